"""The findings on a student and its teachers before a run is paid for, and the estimate.

`examine` runs the probes of `text.py` and `engine.py` on a recipe's own engines. What each catches is in
`finding.py`. A full examination samples a few completions, loads every model several times, and
writes a perturbed copy of the student to the case's folder; the quick one, which `run` makes by itself, asks for
nothing that the next steps would not load anyway. That of servers, which it makes before any step, opens no weights.
"""
