"""Writes the report of a project, and the page of a comparison."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue

from kdpipe import __version__
from kdpipe.pipeline.project import Project
from kdpipe.pipeline.runs import RunFolder
from kdpipe.results.attribution import controls_of
from kdpipe.store.durable import write_bytes
from kdpipe.store.step import canonical
from kdpipe.store.target import write_file

if TYPE_CHECKING:
    from kdpipe.results.comparison import ComparisonRow

FILE = "report.html"
FIGURES = "figures"
HEAD_BYTES = 4096


def report_path(project: Project) -> Path:
    """Where a run's report is by default."""
    return project.run.path / FILE


def stamp(project: Project, digests: Mapping[str, str | None]) -> str:
    """The digest of what a report is made from.

    That is the payload digest of every step, None where it is not done, and the seeds and arms beside the run.
    """
    controls = asdict(controls_of(project, project.recipe.rounds))
    document: JsonValue = {"kdpipe": __version__, "steps": dict(digests), "controls": controls}
    return hashlib.sha256(canonical(document)).hexdigest()[:32]


def is_current(project: Project, path: Path, digests: Mapping[str, str | None]) -> bool:
    """Whether the report at `path` was made by this kdpipe from just these artifacts and controls."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return False
    return f'name="kdpipe-made-from" content="{stamp(project, digests)}"'.encode() in head


def renew_report(
    project: Project,
    digests: Mapping[str, str | None],
    *,
    commands: Sequence[str],
    warn: Callable[[str], None],
) -> None:
    """Writes the run's report unless it is of these payload digests already.

    The run is done and whole: that its report cannot be written is no more than a warning.
    """
    path = report_path(project)
    if is_current(project, path, {step.id: digests.get(step.id) for step in project.plan.steps}):
        return
    try:
        write_report(project, path, commands=commands)
    except Exception as error:  # the run is done and whole: a page about it may not turn that into a failure
        warn(
            f"{path}: the report could not be written: {type(error).__name__}: {error}; kdpipe report tries again"
        )


def write_report(
    project: Project, path: Path, *, commands: Sequence[str], others: Sequence[RunFolder] = ()
) -> int:
    """Writes the report to `path`; returns its size in bytes. A file is written wholly or not at all.

    Where that is the run's own place, its charts are written beside it, each as a file of its own. `commands` are
    shown as what makes the run again; the run is held against `others`. Raises ArtifactError where an artifact that
    it reads is damaged, DataError where runs cannot be compared.
    """
    from kdpipe.report.charts import charts
    from kdpipe.report.figure import figure_file, rounds_of
    from kdpipe.report.page import render
    from kdpipe.report.tokens_data import titled_completions
    from kdpipe.results.comparison import compare
    from kdpipe.results.contender import read_contender
    from kdpipe.results.measures import Measures
    from kdpipe.results.reader import Reader

    measures = Measures(project)
    digests = {state.step.id: state.digest if state.done else None for state in measures.states}
    page = render(
        measures,
        titled_completions(Reader(project, measures.done)),
        stamp=stamp(project, digests),
        commands=commands,
        against=compare([read_contender(run) for run in (project.run, *others)]) if others else (),
    ).encode()
    if path.resolve() == report_path(project).resolve():
        drawn = charts(measures)
        for chart in drawn:
            file = project.run.path / FIGURES / f"{chart.key}.svg"
            write_bytes(file, figure_file(chart, rounds_of(drawn)).encode())
    write_file(path, page)  # last: once it is there, it says that all of this was made
    return len(page)


def write_comparison(
    path: Path,
    rows: Sequence[ComparisonRow],
    workspace: Path,
    *,
    title: str,
    commands: Sequence[str],
    missing: Sequence[str] = (),
) -> int:
    """Writes the page of a comparison to `path`; returns its size in bytes."""
    from kdpipe.report.comparison_page import render_comparison

    page = render_comparison(rows, workspace, title=title, commands=commands, missing=missing).encode()
    write_file(path, page)
    return len(page)
