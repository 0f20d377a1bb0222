"""A comparison as lines of a terminal, as a Markdown table, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from kdpipe.method.statistics import Interval
from kdpipe.results.comparison import Row

HEADER = (
    "",
    "seeds",
    "round",
    "accuracy",
    "95 % interval",
    "against the first, points",
    "p",
    "tokens",
    "seconds",
)


def text_lines(rows: Sequence[Row]) -> list[str]:
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


def markdown_lines(rows: Sequence[Row]) -> list[str]:
    """The same as a Markdown table, the notes below it."""
    table = [HEADER, *(cells_of(row) for row in rows)]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in table]
    lines.insert(1, "|" + "---|" * len(HEADER))
    notes = notes_on(rows)
    return [*lines, *([""] if notes else []), *notes]


def comparison_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every row with its runs; intervals as {estimate, low, high}."""
    return [
        {
            "label": row.label,
            "accuracy": asdict(row.accuracy),
            "difference": None if row.difference is None else asdict(row.difference),
            "p_value": row.p_value,
            "paired": row.is_paired,
            "seconds": row.seconds,
            "tokens": row.tokens,
            "runs": [
                {
                    "run": one.run,
                    "seed": one.seed,
                    "round": one.round,
                    "problems": len(one.correct),
                    "accuracy": sum(one.correct.values()) / len(one.correct),
                    "seconds": dict(one.seconds),
                    "tokens": dict(one.tokens),
                }
                for one in row.contenders
            ],
        }
        for row in rows
    ]


def cells_of(row: Row) -> tuple[str, ...]:
    """What stands under each word of `HEADER`."""
    rounds = sorted({one.round for one in row.contenders})
    return (
        row.label,
        str(len(row.contenders)),
        "-".join(str(number) for number in dict.fromkeys((rounds[0], rounds[-1]))),
        f"{row.accuracy.estimate:.1%}",
        f"{row.accuracy.low:.1%} to {row.accuracy.high:.1%}",
        "" if row.difference is None else _points(row.difference) + ("" if row.is_paired else " *"),
        "" if row.p_value is None else f"{row.p_value:.2g}",
        f"{row.tokens:,.0f}",
        f"{row.seconds:,.0f}",
    )


def _points(change: Interval) -> str:
    return f"{100 * change.estimate:+.1f} ({100 * change.low:+.1f} to {100 * change.high:+.1f})"


def notes_on(rows: Sequence[Row]) -> list[str]:
    """A sentence for whatever the cells cannot say."""
    notes = []
    if any(not row.is_paired for row in rows):
        notes.append("* other problems than the first row's: two independent groups, not pairs")
    for field in ("evaluate.temperature", "evaluate.samples"):
        found = {one.settings.get(field) for row in rows for one in row.contenders}
        if len(found) > 1:
            notes.append(f"{field} is not the same in all rows: part of a difference may be that")
    if any(len(row.contenders) > 1 for row in rows):
        notes.append("several seeds: mean, with the interval for other seeds and other problems")
    return notes
