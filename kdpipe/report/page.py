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
from kdpipe.plan import STUDENT, Stage
from kdpipe.report.charts import charts
from kdpipe.report.figure import (
    Bar,
    Chart,
    Series,
    chart_svg,
    interval_svg,
    rounds_of,
    shares_svg,
    thinned,
)
from kdpipe.report.markup import Html, element, embedded, joined
from kdpipe.report.measures import Cost, Evaluation, Measures, token_totals
from kdpipe.report.stamp import NAME as STAMP_NAME
from kdpipe.report.tokens_data import Titled, token_data
from kdpipe.report.verdict import model_name, nats, percent, points, signed, verdict, warnings
from kdpipe.statistics import Interval

MAX_BYTES = 3_000_000
MAX_TOKEN_BYTES = 2_300_000
MARGIN_BYTES = 20_000
MAX_TABLE_ROWS = 60
MAX_RECIPE_CHARACTERS = 60_000
COLOURS: dict[Stage, int] = {"rollout": 0, "teacher-score": 1, "train": 2, "evaluate": 3, "sft": 4}
"""As in the charts."""
EDGES = ("0.1", "0.5", "1.5", "4")


def render(measures: Measures, batches: list[Titled], *, stamp: str, commands: Sequence[str]) -> str:
    """The whole page, below `MAX_BYTES`; `stamp` says what it was made from."""
    drawn = charts(measures)
    main = _main(measures, drawn, batches, commands)
    frame = _document(measures, main, drawn, None, stamp=stamp)
    room = min(MAX_TOKEN_BYTES, MAX_BYTES - MARGIN_BYTES - len(frame.encode()))
    if not batches:
        return frame
    data = token_data(batches, headline=measures.project.recipe.task.headline, max_bytes=room)
    return _document(measures, main, drawn, data, stamp=stamp)


def _main(
    measures: Measures, drawn: Sequence[Chart], batches: Sequence[Titled], commands: Sequence[str]
) -> Html:
    return element(
        "main",
        {"id": "main"},
        _verdict_section(measures),
        _headroom_section(measures),
        _curves_section(drawn),
        _tokens_section(batches),
        _costs_section(measures),
        _mismatch_section(measures),
        _provenance_section(measures, commands),
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


def _section(name: str, title: str, *children: Html | None) -> Html:
    heading = element("h2", {"id": f"{name}-title"}, title)
    return element("section", {"id": name, "aria-labelledby": f"{name}-title"}, heading, *children)


def _paragraph(text: str, name: str | None = None) -> Html:
    return element("p", {"class": name}, text)


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


# --------------------------------------------------------------------------------------------- verdict


def _verdict_section(measures: Measures) -> Html:
    found = verdict(measures)
    weak = warnings(measures)
    return element(
        "section",
        {"id": "verdict", "aria-label": "Verdict"},
        element(
            "div", {"class": f"verdict {found.tone}", "role": "heading", "aria-level": "2"}, found.headline
        ),
        joined([_paragraph(sentence, "lead") for sentence in found.sentences]),
        _results(measures),
        element(
            "div",
            {"class": "warnings"},
            element("h3", None, "Before you believe it"),
            element("ul", None, *(element("li", None, text) for text in weak)),
        )
        if weak
        else None,
    )


def _results(measures: Measures) -> Html | None:
    shown = [one for one in (measures.before, measures.after) if one is not None] + measures.teachers
    if not shown:
        return None
    head = element(
        "tr",
        None,
        *(
            element("th", {"scope": "col", "class": name}, text)
            for text, name in (
                ("", None),
                ("0 to 100%", "wide"),
                ("accuracy", None),
                ("95% interval", None),
                ("reverse KL, nats", None),
                ("cut", None),
            )
        ),
    )
    rows = [_result_row(one) for one in shown]
    after = measures.after
    if after is not None and after.accuracy_change is not None:
        rows.append(_change_row(after, after.accuracy_change))
    table = element("table", None, element("thead", None, head), element("tbody", None, *rows))
    return element("div", {"class": "results scroll"}, table)


def _result_row(one: Evaluation) -> Html:
    style = 1 if one.is_student else 2
    accuracy, divergence = one.accuracy, one.reverse_kl
    spoken = (
        f"{percent(accuracy.estimate)}, {percent(accuracy.low)} to {percent(accuracy.high)}, from 0 to 100 %"
    )
    bar = interval_svg(
        Bar(accuracy.estimate, accuracy.low, accuracy.high, style), low=0, high=1, label=spoken
    )
    return element(
        "tr",
        None,
        element("th", {"scope": "row"}, one.label),
        element("td", {"class": "wide"}, bar),
        element("td", None, percent(accuracy.estimate)),
        element("td", None, _range(f"{percent(accuracy.low)} to {percent(accuracy.high)}")),
        element("td", None, "" if divergence is None else nats(divergence.estimate), _between(divergence)),
        element("td", None, percent(one.summary["truncated_fraction"])),
    )


def _range(text: str) -> Html:
    return element("span", {"class": "range"}, text)


def _between(interval: Interval | None) -> Html | None:
    return None if interval is None else _range(f"  ({nats(interval.low)} to {nats(interval.high)})")


def _change_row(after: Evaluation, change: Interval) -> Html:
    divergence = after.reverse_kl_change
    return element(
        "tr",
        None,
        element("th", {"scope": "row"}, "paired difference"),
        element("td", {"class": "wide"}, ""),
        element("td", None, f"{points(change.estimate)} pt"),
        element("td", None, _range(f"{points(change.low)} to {points(change.high)}")),
        element(
            "td",
            None,
            *(
                (
                    signed(divergence.estimate),
                    _range(f"  ({signed(divergence.low)} to {signed(divergence.high)})"),
                )
                if divergence is not None
                else ()
            ),
        ),
        element("td", None, ""),
    )


# --------------------------------------------------------------------------------------------- headroom


def _headroom_section(measures: Measures) -> Html:
    recipe = measures.project.recipe
    note = (
        "How much better the teacher is than the student was before training, on the same problems: more than this "
        "the student can hardly gain from it."
    )
    if not recipe.train.objective.has_kd:
        return _section("headroom", "Headroom", _paragraph("This recipe distils from no teacher.", "note"))
    found = measures.headrooms
    if not found:
        told = (
            "No teacher was evaluated: evaluate.teacher is off."
            if not recipe.evaluate.teacher
            else "No teacher is evaluated yet."
        )
        return _section("headroom", "Headroom", _paragraph(note, "note"), _paragraph(told))
    rows = [
        element(
            "p",
            None,
            element("b", None, headroom.teacher),
            f": {headroom.sentence()}.".replace(" %", "%"),
            f" {_gate(measures, headroom.stops, headroom.exempt)}",
        )
        for headroom in found
    ]
    return _section("headroom", "Headroom", _paragraph(note, "note"), joined(rows))


def _gate(measures: Measures, stops: bool, exempt: str | None) -> str:
    if exempt is not None:
        return "The gate before round 1 does not ask it to be better."
    if not stops:
        return "It passed the gate before round 1."
    if measures.project.recipe.runtime.allow_weak_teacher:
        return "It did not pass the gate before round 1; runtime.allow_weak_teacher let the run go on."
    return "It did not pass the gate: a run stops before round 1."


# ----------------------------------------------------------------------------------------------- curves


def _curves_section(drawn: Sequence[Chart]) -> Html:
    if not drawn:
        return _section(
            "curves", "Over the rounds", _paragraph("No step that measures anything is done yet.")
        )
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
    return _section(
        "curves",
        "Over the rounds",
        _paragraph(note, "note"),
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
    head = element(
        "tr",
        None,
        element("th", {"scope": "col"}, "round"),
        *(element("th", {"scope": "col", "class": "head"}, name) for name, _, _ in columns),
    )
    rows = [
        element(
            "tr",
            None,
            element("th", {"scope": "row"}, str(number)),
            *(element("td", None, column.get(number, "")) for column in values),
        )
        for number in kept
    ]
    said = "The numbers as a table" + ("" if step == 1 else f" (every {step}th round)")
    table = element("table", None, element("thead", None, head), element("tbody", None, *rows))
    return element(
        "details",
        None,
        element("summary", None, said),
        element(
            "div", {"class": "scroll", "tabindex": "0", "role": "region", "aria-label": "The numbers"}, table
        ),
    )


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


# ------------------------------------------------------------------------------------------------ tokens


def _tokens_section(batches: Sequence[Titled]) -> Html:
    title = "Token by token"
    if not batches:
        return _section("tokens", title, _paragraph("Nothing was sampled yet."))
    note = (
        "Each token is shaded by what it adds to the reverse KL: the student's log-prob less the teacher's. "
        "Hover it, or focus it with Tab and go on with the arrow keys, for both numbers and, where they are kept, "
        "the teacher's own choices."
    )
    viewer = element(
        "div",
        {"id": "viewer", "hidden": True},
        _controls(),
        _legend(),
        element("p", {"id": "set-note", "class": "note"}, ""),
        element("p", {"id": "count", "aria-live": "polite"}, ""),
        element("div", {"id": "list"}, ""),
        element("button", {"id": "more", "type": "button", "hidden": True}, "Show more"),
        element("div", {"id": "tip", "role": "tooltip", "hidden": True}, ""),
    )
    without = element(
        "noscript",
        None,
        _paragraph("The token view needs JavaScript; kdpipe samples shows the same in a terminal."),
    )
    return _section("tokens", title, _paragraph(note, "note"), without, viewer)


def _controls() -> Html:
    filters = [
        element(
            "button",
            {"type": "button", "data-filter": name, "aria-pressed": "false"},
            name.capitalize(),
            element("span", {"class": "number"}, ""),
        )
        for name in ("all", "right", "wrong", "truncated", "flipped")
    ]
    orders = {
        "worst": "largest disagreement",
        "mean": "mean reverse KL",
        "long": "length",
        "order": "order in the table",
    }
    options = [element("option", {"value": key}, text) for key, text in orders.items()]
    return element(
        "div",
        {"class": "controls"},
        element("div", {"id": "sets", "role": "group", "aria-label": "Which completions"}, ""),
        element("div", {"id": "filters", "role": "group", "aria-label": "Filter"}, *filters),
        element("label", None, "by ", element("select", {"id": "sort"}, *options)),
        element(
            "label",
            None,
            element(
                "input",
                {
                    "type": "search",
                    "id": "search",
                    "placeholder": "Search",
                    "aria-label": "Search in the completions",
                },
            ),
        ),
    )


def _legend() -> Html:
    more = [element("span", {"class": f"p{index + 1}"}, f"+{edge}") for index, edge in enumerate(EDGES)]
    less = [
        element("span", {"class": f"n{index + 1}"}, f"−{edge}")
        for index, edge in reversed(list(enumerate(EDGES)))
    ]
    return element(
        "div",
        {"class": "legend"},
        element("span", None, "teacher more sure"),
        element("span", {"class": "scale"}, *less, element("span", None, "0"), *more),
        element("span", None, "student more sure; nats from which a shade begins"),
    )


# ------------------------------------------------------------------------------------------------- costs


def _costs_section(measures: Measures) -> Html:
    costs = measures.costs()
    if not costs:
        return _section("costs", "Where the time and the tokens went", _paragraph("No step is done yet."))
    around = measures.seconds_around()
    shares: list[tuple[str, float, int]] = [(cost.stage, cost.seconds, COLOURS[cost.stage]) for cost in costs]
    shares += [("loading and saving", around, 5)] if around else []
    total = sum(value for _, value, _ in shares)
    rows = [_cost_row(cost, total) for cost in costs]
    if around:
        key = element("span", {"class": "key s5"}, "")
        cells = ("", duration(around), f"{around / total:.0%}", "", "")
        rows.append(
            element(
                "tr",
                None,
                element("th", {"scope": "row"}, key, "loading and saving around them"),
                *(element("td", None, cell) for cell in cells),
            )
        )
    rows.append(
        element(
            "tr",
            None,
            element("th", {"scope": "row"}, "together"),
            *(
                element("td", None, cell)
                for cell in (
                    str(sum(cost.steps for cost in costs)),
                    duration(total),
                    "",
                    f"{token_totals(costs):,.0f}",
                    "",
                )
            ),
        )
    )
    names = ("stage", "steps", "time", "share", "tokens", "tokens a second")
    head = element("tr", None, *(element("th", {"scope": "col"}, name) for name in names))
    table = element("table", None, element("thead", None, head), element("tbody", None, *rows))
    note = "A token counts in every stage that handles it. Steps reused from another run count what they took there."
    return _section(
        "costs",
        "Where the time and the tokens went",
        _paragraph(note, "note"),
        shares_svg(shares, label="; ".join(f"{name} {value / total:.0%}" for name, value, _ in shares)),
        element("div", {"class": "scroll"}, table),
    )


def _cost_row(cost: Cost, total: float) -> Html:
    rate = f"{cost.tokens / cost.seconds:,.0f}" if cost.seconds and cost.tokens else ""
    cells = (
        str(cost.steps),
        duration(cost.seconds),
        f"{cost.seconds / total:.0%}" if total else "",
        f"{cost.tokens:,.0f}",
        rate,
    )
    return element(
        "tr",
        None,
        element(
            "th", {"scope": "row"}, element("span", {"class": f"key s{COLOURS[cost.stage]}"}, ""), cost.stage
        ),
        *(element("td", None, cell) for cell in cells),
    )


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


# ---------------------------------------------------------------------------------------------- mismatch


def _mismatch_section(measures: Measures) -> Html:
    title = "Sampler against trainer"
    names = ("mean", "p99", "max", "acted_fraction")
    found = {
        name: measures.by_round(f"train/mismatch_{'nats_' if name != 'acted_fraction' else ''}{name}")
        for name in names
    }
    if not found["max"]:
        return _section(
            "mismatch", title, _paragraph("No round was trained on the student's own samples yet.")
        )
    note = (
        "The same weights twice: the log-probs that the sampler gave its tokens, less those that the trainer "
        "computes for them before the first update. It is all the engines' doing, and should be far below the KL."
    )
    rounds = sorted(found["max"])
    worst = max(rounds, key=lambda number: found["max"][number])
    shown = {"first": rounds[0], "worst": worst, "last": rounds[-1]}
    head = element(
        "tr",
        None,
        *(
            element("th", {"scope": "col"}, name)
            for name in ("", "round", "mean, nats", "p99", "largest", "tokens that a control acts on")
        ),
    )
    rows = [
        element(
            "tr",
            None,
            element("th", {"scope": "row"}, name),
            element("td", None, str(number)),
            *(
                element(
                    "td",
                    None,
                    f"{found[column].get(number, 0.0):+.1e}".replace("-", "−")
                    if column == "mean"
                    else f"{found[column].get(number, 0.0):.1e}".replace("-", "−"),
                )
                for column in names[:3]
            ),
            element("td", None, percent(found["acted_fraction"].get(number, 0.0))),
        )
        for name, number in shown.items()
    ]
    table = element("table", None, element("thead", None, head), element("tbody", None, *rows))
    return _section("mismatch", title, _paragraph(note, "note"), element("div", {"class": "scroll"}, table))


# -------------------------------------------------------------------------------------------- provenance


def _provenance_section(measures: Measures, commands: Sequence[str]) -> Html:
    loaded = measures.project.loaded
    overrides = "".join(f"\n# --set {override}" for override in loaded.overrides)
    text = (
        loaded.text
        if len(loaded.text) <= MAX_RECIPE_CHARACTERS
        else loaded.text[:MAX_RECIPE_CHARACTERS] + "\n# ..."
    )
    facts = [(name, ", ".join(values)) for name, values in measures.provenance().items()]
    digests = [
        (step.id, measures.manifests[step.id].payload_digest)
        for step in measures.done
        if step.round in (0, measures.rounds_done) and step.id in measures.manifests
    ]
    return _section(
        "provenance",
        "Recipe and provenance",
        _paragraph(
            "The same recipe, models and data give the same artifacts: with the hf engine on one machine, to the byte.",
            "note",
        ),
        element("pre", None, "\n".join(commands)),
        _details("The recipe", element("pre", None, f"{text.rstrip()}{overrides}"), opened=False),
        _details("What it was made with", _facts(facts), opened=False),
        _details(
            f"Digests of round 0 and round {measures.rounds_done}", _facts(digests, mono=True), opened=False
        ),
    )


def _details(title: str, content: Html, *, opened: bool) -> Html:
    return element("details", {"class": "print", "open": opened}, element("summary", None, title), content)


def _facts(facts: Sequence[tuple[str, str]], *, mono: bool = False) -> Html:
    name = "mono" if mono else None
    return element(
        "dl",
        None,
        *(joined([element("dt", None, key), element("dd", {"class": name}, value)]) for key, value in facts),
    )
