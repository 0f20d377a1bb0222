"""What the cold start of a model reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdpipe.recipe.schema import Scratch, ScratchTeacher, Sft, Student
from kdpipe.stages.settings.model import routes_of
from kdpipe.stages.settings.task import problems_of

if TYPE_CHECKING:
    from pydantic import JsonValue

    from kdpipe.recipe.schema import Recipe, Teacher
    from kdpipe.recipe.section import DtypeName
    from kdpipe.stages.settings.model import Routes
    from kdpipe.store.step import Fields


@dataclass(frozen=True, slots=True)
class ColdStart:
    """A model before its cold start, and the cold start: None keeps a scratch model as initialised."""

    dtype: DtypeName
    trust_remote_code: bool
    template: Mapping[str, JsonValue]
    scratch: Scratch | None
    sft: Sft | None
    only: Routes | None


@dataclass(frozen=True, slots=True)
class SftSettings:
    """The cold start of the student or of a teacher, the other being None."""

    task: Fields
    student: ColdStart | None
    teacher: ColdStart | None

    @classmethod
    def of(cls, recipe: Recipe, model: Student | Teacher) -> SftSettings:
        """The settings of that model's cold start."""
        is_student = isinstance(model, Student)
        start = ColdStart(
            dtype=model.dtype,
            trust_remote_code=model.trust_remote_code,
            template=model.template,
            scratch=model.scratch if isinstance(model, Student | ScratchTeacher) else None,
            sft=None if model.sft is None else model.sft.model_copy(update={"seed": None}),
            only=None if isinstance(model, Student) else routes_of(model),
        )
        task = problems_of(recipe.task)
        return cls(task, start if is_student else None, None if is_student else start)

    @property
    def model(self) -> ColdStart:
        """The one that is there."""
        found = self.student or self.teacher
        assert found is not None
        return found
