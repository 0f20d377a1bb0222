"""A chart as an SVG file that stands alone: with its title, on a light ground, in the colours of the page's style."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files

from kdpipe.report.figure import HEIGHT, WIDTH, Chart, chart_svg
from kdpipe.report.markup import Html, element

HEADING = 44.0
MARGIN = 14.0
SCALE = 2.0
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif'


def figure_file(chart: Chart, rounds: tuple[int, int]) -> str:
    """The text of the file. A viewer that knows nothing of the page shows it as the page does in its light theme."""
    width, height = WIDTH + 2 * MARGIN, HEIGHT + HEADING + 2 * MARGIN
    unit = chart.unit + (f"; {chart.bands}" if chart.bands else "")
    drawn = element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {width:g} {height:g}",
            "width": SCALE * width,
            "height": SCALE * height,
        },
        element("style", None, Html(_style())),
        element("rect", {"class": "ground", "width": width, "height": height}),
        element("text", {"class": "heading", "x": MARGIN, "y": MARGIN + 12}, chart.title),
        element("text", {"class": "unit", "x": MARGIN, "y": MARGIN + 28}, f"{unit}, over rounds"),
        element(
            "svg",
            {"x": MARGIN, "y": MARGIN + HEADING, "width": WIDTH, "height": HEIGHT, "overflow": "visible"},
            chart_svg(chart, rounds),
        ),
    )
    return f"{drawn.text}\n"


@cache
def _style() -> str:
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
    return re.sub(r"var\(--(\w+)\)", lambda match: colors[match[1]], "\n".join(rules))
