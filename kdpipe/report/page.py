"""The report as one HTML file: nothing is loaded, nothing but its own two scripts and one style may run or apply.

The policy in its head names these by their digests, so that markup that slipped in somewhere would do nothing.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from kdpipe import __version__
from kdpipe.recipe.roles import STUDENT
from kdpipe.report.against import against_section
from kdpipe.report.charts import charts
from kdpipe.report.figure import Chart, Series, chart_svg, rounds_of, thinned
from kdpipe.report.headline import headroom_section, verdict_section
from kdpipe.report.ledgers import costs_section, mismatch_section, provenance_section
from kdpipe.report.markup import Html, element, embedded, paragraph, section, table
from kdpipe.report.stamp import NAME as STAMP_NAME
from kdpipe.report.token_view import tokens_section
from kdpipe.report.tokens_data import Titled, token_data
from kdpipe.results.comparison import ComparisonRow
from kdpipe.results.measures import Measures
from kdpipe.results.verdict import model_name

MAX_BYTES = 3_000_000
MAX_TOKEN_BYTES = 2_300_000
MARGIN_BYTES = 20_000
MAX_TABLE_ROWS = 60


def render(
    measures: Measures,
    batches: list[Titled],
    *,
    stamp: str,
    commands: Sequence[str],
    against: Sequence[ComparisonRow] = (),
) -> str:
    """The whole page, below `MAX_BYTES`; `stamp` says what it was made from, `against` has the run's own row first."""
    drawn = charts(measures)
    main = _main(measures, drawn, batches, commands, against)
    frame = _document(measures, main, drawn, None, stamp=stamp)
    room = min(MAX_TOKEN_BYTES, MAX_BYTES - MARGIN_BYTES - len(frame.encode()))
    if not batches:
        return frame
    data = token_data(batches, max_bytes=room)
    return _document(measures, main, drawn, data, stamp=stamp)


def _main(
    measures: Measures,
    drawn: Sequence[Chart],
    batches: Sequence[Titled],
    commands: Sequence[str],
    against: Sequence[ComparisonRow],
) -> Html:
    return element(
        "main",
        {"id": "main"},
        verdict_section(measures),
        headroom_section(measures),
        against_section(against),
        _curves_section(drawn),
        tokens_section(batches),
        costs_section(measures),
        mismatch_section(measures),
        provenance_section(measures, commands),
    )


def _document(
    measures: Measures, main: Html, drawn: Sequence[Chart], data: dict[str, Any] | None, *, stamp: str
) -> str:
    style, script = _resource("style.css"), _resource("script.js")
    policy = (
        f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; "
        "base-uri 'none'; form-action 'none'"
    )
    head = element(
        "head",
        None,
        element("meta", {"charset": "utf-8"}),
        element("meta", {"http-equiv": "Content-Security-Policy", "content": policy}),
        element("meta", {"name": STAMP_NAME, "content": stamp}),
        element("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        element("meta", {"name": "color-scheme", "content": "light dark"}),
        element("title", None, f"{measures.project.run.name} · kdpipe report"),
        element("style", None, Html(style)),
    )
    body = element(
        "body",
        None,
        element("a", {"class": "skip", "href": "#main"}, "To the content"),
        _header(measures),
        main,
        _footer(),
        _json("chart-data", _readouts(drawn)),
        None if data is None else _json("token-data", data),
        element("script", None, Html(script)),
    )
    return f"<!doctype html>\n{element('html', {'lang': 'en'}, head, body).text}\n"


def _json(name: str, value: Any) -> Html:
    return element("script", {"type": "application/json", "id": name}, Html(embedded(value)))


def _resource(name: str) -> str:
    return (files("kdpipe.report") / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _header(measures: Measures) -> Html:
    recipe = measures.project.recipe
    teachers = ", ".join(
        f"{teacher.name}: {model_name(measures, teacher.name)}" for teacher in recipe.teachers
    )
    at = measures.finished_at()
    when = "" if at is None else f" · last step {time.strftime('%Y-%m-%d %H:%M', time.localtime(at))}"
    rounds = f"{measures.rounds_done} of {recipe.rounds} rounds"
    about = f"{recipe.task.kind} · student: {model_name(measures, STUDENT)}" + (
        f" · {teachers}" if teachers else ""
    )
    words = element(
        "div",
        None,
        element("h1", None, measures.project.run.name),
        element("div", {"class": "sub"}, about),
        element("div", {"class": "sub"}, f"{recipe.train.objective.kind} · {rounds}{when}"),
    )
    return element(
        "header", None, words, element("button", {"id": "theme", "type": "button", "hidden": True}, "Dark")
    )


def _footer() -> Html:
    return element(
        "footer",
        None,
        element(
            "p", None, f"kdpipe {__version__}. Made from the artifacts of the run alone; it loads nothing."
        ),
    )


# ----------------------------------------------------------------------------------------------- curves


def _curves_section(drawn: Sequence[Chart]) -> Html:
    if not drawn:
        return section("curves", "Over the rounds", paragraph("No step that measures anything is done yet."))
    rounds = rounds_of(drawn)
    figures = [
        element(
            "figure",
            None,
            element(
                "figcaption",
                None,
                element("h3", None, chart.title),
                element("span", {"class": "unit"}, chart.unit + (f"; {chart.bands}" if chart.bands else "")),
                element("output", {"aria-live": "off"}, ""),
            ),
            chart_svg(chart, rounds),
        )
        for chart in drawn
    ]
    note = (
        "Round 0 is before training. Point at a chart, or focus it and use the arrow keys, "
        "to read all of them at a round."
    )
    return section(
        "curves",
        "Over the rounds",
        paragraph(note, "note"),
        element("div", {"class": "charts"}, *figures),
        _numbers_table(drawn),
    )


def _columns(drawn: Sequence[Chart]) -> list[tuple[str, Chart, Series]]:
    return [
        (f"{chart.title}, {chart.unit}" + (f": {series.label}" if series.label else ""), chart, series)
        for chart in drawn
        for series in chart.series
        if series.points and not series.reference
    ]


def _numbers_table(drawn: Sequence[Chart]) -> Html:
    columns = _columns(drawn)
    rounds = sorted({point.round for _, _, series in columns for point in series.points})
    step = -(-len(rounds) // MAX_TABLE_ROWS)
    kept = [number for index, number in enumerate(rounds) if index % step == 0 or number == rounds[-1]]
    values = [
        {point.round: chart.show(point.value) for point in series.points} for _, chart, series in columns
    ]
    rows = [[str(number), *(column.get(number, "") for column in values)] for number in kept]
    said = "The numbers as a table" + ("" if step == 1 else f" (every {step}th round)")
    region = {"class": "scroll", "tabindex": "0", "role": "region", "aria-label": "The numbers"}
    content = table(("round", *(name for name, _, _ in columns)), rows)
    return element("details", None, element("summary", None, said), element("div", region, content))


def _readouts(drawn: Sequence[Chart]) -> dict[str, Any]:
    """What the cursor says: for each chart its lines as [label, rounds, values as they are written]."""
    return {
        chart.key: [
            [
                series.label,
                [point.round for point in kept],
                [_shown(chart, point.value, point.low, point.high) for point in kept],
            ]
            for series in chart.series
            if (kept := thinned(series.points)) and not series.reference
        ]
        for chart in drawn
    }


def _shown(chart: Chart, value: float, low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return chart.show(value)
    return f"{chart.show(value)} ({chart.show(low)} to {chart.show(high)})"
