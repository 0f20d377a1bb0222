"""A run at a glance: stages by rounds, the running step and its pace, from manifests and notes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from kdpipe.cli.round_line import round_line
from kdpipe.cli.terminal import COLUMNS, Paint, Style
from kdpipe.pipeline.headroom import headrooms
from kdpipe.pipeline.progress import Progress, duration, pace_words, read_progress
from kdpipe.pipeline.project import Project, round_metrics
from kdpipe.pipeline.runs import RunEvent, unended
from kdpipe.pipeline.status import State
from kdpipe.results.effect import ending
from kdpipe.results.evaluations import Evaluations, summaries_of
from kdpipe.results.visible_text import visible
from kdpipe.store.locks import is_running
from kdpipe.store.stage import Stage
from kdpipe.tracking.pending import pending, waiting

Cell = Literal["done", "running", "stale", "to do", "damaged"]
LAST_STEPS = 5  # of a stage, whose median is the estimate of the next one
MARKS: dict[Cell, tuple[str, Style]] = {
    "done": ("#", "green"),
    "running": (">", "bold"),
    "stale": ("~", "yellow"),
    "to do": (".", "dim"),
    "damaged": ("!", "red"),
}


@dataclass(frozen=True, slots=True)
class Overview:
    """The state of every step, whether the run is running, and the progress of the current step."""

    project: Project
    states: tuple[State, ...]
    running: bool
    current: str | None
    progress: Progress | None
    seconds_left: float | None

    @property
    def left(self) -> list[State]:
        return [state for state in self.states if not state.done]

    @property
    def rounds_done(self) -> int:
        """The last round whose training is done."""
        done = [state.step for state in self.states if state.done]
        return max((step.round for step in done if step.stage == Stage.TRAIN), default=0)

    @property
    def result(self) -> str | None:
        """The headline so far."""
        done = (state.step for state in self.states if state.done)
        then = ending(self.project.run, self.states)
        return Evaluations(summaries_of(self.project, done)).result(self.project.recipe.rounds, then=then)

    def cell(self, state: State) -> Cell:
        return "running" if state.step.id == self.current else state.verdict

    def to_json(self) -> dict[str, object]:
        """The grid by stage and round, what is left, and the progress of the running step."""
        grid: dict[str, dict[str, str]] = {}
        for state in self.states:
            grid.setdefault(state.step.link_name, {})[str(state.step.round)] = self.cell(state)
        recipe, run = self.project.recipe, self.project.run
        return {
            "run": run.name,
            "running": self.running,
            "rounds_done": self.rounds_done,
            "rounds": recipe.rounds,
            "steps_left": len(self.left),
            "next": self.left[0].step.id if self.left else None,
            "not_mirrored": pending(run.path) if recipe.tracking.enabled else 0,
            "headroom": [asdict(headroom) for headroom in headrooms(self.project)],
            "result": self.result,
            "grid": grid,
            "current": self.current,
            "progress": None if self.progress is None else asdict(self.progress),
            "seconds_left": self.seconds_left,
        }


def overview(project: Project) -> Overview:
    """The overview of a run as it is now."""
    states = tuple(project.survey())
    if not is_running(project.run.path):
        return Overview(project, states, False, None, None, None)
    events, progress = project.run.events(), read_progress(project.run.path)
    last = unended(events)
    current = last.step if last is not None and last.kind == "step started" else None
    if progress is not None and progress.step != current:
        progress = None
    left = seconds_left(states, events, now=time.time())
    return Overview(project, states, True, current, progress, left)


def status_lines(found: Overview, paint: Paint) -> list[str]:
    """How far the run is, the line of its last round, and what comes next."""
    project, states, left, rounds_done = found.project, found.states, found.left, found.rounds_done
    lines = [
        f"{project.run.name}: {'running' if found.running else 'not running'}",
        f"{len(states) - len(left)} of {len(states)} steps, {rounds_done} of {project.recipe.rounds} rounds done",
        *grid_lines(found, paint),
    ]
    if rounds_done:
        metrics = round_metrics(project, rounds_done)
        lines.append(round_line(rounds_done, project.recipe.rounds, metrics))
    lines += [f"teacher {one.teacher}: {visible(one.sentence())}" for one in headrooms(project)]
    if (result := found.result) is not None:
        lines.append(result)
    if found.running:
        lines.append(progress_line(found))
    elif left:
        lines.append(f"next: {left[0].step.id}{'; ' + visible(left[0].why) if left[0].why else ''}")
    if not found.running and project.recipe.tracking.enabled:
        lines += map(visible, waiting(project.run.path))
    return lines


def seconds_left(states: Sequence[State], events: Sequence[RunEvent], *, now: float) -> float | None:
    """How long what is to do will take, by the median of each stage's last steps that this run performed.

    None where a stage that is still to do was not performed yet, and where nothing is to do.
    """
    stages = {state.step.id: state.step.link_name for state in states}
    took: dict[str, list[float]] = {}
    begun: dict[str, float] = {}
    for event in events:
        step = event.step
        if step not in stages:  # of another plan
            continue
        if event.kind == "step started":
            begun[step] = event.time
        elif step in begun and event.kind in ("step done", "step stopped"):
            since = begun.pop(step)
            if event.kind == "step done" and not event.reused:
                took.setdefault(stages[step], []).append(event.time - since)
    to_do = [state.step for state in states if state.verdict != "done"]
    if not to_do or any(step.link_name not in took for step in to_do):
        return None
    expected = [statistics.median(took[step.link_name][-LAST_STEPS:]) for step in to_do]
    spent = [
        min(seconds, now - begun[step.id])
        for step, seconds in zip(to_do, expected, strict=True)
        if step.id in begun
    ]
    return sum(expected) - sum(spent[:1])


def grid_lines(found: Overview, paint: Paint) -> list[str]:
    """A row for each stage, a column for each round (every tenth has its number), and the legend."""
    cells = {(state.step.link_name, state.step.round): found.cell(state) for state in found.states}
    names = list(dict.fromkeys(state.step.link_name for state in found.states))
    rounds = range(max((number for _, number in cells), default=0) + 1)
    width = max([len("round"), *map(len, names)])
    size = max(10, (COLUMNS - width - 4) // 10 * 10)
    lines: list[str] = []
    for start in range(0, len(rounds), size):
        block = rounds[start : start + size]
        ruler = "".join(f"{number:<10}" for number in block if number % 10 == 0)
        lines.append(paint(f"  {'round':<{width}}  {ruler}".rstrip(), "dim"))
        for name in names:
            row = [cells.get((name, number)) for number in block]
            if any(row):
                marks = "".join(paint(*MARKS[cell]) if cell else " " for cell in row)
                lines.append(f"  {visible(name):<{width}}  {marks}".rstrip())
    used = [cell for cell in MARKS if cell in cells.values()]
    legend = "   ".join(f"{paint(*MARKS[cell])} {cell}" for cell in used)
    return [*lines, f"  {'':<{width}}  {legend}"]


def progress_line(found: Overview) -> str:
    """The running step: how far, how fast, time left, and the age of that report where it is old."""
    left = found.seconds_left
    whole = "" if left is None else f"; the whole run: about {duration(left)} left"
    if found.progress is None:
        return f"now: {found.current or 'between two steps'}{whole}"
    at = found.progress
    age = time.time() - at.at
    reported = f", reported {age:.0f} s ago" if age > 10 else ""
    return visible(f"now: {at.step}, {pace_words(at)}{reported}{whole}")
