"""Which curves the page shows, each with its unit and how its numbers are written."""

from __future__ import annotations

from collections.abc import Mapping

from kdpipe.method.statistics import Interval
from kdpipe.recipe.roles import STUDENT
from kdpipe.report.figure import Chart, Point, Series
from kdpipe.results.measures import Evaluation, Measures
from kdpipe.store.stage import Stage

STAGE_STYLES = {stage: (number - 1) % len(Stage) for number, stage in enumerate(Stage)}
"""The colour of each stage, wherever stages are beside each other."""


def charts(measures: Measures) -> list[Chart]:
    """Those that have something to show."""
    found = [
        _reverse_kl(measures),
        _accuracy(measures),
        _reward(measures),
        _length(measures),
        _truncated(measures),
        _gradient(measures),
        _mismatch(measures),
        _stage_seconds(measures),
        _speed(measures),
    ]
    return [chart for chart in found if chart.has_points]


def _reverse_kl(measures: Measures) -> Chart:
    held_out = [
        _bounded(one.step.round, found)
        for one in _of_student(measures)
        if (found := one.reverse_kl) is not None
    ]
    return Chart(
        "reverse-kl",
        "Reverse KL",
        "nats a token",
        [
            Series("training", _points(measures.by_round("score/reverse_kl_nats"))),
            Series("held out", held_out, style=1, marked=True),
        ],
        _number,
        bands="95% interval",
    )


def _accuracy(measures: Measures) -> Chart:
    series = [
        Series(
            "student",
            [_bounded(one.step.round, one.accuracy) for one in _of_student(measures)],
            style=1,
            marked=True,
        )
    ]
    series += [
        Series(one.step.subject, [Point(0, one.accuracy.estimate)], style=2, reference=True)
        for one in measures.teachers
    ]
    return Chart(
        "accuracy",
        "Held-out accuracy",
        "share of problems",
        series,
        _share,
        bands="95% interval",
        ceiling=1.0,
    )


def _reward(measures: Measures) -> Chart:
    points = _points(measures.by_round("rollout/reward_mean"))
    return Chart("reward", "Reward", "mean of a round's samples", [Series("", points)], _number)


def _length(measures: Measures) -> Chart:
    points = _points(measures.by_round("rollout/completion_tokens_mean"))
    return Chart("length", "Completion length", "tokens, mean", [Series("", points)], _number)


def _truncated(measures: Measures) -> Chart:
    shares = measures.by_round("rollout/truncated_fraction")
    ceiling = 0.25 if max(shares.values(), default=0.0) <= 0.25 else 1.0
    lines = [Series("", _points(shares))]
    return Chart("truncated", "Truncated samples", "share", lines, _share, ceiling=ceiling)


def _gradient(measures: Measures) -> Chart:
    points = [
        Point(number, spread.mean, spread.low, spread.high)
        for number, spread in sorted(measures.over_optimizer_steps("train/grad_norm").items())
    ]
    return Chart(
        "gradient",
        "Gradient norm",
        "before clipping; mean, least, greatest",
        [Series("", points)],
        _number,
        bands="",
    )


def _mismatch(measures: Measures) -> Chart:
    names = {"largest": "train/mismatch_nats_max", "p99": "train/mismatch_nats_p99"}
    series = [
        Series(label, [point for point in _points(measures.by_round(name)) if point.value > 0], style=style)
        for style, (label, name) in enumerate(names.items())
    ]
    return Chart("mismatch", "Sampler against trainer", "nats, log scale", series, _power, scale="log")


def _short(stage: Stage) -> str:
    return stage.removeprefix("teacher-")


def _stage_seconds(measures: Measures) -> Chart:
    series = [
        Series(
            _short(stage),
            _points({number: value for number, value in found.items() if number > 0}),
            style=style,
        )
        for stage, style in STAGE_STYLES.items()
        if stage != Stage.SFT and (found := measures.summed_by_round(stage, "seconds"))
    ]
    series = [
        Series(one.label, one.points, one.style, marked=one.label == Stage.EVALUATE and len(one.points) < 12)
        for one in series
    ]
    return Chart("stage-seconds", "Time per stage", "seconds", series, _seconds)


def _speed(measures: Measures) -> Chart:
    series = []
    for stage in (Stage.ROLLOUT, Stage.TEACHER_SCORE, Stage.TRAIN):
        seconds = measures.summed_by_round(stage, "seconds")
        tokens = measures.summed_by_round(stage, "tokens")
        rates = {
            number: tokens[number] / seconds[number]
            for number in seconds
            if seconds[number] and tokens[number]
        }
        series.append(Series(_short(stage), _points(rates), style=STAGE_STYLES[stage]))
    return Chart("speed", "Speed", "tokens a second", series, _count)


def _of_student(measures: Measures) -> list[Evaluation]:
    return [one for one in measures.evaluations if one.step.subject == STUDENT]


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
