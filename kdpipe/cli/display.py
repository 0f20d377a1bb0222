"""A run as a person sees it (progress on stderr, a line a round, a table at the end), or JSON lines.

Without a terminal it prints plain lines, one every few seconds at most. Only the live progress line needs rich,
which would be a fifth of what `kdpipe plan` costs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, astuple
from typing import TYPE_CHECKING

from kdpipe.cli.round_line import round_line
from kdpipe.cli.terminal import PLAIN_SECONDS, Paint, aligned, counted, is_terminal, painter, print_event
from kdpipe.method.interval import Interval
from kdpipe.pipeline.headline import Headline
from kdpipe.pipeline.progress import Pace, duration, pace_words
from kdpipe.pipeline.request import Noted, Performed, StepEvent, Waiting, Warned
from kdpipe.pipeline.runs import RunFolder
from kdpipe.results.evaluations import Evaluation
from kdpipe.results.visible_text import visible
from kdpipe.store.step import Step
from kdpipe.workers.pulse import Progressed

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Terminal:
    """Shows a run to a person, on stderr: a live line where stderr is a terminal, else plain lines."""

    def __init__(self) -> None:
        self.live = is_terminal(sys.stderr)
        self._paint = painter(sys.stderr)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._pace = Pace()
        self._said = 0.0

    def begin(self, run: RunFolder, todo: int, reused: int) -> None:
        done = f", {reused} done already" if reused else ""
        self._say(f"{self._paint(run.name, 'bold')}: {counted(todo, 'step')} to do{done}")

    def step_begins(self, step: Step) -> None:
        self._pace = Pace()
        self._said = time.monotonic()
        if self.live:
            self._progress, self._task = _live_line(step.id)
            self._progress.start()

    def step_event(self, step: Step, event: StepEvent) -> None:
        match event:
            case Waiting():
                self._say(f"{step.id}: another run is making it; waiting to reuse it")
            case Noted(text=text):
                self._say(visible(text))
            case Warned(text=text):
                self.warn(text)
            case Progressed():
                words = pace_words(self._pace.note(event))
                if self._progress is not None and self._task is not None:
                    self._progress.update(self._task, total=event.total, completed=event.done, words=words)
                elif time.monotonic() - self._said > PLAIN_SECONDS:
                    self._said = time.monotonic()
                    self._say(f"{step.id}: {words}")

    def step_ends(self, step: Step, result: Performed) -> None:
        """Ends the step's line; steps of round 0 leave one, as no line of a round follows them."""
        self.stop()
        if result.reused:
            self._say(f"{step.id}: reused from another run")
        elif step.round == 0:
            self._say(f"{step.id}: {duration(result.seconds)}")

    def round_ends(self, number: int, rounds: int, metrics: dict[str, float]) -> None:
        self._say(round_line(number, rounds, metrics))

    def note(self, message: str) -> None:
        self._say(visible(message))

    def warn(self, message: str) -> None:
        self._say(f"{self._paint('warning:', 'yellow')} {visible(message)}")

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _say(self, line: str) -> None:
        if self._progress is not None:
            self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)


def _live_line(name: str) -> tuple[Progress, TaskID]:
    from rich.console import Console
    from rich.progress import Progress as LiveProgress
    from rich.progress import SpinnerColumn, TextColumn

    progress = LiveProgress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        TextColumn("{task.fields[words]}", markup=False),
        console=Console(stderr=True, highlight=False),
        transient=True,
    )
    return progress, progress.add_task(name, total=None, words="starting")


class JsonLines:
    """Shows a run to a program: one JSON document a line, on stdout."""

    def begin(self, run: RunFolder, todo: int, reused: int) -> None:
        print_event("begin", run=run.name, folder=str(run.path), todo=todo, reused=reused)

    def step_begins(self, step: Step) -> None:
        print_event("step begins", step=step.id, fingerprint=step.fingerprint)

    def step_event(self, step: Step, event: StepEvent) -> None:
        """Notes and warnings; progress is for people."""
        match event:
            case Noted(text=text):
                print_event("note", step=step.id, text=text)
            case Warned(text=text):
                self.warn(text)

    def step_ends(self, step: Step, result: Performed) -> None:
        print_event("step ends", step=step.id, **asdict(result))

    def round_ends(self, number: int, rounds: int, metrics: dict[str, float]) -> None:
        print_event("round ends", round=number, rounds=rounds, metrics=metrics)

    def note(self, message: str) -> None:
        print_event("note", text=message)

    def warn(self, message: str) -> None:
        print_event("warning", message=message)

    def stop(self) -> None:
        """Nothing."""


def outcome_lines(evaluations: Sequence[Evaluation], paint: Paint) -> list[str]:
    """The headline before and after with its interval, and what is shown beside it, as a table."""
    measure = evaluations[0].headline
    beside = [measure.beside] if measure.beside else []
    table = [("", measure.title, "95 % interval", *(other.title for other in beside))]
    for one in evaluations:
        estimate, low, high = map(measure.show, astuple(one.level))
        others = [_bounded(other, other.level(one.summary)) for other in beside]
        table.append((one.label, estimate, f"{low} to {high}", *others))
    heading, *lines = aligned(table)
    return [paint(heading, "bold"), *lines]


def _bounded(measure: Headline, level: Interval | None) -> str:
    if level is None:
        return ""
    estimate, low, high = map(measure.show, astuple(level))
    return f"{estimate} ({low} to {high})"


def change_lines(after: Evaluation, rounds: int) -> list[str]:
    """The paired differences of the last evaluation to student 0, a sentence each, and what they mean."""
    lines, headline = [], after.headline
    for measure in filter(None, (headline, headline.beside)):
        if (change := measure.change(after.summary)) is not None:
            estimate, low, high = map(measure.show_change, astuple(change))
            p = after.p_text if measure is headline else ""
            lines.append(
                f"{measure.name} {estimate} {measure.change_unit}, paired 95 % interval {low} to {high}{p}"
            )
    effect = after.effect(rounds)
    return lines if effect is None else [*lines, effect.headline]
