"""The tables of the pages, each cell as it is shown.

On a narrow screen a row becomes lines of `column: cell`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import astuple

from kdpipe.method.interval import Interval
from kdpipe.pipeline.headline import Headline
from kdpipe.pipeline.progress import duration
from kdpipe.report.figure import axis_of, axis_svg, interval_svg, share_svg
from kdpipe.results.evaluations import Evaluation
from kdpipe.results.measures import Cost, Measures
from kdpipe.results.table import Table
from kdpipe.results.verdict import delta, nats, percent, shown, signed

AROUND = "loading and saving"
MANY = re.compile(r"(pass|maj)_at_[0-9]+")


def evaluations_table(measures: Measures) -> Table:
    """Student 0, the last student and the teachers, and what the student gained."""
    found = measures.shown
    measure = found[0].headline
    axis = axis_of(measure, [one.level for one in found])
    beside = ["reverse KL, nats"] if measure.beside else []
    rows = []
    for one in found:
        level = one.reverse_kl if beside else None
        rows.append(
            [
                one.label,
                interval_svg(one.level, axis, style=1 if one.is_student else 2),
                shown(measure, one.level.estimate),
                _range(measure, one.level),
                *([_with_bounds(*map(nats, astuple(level))) if level else ""] if beside else []),
                percent(one.summary["truncated_fraction"]),
            ]
        )
    if measures.after and (change := measures.after.change):
        moved = measures.after.reverse_kl_change if beside else None
        unit = f" {measure.change_unit}"
        rows.append(
            [
                "paired difference",
                "",
                f"{delta(measure, change.estimate)}{unit}",
                f"{delta(measure, change.low)} to {delta(measure, change.high)}",
                *([_with_bounds(*map(signed, astuple(moved))) if moved else ""] if beside else []),
                "",
            ]
        )
    return Table(["", axis_svg(axis), measure.title, "95% interval", *beside, "truncated"], rows)


def _range(measure: Headline, level: Interval) -> str:
    return f"{shown(measure, level.low)} to {shown(measure, level.high)}"


def _with_bounds(estimate: str, low: str, high: str) -> str:
    return f"{estimate} ({low} to {high})"


def samples_table(evaluations: Sequence[Evaluation]) -> Table | None:
    """pass@k and maj@k of several samples; None where a problem is answered once."""
    names = {name for one in evaluations for name in one.summary if MANY.fullmatch(name)}
    ordered = sorted(names, key=lambda name: (name[:4] != "pass", int(name.rpartition("_")[2])))
    rows = [
        [
            one.label,
            *(
                _with_bounds(*map(percent, astuple(found))) if (found := one.interval(name)) else ""
                for name in ordered
            ),
        ]
        for one in evaluations
    ]
    return Table(["", *(name.replace("_at_", "@") for name in ordered)], rows) if ordered else None


def costs_table(measures: Measures) -> Table | None:
    """What each stage took, what the steps took around them, and all of it; None before the first step."""
    found = measures.costs()
    if not found:
        return None
    if around := measures.seconds_around():
        found.append(Cost(AROUND, seconds=around))
    total = sum(found, Cost("together"))
    whole = total.seconds or 1.0
    rows = [
        [
            cost.name,
            share_svg(cost.seconds / whole),
            f"{cost.seconds / whole:.0%}",
            duration(cost.seconds),
            str(cost.steps or ""),
            f"{cost.tokens:,.0f}" if cost.steps else "",
            f"{cost.tokens / cost.seconds:,.0f}" if cost.seconds and cost.tokens else "",
        ]
        for cost in found
    ]
    rows.append(["together", "", "", duration(total.seconds), str(total.steps), f"{total.tokens:,.0f}", ""])
    return Table(["stage", "", "share", "time", "steps", "tokens", "tokens a second"], rows)


def mismatch_table(measures: Measures) -> Table | None:
    """What sampler and trainer disagree about in the first, worst and last round; None before any."""
    mean, p99, most = (measures.by_round(f"train/mismatch_nats_{name}") for name in ("mean", "p99", "max"))
    acted = measures.by_round("train/mismatch_acted_fraction")
    if not most:
        return None
    chosen = {"first": min(most), "worst": max(most, key=lambda number: most[number]), "last": max(most)}
    rows = [
        [name, str(at), power(mean[at], sign="+"), power(p99[at]), power(most[at]), percent(acted[at])]
        for name, at in chosen.items()
    ]
    return Table(["", "round", "mean, nats", "p99", "largest", "tokens that a control acts on"], rows)


def power(value: float, *, sign: str = "") -> str:
    """A small number as a power of ten."""
    return f"{value:{sign}.1e}".replace("-", "−")
