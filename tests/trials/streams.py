"""Streams that are closed, full, or read by nobody; terminals and locales that are odd; signals."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from tests.trials.trial import DONE, FAILED, Trial, goes_on, is_done_if_it_says_so

COMMANDS = {
    "check": "kdpipe check recipe.yaml",
    "plan": "kdpipe plan recipe.yaml",
    "plan --json": "kdpipe plan recipe.yaml --json",
    "status": "kdpipe status recipe.yaml",
    "status --json": "kdpipe status recipe.yaml --json",
    "samples": "kdpipe samples recipe.yaml",
    "verify": "kdpipe verify recipe.yaml",
    "report": "kdpipe report recipe.yaml -o page.html",
    "export": "kdpipe export recipe.yaml out",
    "compare": "kdpipe compare $(ls kdpipe-out/runs)",
    "recipes": "kdpipe recipes quickstart",
    "schema": "kdpipe schema",
    "gc": "kdpipe gc",
    "finished run": "kdpipe run recipe.yaml",
}
STREAMS = {
    "no stdout": (">&-", True, frozenset({DONE, FAILED})),
    "no stderr": ("2>&-", True, frozenset({DONE})),
    "no stdin": ("<&-", False, frozenset({DONE})),
    "no stream at all": ("<&- >&- 2>&-", True, frozenset({DONE, FAILED})),
    "a full device as stdout": ("> /dev/full", False, frozenset({DONE, FAILED})),
    "a full device as stderr": ("2> /dev/full", True, frozenset({DONE, FAILED})),
    "nobody reads stdout": ("| true; exit ${PIPESTATUS[0]}", True, frozenset({DONE, 141})),
    "nobody reads stderr": ("2> >(true)", True, frozenset({DONE, 141})),
}
"""Name -> redirection, whether what is said may be lost with it, and exit codes beside those of the command."""
ENVIRONMENTS: dict[str, dict[str, str]] = {
    "LANG=C": {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "ASCII streams": {"PYTHONIOENCODING": "ascii"},
    "one column": {"COLUMNS": "1"},
    "columns that are no number": {"COLUMNS": "x", "LINES": "-1"},
    "an unknown terminal": {"TERM": "nothing-known", "FORCE_COLOR": "1"},
    "no home": {"HOME": ""},
    "a home that is not there": {"HOME": "/nonexistent/home"},
    "an unknown time zone": {"TZ": "Nowhere/City"},
}
RUN = "rm -r kdpipe-out; kdpipe run recipe.yaml"
AT_A_STEP = "until grep -qs 'step started' kdpipe-out/runs/*/events.jsonl; do sleep 0.05; done"


def trials() -> Iterator[Trial]:
    for (name, command), (stream, (redirection, silent, allowed)) in product(
        COMMANDS.items(), STREAMS.items()
    ):
        yield Trial(
            "streams",
            f"{name}: {stream}",
            f"{command} {redirection}",
            allowed,
            silent=silent,
            may_write=("page.html", "out"),
        )
    for (name, command), (odd, environment) in product(COMMANDS.items(), ENVIRONMENTS.items()):
        yield Trial(
            "streams",
            f"{name}: {odd}",
            command,
            frozenset({DONE}),
            environment=environment,
            may_write=("page.html", "out"),
        )
    for stream, (redirection, silent, allowed) in STREAMS.items():
        for form in ("", " --json"):
            yield Trial(
                "streams",
                f"a whole run{form}: {stream}",
                f"{RUN}{form} {redirection}",
                allowed,
                silent=silent,
                check=is_done_if_it_says_so,
            )
    for name, code in {"TERM": 143, "HUP": 129, "USR1": 138, "KILL": 137}.items():
        yield Trial(
            "streams",
            f"SIG{name} in the middle of a run",
            f"{RUN} & {AT_A_STEP}; kill -{name} $!; wait $!",
            frozenset({code}),
            check=goes_on,
        )
    yield Trial(
        "streams",
        "nohup and SIGHUP",
        f"trap '' HUP; {RUN} & {AT_A_STEP}; kill -HUP $!; wait $!",
        frozenset({DONE}),
        check=is_done_if_it_says_so,
    )
