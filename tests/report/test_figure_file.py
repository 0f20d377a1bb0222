"""A chart as a file: it stands alone, says what it shows, and text in it is inert."""

from __future__ import annotations

import re
from xml.dom.minidom import parseString

import pytest

from kdpipe.report.figure import Chart, Point, Series, figure_file
from tests.reports import HIT


def chart(label: str) -> Chart:
    series = [
        Series(label, [Point(0, 0.25, 0.2, 0.3), Point(3, 0.75, 0.7, 0.8)], style=1, marked=True),
        Series("teacher", [Point(0, 0.9)], style=2, reference=True),
    ]
    return Chart("accuracy", "Held-out accuracy", "share", series, "{:.0%}".format, bands="95% interval")


def test_a_figure_needs_no_page_around_it() -> None:
    text = figure_file(chart("student"), (0, 3))
    root = parseString(text).documentElement  # well-formed
    assert root.tagName == "svg"
    assert root.getAttribute("xmlns") == "http://www.w3.org/2000/svg"
    assert float(root.getAttribute("width")) > 500
    assert "var(" not in text
    assert not re.search(r"url\(|href|@import|<script", text)
    words = [node.firstChild.data for node in root.getElementsByTagName("text")]
    assert words[:2] == ["Held-out accuracy", "share; 95% interval, over rounds"]
    assert words[-2:] == ["teacher", "student"]


def test_every_line_of_a_figure_has_a_color_of_its_own() -> None:
    text = figure_file(chart("student"), (0, 3))
    style = parseString(text).getElementsByTagName("style")[0].firstChild.data
    strokes = dict(re.findall(r"svg \.line\.(s\d),[^{]*{ stroke: (#[0-9a-f]{6}); }", style))
    assert len(strokes) == len(set(strokes.values())) == 4
    assert "#ffffff" in re.search(r"\.ground {[^}]*}", style)[0]  # type: ignore[index]


@pytest.mark.parametrize("text", HIT[:-1])
def test_text_in_a_figure_stays_text(text: str) -> None:
    root = parseString(figure_file(chart(text), (0, 3))).documentElement
    assert {node.tagName for node in root.getElementsByTagName("*")} <= {
        "svg", "style", "rect", "text", "title", "desc", "line", "polyline", "circle"
    }  # fmt: skip
