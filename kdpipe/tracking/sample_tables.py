"""Texts and their grades as MLflow tables: the JSON that `mlflow.log_table` writes, made whole and not appended to.

What is shown is bounded, and tags of the run say how much of it that is. Text is data: characters that do not print
are written out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from kdpipe.data.payload import GRADES_FILE, ROLLOUTS_FILE
from kdpipe.data.tables import GRADES, ROLLOUTS, read_rows
from kdpipe.results.visible_text import visible
from kdpipe.store.step import Stage
from kdpipe.tracking.contents import DoneStep

MAX_GRADES = 500
MAX_SAMPLES = 64
MAX_TEXT = 4000
FIRST = ["question", "text"]  # by the first column the page puts runs side by side, and shows the second
LAST = ["correct", "expected", "finish_reason", "prompt_id", "sample"]


@dataclass(frozen=True, slots=True)
class Table:
    """A table's JSON, how many rows it has, and of how many they are the first."""

    text: str
    rows: int
    of: int


def table_of(step: DoneStep, headline: str) -> Table:
    """The table of a step that has one; `headline` says which answer is graded. Raises ArtifactError on damage."""
    answer = f"answer_{headline}"
    if step.document["stage"] == Stage.EVALUATE:
        file, schema, limit, more = GRADES_FILE, GRADES, MAX_GRADES, [answer]
    else:
        file, schema, limit, more = ROLLOUTS_FILE, ROLLOUTS, MAX_SAMPLES, [answer, "reward", "source"]
    columns = [*FIRST, *more, *LAST]
    rows = read_rows(step.entry.opened(file) / file, schema, columns=columns)
    shown = [[_cell(row[name]) for name in columns] for row in rows[:limit]]
    names = [*("completion" if name == "text" else name for name in columns), "round"]
    document = {"columns": names, "data": [[*row, step.round] for row in shown]}
    return Table(json.dumps(document, allow_nan=False), len(shown), len(rows))


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = visible(value)
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 3]}..."
