"""What a run's evaluations found, as MLflow shows it: tags, a description, and tables of texts.

In the words of the report. Tags are to compare runs by: each has its interval, so that a column can be read alone.
Tables are the JSON of `mlflow.log_table`: bounded, and with what does not print escaped, as text is data.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

from kdpipe.data.payload import GRADES_FILE, ROLLOUTS_FILE
from kdpipe.data.tables import GRADES, ROLLOUTS, read_rows
from kdpipe.pipeline.headroom import headrooms_of
from kdpipe.recipe.schema import Recipe
from kdpipe.results.evaluations import Evaluation, Evaluations
from kdpipe.results.verdict import delta, interval_text, nats, percent, shown, signed
from kdpipe.results.visible_text import visible
from kdpipe.store.stage import Stage
from kdpipe.tracking.steps import DoneStep

MAX_GRADES = 500
MAX_SAMPLES = 64
MAX_TEXT = 4000
FIRST = ["question", "text"]  # the page aligns runs by the first column and shows the second
OF_GRADES = ("answer", "reward", "correct", "expected")
LAST = ["correct", "expected", "finish_reason", "prompt_id", "sample"]


class Findings(Evaluations):
    """What the evaluations of a run came to."""

    def tags(self, recipe: Recipe) -> dict[str, str]:
        """The tags that can be told so far."""
        found = {}
        if self.before is not None:
            found["student.before"] = _level(self.before)
        if self.after is not None:
            found["student.after"] = f"{_level(self.after)}, round {self.after.round}"
            measure = self.after.headline
            result = self.result(recipe.rounds)
            if (change := self.after.change) is not None and result is not None:
                gain = f"{delta(measure, change.estimate)} {measure.change_unit}"
                interval = f"{interval_text(measure, change)}{self.after.p_text}"
                found["student.gain"] = f"{gain} ({interval}) on {self.after.problems} problems"
                found["result"] = result
            found |= _bounds(self.after, "{}")
        for one in self.teachers:
            found |= _bounds(one, f"teacher.{{}}{_suffix(recipe, one.model)}")
        found |= {f"teacher.accuracy{_suffix(recipe, one.model)}": _level(one) for one in self.teachers}
        first = (one.summary for one in self.evaluations if one.round == 0)
        for headroom in headrooms_of(recipe, first):
            found[f"headroom{_suffix(recipe, headroom.teacher)}"] = headroom.sentence()
        return found

    def note(self, recipe: Recipe) -> str:
        """A few lines of Markdown: the result, and a table of the evaluations."""
        found = self.tags(recipe)
        rows = [(one.label.removesuffix(f" round {one.round}"), one) for one in self.shown]
        lines = [f"**{found['result']}** {found['student.gain']}.", ""] if "result" in found else []
        measure = self.evaluations[0].headline
        levels = [f"{label} {_levels(one)[0]}" for label, one in rows]
        lines += [f"{measure.title[0].upper()}{measure.title[1:]}: {', '.join(levels)}.", ""]
        beside = ["reverse KL, nats a token"] if measure.beside else []
        columns = ("", measure.title, "95% interval", *beside, "cut at the length limit")
        table = [
            _line(columns),
            _line(["---", *["---:"] * (len(columns) - 1)]),
            *(_line(_row(*one)) for one in rows),
        ]
        return "\n".join([*lines, *table, "", "The whole report is the artifact `report.html`."])


def _suffix(recipe: Recipe, teacher: str) -> str:
    """What tells a teacher's tags from those of the others."""
    names = [each.name for each in recipe.teachers]
    return f".{teacher}" if len(names) > 1 and teacher in names else ""


def _level(one: Evaluation) -> str:
    estimate, low, high = _levels(one)
    return f"{estimate}{one.headline.unit} ({low} to {high})"


def _bounds(one: Evaluation, called: str) -> dict[str, str]:
    """Each interval of an evaluation's summary, by the name of what it is of."""
    found = {}
    for name in one.summary:
        of = name.removesuffix("_low")
        if of != name:
            low, high = one.summary[name], one.summary[f"{of}_high"]
            found[f"interval.{called.format(of)}"] = f"{low:.4g} to {high:.4g}, round {one.round}"
    return found


def _levels(one: Evaluation) -> list[str]:
    return [shown(one.headline, value) for value in astuple(one.level)]


def _row(label: str, one: Evaluation) -> list[str]:
    (estimate, low, high), change = _levels(one), one.reverse_kl_change
    divergence = [] if one.headline.beside is None else [one.reverse_kl]
    moved = "" if change is None else f" ({signed(change.estimate)})"
    return [
        label,
        estimate,
        f"{low} to {high}",
        *("" if found is None else f"{nats(found.estimate)}{moved}" for found in divergence),
        percent(one.summary["truncated_fraction"]),
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
    if all(row["correct"] is None for row in rows):
        columns = [name for name in columns if name not in OF_GRADES]
    shown = [[_shown(row[name]) for name in columns] for row in rows[:limit]]
    names = [*("completion" if name == "text" else name for name in columns), "round"]
    document = {"columns": names, "data": [[*row, step.round] for row in shown]}
    return json.dumps(document, allow_nan=False), len(shown), len(rows)


def _shown(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = visible(value)
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 3]}..."
