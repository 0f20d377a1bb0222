"""A comparison as lines of a terminal, and as a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence

from kdpipe.cli.terminal import aligned
from kdpipe.results.comparison import HEADER, ComparisonRow, cells_of, notes_on


def text_lines(rows: Sequence[ComparisonRow]) -> list[str]:
    """The table in columns, and a sentence for whatever it cannot say."""
    return [*aligned([HEADER, *map(cells_of, rows)]), *notes_on(rows)]


def markdown_lines(rows: Sequence[ComparisonRow]) -> list[str]:
    """The same as a Markdown table, the notes below it."""
    table = [HEADER, *map(cells_of, rows)]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in table]
    lines.insert(1, "|" + "---|" * len(HEADER))
    notes = notes_on(rows)
    return [*lines, *([""] if notes else []), *notes]
