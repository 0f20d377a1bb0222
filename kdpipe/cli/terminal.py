"""What a person sees of a run: progress on stderr, one line a round, a table at the end. Or JSON lines.

Without a terminal it prints plain lines, one every few seconds at most, and no control codes. Model text is
shown through `inert`, which strips whatever a terminal would act on. Only the live progress line needs rich,
which would be a fifth of what `kdpipe plan` costs.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TextIO

from kdpipe.pipeline.progress import Pace, duration, time_left
from kdpipe.pipeline.runs import RunFolder
from kdpipe.store.step import Step

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PLAIN_SECONDS = 5.0
WATCH_SECONDS = 1.0
COLUMNS = 80
Style = Literal["bold", "dim", "red", "green", "yellow", "cyan"]
Paint = Callable[[str, Style], str]
_CODES: dict[Style, int] = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33, "cyan": 36}


def painter(stream: TextIO) -> Paint:
    """Puts colour codes around a text where `stream` is coloured; else nothing."""
    if is_coloured(stream):
        return lambda text, style: f"\x1b[{_CODES[style]}m{text}\x1b[0m"
    return lambda text, _style: text


def is_coloured(stream: TextIO) -> bool:
    """Whether colours are shown on `stream`: it is a terminal, and NO_COLOR is not set."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


def is_terminal(stream: TextIO) -> bool:
    """Whether `stream` understands control codes."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def inert(text: str) -> str:
    """Model or data text without control characters, so that a terminal shows it and does nothing else."""
    kept = (c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)
    return "".join(kept)


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
        """Says what is about to happen."""
        done = f", {reused} done already" if reused else ""
        self._say(f"{self._paint(run.name, 'bold')}: {counted(todo, 'step')} to do{done}")

    def step_begins(self, step: Step) -> None:
        """Starts the step's line."""
        self._pace = Pace()
        self._said = time.monotonic()
        if self.live:
            self._progress, self._task = _live_line(step.id)
            self._progress.start()

    def step_event(self, step: Step, event: dict[str, Any]) -> None:
        """Shows how far the step is."""
        if event["kind"] == "waiting":
            self._say(f"{step.id}: another run is making it; waiting to reuse it")
            return
        if event["kind"] == "note":
            self._say(inert(event["text"]))
            return
        if event["kind"] == "warning":
            self.warn(event["text"])
            return
        self._pace.note(event)
        if self._progress is not None and self._task is not None:
            self._progress.update(
                self._task, total=event["total"], completed=event["done"], words=_pace_words(self._pace)
            )
        elif time.monotonic() - self._said > PLAIN_SECONDS:
            self._said = time.monotonic()
            self._say(f"{step.id}: {_pace_words(self._pace)}")

    def step_ends(self, step: Step, result: dict[str, Any]) -> None:
        """Ends the step's line; steps of round 0 leave one, as no line of a round follows them."""
        self.stop()
        if result["reused"]:
            self._say(f"{step.id}: reused from another run")
        elif step.round == 0:
            self._say(f"{step.id}: {duration(result['seconds'])}")

    def round_ends(self, number: int, rounds: int, metrics: dict[str, float]) -> None:
        """Prints the round's line."""
        self._say(round_line(number, rounds, metrics))

    def tick(self) -> None:
        """Nothing: rich refreshes by itself."""

    def warn(self, message: str) -> None:
        """Says what does not stop the run but should be known."""
        self._say(f"{self._paint('warning:', 'yellow')} {inert(message)}")

    def stop(self) -> None:
        """Removes the live line."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _say(self, line: str) -> None:
        if self._progress is not None:
            self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)


def _pace_words(pace: Pace) -> str:
    """How far a step is, how fast it goes on and how long it will take."""
    pieces = [f"{pace.done}/{pace.total} {pace.unit}"]
    if pace.tokens_per_second is not None:
        pieces.append(f"{pace.tokens_per_second:,.0f} tokens/s")
    if pace.seconds_left:
        pieces.append(f"{time_left(pace.seconds_left)} left")
    return ", ".join(pieces)


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


def watch_lines(look: Callable[[], tuple[list[str], bool]]) -> None:
    """Shows what `look` returns anew each second until it says that it was the last; Ctrl-C ends it quietly.

    Where stdout is no terminal: the first and the last time, and between them what has changed.
    """
    with contextlib.suppress(KeyboardInterrupt):
        if is_terminal(sys.stdout):
            _watch_live(look)
            return
        before: list[str] = []
        goes_on = True
        while goes_on:
            lines, goes_on = look()
            new = [line for line in lines if line not in before]
            if new:
                print("\n".join(new), flush=True)
            before = lines
            if goes_on:
                time.sleep(PLAIN_SECONDS)


def _watch_live(look: Callable[[], tuple[list[str], bool]]) -> None:
    from rich.live import Live
    from rich.text import Text

    goes_on = True
    with Live(auto_refresh=False, vertical_overflow="crop") as live:
        while goes_on:
            lines, goes_on = look()
            live.update(Text.from_ansi("\n".join(lines)), refresh=True)
            if goes_on:
                time.sleep(WATCH_SECONDS)


class JsonLines:
    """Shows a run to a program: one JSON document a line, on stdout."""

    def begin(self, run: RunFolder, todo: int, reused: int) -> None:
        """See Terminal."""
        self._print(event="begin", run=run.name, folder=str(run.path), todo=todo, reused=reused)

    def step_begins(self, step: Step) -> None:
        """See Terminal."""
        self._print(event="step begins", step=step.id, fingerprint=step.fingerprint)

    def step_event(self, step: Step, event: dict[str, Any]) -> None:
        """Notes and warnings; progress is for people."""
        if event["kind"] == "note":
            self._print(event="note", step=step.id, text=event["text"])
        elif event["kind"] == "warning":
            self.warn(event["text"])

    def step_ends(self, step: Step, result: dict[str, Any]) -> None:
        """See Terminal."""
        self._print(event="step ends", step=step.id, **result)

    def round_ends(self, number: int, rounds: int, metrics: dict[str, float]) -> None:
        """See Terminal."""
        self._print(event="round ends", round=number, rounds=rounds, metrics=metrics)

    def tick(self) -> None:
        """Nothing."""

    def warn(self, message: str) -> None:
        """See Terminal."""
        self._print(event="warning", message=message)

    def stop(self) -> None:
        """Nothing."""

    def _print(self, **fields: Any) -> None:
        print(json.dumps(fields, sort_keys=True), flush=True)


def round_line(number: int, rounds: int, metrics: dict[str, float]) -> str:
    """One round in one line of at most 80 columns: reverse KL, reward, and accuracy when it was due."""
    pieces = [f"round {number:>{len(str(rounds))}}/{rounds}"]
    if (value := metrics.get("score/reverse_kl_nats")) is not None:
        pieces.append(f"reverse KL {value:6.3f}")
    if (value := metrics.get("rollout/reward_mean")) is not None:
        pieces.append(f"reward {value:5.3f}")
    if (value := metrics.get("evaluate/accuracy")) is not None:
        pieces.append(f"accuracy {value:6.1%}")
    seconds = sum(value for name, value in metrics.items() if name.startswith("time/"))
    pieces.append(duration(seconds))
    return "  ".join(pieces)


def outcome_lines(rows: Sequence[tuple[str, dict[str, Any] | None]], paint: Paint) -> list[str]:
    """Before and after with intervals, as a table: (label, summary.json of the evaluation)."""
    table = [("", "accuracy", "95 % interval", "held-out reverse KL, nats")]
    table += [
        (
            label,
            f"{summary['accuracy']:.1%}",
            f"{summary['accuracy_low']:.1%} to {summary['accuracy_high']:.1%}",
            _interval(summary, *_reverse_kl_keys(summary, ""), ".3f"),
        )
        for label, summary in rows
        if summary is not None
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(
            [f"{row[0]:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))]
        )
        for row in table
    ]
    return [paint(lines[0], "bold"), *(line.rstrip() for line in lines[1:])]


def change_lines(after: dict[str, Any]) -> list[str]:
    """The paired differences of the last evaluation to student 0, a sentence each."""
    lines = []
    if "accuracy_change" in after:
        low, high = after["accuracy_change_low"], after["accuracy_change_high"]
        p = (
            f", McNemar p = {after['accuracy_change_p_value']:.2g}"
            if "accuracy_change_p_value" in after
            else ""
        )
        lines.append(
            f"accuracy {100 * after['accuracy_change']:+.1f} points, paired 95 % interval "
            f"{100 * low:+.1f} to {100 * high:+.1f}{p}"
        )
    keys = _reverse_kl_keys(after, "_change")
    if keys[0] in after:
        value, low, high = (after[key] for key in keys)
        lines.append(f"held-out reverse KL {value:+.3f} nats, paired 95 % interval {low:+.3f} to {high:+.3f}")
    return lines


def _reverse_kl_keys(summary: dict[str, Any], what: str) -> tuple[str, str, str]:
    """The keys of the estimate from whole distributions where there is one: it has less variance."""
    exact = f"reverse_kl_exact{what}"
    name = exact if f"{exact}_nats" in summary else f"reverse_kl{what}"
    return f"{name}_nats", f"{name}_low", f"{name}_high"


def _interval(summary: dict[str, Any], value: str, low: str, high: str, spec: str) -> str:
    if value not in summary:
        return ""
    return f"{summary[value]:{spec}} ({summary[low]:{spec}} to {summary[high]:{spec}})"


def counted(number: int, noun: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
