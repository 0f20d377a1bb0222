"""Charts as SVG: lines lie where their ticks say, text in them is inert, and a file of one stands alone."""

from __future__ import annotations

import re
from typing import Any
from xml.dom.minidom import parseString

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markupsafe import Markup

from kdpipe.method.interval import Interval
from kdpipe.pipeline.headline import ACCURACY, REVERSE_KL
from kdpipe.report.figure import (
    Axis,
    Chart,
    Point,
    Series,
    axis_of,
    axis_svg,
    change_axis,
    chart_svg,
    element,
    figure_file,
    interval_svg,
    thinned,
)
from tests.reports import HIT


def chart(points: list[Point], **changes: Any) -> Chart:
    return Chart("key", "Title", "unit", [Series("", points)], lambda value: f"{value:g}", **changes)


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30))
@example([5e-324])
def test_a_line_stays_inside_its_axes(values: list[float]) -> None:
    svg = chart_svg(chart([Point(n, value) for n, value in enumerate(values)]), (0, max(1, len(values) - 1)))
    [points] = re.findall(r'<polyline class="line s0" points="([^"]*)"', svg)
    for pair in points.split():
        x, y = map(float, pair.split(","))
        assert 45.9 <= x <= 330.1
        assert 9.9 <= y <= 152.1


def test_values_lie_where_their_ticks_say() -> None:
    svg = chart_svg(chart([Point(0, 0.0), Point(10, 1.0)]), (0, 10))
    ticks = {float(text): float(y) - 3.5 for y, text in re.findall(r'x="40" y="([\d.]+)">([\d.]+)<', svg)}
    assert {0.0, 1.0} <= ticks.keys()
    assert 'points="46.0,152.0 330.0,10.0"' in svg
    assert (ticks[0.0], ticks[1.0]) == (152.0, 10.0)


def test_long_runs_are_thinned_to_means_whose_bounds_hold_all() -> None:
    points = [Point(number, float(number % 7)) for number in range(5000)]
    found = thinned(points)
    assert len(found) <= 240
    assert (found[0].low, found[0].high) == (0.0, 6.0)
    assert sum(point.value for point in found) / len(found) == pytest.approx(3, abs=0.02)
    assert thinned(points[:200]) == points[:200]


def test_a_figure_tells_in_words_where_its_line_begins_and_ends() -> None:
    svg = chart_svg(chart([Point(1, 0.5), Point(9, 0.25)]), (0, 9))
    assert "Title: 0.5 in round 1, 0.25 in round 9." in svg
    assert "<title" in svg


def test_an_attribute_cannot_be_left() -> None:
    assert element("p", {"title": '"><script>'}, Markup("<b>ours</b>"), "<i>") == (
        '<p title="&#34;&gt;&lt;script&gt;"><b>ours</b>&lt;i&gt;</p>'
    )


# ---------------------------------------------------------------------------------------- files of their own


def labelled(label: str) -> Chart:
    series = [
        Series(label, [Point(0, 0.25, 0.2, 0.3), Point(3, 0.75, 0.7, 0.8)], style=1, marked=True),
        Series("teacher", [Point(0, 0.9)], style=2, reference=True),
    ]
    return Chart("accuracy", "Held-out accuracy", "share", series, "{:.0%}".format, bands="95% interval")


def test_a_figure_needs_no_page_around_it() -> None:
    text = figure_file(labelled("student"), (0, 3))
    root = parseString(text).documentElement  # well-formed
    assert root.tagName == "svg"
    assert root.getAttribute("xmlns") == "http://www.w3.org/2000/svg"
    assert float(root.getAttribute("width")) > 500
    assert "var(" not in text
    assert not re.search(r"url\(|href|@import|<script", text)
    words = [node.firstChild.data for node in root.getElementsByTagName("text")]
    assert words[:2] == ["Held-out accuracy", "share; 95% interval"]
    assert "round" in words
    assert words[-2:] == ["teacher", "student"]


def test_every_line_of_a_figure_has_a_color_dashes_and_marks_of_its_own() -> None:
    text = figure_file(labelled("student"), (0, 3))
    style = parseString(text).getElementsByTagName("style")[0].firstChild.data
    strokes = dict(re.findall(r"svg \.line\.(s\d),[^{]*{ stroke: (#[0-9a-f]{6}); }", style))
    assert len(strokes) == len(set(strokes.values())) == 4
    dashes = dict(re.findall(r"svg \.line\.(s\d) { stroke-dasharray: ([^;]*); }", style))
    assert len(set(dashes.values())) == 3  # the first one is solid
    level = Interval(0.5, 0.4, 0.6)
    shapes = [interval_svg(level, axis_of(ACCURACY, [level]), style=style) for style in range(4)]
    marks = {re.sub(r"s\d", "", re.findall(r'<\w+ class="dot s\d"[^>]*>', svg)[0]) for svg in shapes}
    assert len(marks) == 4


@pytest.mark.parametrize(
    ("axis", "told"),
    [
        (axis_of(ACCURACY, [Interval(0.1, 0.0, 0.2)]), ["0%", "25%", "50%", "75%", "100%"]),
        (axis_of(REVERSE_KL, [Interval(0.7, 0.6, 0.85)]), ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        (change_axis(ACCURACY, [Interval(0.1, -0.02, 0.2)]), ["−5", "0", "+5", "+10", "+15", "+20"]),
        (change_axis(REVERSE_KL, [Interval(-0.7, -0.8, -0.6)]), ["−0.8", "−0.6", "−0.4", "−0.2", "0"]),
    ],
)
def test_intervals_lie_where_the_ticks_above_them_say(axis: Axis, told: list[str]) -> None:
    ticks = re.findall(r'x="([\d.]+)" y="12">([^<]*)<', axis_svg(axis))
    assert [text for _, text in ticks] == told
    for (x, _), value in zip(ticks, axis.ticks, strict=True):
        drawn = interval_svg(Interval(value, axis.ticks[0], axis.ticks[-1]), axis, style=0)
        assert f'cx="{x}"' in drawn
        assert f'x1="{ticks[0][0]}" x2="{ticks[-1][0]}"' in drawn
    assert (' class="axis"' in drawn) == axis.is_change  # the line of no difference


def test_a_files_colours_are_those_of_the_light_theme() -> None:
    style = figure_file(labelled("student"), (0, 3))
    assert "#ffffff" in re.search(r"\.ground {[^}]*}", style)[0]  # type: ignore[index]


@pytest.mark.parametrize("text", HIT[:-1])
def test_text_in_a_figure_stays_text(text: str) -> None:
    root = parseString(figure_file(labelled(text), (0, 3))).documentElement
    assert {node.tagName for node in root.getElementsByTagName("*")} <= {
        "svg", "style", "rect", "text", "title", "desc", "line", "polyline", "polygon"
    }  # fmt: skip
