"""The evaluations of a project as their summaries have them, read without numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kdpipe.method.interval import Interval
from kdpipe.pipeline.project import Project, summary_of
from kdpipe.recipe.roles import STUDENT
from kdpipe.store.stage import Stage
from kdpipe.store.step import Step


@dataclass(frozen=True, slots=True)
class Summary:
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
        found = self.interval("accuracy")
        assert found is not None
        return found

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


@dataclass(frozen=True, slots=True)
class Evaluation(Summary):
    """The summary of a step, and what to call the model."""

    label: str
    step: Step

    @property
    def is_student(self) -> bool:
        return self.step.subject == STUDENT


class Evaluated:
    """The evaluations among these steps of a project."""

    def __init__(self, project: Project, done: Sequence[Step]) -> None:
        self.project = project
        self.done = done

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """Those that are done, in the order of the plan."""
        found = []
        for step in self.done:
            if step.stage == Stage.EVALUATE and (summary := summary_of(self.project, step.id)) is not None:
                student = f"student after round {step.round}" if step.round else "student before"
                label = student if step.subject == STUDENT else step.subject
                found.append(Evaluation(summary, label, step))
        return found

    @property
    def before(self) -> Evaluation | None:
        """That of student 0."""
        return next((one for one in self.evaluations if one.is_student and one.step.round == 0), None)

    @property
    def after(self) -> Evaluation | None:
        """The last one of a trained student."""
        return next((one for one in reversed(self.evaluations) if one.is_student and one.step.round), None)

    @property
    def teachers(self) -> list[Evaluation]:
        return [one for one in self.evaluations if not one.is_student]

    @property
    def shown(self) -> list[Evaluation]:
        """Those that a table shows: student 0, the last student, the teachers."""
        return [one for one in (self.before, self.after) if one is not None] + self.teachers
