"""Processes: start, call, stop, progress."""
