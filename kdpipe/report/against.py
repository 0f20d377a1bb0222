"""The run of the page beside other runs over the same problems: the table of `kdpipe compare`, drawn."""

from __future__ import annotations

from collections.abc import Sequence

from kdpipe.report.figure import Bar, interval_svg
from kdpipe.report.markup import Html, element, joined, paragraph, section
from kdpipe.results.comparison import HEADER, ComparisonRow, cells_of, notes_on

LABEL, SEEDS, ROUND, ACCURACY, INTERVAL, DIFFERENCE, P_VALUE, TOKENS, SECONDS = range(len(HEADER))


def against_section(rows: Sequence[ComparisonRow]) -> Html | None:
    """A line for each recipe, the page's own first; None where there is nothing to hold it against."""
    if not rows:
        return None
    names = [HEADER[index] for index in (ACCURACY, INTERVAL, DIFFERENCE, P_VALUE, TOKENS, SECONDS)]
    head = element(
        "tr",
        None,
        element("th", {"scope": "col"}, ""),
        element("th", {"scope": "col", "class": "wide"}, "0 to 100%"),
        *(element("th", {"scope": "col"}, name) for name in names),
    )
    lines = [_line(row, is_own=row is rows[0]) for row in rows]
    content = element("table", None, element("thead", None, head), element("tbody", None, *lines))
    note = "Each run counts with its last evaluated student; the first line holds the run of this page."
    return section(
        "against",
        "Against other runs",
        paragraph(note, "note"),
        element("div", {"class": "results scroll"}, content),
        joined([paragraph(sentence, "note") for sentence in notes_on(rows)]),
    )


def _line(row: ComparisonRow, *, is_own: bool) -> Html:
    cells = cells_of(row)
    found = row.accuracy
    spoken = f"{cells[ACCURACY]}, {cells[INTERVAL]}, from 0 to 100 %"
    bar = Bar(found.estimate, found.low, found.high, 1 if is_own else 2)
    runs = ", ".join(one.run for one in row.contenders)
    about = element("div", {"class": "sub"}, f"{runs} · round {cells[ROUND]}")
    return element(
        "tr",
        None,
        element("th", {"scope": "row"}, cells[LABEL], about),
        element("td", {"class": "wide"}, interval_svg(bar, low=0, high=1, label=spoken)),
        element("td", None, cells[ACCURACY]),
        element("td", None, element("span", {"class": "range"}, cells[INTERVAL])),
        *(element("td", None, cells[index]) for index in (DIFFERENCE, P_VALUE, TOKENS, SECONDS)),
    )
