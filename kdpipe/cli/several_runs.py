"""Runs one after the other, of which one may fail, and what is printed of them together."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdpipe.cli.one_run import run_one
from kdpipe.cli.parameters import load_given
from kdpipe.cli.printing import print_error, say
from kdpipe.errors import Interrupted, KdpipeError, StepError

if TYPE_CHECKING:
    from kdpipe.pipeline.runner import Request
    from kdpipe.pipeline.runs import RunFolder
    from kdpipe.results.comparison import ComparisonRow
    from kdpipe.results.studies import StudyKind
    from kdpipe.tracking.record import Status


def run_study(
    kind: "StudyKind",
    recipe: str,
    runs: "Sequence[tuple[str, list[str]]]",
    workspace: Path,
    request: "Request",
    *,
    compare: "Callable[[dict[int, RunFolder]], Sequence[ComparisonRow]]",
    markdown: bool,
    as_json: bool,
) -> None:
    """Runs each of (name, overrides) as one study, and prints and keeps the comparison of those that ended.

    `compare` is given their folders by their place. Raises StepError where some failed.
    """
    from kdpipe.cli.comparison_table import markdown_lines
    from kdpipe.pipeline.runs import run_folder
    from kdpipe.results.comparison import comparison_json
    from kdpipe.results.studies import make_study
    from kdpipe.store.locks import run_lock
    from kdpipe.tracking import begin_study, end_study

    # a mistake in the last one is told before the first one costs anything
    recipes = [load_given(recipe, changes, workspace).recipe for _, changes in runs]
    place, first = workspace.resolve(), recipes[0]
    names = {run_folder(place, one).name: label for one, (label, _) in zip(recipes, runs, strict=True)}
    study = make_study(place, kind, recipe=first.name, runs=names)
    status: Status = "FAILED"
    with run_lock(study.path):
        study.event("study started")
        begin_study(study, place, first.tracking)
        try:
            done, failed = _run_each(recipe, runs, workspace, request, as_json=as_json)
            rows = compare(done) if done else []
            study.keep(comparison_json(rows), markdown_lines(rows) if rows else [], failed)
            _print_study(rows, failed, len(runs), markdown=markdown, as_json=as_json)
            status = "FINISHED"
        except (Interrupted, KeyboardInterrupt):
            status = "KILLED"
            raise
        finally:
            study.event("study ended", status=status)
            if trouble := end_study(study, place, first.tracking, status):
                say(
                    f"MLflow: not all of the study is mirrored yet: {trouble}; the next command goes on with it"
                )


def _run_each(
    recipe: str,
    runs: "Sequence[tuple[str, list[str]]]",
    workspace: Path,
    request: "Request",
    *,
    as_json: bool,
) -> "tuple[dict[int, RunFolder], list[str]]":
    """Runs each of (name, overrides): the folders of those that ended, by their place, and the names of the others."""
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


def _print_study(
    rows: "Sequence[ComparisonRow]", failed: list[str], count: int, *, markdown: bool, as_json: bool
) -> None:
    """The comparison of the runs that ended; raises StepError where some failed."""
    from kdpipe.results.comparison import comparison_json

    if as_json:
        print(json.dumps({"event": "comparison", "rows": comparison_json(rows)}, sort_keys=True))
    elif rows:
        print()
        print_rows(rows, markdown=markdown)
    if failed:
        raise StepError(f"{len(failed)} of {count} runs failed: {'; '.join(failed)}")


def print_rows(rows: "Sequence[ComparisonRow]", *, markdown: bool) -> None:
    """Prints a comparison as text, or as Markdown."""
    from kdpipe.cli.comparison_table import markdown_lines, text_lines
    from kdpipe.cli.terminal import inert

    lines = markdown_lines(rows) if markdown else text_lines(rows)
    print("\n".join(map(inert, lines)))
