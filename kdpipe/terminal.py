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
import textwrap
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TextIO

from kdpipe.duration import duration
from kdpipe.plan import Step
from kdpipe.runs import RunFolder
from kdpipe.survey import State

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


class _Rate:
    """Tokens per second and time left of one step, from its progress events; the clock starts with the first."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.unit, self.total, self.done, self.tokens = "", 0, 0, 0
        self.first_done, self.first_tokens = 0, 0

    def update(self, event: dict[str, Any]) -> None:
        if event["unit"] != self.unit:
            self.unit, self.started = event["unit"], time.monotonic()
            self.first_done, self.first_tokens = event["done"], event["tokens"]
        self.total, self.done, self.tokens = event["total"], event["done"], event["tokens"]

    def words(self) -> str:
        seconds = max(time.monotonic() - self.started, 1e-3)
        pieces = [f"{self.done}/{self.total} {self.unit}"]
        if (tokens := self.tokens - self.first_tokens) > 0:
            pieces.append(f"{tokens / seconds:,.0f} tokens/s")
        finished = self.done - self.first_done
        if finished > 0 and self.done < self.total:
            left = seconds * (self.total - self.done) / finished
            pieces.append(f"{duration(left) if left >= 3600 else _roughly(left)} left")
        return ", ".join(pieces)


class Terminal:
    """Shows a run to a person, on stderr: a live line where stderr is a terminal, else plain lines."""

    def __init__(self) -> None:
        self.live = is_terminal(sys.stderr)
        self._paint = painter(sys.stderr)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._rate = _Rate()
        self._said = 0.0

    def begin(self, run: RunFolder, todo: int, reused: int) -> None:
        """Says what is about to happen."""
        done = f", {reused} done already" if reused else ""
        self._say(f"{self._paint(run.name, 'bold')}: {_counted(todo, 'step')} to do{done}")

    def step_begins(self, step: Step) -> None:
        """Starts the step's line."""
        self._rate = _Rate()
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
        self._rate.update(event)
        if self._progress is not None and self._task is not None:
            self._progress.update(
                self._task, total=event["total"], completed=event["done"], words=self._rate.words()
            )
        elif time.monotonic() - self._said > PLAIN_SECONDS:
            self._said = time.monotonic()
            self._say(f"{step.id}: {self._rate.words()}")

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
            print(line, file=sys.stderr, flush=True)  # noqa: T201 (progress goes to stderr)


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
                print("\n".join(new), flush=True)  # noqa: T201 (results go to stdout)
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


def _roughly(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds / 60:.0f} min"


def plan_lines(run: str, states: Sequence[State], *, horizon: str, paint: Paint) -> list[str]:
    """The plan, a line a step; rounds that repeat the one before are told in one line."""
    todo = sum(not state.done for state in states)
    lines = [f"{paint(run, 'bold')}: {_counted(len(states), 'step')}, {todo} to run"]
    width = max([24, *(len(state.step.id) + 2 for state in states)])
    rounds: dict[int, list[State]] = {}
    for state in states:
        rounds.setdefault(state.step.round, []).append(state)
    before: Sequence[tuple[str, str, str]] = ()
    repeats: list[int] = []
    for number, members in rounds.items():
        shape = [(s.step.link_name, s.verdict, s.why.replace(f"@{number}", "@this")) for s in members]
        shape = [(name, verdict, why.replace(f"@{number - 1}", "@last")) for name, verdict, why in shape]
        if shape == before:
            repeats.append(number)
            continue
        lines += _repeat_line(repeats, paint)
        repeats = []
        before = shape
        lines += [_state_line(state, paint, width) for state in members]
    lines += _repeat_line(repeats, paint)
    return [*lines, horizon] if horizon else lines


def _repeat_line(rounds: list[int], paint: Paint) -> list[str]:
    if not rounds:
        return []
    which = f"round {rounds[0]}" if len(rounds) == 1 else f"rounds {rounds[0]} to {rounds[-1]}"
    return [paint(f"  {which}: the same", "dim")]


def _state_line(state: State, paint: Paint, width: int) -> str:
    colours: dict[str, Style] = {"done": "green", "stale": "yellow", "to do": "cyan", "damaged": "red"}
    notes = [state.why] if state.why else []
    if state.dropped:
        notes.append(f"dropped: {', '.join(sorted(state.dropped))}")
    verdict = paint(f"{state.verdict:<8}" if notes else state.verdict, colours[state.verdict])
    return f"  {state.step.id:<{width}}{verdict}{inert('; '.join(notes))}"


def check_loss_lines(phase: dict[str, Any], paint: Paint) -> list[str]:
    """The findings on an objective as a table of 80 columns, and below it what its failures mean."""
    heading = textwrap.wrap(phase["objective"], COLUMNS, subsequent_indent="  ")
    rows = [("property", "verdict", "measured")]
    rows += [(f["claim"], f["verdict"], _measured(f)) for f in phase["findings"]]
    verdict_width, measured_width = (max(len(row[i]) for row in rows) for i in (1, 2))
    width = COLUMNS - len("  1  ") - len("  ") * 2 - verdict_width - measured_width
    colours: dict[str, Style] = {"ok": "green", "FAILED": "red", "not applicable": "dim"}
    lines = [paint(line, "bold") for line in heading]
    for number, (claim, verdict, measured) in enumerate(rows):
        first, *others = textwrap.wrap(claim, width)
        shown = f"{verdict:<{verdict_width}}"
        shown = paint(shown, colours[verdict]) if number else shown
        lines.append(f"  {number or ' '}  {first:<{width}}  {shown}  {measured}".rstrip())
        lines += [f"     {other}" for other in others]
    for finding in phase["findings"]:
        if finding["meaning"]:
            numbers = [f"{m['name']} {m['value']:.2g}" for m in finding["measures"]]
            why = ", ".join([*numbers, *filter(None, [finding["problem"]])])
            text = f"{finding['number']} FAILED: {finding['meaning']} ({why})"
            lines += textwrap.wrap(
                text, COLUMNS, initial_indent="  ", subsequent_indent="     ", break_on_hyphens=False
            )
    return lines


def doctor_lines(result: dict[str, Any], paint: Paint) -> list[str]:
    """The findings as a table of 80 columns: who, probe, verdict and worst number, and below each what it says."""
    findings = result["findings"]
    width = max(len(finding["probe"]) for finding in findings)
    counts = {
        verdict: sum(finding["verdict"] == verdict for finding in findings)
        for verdict in ("ok", "FAILED", "warning", "skipped")
    }
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    lines = [f"{paint(result['run'], 'bold')}: {_counted(len(findings), 'probe')}: {told}"]
    about = ""
    for finding in findings:
        if finding["about"] != about:
            about = finding["about"]
            lines += ["", paint(inert(about), "bold")]
        lines += _finding_lines(finding, width, paint)
    return lines


def _finding_lines(finding: dict[str, Any], width: int, paint: Paint) -> list[str]:
    """A probe with its verdict and what it says, and below that its numbers; what a failure means comes last."""
    colours: dict[str, Style] = {"ok": "green", "FAILED": "red", "warning": "yellow", "skipped": "dim"}
    indent = " " * (width + 13)

    def wrapped(text: str) -> list[str]:
        return textwrap.wrap(
            text, COLUMNS, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )

    verdict = finding["verdict"]
    lines = wrapped(inert(finding["said"]))
    shown = paint(f"{verdict:<7}", colours[verdict])
    lines[0] = f"  {finding['probe']:<{width}}  {shown}  {lines[0].strip()}"
    lines += wrapped(", ".join(map(_limited, finding["measures"])))
    return lines + (wrapped(f"catches {finding['catches']}") if verdict == "FAILED" else [])


def _limited(measure: dict[str, Any]) -> str:
    """A number beside its limit, as the two stand to each other."""
    found, limit = measure["value"], measure["limit"]
    if found is None:
        return f"{measure['name']} not finite"
    value = f"{found:g}" if limit > 1 else f"{found:.2g}"
    return f"{measure['name']} {value} {'>' if found > limit else '<='} {limit:g}"


def estimate_lines(result: dict[str, Any], paint: Paint) -> list[str]:
    """What the recipe takes: memory by role, disk and tokens of a round."""
    found = result["estimate"]
    if "problem" in found:
        return [f"what it takes cannot be told: {inert(found['problem'])}"]
    lines = [paint("takes (completions of full length, nothing compressed, activations roughly)", "bold")]
    parameters = ", ".join(f"{name} {_short_count(count)}" for name, count in found["parameters"].items())
    lines.append(f"  parameters  {parameters}")
    for role, parts in found["memory_bytes"].items():
        kept = ", ".join(f"{name} {_size(size)}" for name, size in parts.items() if size)
        text = f"{role} {_size(sum(parts.values()))}: {kept}"
        lines += textwrap.wrap(
            text, COLUMNS, initial_indent="  memory      ", subsequent_indent=" " * 16, break_on_hyphens=False
        )
    disk = found["disk_bytes_per_round"]
    parts = ", ".join(f"{name} {_size(size)}" for name, size in disk.items())
    text = (
        f"{_size(sum(disk.values()))} a round ({parts}); {_size(found['disk_bytes_kept'])} stay at the end, "
        f"{_size(result['free_disk_bytes'])} are free"
    )
    lines += textwrap.wrap(text, COLUMNS, initial_indent="  disk        ", subsequent_indent=" " * 16)
    tokens = ", ".join(f"{count:,} {name}" for name, count in found["tokens_per_round"].items())
    lines.append(f"  tokens      {tokens}, a round")
    return lines


def _short_count(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def _size(count: int) -> str:
    """Bytes in the largest unit that keeps the number above 1."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1e3:,.0f} kB"


def _measured(finding: dict[str, Any]) -> str:
    """The worst of a finding's numbers."""
    if finding["problem"] or not finding["measures"]:
        return "not finite" if finding["problem"] else ""
    worst = finding["measures"][0]
    verb = "moves by" if worst["must_move"] else "off by"
    return f"{verb} {worst['value']:.2g} of {worst['of']:.2g}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
