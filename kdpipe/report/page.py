"""The report as one HTML file that loads nothing.

`page.html.j2` is the page; the values that it shows are prepared here. The policy in its head lets nothing run or apply
but its own script and style, named by their digests, so that markup that slipped in somewhere would do nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from kdpipe import __version__
from kdpipe.pipeline.progress import duration
from kdpipe.report.charts import AROUND, STYLES, charts
from kdpipe.report.figure import (
    Chart,
    Point,
    axis_of,
    chart_svg,
    interval_svg,
    rounds_of,
    shares_svg,
    thinned,
)
from kdpipe.report.tokens_data import Titled, token_data
from kdpipe.results.comparison import ComparisonRow, cells_of, header_of, notes_on
from kdpipe.results.evaluations import Evaluation
from kdpipe.results.measures import Cost, Measures
from kdpipe.results.verdict import delta, model_name, nats, percent, shown, signed, verdict, warnings
from kdpipe.results.visible_text import visible

MAX_BYTES = 3_000_000
MAX_TOKEN_BYTES = 2_300_000
MARGIN_BYTES = 20_000
MAX_TABLE_ROWS = 60
MAX_RECIPE_CHARACTERS = 60_000
MANY = re.compile(r"(pass|maj)_at_[0-9]+")


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
        _template().render,
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


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, Markup) else visible(str(value)),
        loader=PackageLoader("kdpipe.report", ""),
    )
    filters = (duration, embedded, nats, percent, signed)
    environment.filters |= {function.__name__: function for function in filters}
    style, script = _resource("style.css"), _resource("script.js")
    own = {
        "axis_of": axis_of,
        "cells_of": cells_of,
        "header_of": header_of,
        "delta": delta,
        "interval_svg": interval_svg,
        "notes_on": notes_on,
        "policy": f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; "
        "base-uri 'none'; form-action 'none'",
        "script": script,
        "shares_svg": shares_svg,
        "shown": shown,
        "style": style,
        "styles": STYLES,
        "version": __version__,
    }
    return environment.get_template("page.html.j2", globals=own)


def _resource(name: str) -> Markup:
    return Markup((files("kdpipe.report") / name).read_text(encoding="utf-8"))  # noqa: S704 (our own file)


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def embedded(value: object) -> Markup:
    """JSON that can stand inside a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # noqa: S704 (escaped above, as a script element needs it)


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
        "evaluations": measures.shown,
        "several": _several_samples(measures.shown),
        "charts": [(chart, chart_svg(chart, rounds)) for chart in drawn],
        "numbers": _numbers(drawn),
        "readouts": _readouts(drawn),
        "costs": _costs(measures),
        "mismatch": _mismatch(measures),
        "recipe_text": _recipe_text(measures),
        "provenance": [(name, ", ".join(values)) for name, values in measures.provenance().items()],
        "digests": _digests(measures),
    }


def _several_samples(evaluations: Sequence[Evaluation]) -> list[str]:
    """Which pass@k and maj@k there are, where problems were answered several times."""
    names = [name for name in (evaluations[0].summary if evaluations else ()) if MANY.fullmatch(name)]
    return sorted(names, key=lambda name: (name.partition("_")[0] != "pass", int(name.rpartition("_")[2])))


def _costs(measures: Measures) -> list[Cost]:
    """What each stage took, and last what the steps took around them: no step of its own."""
    found = measures.costs()
    if found and (around := measures.seconds_around()):
        found.append(Cost(AROUND, seconds=around))
    return found


def _mismatch(measures: Measures) -> list[tuple[str, ...]]:
    """What sampler and trainer disagree about in the first, worst and last round."""
    mean, p99, most = (measures.by_round(f"train/mismatch_nats_{name}") for name in ("mean", "p99", "max"))
    acted = measures.by_round("train/mismatch_acted_fraction")
    if not most:
        return []
    shown = {"first": min(most), "worst": max(most, key=lambda number: most[number]), "last": max(most)}
    return [
        (name, str(at), power(mean[at], sign="+"), power(p99[at]), power(most[at]), percent(acted[at]))
        for name, at in shown.items()
    ]


def power(value: float, *, sign: str = "") -> str:
    """A small number as a power of ten."""
    return f"{value:{sign}.1e}".replace("-", "−")


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


@dataclass(frozen=True, slots=True)
class Numbers:
    """The points of all charts as one table, of every `step`-th round and the last."""

    step: int
    columns: list[str]
    rows: list[list[str]]


def _numbers(drawn: Sequence[Chart]) -> Numbers:
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
    return Numbers(step, ["round", *names], rows)


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
