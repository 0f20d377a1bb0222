"""A comparison as lines of a terminal, and as a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence

from kdpipe.results.comparison import HEADER, ComparisonRow, cells_of, notes_on


def text_lines(rows: Sequence[ComparisonRow]) -> list[str]:
    """The table in columns, and a sentence for whatever it cannot say."""
    table = [HEADER, *(cells_of(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(
            [f"{cells[0]:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(cells[1:], widths[1:], strict=True))]
        ).rstrip()
        for cells in table
    ]
    return [*lines, *notes_on(rows)]


def markdown_lines(rows: Sequence[ComparisonRow]) -> list[str]:
    """The same as a Markdown table, the notes below it."""
    table = [HEADER, *(cells_of(row) for row in rows)]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in table]
    lines.insert(1, "|" + "---|" * len(HEADER))
    notes = notes_on(rows)
    return [*lines, *([""] if notes else []), *notes]
