"""What the scoring of a round by one teacher reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from kdpipe.stages.settings.document import named
from kdpipe.stages.settings.model import ModelSettings, TeacherSettings
from kdpipe.stages.settings.task import problems_of

if TYPE_CHECKING:
    from kdpipe.recipe.schema import Recipe, Teacher
    from kdpipe.recipe.stages import Keeping
    from kdpipe.store.step import Fields


@dataclass(frozen=True, slots=True)
class ScoreSettings:
    """How a teacher scores, and what is kept of it, log-probs of a support in the dtype `logprobs`.

    `is_one_of_several` names its metrics by the teacher. `student` is there where it chooses ids of
    the support, at the `temperature` of the rollout.
    """

    task: Fields
    teacher: TeacherSettings
    keep: Keeping = field(metadata=named("teacher_score.keep"))
    logprobs: Literal["float32", "float16"] = field(metadata=named("teacher_score.logprobs"))
    student: ModelSettings | None
    temperature: float = field(metadata=named("rollout.temperature"))
    is_one_of_several: bool

    @classmethod
    def of(cls, recipe: Recipe, teacher: Teacher) -> ScoreSettings:
        """The settings of every round."""
        keep = recipe.keep
        return cls(
            task=problems_of(recipe.task),
            teacher=TeacherSettings.of(recipe, teacher, recipe.teacher_score.engine),
            keep=keep,
            logprobs=recipe.teacher_score.logprobs,
            student=ModelSettings.of(recipe.student) if keep.student_top_k else None,
            temperature=recipe.rollout.temperature,
            is_one_of_several=len(recipe.teachers) > 1,
        )
