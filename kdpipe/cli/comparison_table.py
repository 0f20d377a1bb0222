"""A comparison as lines of a terminal, and as Markdown tables."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from kdpipe.cli.terminal import COLUMNS, aligned, indented
from kdpipe.results.comparison import ComparisonRow
from kdpipe.results.table import Table, notes_on, tables_of
from kdpipe.results.visible_text import visible


def text_lines(rows: Sequence[ComparisonRow]) -> list[str]:
    """The tables in columns, and a sentence for whatever they cannot say."""
    lines = [line for table in tables_of(rows) for line in (*_columns(table), "")]
    return lines + [line for note in notes_on(rows) for line in indented(_one_line(note), "", "  ")]


def _columns(table: Table) -> list[str]:
    """The table in columns; where they would not fit, what a row is called has lines of its own."""
    cells = [table.columns, *([_one_line(cell) for cell in row] for row in table.rows)]
    lines = aligned(cells)
    if max(map(len, lines)) <= COLUMNS:
        return lines
    below = aligned([("  " if label else "", *others) for label, *others in cells])
    return [
        each
        for (label, *_), line in zip(cells, below, strict=True)
        for each in (*(indented(label, "", "  ") if label else ()), line)
    ]


def markdown_lines(rows: Sequence[ComparisonRow]) -> list[str]:
    """The same as Markdown tables, the notes below them."""
    lines = []
    for table in tables_of(rows):
        cells = [_markdown_row(row) for row in (table.columns, *table.rows)]
        lines += [cells[0], "|" + "---|" * len(table.columns), *cells[1:], ""]
    return lines + [f"* {_literal(note)}" for note in notes_on(rows)]


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_literal, cells)) + " |"


def _one_line(text: str) -> str:
    """A text, such as a prompt that a sweep is over, without its line ends."""
    return " ".join(visible(text).split())


def _literal(text: str) -> str:
    """A text as Markdown that shows it: no cell, HTML, image or emphasis begins in it."""
    return re.sub(r"([\\`*\[\]|~])", r"\\\1", html.escape(_one_line(text), quote=False))
