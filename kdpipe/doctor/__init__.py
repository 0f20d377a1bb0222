"""Probes of text, engine, student, teacher and machine, and the estimate."""
