"""A comparison as lines of a terminal, and as a Markdown table."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from kdpipe.cli.terminal import aligned
from kdpipe.results.comparison import ComparisonRow, cells_of, header_of, notes_on
from kdpipe.results.visible_text import visible


def text_lines(rows: Sequence[ComparisonRow]) -> list[str]:
    """The table in columns, and a sentence for whatever it cannot say."""
    table = [header_of(rows[0].headline), *([_one_line(cell) for cell in cells_of(row)] for row in rows)]
    return [*aligned(table), *notes_on(rows)]


def markdown_lines(rows: Sequence[ComparisonRow]) -> list[str]:
    """The same as a Markdown table, the notes below it."""
    header = header_of(rows[0].headline)
    table = [header, *map(cells_of, rows)]
    lines = ["| " + " | ".join(map(_literal, cells)) + " |" for cells in table]
    lines.insert(1, "|" + "---|" * len(header))
    notes = notes_on(rows)
    return [*lines, *([""] if notes else []), *notes]


def _one_line(text: str) -> str:
    """A text, such as a prompt that a sweep is over, without its line ends."""
    return " ".join(visible(text).split())


def _literal(text: str) -> str:
    """A text as Markdown that shows it: no cell, HTML, image or emphasis begins in it."""
    return re.sub(r"([\\`*\[\]|~])", r"\\\1", html.escape(_one_line(text), quote=False))
