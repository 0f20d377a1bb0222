"""Which curves the page shows, each with its unit and how its numbers are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from kdpipe.method.interval import Interval
from kdpipe.pipeline.headline import ACCURACY
from kdpipe.report.figure import Chart, Point, Series
from kdpipe.results.measures import Measures
from kdpipe.store.stage import Stage

STYLES = {Stage.ROLLOUT: 0, Stage.TEACHER_SCORE: 1, Stage.TRAIN: 2, Stage.EVALUATE: 3}
"""How each stage of a round is drawn, wherever several are."""


def charts(measures: Measures) -> list[Chart]:
    """Those that have something to show: where all is zero a sentence does."""
    return [chart for chart in _measured(measures) if not chart.is_zero]


def zero_charts(measures: Measures) -> list[str]:
    """What is zero all along."""
    return [f"{chart.title} ({chart.unit})" for chart in _measured(measures) if chart.is_zero]


def _measured(measures: Measures) -> list[Chart]:
    length = _line(measures, "rollout/completion_tokens_mean")
    shares = _line(measures, "rollout/truncated_fraction")
    is_low = all(point.value <= 0.25 for point in shares.points)
    norms = sorted(measures.over_optimizer_steps("train/grad_norm").items())
    gradient = [Point(number, sum(of) / len(of), min(of), max(of)) for number, of in norms if of]
    found = [
        _reverse_kl(measures),
        _accuracy(measures),
        _reward(measures),
        Chart("length", "Completion length", "tokens, mean", [length], _number),
        Chart("truncated", "Truncated samples", "share", [shares], _share, ceiling=0.25 if is_low else 1.0),
        Chart(
            "gradient",
            "Gradient norm",
            "before clipping; mean, least, greatest",
            [Series("", gradient)],
            _number,
        ),
        _mismatch(measures),
        _stage_seconds(measures),
        _speed(measures),
    ]
    return [chart for chart in found if any(series.points for series in chart.series)]


def _reverse_kl(measures: Measures) -> Chart:
    students = [one for one in measures.evaluations if one.is_student]
    held_out = [_bounded(one.round, found) for one in students if (found := one.reverse_kl)]
    series = [
        Series("training", _points(measures.own_reverse_kl())),
        Series("held out", held_out, style=1, marked=True),
    ]
    return Chart("reverse-kl", "Reverse KL", "nats a token", series, _number, bands="95% interval")


def _reward(measures: Measures) -> Chart:
    values, low, high = (measures.by_round(f"rollout/reward_{name}") for name in ("mean", "low", "high"))
    points = [Point(number, values[number], low.get(number), high.get(number)) for number in sorted(values)]
    bands = "95% interval over prompts" if low else ""
    return Chart("reward", "Reward", "mean of a round", [Series("", points)], _number, bands)


def _accuracy(measures: Measures) -> Chart:
    levels = [(one, found) for one in measures.evaluations if (found := ACCURACY.level(one.summary))]
    students = [_bounded(one.round, found) for one, found in levels if one.is_student]
    series = [
        Series("student", students, style=1, marked=True),
        *(
            Series(one.model, [Point(0, found.estimate)], style=2, reference=True)
            for one, found in levels
            if not one.is_student
        ),
    ]
    title, unit = "Held-out accuracy", "share of problems"
    return Chart("accuracy", title, unit, series, _share, bands="95% interval", ceiling=1.0)


def _mismatch(measures: Measures) -> Chart:
    largest = _line(measures, "train/mismatch_nats_max", label="largest")
    p99 = _line(measures, "train/mismatch_nats_p99", label="p99", style=1)
    series = [
        replace(one, points=[point for point in one.points if point.value > 0]) for one in (largest, p99)
    ]
    return Chart("mismatch", "Sampler against trainer", "nats, log scale", series, _power, scale="log")


def _stage_seconds(measures: Measures) -> Chart:
    series = []
    for stage, style in STYLES.items():
        costs = measures.costs_by_round(stage)
        points = _points({number: cost.seconds for number, cost in costs.items() if number > 0})
        is_marked = stage == Stage.EVALUATE and len(points) < 12
        series.append(Series(_short(stage), points, style, marked=is_marked))
    return Chart("stage-seconds", "Time per stage", "seconds", series, _seconds)


def _speed(measures: Measures) -> Chart:
    series = []
    for stage in (Stage.ROLLOUT, Stage.TEACHER_SCORE, Stage.TRAIN):
        costs = measures.costs_by_round(stage).items()
        rates = {number: cost.tokens / cost.seconds for number, cost in costs if cost.seconds and cost.tokens}
        series.append(Series(_short(stage), _points(rates), style=STYLES[stage]))
    return Chart("speed", "Speed", "tokens a second", series, _count)


def _short(stage: Stage) -> str:
    return stage.removeprefix("teacher-")


def _line(measures: Measures, name: str, *, label: str = "", style: int = 0) -> Series:
    return Series(label, _points(measures.by_round(name)), style)


def _bounded(number: int, interval: Interval) -> Point:
    return Point(number, interval.estimate, interval.low, interval.high)


def _points(values: Mapping[int, float]) -> list[Point]:
    return [Point(number, values[number]) for number in sorted(values)]


# How numbers are written: enough digits to tell neighbouring ticks apart.


def _number(value: float) -> str:
    size = abs(value)
    if size >= 1000:
        return _count(value)
    text = f"{value:.0f}" if size >= 100 else f"{value:.3g}" if size >= 0.001 or not size else f"{value:.1e}"
    return text.replace("-", "−")


def _share(value: float) -> str:
    return f"{100 * value:.3g}%"


def _seconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _count(value: float) -> str:
    return f"{value:,.0f}" if value < 1000 else f"{value / 1000:,.3g} k"


def _power(value: float) -> str:
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    superscript = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{superscript}" if mantissa == "1.0" else f"{mantissa}·10{superscript}"
