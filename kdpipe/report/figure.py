"""Line charts and intervals as SVG, in the page or as files, without a plotting library.

Colours and type come from the page's style. A chart is 340 units wide and scales with its column. Lines are labelled
where they end, so that no legend is needed. Whatever text a figure shows is escaped in `element`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

from markupsafe import Markup, escape

from kdpipe.method.interval import Interval
from kdpipe.pipeline.headline import ACCURACY, REVERSE_KL, Headline
from kdpipe.results.verdict import delta, shown
from kdpipe.results.visible_text import visible

WIDTH, HEIGHT = 340.0, 190.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 10.0, 38.0
NAMES = 60.0  # what names at the ends of lines need on the right
MAX_NAME = 10
MAX_POINTS = 240
LABEL_GAP = 13.0
SMALLEST_SPAN = 1e-300  # below, a third of it may be zero
HEADING, MARGIN, ENLARGED = 44.0, 14.0, 2.0  # of a figure in a file of its own
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif'
EMPTY = frozenset({"line", "circle", "rect", "polyline", "polygon"})
Scale = Literal["linear", "log"]


def element(name: str, attributes: Mapping[str, str | float], *children: str) -> Markup:
    """`<name attributes>children</name>`; children that are not markup are text."""
    written = "".join(f' {key}="{_attribute(value)}"' for key, value in attributes.items())
    if name in EMPTY and not children:
        return Markup(f"<{name}{written}/>")  # noqa: S704 (values are escaped)
    inside = "".join(child if isinstance(child, Markup) else escape(visible(child)) for child in children)
    return Markup(f"<{name}{written}>{inside}</{name}>")  # noqa: S704 (children are escaped)


def _attribute(value: str | float) -> str:
    """Coordinates need no more than a hundredth of a pixel."""
    return escape(visible(value)) if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")


@dataclass(frozen=True, slots=True)
class Point:
    """A value at a round, with the bounds of its interval or spread where it has one."""

    round: int
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Series:
    """One line. `style` 0 to 3 is its colour, its dashes and the shape of its marks.

    A `reference` is a level, drawn thin over the whole width.
    """

    label: str
    points: Sequence[Point]
    style: int = 0
    reference: bool = False
    marked: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """What one chart shows. `show` writes a value with its unit; `bands` says what low and high are."""

    key: str
    title: str
    unit: str
    series: Sequence[Series]
    show: Callable[[float], str]
    bands: str = ""
    scale: Scale = "linear"
    ceiling: float | None = None

    @property
    def caption(self) -> str:
        return self.unit + (f"; {self.bands}" if self.bands else "")

    @property
    def is_zero(self) -> bool:
        """Whether there is nothing to see, as every point and bound is zero."""
        points = [point for series in self.series for point in series.points]
        return not any(point.value or point.low or point.high for point in points)


def rounds_of(charts: Sequence[Chart]) -> tuple[int, int]:
    """The first and the last round of all charts together: their shared axis."""
    numbers = [point.round for chart in charts for series in chart.series for point in series.points]
    return (min(numbers), max(numbers)) if numbers else (0, 1)


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most `MAX_POINTS` points: means of neighbours, whose bounds hold all of theirs."""
    size = math.ceil(len(points) / MAX_POINTS)
    if size < 2:
        return list(points)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        Point(
            group[-1].round,
            sum(point.value for point in group) / len(group),
            min(point.value if point.low is None else point.low for point in group),
            max(point.value if point.high is None else point.high for point in group),
        )
        for group in groups
    ]


def chart_svg(chart: Chart, rounds: tuple[int, int]) -> Markup:
    """The chart, with a title and a description for those who do not see it."""
    axes = Axes(chart, rounds)
    lines = [series for series in chart.series if series.points]
    return element(
        "svg",
        {
            "viewBox": f"0 0 {WIDTH:g} {HEIGHT:g}",
            "role": "img",
            "tabindex": "0",
            "aria-labelledby": f"{chart.key}-title {chart.key}-desc",
            "data-chart": chart.key,
            "data-x": f"{LEFT:g} {axes.right:g} {rounds[0]} {rounds[1]}",
        },
        element("title", {"id": f"{chart.key}-title"}, f"{chart.title}, {chart.unit}, over rounds"),
        element("desc", {"id": f"{chart.key}-desc"}, description(chart)),
        *_grid(axes, chart),
        *(mark for series in lines for mark in _band(axes, series)),
        *(mark for series in lines for mark in _line(axes, series)),
        *_labels(axes, lines),
        element("line", {"class": "cursor", "visibility": "hidden", "y1": TOP, "y2": HEIGHT - BOTTOM}),
    )


def description(chart: Chart) -> str:
    """The chart in words: where each line begins and ends."""
    sentences = []
    for series in chart.series:
        if not series.points:
            continue
        first, final = series.points[0], series.points[-1]
        name = series.label or chart.title
        if series.reference or first.round == final.round:
            sentences.append(f"{name}: {chart.show(final.value)}.")
        else:
            sentences.append(
                f"{name}: {chart.show(first.value)} in round {first.round}, "
                f"{chart.show(final.value)} in round {final.round}."
            )
    return " ".join(sentences)


class Axes:
    """From rounds and values to coordinates, with the ticks of the value axis."""

    def __init__(self, chart: Chart, rounds: tuple[int, int]) -> None:
        self.rounds = rounds
        has_names = any(series.label and series.points for series in chart.series)
        self.right = WIDTH - (NAMES if has_names else RIGHT)
        values = [
            value
            for series in chart.series
            for point in series.points
            for value in (point.value, point.low, point.high)
            if value is not None
        ]
        self.is_log = chart.scale == "log" and min(values) > 0
        if self.is_log:
            self.ticks = _log_ticks(min(values), max(values))
        else:
            top = max(0.0, *values) if chart.ceiling is None else chart.ceiling
            self.ticks = _ticks(min(0.0, *values), top)
        self.low, self.high = self.ticks[0], self.ticks[-1]

    def x(self, number: float) -> float:
        first, final = self.rounds
        return LEFT + (self.right - LEFT) * (number - first) / max(1, final - first)

    def y(self, value: float) -> float:
        if self.is_log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(1.0, max(0.0, share))


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from below `low` to above `high`, three to six of them."""
    span = high - low if high - low > SMALLEST_SPAN else 1.0
    unit = 10.0 ** math.floor(math.log10(span / 3))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if span / (unit * factor) <= 4.5)
    first, final = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(final, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, final = math.floor(math.log10(low)), math.ceil(math.log10(high) - 1e-9)
    final = max(final, first + 1)
    step = max(1, round((final - first) / 4))
    return [10.0**power for power in range(first, final + step, step)]


def _round_ticks(rounds: tuple[int, int]) -> list[int]:
    """Whole numbers; the last round is one of them, as it is what one asks for."""
    first, final = rounds
    if final - first <= 5:
        return list(range(first, final + 1))
    found = [int(tick) for tick in _ticks(first, final) if tick == int(tick) and first <= tick < final]
    room = (final - first) * 0.09
    return [tick for tick in found if final - tick > room] + [final]


def _grid(axes: Axes, chart: Chart) -> list[Markup]:
    base = HEIGHT - BOTTOM
    marks: list[Markup] = []
    for tick in axes.ticks:
        y = axes.y(tick)
        kind = "axis" if tick == axes.ticks[0] else "grid"
        marks.append(_segment(kind, (LEFT, axes.right), (y, y)))
        marks.append(element("text", {"class": "tick end", "x": LEFT - 6, "y": y + 3.5}, chart.show(tick)))
    for number in _round_ticks(axes.rounds):
        x = axes.x(number)
        marks.append(element("text", {"class": "tick mid", "x": x, "y": base + 15}, str(number)))
    middle = {"x": (LEFT + axes.right) / 2, "y": base + 32}
    return [*marks, element("text", {"class": "mid", **middle}, "round")]


def _band(axes: Axes, series: Series) -> list[Markup]:
    bounded = [
        (axes.x(point.round), axes.y(point.low), axes.y(point.high))
        for point in thinned(series.points)
        if point.low is not None and point.high is not None
    ]
    if not bounded:
        return []
    if series.marked:
        return [_segment(f"whisker s{series.style}", (x, x), (low, high)) for x, low, high in bounded]
    upper, lower = [(x, high) for x, _, high in bounded], [(x, low) for x, low, _ in reversed(bounded)]
    return [element("polygon", {"class": f"band s{series.style}", "points": _pairs(upper + lower)})]


def _line(axes: Axes, series: Series) -> list[Markup]:
    if series.reference:
        y = axes.y(series.points[0].value)
        return [_segment(f"level s{series.style}", (LEFT, axes.right), (y, y))]
    points = [(axes.x(point.round), axes.y(point.value)) for point in thinned(series.points)]
    parts = [element("polyline", {"class": f"line s{series.style}", "points": _pairs(points)})]
    if series.marked or len(points) == 1:
        parts += [_dot(series.style, x, y, 3.0) for x, y in points]
    return parts


def _dot(style: int, x: float, y: float, size: float) -> Markup:
    """A mark that is told from the other styles' by its shape too."""
    name = {"class": f"dot s{style}"}
    if style == 0:
        return element("circle", {**name, "cx": x, "cy": y, "r": size})
    corners = (
        [(0.9, 0.9), (-0.9, 0.9), (-0.9, -0.9), (0.9, -0.9)]
        if style == 1
        else [(1.2, 0.0), (0.0, 1.2), (-1.2, 0.0), (0.0, -1.2)]
        if style == 2
        else [(0.0, -1.2), (1.15, 0.9), (-1.15, 0.9)]
    )
    return element("polygon", {**name, "points": _pairs([(x + size * a, y + size * b) for a, b in corners])})


def _labels(axes: Axes, lines: Sequence[Series]) -> list[Markup]:
    """Names of the lines at their right ends, moved apart where they would overlap."""
    named = [series for series in lines if series.label]
    placed: list[tuple[float, Series]] = []
    for series in sorted(named, key=lambda series: axes.y(series.points[-1].value)):
        y = axes.y(series.points[-1].value) + 4
        placed.append((max(y, placed[-1][0] + LABEL_GAP if placed else 0.0), series))
    too_low = placed[-1][0] - (HEIGHT - BOTTOM + 4) if placed else 0.0
    return [
        element(
            "text",
            {"class": f"name s{series.style}", "x": axes.right + 6, "y": y - max(0.0, too_low)},
            series.label if len(series.label) <= MAX_NAME else series.label[: MAX_NAME - 1] + "…",
        )
        for y, series in placed
    ]


def _segment(kind: str, x: tuple[float, float], y: tuple[float, float]) -> Markup:
    return element("line", {"class": kind, "x1": x[0], "x2": x[1], "y1": y[0], "y2": y[1]})


def _pairs(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


@dataclass(frozen=True, slots=True)
class Axis:
    """What intervals of a measure that stand below each other are drawn on: levels, or differences."""

    measure: Headline
    ticks: Sequence[float]
    is_change: bool = False

    def x(self, value: float) -> float:
        """Where a value is on an axis of 240 units."""
        share = (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])
        return 6 + 228 * min(1.0, max(0.0, share))

    def tick(self, value: float) -> str:
        """A value in as few digits as tell it."""
        number = value if self.measure is REVERSE_KL else 100 * value
        sign = "+" if self.is_change and number else ""
        unit = "%" if self.measure is ACCURACY and not self.is_change else ""
        return f"{number:{sign}.4g}{unit}".replace("-", "−")

    def told(self, value: float) -> str:
        """A value as the page writes it."""
        return (delta if self.is_change else shown)(self.measure, value)


def axis_of(measure: Headline, levels: Iterable[Interval]) -> Axis:
    """The axis on which these levels are seen beside each other: shares have one and the same."""
    highest = max(level.high for level in levels)
    return Axis(measure, (0.0, 0.25, 0.5, 0.75, 1.0) if measure is ACCURACY else _ticks(0.0, highest))


def change_axis(measure: Headline, changes: Iterable[Interval]) -> Axis:
    """The axis on which these differences are seen beside each other and beside zero."""
    bounds = [bound for one in changes for bound in (one.low, one.high)]
    return Axis(measure, _ticks(min(0.0, *bounds), max(0.0, *bounds)), is_change=True)


def axis_svg(axis: Axis) -> Markup:
    """The numbers above the intervals of an axis."""
    return element(
        "svg",
        {"viewBox": "0 0 240 16", "class": "interval", "role": "img", "aria-label": _ends(axis)},
        *(
            element("text", {"class": "mid", "x": axis.x(tick), "y": 12.0}, axis.tick(tick))
            for tick in axis.ticks
        ),
    )


def _ends(axis: Axis) -> str:
    return f"axis from {axis.tick(axis.ticks[0])} to {axis.tick(axis.ticks[-1])}"


def interval_svg(found: Interval, axis: Axis, *, style: int) -> Markup:
    """A value as a mark with whiskers on an axis whose ticks and zero are shown, as wide as its cell."""
    estimate, low, high = map(axis.told, astuple(found))
    ticks = [
        _segment("axis" if axis.is_change and not tick else "grid", (at, at), (0.0, 20.0))
        for tick in axis.ticks
        if (at := axis.x(tick))
    ]
    spoken = f"{estimate}, {low} to {high}, {_ends(axis)}"
    return element(
        "svg",
        {"viewBox": "0 0 240 20", "class": "interval", "role": "img", "aria-label": spoken},
        *ticks,
        _segment(f"whisker s{style}", (axis.x(found.low), axis.x(found.high)), (10.0, 10.0)),
        _dot(style, axis.x(found.estimate), 10.0, 5.0),
    )


def share_svg(share: float) -> Markup:
    """A share of a whole as a bar, as wide as its cell."""
    return element(
        "svg",
        {"viewBox": "0 0 240 20", "class": "interval", "role": "img", "aria-label": f"{share:.0%}"},
        element("rect", {"class": "rest", "x": 6.0, "y": 5.0, "width": 228.0, "height": 10.0}),
        element("rect", {"class": "s0", "x": 6.0, "y": 5.0, "width": 228 * share, "height": 10.0}),
    )


def figure_file(chart: Chart, rounds: tuple[int, int]) -> str:
    """The chart as an SVG file that stands alone, with its title, as the page shows it in its light theme."""
    width, height = WIDTH + 2 * MARGIN, HEIGHT + HEADING + 2 * MARGIN
    drawn = element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {width:g} {height:g}",
            "width": ENLARGED * width,
            "height": ENLARGED * height,
        },
        element("style", {}, _style()),
        element("rect", {"class": "ground", "width": width, "height": height}),
        element("text", {"class": "heading", "x": MARGIN, "y": MARGIN + 12}, chart.title),
        element("text", {"class": "unit", "x": MARGIN, "y": MARGIN + 28}, chart.caption),
        element(
            "svg",
            {"x": MARGIN, "y": MARGIN + HEADING, "width": WIDTH, "height": HEIGHT, "overflow": "visible"},
            chart_svg(chart, rounds),
        ),
    )
    return f"{drawn}\n"


@cache
def _style() -> Markup:
    """The page's rules for what is drawn, each colour as it is in the light theme."""
    page = (files("kdpipe.report") / "style.css").read_text(encoding="utf-8")
    colors = dict(re.findall(r"--(\w+): light-dark\((#\w+),", page))
    rules = [line for line in page.splitlines() if line.startswith(("svg .", "svg text"))]
    rules += [
        f"svg {{ font-family: {FONT}; font-variant-numeric: tabular-nums lining-nums; }}",
        ".ground { fill: var(--card); }",
        "svg .heading { font-size: 15px; font-weight: 600; fill: var(--ink); }",
        "svg .unit { font-size: 11.5px; }",
    ]
    light = re.sub(r"var\(--(\w+)\)", lambda match: colors[match[1]], "\n".join(rules))
    return Markup(light)  # noqa: S704 (our own style)
