"""How the student and a teacher are loaded, prompted and asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from kdpipe.recipe.roles import SERVER
from kdpipe.recipe.schema import SelfTeacher, ServedTeacher

if TYPE_CHECKING:
    from pydantic import JsonValue

    from kdpipe.recipe.schema import EngineName, Recipe, Student, Teacher
    from kdpipe.recipe.section import DtypeName

    Routes: TypeAlias = Mapping[str, Sequence[str | int | float]]


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """How a model is loaded and prompted."""

    dtype: DtypeName
    trust_remote_code: bool
    template: Mapping[str, JsonValue]

    @classmethod
    def of(cls, model: Student | Teacher) -> ModelSettings:
        """Those of the student or a teacher."""
        return cls(model.dtype, model.trust_remote_code, model.template)


@dataclass(frozen=True, slots=True)
class TeacherSettings:
    """How a teacher is loaded, prompted and asked, and by what: an engine here, or its own server.

    `self_` says which student it is, if one. Without a `template` it has the student's. `temperature` is its own or
    the rollout's. `swaps_end_token`: its end of a turn and the student's trade places in its distributions.
    """

    name: str
    self_: Literal["initial", "current", "ema"] | None
    dtype: DtypeName
    trust_remote_code: bool
    quantization: str | None
    template: Mapping[str, JsonValue]
    student_template: Mapping[str, JsonValue]
    prompt: str | None
    only: Routes | None
    temperature: float
    swaps_end_token: bool
    engine: EngineName | Literal["server"]

    @classmethod
    def of(cls, recipe: Recipe, teacher: Teacher, engine: EngineName) -> TeacherSettings:
        """Those of one of the recipe's teachers; `engine` asks it unless it is behind a server."""
        return cls(
            name=teacher.name,
            self_=teacher.self_ if isinstance(teacher, SelfTeacher) else None,
            dtype=teacher.dtype,
            trust_remote_code=teacher.trust_remote_code,
            quantization=teacher.quantization,
            template=teacher.template,
            student_template=recipe.student.template,
            prompt=teacher.prompt,
            only=routes_of(teacher),
            temperature=recipe.temperature_of(teacher),
            swaps_end_token=recipe.train.objective.end_token == "alias",  # noqa: S105 (no password)
            engine=SERVER if isinstance(teacher, ServedTeacher) else engine,
        )

    @property
    def has_own_template(self) -> bool:
        """Whether its prompts are rendered otherwise than the student's."""
        return bool(self.template) and self.template != self.student_template


@dataclass(frozen=True, slots=True)
class SupportSettings:
    """What a support asks of a teacher's vocabulary: all of the student's ids, or as many as `top_k`.

    Not hashed: it lets a teacher through or not, and changes nothing of what that says.
    """

    is_vocabulary: bool
    top_k: int

    @classmethod
    def of(cls, recipe: Recipe) -> SupportSettings:
        """That of the recipe's objective, and of what it keeps."""
        support = recipe.train.objective.distribution_support
        return cls(support == "vocabulary", max(recipe.keep.teacher_top_k, recipe.keep.student_top_k))


def routes_of(teacher: Teacher) -> Routes | None:
    """The values of each field by which a teacher is given its problems, in one order; None: it has all."""
    if teacher.only is None:
        return None
    lists = {name: wanted if isinstance(wanted, list) else [wanted] for name, wanted in teacher.only.items()}
    return {name: sorted(set(values), key=str) for name, values in lists.items()}
