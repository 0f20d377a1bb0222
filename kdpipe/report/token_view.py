"""The frame of the token view; the completions in it are data, which the script of the page shows."""

from __future__ import annotations

from collections.abc import Sequence

from kdpipe.report.markup import Html, element, paragraph, section
from kdpipe.report.tokens_data import Titled

EDGES = ("0.1", "0.5", "1.5", "4")
"""Nats from which a shade begins, as in the script."""


def tokens_section(batches: Sequence[Titled]) -> Html:
    """What the script fills with completions: controls, legend, list and tip."""
    title = "Token by token"
    if not batches:
        return section("tokens", title, paragraph("Nothing was sampled yet."))
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
        paragraph("The token view needs JavaScript; kdpipe samples shows the same in a terminal."),
    )
    return section("tokens", title, paragraph(note, "note"), without, viewer)


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
