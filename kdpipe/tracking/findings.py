"""What a run's evaluations found, as MLflow shows it: tags, a description, and tables of texts.

In the words of the report. Tags are to compare runs by: each has its interval, so that a column can be read alone.
Tables are the JSON of `mlflow.log_table`: bounded, and with what does not print escaped, as text is data.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from kdpipe.data.payload import GRADES_FILE, ROLLOUTS_FILE
from kdpipe.data.tables import GRADES, ROLLOUTS, read_rows
from kdpipe.pipeline.requirements import headroom_of
from kdpipe.recipe.schema import Recipe
from kdpipe.results.evaluations import Evaluation, Evaluations
from kdpipe.results.verdict import effect, interval_text, nats, percent, points, signed
from kdpipe.results.visible_text import visible
from kdpipe.store.stage import Stage
from kdpipe.tracking.steps import DoneStep

MAX_GRADES = 500
MAX_SAMPLES = 64
MAX_TEXT = 4000
FIRST = ["question", "text"]  # the page aligns runs by the first column and shows the second
LAST = ["correct", "expected", "finish_reason", "prompt_id", "sample"]


class Findings(Evaluations):
    """What the evaluations of a run came to."""

    def tags(self, recipe: Recipe) -> dict[str, str]:
        """The tags that can be told so far."""
        found = {}
        if self.before is not None:
            found["student.before"] = _accuracy(self.before)
        if self.after is not None:
            summary = self.after.summary
            found["student.after"] = f"{_accuracy(self.after)}, round {summary['round']}"
            if (change := self.after.accuracy_change) is not None:
                gain = f"{points(change.estimate)} points ({interval_text(change)}{self.after.p_text})"
                found["student.gain"] = f"{gain} on {summary['problems']} problems"
                found["result"] = effect(change, self.after.reverse_kl_change)[1]
        teachers = {one.model: one for one in self.teachers}
        for teacher in recipe.teachers:
            if (own := teachers.get(teacher.name)) is not None:
                suffix = "" if len(recipe.teachers) == 1 else f".{teacher.name}"
                found[f"teacher.accuracy{suffix}"] = _accuracy(own)
                found[f"headroom{suffix}"] = headroom_of(teacher, own.summary).sentence()
        return found

    def note(self, recipe: Recipe) -> str:
        """A few lines of Markdown: the result, and a table of the evaluations."""
        found = self.tags(recipe)
        shown = [(one.label.removesuffix(f" round {one.round}"), one) for one in self.shown]
        lines = [f"**{found['result']}** {found['student.gain']}.", ""] if "result" in found else []
        accuracies = [f"{label} {percent(one.accuracy.estimate)}" for label, one in shown]
        lines += [f"Accuracy: {', '.join(accuracies)}.", ""]
        columns = ("", "accuracy", "95% interval", "reverse KL, nats a token", "cut at the length limit")
        table = [
            _line(columns),
            _line(["---", *["---:"] * (len(columns) - 1)]),
            *(_line(_row(*one)) for one in shown),
        ]
        return "\n".join([*lines, *table, "", "The whole report is the artifact `report.html`."])


def _accuracy(summary: Evaluation) -> str:
    found = summary.accuracy
    return f"{percent(found.estimate)} ({percent(found.low)} to {percent(found.high)})"


def _row(label: str, summary: Evaluation) -> list[str]:
    accuracy, divergence, change = summary.accuracy, summary.reverse_kl, summary.reverse_kl_change
    moved = "" if change is None else f" ({signed(change.estimate)})"
    return [
        label,
        percent(accuracy.estimate),
        f"{percent(accuracy.low)} to {percent(accuracy.high)}",
        "" if divergence is None else f"{nats(divergence.estimate)}{moved}",
        percent(summary.summary["truncated_fraction"]),
    ]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def table_of(step: DoneStep) -> tuple[str, int, int]:
    """The table's JSON of a rollout or evaluation, how many rows it has, and of how many.

    Raises ArtifactError on damage.
    """
    if step.stage == Stage.EVALUATE:
        file, schema, limit, more = GRADES_FILE, GRADES, MAX_GRADES, ["answer"]
    else:
        file, schema, limit, more = ROLLOUTS_FILE, ROLLOUTS, MAX_SAMPLES, ["answer", "reward", "source"]
    columns = [*FIRST, *more, *LAST]
    rows = read_rows(step.entry.opened(file) / file, schema, columns=columns)
    shown = [[_shown(row[name]) for name in columns] for row in rows[:limit]]
    names = [*("completion" if name == "text" else name for name in columns), "round"]
    document = {"columns": names, "data": [[*row, step.round] for row in shown]}
    return json.dumps(document, allow_nan=False), len(shown), len(rows)


def _shown(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = visible(value)
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 3]}..."
