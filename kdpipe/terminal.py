"""What a person sees of a run: progress on stderr, one line a round, a table at the end. Or JSON lines.

Without a terminal it prints plain lines, one every few seconds at most, and no control codes. Model text is
shown through `inert`, which strips whatever a terminal would act on.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from kdpipe.plan import Step
from kdpipe.runs import RunFolder
from kdpipe.survey import State

PLAIN_SECONDS = 5.0


def console(*, stderr: bool = False) -> Console:
    """A console that honours NO_COLOR and never wraps numbers into links."""
    return Console(stderr=stderr, highlight=False, soft_wrap=not sys.stdout.isatty())


def inert(text: str) -> str:
    """Model or data text without control characters, so that a terminal shows it and does nothing else."""
    kept = (c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)
    return "".join(kept)


class _Rate:
    """Tokens per second and time left of one step, from its progress events."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.unit, self.total, self.done, self.tokens, self.first = "", 0, 0, 0, 0

    def update(self, event: dict[str, Any]) -> None:
        if event["unit"] != self.unit:
            self.unit, self.first = event["unit"], event["done"]
        self.total, self.done, self.tokens = event["total"], event["done"], event["tokens"]

    def words(self) -> str:
        seconds = max(time.monotonic() - self.started, 1e-3)
        pieces = [f"{self.done}/{self.total} {self.unit}"]
        if self.tokens:
            pieces.append(f"{self.tokens / seconds:,.0f} tokens/s")
        finished = self.done - self.first
        if finished > 0 and self.done < self.total:
            pieces.append(f"{_duration(seconds * (self.total - self.done) / finished)} left")
        return ", ".join(pieces)


class Terminal:
    """Shows a run to a person, on stderr: a live line where stderr is a terminal, else plain lines."""

    def __init__(self) -> None:
        self.console = console(stderr=True)
        self.live = self.console.is_terminal
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._rate = _Rate()
        self._said = 0.0

    def begin(self, run: RunFolder, todo: int, reused: int) -> None:
        """Says what is about to happen."""
        self.console.print(f"[bold]{run.name}[/]: {todo} steps to do, {reused} done already")

    def step_begins(self, step: Step) -> None:
        """Starts the step's line."""
        self._rate = _Rate()
        self._said = time.monotonic()
        if self.live:
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=16),
                TextColumn("{task.fields[words]}"),
                console=self.console,
                transient=True,
            )
            self._task = self._progress.add_task(step.id, total=None, words="starting")
            self._progress.start()

    def step_event(self, step: Step, event: dict[str, Any]) -> None:
        """Shows how far the step is."""
        if event["kind"] == "waiting":
            self.console.print(f"{step.id}: another run is making it; waiting to reuse it")
            return
        self._rate.update(event)
        if self._progress is not None and self._task is not None:
            self._progress.update(
                self._task, total=event["total"], completed=event["done"], words=self._rate.words()
            )
        elif time.monotonic() - self._said > PLAIN_SECONDS:
            self._said = time.monotonic()
            self.console.print(f"{step.id}: {self._rate.words()}", soft_wrap=True)

    def step_ends(self, step: Step, result: dict[str, Any]) -> None:
        """Ends the step's line; steps of round 0 leave one, as no line of a round follows them."""
        self.stop()
        if result["reused"]:
            self.console.print(f"{step.id}: reused from another run")
        elif step.round == 0:
            self.console.print(f"{step.id}: {_duration(result['seconds'])}", soft_wrap=True)

    def round_ends(self, number: int, rounds: int, metrics: dict[str, float]) -> None:
        """Prints the round's line."""
        self.console.print(round_line(number, rounds, metrics), soft_wrap=True)

    def tick(self) -> None:
        """Nothing: rich refreshes by itself."""

    def stop(self) -> None:
        """Removes the live line."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class JsonLines:
    """Shows a run to a program: one JSON document a line, on stdout."""

    def begin(self, run: RunFolder, todo: int, reused: int) -> None:
        """See Terminal."""
        self._print(event="begin", run=run.name, folder=str(run.path), todo=todo, reused=reused)

    def step_begins(self, step: Step) -> None:
        """See Terminal."""
        self._print(event="step begins", step=step.id, fingerprint=step.fingerprint)

    def step_event(self, step: Step, event: dict[str, Any]) -> None:
        """Progress is for people."""

    def step_ends(self, step: Step, result: dict[str, Any]) -> None:
        """See Terminal."""
        self._print(event="step ends", step=step.id, **result)

    def round_ends(self, number: int, rounds: int, metrics: dict[str, float]) -> None:
        """See Terminal."""
        self._print(event="round ends", round=number, rounds=rounds, metrics=metrics)

    def tick(self) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""

    def _print(self, **fields: Any) -> None:
        print(json.dumps(fields, sort_keys=True), flush=True)  # noqa: T201 (results go to stdout)


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
    pieces.append(_duration(seconds))
    return "  ".join(pieces)


def outcome_table(rows: Sequence[tuple[str, dict[str, Any] | None]]) -> Table:
    """Before and after with intervals: (label, summary.json of the evaluation)."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("", "accuracy", "95 % interval", "held-out reverse KL (nats)"):
        table.add_column(column, justify="left" if not column else "right")
    for label, summary in rows:
        if summary is not None:
            table.add_row(
                label,
                f"{summary['accuracy']:.1%}",
                f"{summary['accuracy_low']:.1%} to {summary['accuracy_high']:.1%}",
                _interval(summary, "reverse_kl_nats", "reverse_kl_low", "reverse_kl_high", ".3f"),
            )
    return table


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
    if "reverse_kl_change_nats" in after:
        low, high = after["reverse_kl_change_low"], after["reverse_kl_change_high"]
        lines.append(
            f"held-out reverse KL {after['reverse_kl_change_nats']:+.3f} nats, paired 95 % interval "
            f"{low:+.3f} to {high:+.3f}"
        )
    return lines


def plain(text: str) -> Text:
    """Text that rich shows as it is, markup characters included."""
    return Text(inert(text))


def _interval(summary: dict[str, Any], value: str, low: str, high: str, spec: str) -> str:
    if value not in summary:
        return ""
    return f"{summary[value]:{spec}} ({summary[low]:{spec}} to {summary[high]:{spec}})"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def plan_lines(run: str, states: Sequence[State], *, horizon: str) -> list[Text]:
    """The plan, a line a step; rounds that repeat the one before are told in one line."""
    lines = [Text.assemble((run, "bold"), f": {len(states)} steps, {sum(not s.done for s in states)} to run")]
    rounds: dict[int, list[State]] = {}
    for state in states:
        rounds.setdefault(state.step.round, []).append(state)
    before: list[tuple[str, str, str]] = []
    repeats: list[int] = []
    for number, members in rounds.items():
        shape = [_shape(state) for state in members]
        if shape == before:
            repeats.append(number)
            continue
        lines += _repeat_line(repeats)
        repeats = []
        before = shape
        lines += [_state_line(state) for state in members]
    lines += _repeat_line(repeats)
    return [*lines, Text(horizon)] if horizon else lines


def _shape(state: State) -> tuple[str, str, str]:
    """The state with round numbers told as this and last, equal for rounds that are alike."""
    number = state.step.round
    why = state.why.replace(f"@{number}", "@this").replace(f"@{number - 1}", "@last")
    return state.step.link_name, state.verdict, why


def _repeat_line(rounds: list[int]) -> list[Text]:
    if not rounds:
        return []
    which = f"round {rounds[0]}" if len(rounds) == 1 else f"rounds {rounds[0]} to {rounds[-1]}"
    return [Text(f"  {which}: the same", style="dim")]


def _state_line(state: State) -> Text:
    colour = {"done": "green", "stale": "yellow", "to do": "cyan", "damaged": "red"}[state.verdict]
    notes = [state.why] if state.why else []
    if state.dropped:
        notes.append(f"dropped: {', '.join(sorted(state.dropped))}")
    return Text.assemble(f"  {state.step.id:<24}", (f"{state.verdict:<8}", colour), inert("; ".join(notes)))


def sample_lines(step: str, rows: Sequence[dict[str, Any]]) -> list[Text]:
    """Completions for reading: question, expected answer, what was written, and the grade."""
    lines = [Text(f"{step}: {len(rows)} completions", style="bold")]
    for row in rows:
        grade = ("right", "green") if row["correct"] else ("wrong", "red")
        answer = row["answer_strict"] or row["answer_flexible"]
        lines += [
            Text(""),
            Text.assemble((f"{inert(row['prompt_id'])}/{row['sample']} ", "bold"), grade),
            Text(inert(row["question"]), style="dim"),
            Text(inert(row["text"])),
            Text(inert(f"expected {row['expected']}, found {answer}, {row['finish_reason']}"), style="dim"),
        ]
    return lines
