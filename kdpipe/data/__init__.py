"""Rows, tables, hidden states, tasks and seeds."""
