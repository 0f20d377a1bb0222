"""The evaluations of a project as their summaries have them, read without numpy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kdpipe.method.interval import Interval
from kdpipe.pipeline.project import Project, summary_of
from kdpipe.recipe.roles import STUDENT
from kdpipe.store.stage import Stage
from kdpipe.store.step import Fields, Step


@dataclass(frozen=True, slots=True)
class Evaluation:
    """An evaluation's summary.json."""

    summary: Mapping[str, Any]

    def interval(self, *names: str, unit: str = "") -> Interval | None:
        """The first of these that it has."""
        found = self.summary
        for name in names:
            if f"{name}{unit}" in found:
                return Interval(found[f"{name}{unit}"], found[f"{name}_low"], found[f"{name}_high"])
        return None

    @property
    def accuracy(self) -> Interval:
        """With Wilson's interval."""
        return Interval(*(self.summary[f"accuracy{bound}"] for bound in ("", "_low", "_high")))

    @property
    def p_text(self) -> str:
        """McNemar's p-value of the difference to student 0, as the end of a sentence."""
        value = self.summary.get("accuracy_change_p_value")
        return "" if value is None else f", McNemar p = {value:.2g}"

    @property
    def accuracy_change(self) -> Interval | None:
        """The paired difference to student 0."""
        return self.interval("accuracy_change")

    @property
    def reverse_kl(self) -> Interval | None:
        """The held-out reverse KL in nats a token, from whole distributions where they were at hand."""
        return self.interval("reverse_kl_exact", "reverse_kl", unit="_nats")

    @property
    def reverse_kl_change(self) -> Interval | None:
        """Its paired difference to student 0."""
        return self.interval("reverse_kl_exact_change", "reverse_kl_change", unit="_nats")

    @property
    def model(self) -> str:
        return str(self.summary["model"])

    @property
    def round(self) -> int:
        return int(self.summary["round"])

    @property
    def is_student(self) -> bool:
        return self.model == STUDENT

    @property
    def label(self) -> str:
        """What to call the model."""
        if not self.is_student:
            return self.model
        return f"student after round {self.round}" if self.round else "student before"


def summaries_of(project: Project, steps: Iterable[Step]) -> list[Fields]:
    """Those of the evaluations among these steps that are done, in their order."""
    found = [summary_of(project, step.id) for step in steps if step.stage == Stage.EVALUATE]
    return [summary for summary in found if summary is not None]


class Evaluations:
    """The evaluations of a run in the order of the plan."""

    def __init__(self, summaries: Iterable[Mapping[str, Any]]) -> None:
        self.evaluations = [Evaluation(one) for one in summaries]

    @property
    def before(self) -> Evaluation | None:
        """That of student 0."""
        return next((one for one in self.evaluations if one.is_student and one.round == 0), None)

    @property
    def after(self) -> Evaluation | None:
        """The last one of a trained student."""
        trained = (one for one in self.evaluations if one.is_student and one.round)
        return max(trained, key=lambda one: one.round, default=None)

    @property
    def teachers(self) -> list[Evaluation]:
        return [one for one in self.evaluations if not one.is_student]

    @property
    def shown(self) -> list[Evaluation]:
        """Those that a table shows: student 0, the last student, the teachers."""
        return [one for one in (self.before, self.after) if one is not None] + self.teachers
