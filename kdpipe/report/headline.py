"""The top of the page: verdict, evaluations side by side, warnings, headroom."""

from __future__ import annotations

import re

from kdpipe.method.statistics import Interval
from kdpipe.report.figure import Bar, interval_svg
from kdpipe.report.markup import Html, element, joined, paragraph, section, table
from kdpipe.results.measures import Evaluation, Measures
from kdpipe.results.verdict import nats, percent, points, signed, verdict, warnings

MANY = re.compile(r"(pass|maj)_at_[0-9]+")


def verdict_section(measures: Measures) -> Html:
    """The verdict in words, the evaluations side by side, and what weakens them."""
    found = verdict(measures)
    weak = warnings(measures)
    return element(
        "section",
        {"id": "verdict", "aria-label": "Verdict"},
        element(
            "div", {"class": f"verdict {found.tone}", "role": "heading", "aria-level": "2"}, found.headline
        ),
        joined([paragraph(sentence, "lead") for sentence in found.sentences]),
        _results(measures),
        _several_samples(measures),
        element(
            "div",
            {"class": "warnings"},
            element("h3", None, "Before you believe it"),
            element("ul", None, *(element("li", None, text) for text in weak)),
        )
        if weak
        else None,
    )


def _shown(measures: Measures) -> list[Evaluation]:
    """Student before and after, then the teachers."""
    return [one for one in (measures.before, measures.after) if one is not None] + measures.teachers


def _several_samples(measures: Measures) -> Html | None:
    """pass@k and maj@k, where problems were answered several times."""
    shown = _shown(measures)
    names = [name for name in (shown[0].summary if shown else ()) if MANY.fullmatch(name)]
    names.sort(key=lambda name: (name.partition("_")[0] != "pass", int(name.rpartition("_")[2])))
    if not names:
        return None
    rows = [
        [
            one.label,
            *(
                f"{percent(found.estimate)} ({percent(found.low)} to {percent(found.high)})"
                if (found := one.interval(name)) is not None
                else ""
                for name in names
            ),
        ]
        for one in shown
    ]
    columns = ("", *(name.replace("_at_", "@") for name in names))
    return element("div", {"class": "scroll"}, table(columns, rows))


def _results(measures: Measures) -> Html | None:
    shown = _shown(measures)
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
    content = element("table", None, element("thead", None, head), element("tbody", None, *rows))
    return element("div", {"class": "results scroll"}, content)


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


def headroom_section(measures: Measures) -> Html:
    """How much better each teacher was than student 0, and how the gate before round 1 took it."""
    recipe = measures.project.recipe
    note = (
        "How much better the teacher is than the student was before training, on the same problems: more than this "
        "the student can hardly gain from it."
    )
    if not recipe.train.objective.has_kd:
        return section("headroom", "Headroom", paragraph("This recipe distils from no teacher.", "note"))
    found = measures.headrooms
    if not found:
        told = (
            "No teacher was evaluated: evaluate.teacher is off."
            if not recipe.evaluate.teacher
            else "No teacher is evaluated yet."
        )
        return section("headroom", "Headroom", paragraph(note, "note"), paragraph(told))
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
    return section("headroom", "Headroom", paragraph(note, "note"), joined(rows))


def _gate(measures: Measures, stops: bool, exempt: str | None) -> str:
    if exempt is not None:
        return "The gate before round 1 does not ask it to be better."
    if not stops:
        return "It passed the gate before round 1."
    if measures.project.recipe.runtime.allow_weak_teacher:
        return "It did not pass the gate before round 1; runtime.allow_weak_teacher let the run go on."
    return "It did not pass the gate: a run stops before round 1."
