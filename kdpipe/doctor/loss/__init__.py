"""check-loss: an objective's gradient against the exact one."""
