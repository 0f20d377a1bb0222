"""Runs one after the other, of which one may fail, and what is printed of them together."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdpipe.commands.one_run import run_one
from kdpipe.commands.parameters import load_given
from kdpipe.commands.printing import print_error, say
from kdpipe.errors import Interrupted, KdpipeError, StepError

if TYPE_CHECKING:
    from kdpipe.comparison import Row
    from kdpipe.runner import Request
    from kdpipe.runs import RunFolder


def run_each(
    recipe: str,
    runs: "Sequence[tuple[str, list[str]]]",
    workspace: Path,
    request: "Request",
    *,
    as_json: bool,
) -> "tuple[dict[int, RunFolder], list[str]]":
    """Runs each of (name, overrides): the folders of those that ended, by their place, and the names of the others."""
    for _, changes in runs:
        # a mistake in the last one is told before the first one costs anything
        load_given(recipe, changes, workspace)
    done: dict[int, RunFolder] = {}
    failed: list[str] = []
    for number, (name, changes) in enumerate(runs):
        say(f"\n{number + 1} of {len(runs)}: {name}")
        try:
            done[number] = run_one(recipe, changes, workspace, lambda _project: request, as_json=as_json).run
        except Interrupted:
            raise
        except KdpipeError as error:
            print_error(error)
            failed.append(name)
    return done, failed


def print_study(
    rows: "Sequence[Row]", failed: list[str], count: int, *, markdown: bool, as_json: bool
) -> None:
    """The comparison of the runs that ended; raises StepError where some failed."""
    from kdpipe.comparison_lines import comparison_json

    if as_json:
        print(json.dumps({"event": "comparison", "rows": comparison_json(rows)}, sort_keys=True))
    elif rows:
        print()
        print_rows(rows, markdown=markdown)
    if failed:
        raise StepError(f"{len(failed)} of {count} runs failed: {'; '.join(failed)}")


def print_rows(rows: "Sequence[Row]", *, markdown: bool) -> None:
    """Prints a comparison as text, or as Markdown."""
    from kdpipe.comparison_lines import markdown_lines, text_lines
    from kdpipe.terminal import inert

    lines = markdown_lines(rows) if markdown else text_lines(rows)
    print("\n".join(map(inert, lines)))
