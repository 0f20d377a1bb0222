"""A run at a glance: stages by rounds, what is running now and how fast. Reads manifests and notes; starts nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from kdpipe.progress import Progress, read_progress
from kdpipe.project import Project
from kdpipe.store import is_running
from kdpipe.survey import State
from kdpipe.terminal import COLUMNS, Paint, Style, inert

Cell = Literal["done", "running", "stale", "to do", "damaged"]
MARKS: dict[Cell, tuple[str, Style]] = {
    "done": ("#", "green"),
    "running": (">", "bold"),
    "stale": ("~", "yellow"),
    "to do": (".", "dim"),
    "damaged": ("!", "red"),
}


@dataclass(frozen=True, slots=True)
class Overview:
    """The state of every step, whether somebody performs them now, and how far the current one is."""

    states: tuple[State, ...]
    running: bool
    current: str | None
    progress: Progress | None

    def cell(self, state: State) -> Cell:
        """What the grid shows of a step."""
        return "running" if state.step.id == self.current else state.verdict

    def to_json(self) -> dict[str, Any]:
        """The grid by stage and round, and the progress of the running step."""
        grid: dict[str, dict[str, str]] = {}
        for state in self.states:
            grid.setdefault(state.step.link_name, {})[str(state.step.round)] = self.cell(state)
        progress = None if self.progress is None else asdict(self.progress)
        return {"grid": grid, "current": self.current, "progress": progress}


def overview(project: Project) -> Overview:
    """The overview of a run as it is now."""
    running = is_running(project.run.path)
    progress = read_progress(project.run.path) if running else None
    current = _current(project) if running else None
    if progress is not None and progress.step != current:
        progress = None
    return Overview(tuple(project.survey()), running, current, progress)


def _current(project: Project) -> str | None:
    """The step that began last, unless it has ended."""
    for event in reversed(project.run.events()):
        if event.get("event") in ("step done", "step stopped"):
            return None
        if event.get("event") == "step started":
            return str(event["step"])
    return None


def grid_lines(found: Overview, paint: Paint) -> list[str]:
    """A row for each stage, a column for each round, in blocks that fit 80 columns; below, what the marks mean."""
    cells = {(state.step.link_name, state.step.round): found.cell(state) for state in found.states}
    names = list(dict.fromkeys(state.step.link_name for state in found.states))
    rounds = range(max((number for _, number in cells), default=0) + 1)
    width = max([len("round"), *map(len, names)])
    size = max(10, (COLUMNS - width - 4) // 10 * 10)
    lines: list[str] = []
    for start in range(0, len(rounds), size):
        block = rounds[start : start + size]
        lines.append(paint(f"  {'round':<{width}}  {_ruler(block)}".rstrip(), "dim"))
        for name in names:
            marks = "".join(_mark(cells.get((name, number)), paint) for number in block)
            if any((name, number) in cells for number in block):
                lines.append(f"  {inert(name):<{width}}  {marks}".rstrip())
    used = [cell for cell in MARKS if cell in cells.values()]
    legend = "   ".join(f"{paint(*MARKS[cell])} {cell}" for cell in used)
    return [*lines, f"  {'':<{width}}  {legend}"]


def _ruler(rounds: Sequence[int]) -> str:
    """The number of every tenth round, above its column."""
    return "".join(f"{number:<10}" for number in rounds if number % 10 == 0)


def _mark(cell: Cell | None, paint: Paint) -> str:
    return " " if cell is None else paint(*MARKS[cell])


def progress_line(found: Overview) -> str:
    """The running step: how far, how fast, how long still, and how old the news is where it is not fresh."""
    if found.progress is None:
        return f"now: {found.current or 'between two steps'}"
    at = found.progress
    pieces = [f"now: {at.step}", f"{at.done}/{at.total} {at.unit}"]
    if at.tokens_per_second is not None:
        pieces.append(f"{at.tokens_per_second:,.0f} tokens/s")
    if at.seconds_left is not None:
        minutes = at.seconds_left / 60
        pieces.append(f"{at.seconds_left:.0f} s left" if minutes < 1 else f"{minutes:.0f} min left")
    if (age := time.time() - at.at) > 10:
        pieces.append(f"told {age:.0f} s ago")
    return inert(", ".join(pieces))
