"""The commands, by what they are for: plain functions, which `cli` names, orders and guards."""
