"""What the writing of a teacher reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kdpipe.stages.settings.document import named
from kdpipe.stages.settings.model import ModelSettings, TeacherSettings
from kdpipe.stages.settings.sampling import DrawSettings, PromptSettings
from kdpipe.stages.settings.task import TaskSettings

if TYPE_CHECKING:
    from kdpipe.recipe.schema import Recipe, Teacher


@dataclass(frozen=True, slots=True)
class TextSettings:
    """How a teacher writes for the first `problems` of a cold start, or for the `prompts` of a round."""

    task: TaskSettings
    teacher: TeacherSettings
    student: ModelSettings
    rollout: DrawSettings
    samples: int
    problems: int | None = field(metadata=named("student.sft.problems"))
    prompts: PromptSettings | None

    @classmethod
    def of(cls, recipe: Recipe, number: int, teacher: Teacher) -> TextSettings:
        """The settings of round `number`; 0 is the student's cold start."""
        sft, rollout = recipe.student.sft, recipe.rollout
        settings = TeacherSettings.of(recipe, teacher, rollout.engine)
        heat = settings.temperature
        if number == 0 and sft is not None:
            heat = sft.temperature
        return cls(
            task=TaskSettings.of(recipe.task),
            teacher=settings,
            student=ModelSettings.of(recipe.student),
            rollout=DrawSettings.of(rollout, temperature=heat),
            samples=sft.samples if number == 0 and sft is not None else 1,
            problems=sft.problems if number == 0 and sft is not None else None,
            prompts=PromptSettings.of(rollout) if number else None,
        )
