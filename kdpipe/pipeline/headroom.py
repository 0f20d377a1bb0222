"""What a student can gain from its teachers, as the evaluations before training have it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kdpipe.pipeline.headline import ACCURACY, REVERSE_KL, headline_of
from kdpipe.pipeline.project import Project, summary_of
from kdpipe.recipe.roles import STUDENT
from kdpipe.recipe.schema import Recipe, SelfTeacher, Teacher
from kdpipe.store.stage import Stage
from kdpipe.store.step import step_id_of

ITSELF = "the student itself"


@dataclass(frozen=True, slots=True)
class Headroom:
    """Headroom of a teacher: its accuracy less that of student 0 on the same problems, paired.

    `low` and `high` are its 95 % interval, `p_value` its test's, None where problems have several samples. `exempt`
    says why the teacher need not be better; None: a run stops before round 1 when it clearly is not.
    """

    teacher: str
    problems: int
    is_routed: bool
    accuracy: float
    change: float
    low: float
    high: float
    p_value: float | None
    exempt: str | None

    @property
    def stops(self) -> bool:
        """Whether the teacher should be better and clearly is not: no value of the interval is above 0."""
        return self.exempt is None and self.high <= 0

    @property
    def is_weak(self) -> bool:
        """Whether it cannot be told that the teacher is better."""
        return self.low <= 0

    @property
    def fault(self) -> str:
        """What is wrong where it stops a run."""
        return f"teacher {self.teacher!r} is not better than the student: {self.sentence()}"

    @property
    def doubt(self) -> str:
        """What cannot be told where it is weak."""
        return f"teacher {self.teacher!r} is not clearly better than the student: {self.sentence()}"

    def sentence(self) -> str:
        """All of it, for people."""
        p = "" if self.p_value is None else f", p = {self.p_value:.2g}"
        low, high, change = map(ACCURACY.show_change, (self.low, self.high, self.change))
        where = (
            f"the {_problems(self.problems)} that it teaches" if self.is_routed else _problems(self.problems)
        )
        exempt = "" if self.exempt is None else f"; it need not be better: {self.exempt}"
        return (
            f"accuracy {self.accuracy:.1%}, headroom {change} points (paired 95 % interval {low} to {high}{p}) "
            f"on {where}{exempt}"
        )


@dataclass(frozen=True, slots=True)
class Distance:
    """Headroom where nothing is graded: the held-out reverse KL of student 0, which training is to lower.

    `teacher` names the teacher, or all whose route or mixture it is measured against.
    """

    teacher: str
    problems: int
    reverse_kl_nats: float
    low: float
    high: float
    exempt: str | None

    @property
    def stops(self) -> bool:
        """Whether there is nothing to learn."""
        return self.exempt is None and self.high <= REVERSE_KL.least

    @property
    def is_weak(self) -> bool:
        """Whether it cannot be told that there is something to learn."""
        return self.low <= REVERSE_KL.least

    @property
    def fault(self) -> str:
        """What is wrong where it stops a run."""
        return f"teacher {self.teacher!r} says what the student says already: {self.sentence()}"

    @property
    def doubt(self) -> str:
        """What cannot be told where it is weak."""
        return (
            f"teacher {self.teacher!r} does not clearly say another thing than the student: {self.sentence()}"
        )

    def sentence(self) -> str:
        """All of it, for people."""
        level, low, high = map(REVERSE_KL.show, (self.reverse_kl_nats, self.low, self.high))
        exempt = "" if self.exempt is None else f"; it need not be above 0: {self.exempt}"
        return (
            f"headroom {level} nats a token, the held-out reverse KL before training (95 % interval {low} to {high}) "
            f"on {_problems(self.problems)}{exempt}; whether the teacher knows the task cannot be told: "
            "task.grader is none"
        )


def headrooms_of(recipe: Recipe, summaries: Iterable[Mapping[str, Any]]) -> list[Headroom | Distance]:
    """Those that these summaries of round 0 tell, in the order of the recipe's teachers."""
    found = {str(summary["model"]): summary for summary in summaries}
    if STUDENT in found and headline_of(found[STUDENT]) is REVERSE_KL:
        return [_distance(recipe, found[STUDENT])]
    return [headroom_of(one, found[one.name]) for one in recipe.teachers if one.name in found]


def headrooms(project: Project) -> list[Headroom | Distance]:
    """Those of the evaluations that are done."""
    names = [STUDENT, *(teacher.name for teacher in project.recipe.teachers)]
    found = (summary_of(project, step_id_of(Stage.EVALUATE, name, 0)) for name in names)
    return headrooms_of(project.recipe, (summary for summary in found if summary is not None))


def headroom_of(teacher: Teacher, summary: Mapping[str, Any]) -> Headroom:
    """The headroom in the summary of a teacher's evaluation."""
    reasons = [ITSELF] if isinstance(teacher, SelfTeacher) else []
    if teacher.is_privileged:
        reasons.append("privileged (its prompt shows more than the question)")
    change = ACCURACY.change(summary)
    assert change is not None
    return Headroom(
        teacher.name,
        summary["problems"],
        teacher.only is not None,
        summary["accuracy"],
        change.estimate,
        change.low,
        change.high,
        summary.get("accuracy_change_p_value"),
        " and ".join(reasons) or None,
    )


def _distance(recipe: Recipe, summary: Mapping[str, Any]) -> Distance:
    level = REVERSE_KL.level(summary)
    assert level is not None
    names = ", ".join(teacher.name for teacher in recipe.teachers)
    selves = [isinstance(teacher, SelfTeacher) and teacher.prompt is None for teacher in recipe.teachers]
    exempt = ITSELF if all(selves) else None
    return Distance(names, summary[REVERSE_KL.counted], level.estimate, level.low, level.high, exempt)


def _problems(count: int) -> str:
    return f"{count} problem{'' if count == 1 else 's'}"
