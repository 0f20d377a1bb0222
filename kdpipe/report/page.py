"""The report as one HTML file that loads nothing: `page.html.j2`, whose values are prepared here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from kdpipe.report.charts import charts, zero_charts
from kdpipe.report.figure import Chart, Point, chart_svg, rounds_of, thinned
from kdpipe.report.tables import (
    costs_table,
    evaluations_table,
    mismatch_table,
    samples_table,
)
from kdpipe.report.template import template
from kdpipe.report.tokens_data import Titled, token_data
from kdpipe.results.comparison import ComparisonRow
from kdpipe.results.measures import Measures
from kdpipe.results.table import Table
from kdpipe.results.verdict import model_name, verdict, warnings

MAX_BYTES = 3_000_000
MAX_TOKEN_BYTES = 2_300_000
MARGIN_BYTES = 20_000
MAX_TABLE_ROWS = 60
MAX_RECIPE_CHARACTERS = 60_000


def render(
    measures: Measures,
    sets: Sequence[Titled],
    *,
    stamp: str,
    commands: Sequence[str],
    against: Sequence[ComparisonRow] = (),
) -> str:
    """The whole page, below `MAX_BYTES`.

    `stamp` says what it was made from, `commands` make the run again, `against` has the run's own row first.
    """
    drawn = charts(measures)
    page = partial(
        template("page").render,
        _shown(measures, drawn),
        stamp=stamp,
        commands=commands,
        sets=sets,
        against=against,
    )
    frame = page(tokens=None)
    if not sets:
        return frame
    room = min(MAX_TOKEN_BYTES, MAX_BYTES - MARGIN_BYTES - len(frame.encode()))
    return page(tokens=token_data(sets, max_bytes=room))


def _shown(measures: Measures, drawn: Sequence[Chart]) -> dict[str, object]:
    """The names that the template knows."""
    rounds = rounds_of(drawn)
    finished = measures.finished_at()
    return {
        "measures": measures,
        "project": measures.project,
        "recipe": measures.project.recipe,
        "finished": None if finished is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(finished)),
        "model_name": partial(model_name, measures),
        "verdict": verdict(measures),
        "warnings": warnings(measures),
        "results": evaluations_table(measures) if measures.shown else None,
        "samples": samples_table(measures.shown),
        "words": _words(measures),
        "charts": [(chart, chart_svg(chart, rounds)) for chart in drawn],
        "numbers": _numbers(drawn),
        "readouts": _readouts(drawn),
        "zero": zero_charts(measures),
        "costs": costs_table(measures),
        "mismatch": mismatch_table(measures),
        "recipe_text": _recipe_text(measures),
        "provenance": [(name, ", ".join(values)) for name, values in measures.provenance().items()],
        "digests": _digests(measures),
    }


def _words(measures: Measures) -> list[str]:
    """The terms of the results."""
    several = samples_table(measures.shown) is not None
    graded = (
        ["accuracy", *(["pass@k", "maj@k"] if several else [])] if measures.project.recipe.is_graded else []
    )
    return [*graded, "95% interval", "paired difference", "reverse KL", "held out", "nats", "truncated"]


def _recipe_text(measures: Measures) -> str:
    loaded = measures.project.loaded
    text = loaded.text
    if len(text) > MAX_RECIPE_CHARACTERS:
        text = text[:MAX_RECIPE_CHARACTERS] + "\n# ..."
    return text.rstrip() + "".join(f"\n# --set {override}" for override in loaded.overrides)


def _digests(measures: Measures) -> list[tuple[str, str]]:
    return [
        (step.id, measures.manifests[step.id].payload_digest)
        for step in measures.done
        if step.round in (0, measures.rounds_done) and step.id in measures.manifests
    ]


def _numbers(drawn: Sequence[Chart]) -> tuple[Table, int]:
    """The points of all charts as one table, of every so manieth round and the last; and of which."""
    lines = [
        (chart, series)
        for chart in drawn
        for series in chart.series
        if series.points and not series.reference
    ]
    rounds = sorted({point.round for _, series in lines for point in series.points})
    step = -(-len(rounds) // MAX_TABLE_ROWS)
    kept = [number for index, number in enumerate(rounds) if index % step == 0 or number == rounds[-1]]
    values = [{point.round: chart.show(point.value) for point in series.points} for chart, series in lines]
    names = [
        f"{chart.title}, {chart.unit}" + (f": {series.label}" if series.label else "")
        for chart, series in lines
    ]
    rows = [[str(number), *(column.get(number, "") for column in values)] for number in kept]
    return Table(["round", *names], rows), step


def _readouts(drawn: Sequence[Chart]) -> dict[str, object]:
    """What the cursor says: for each chart its lines as [label, rounds, values as they are written]."""
    return {
        chart.key: [
            [series.label, [point.round for point in kept], [_shown_point(chart, point) for point in kept]]
            for series in chart.series
            if (kept := thinned(series.points)) and not series.reference
        ]
        for chart in drawn
    }


def _shown_point(chart: Chart, point: Point) -> str:
    if point.low is None or point.high is None:
        return chart.show(point.value)
    return f"{chart.show(point.value)} ({chart.show(point.low)} to {chart.show(point.high)})"
