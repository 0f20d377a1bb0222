"""Texts and their grades as MLflow tables: the JSON of `mlflow.log_table`, written whole.

The number of rows is bounded, and tags of the run say how many of all it shows. Characters that do not print are
escaped: text is data.
"""

from __future__ import annotations

import json
from typing import Any

from kdpipe.data.payload import GRADES_FILE, ROLLOUTS_FILE
from kdpipe.data.tables import GRADES, ROLLOUTS, read_rows
from kdpipe.results.visible_text import visible
from kdpipe.store.stage import Stage
from kdpipe.tracking.steps import DoneStep

MAX_GRADES = 500
MAX_SAMPLES = 64
MAX_TEXT = 4000
FIRST = ["question", "text"]  # the page aligns runs by the first column and shows the second
LAST = ["correct", "expected", "finish_reason", "prompt_id", "sample"]


def table_of(step: DoneStep, headline: str) -> tuple[str, int, int]:
    """The table's JSON of a rollout or evaluation, how many rows it has, and of how many.

    `headline` says which answer is graded. Raises ArtifactError on damage.
    """
    answer = f"answer_{headline}"
    if step.stage == Stage.EVALUATE:
        file, schema, limit, more = GRADES_FILE, GRADES, MAX_GRADES, [answer]
    else:
        file, schema, limit, more = ROLLOUTS_FILE, ROLLOUTS, MAX_SAMPLES, [answer, "reward", "source"]
    columns = [*FIRST, *more, *LAST]
    rows = read_rows(step.entry.opened(file) / file, schema, columns=columns)
    shown = [[_cell(row[name]) for name in columns] for row in rows[:limit]]
    names = [*("completion" if name == "text" else name for name in columns), "round"]
    document = {"columns": names, "data": [[*row, step.round] for row in shown]}
    return json.dumps(document, allow_nan=False), len(shown), len(rows)


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = visible(value)
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 3]}..."
