"""What an evaluation of the student or of a teacher reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kdpipe.stages.settings.document import named
from kdpipe.stages.settings.model import ModelSettings, TeacherSettings
from kdpipe.stages.settings.sampling import DrawSettings
from kdpipe.stages.settings.task import TaskSettings

if TYPE_CHECKING:
    from kdpipe.recipe.schema import EngineName, Recipe, Teacher


@dataclass(frozen=True, slots=True)
class EvaluateSettings:
    """How a model answers the first `problems` test problems; `teacher` is None for the student.

    The student's completions for `reverse_kl_problems`, drawn as the rollout's, are scored by `teachers`, by name;
    `weights` are those of a mixture, None where each problem has its own teacher.
    """

    task: TaskSettings
    student: ModelSettings | None
    teacher: TeacherSettings | None
    evaluate: DrawSettings
    engine: EngineName = field(metadata=named("evaluate.engine"))
    problems: int | None = field(metadata=named("evaluate.problems"))
    samples: int = field(metadata=named("evaluate.samples"))
    reverse_kl_problems: int = field(metadata=named("evaluate.reverse_kl_problems"))
    rollout: DrawSettings | None
    teachers: Mapping[str, TeacherSettings]
    weights: Mapping[str, float] | None = field(metadata=named("teachers.weights"))

    @classmethod
    def of(cls, recipe: Recipe, teacher: Teacher | None = None) -> EvaluateSettings:
        """The settings of every evaluation of the student, or of `teacher`."""
        section, rollout = recipe.evaluate, recipe.rollout
        engine = section.engine or rollout.engine
        reverse_kl_problems = section.reverse_kl_problems if teacher is None else 0
        scorer, scorers = recipe.teacher_score.engine, recipe.teachers if reverse_kl_problems else []
        return cls(
            task=TaskSettings.of(recipe.task),
            student=ModelSettings.of(recipe.student) if teacher is None else None,
            teacher=None if teacher is None else TeacherSettings.of(recipe, teacher, engine),
            evaluate=DrawSettings.of(
                rollout, temperature=section.temperature, max_new_tokens=section.max_new_tokens
            ),
            engine=engine,
            problems=section.problems,
            samples=section.samples,
            reverse_kl_problems=reverse_kl_problems,
            rollout=DrawSettings.of(rollout) if scorers else None,
            teachers={each.name: TeacherSettings.of(recipe, each, scorer) for each in scorers},
            weights=recipe.mixture if scorers else None,
        )
