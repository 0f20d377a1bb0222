"""What plan, check-loss and doctor print: all that is known of a run before it begins."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from kdpipe.cli.terminal import COLUMNS, Paint, Style, counted, inert
from kdpipe.pipeline.status import State


def plan_lines(run: str, states: Sequence[State], *, horizon: str, paint: Paint) -> list[str]:
    """The plan, a line a step; rounds that repeat the one before are told in one line."""
    todo = sum(not state.done for state in states)
    lines = [f"{paint(run, 'bold')}: {counted(len(states), 'step')}, {todo} to run"]
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
    lines = [f"{paint(result['run'], 'bold')}: {counted(len(findings), 'probe')}: {told}"]
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
