"""Roles: which model or earlier result a step reads. One of several teachers is `teacher:NAME`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pydantic_core import CoreSchema

    from kdpipe.recipe.schema import Recipe, Teacher

STUDENT = "student"
"""The student's name where teachers have theirs: the subject of its steps, the key of its model."""
SERVER: Literal["server"] = "server"


class RoleKind(StrEnum):
    """What an input is to a step."""

    STUDENT = "student"
    BASE = "base"  # the model below the student's adapter, where a step made it
    EMA = "ema"  # the average of the students so far
    TEACHER = "teacher"
    ROLLOUT = "rollout"
    TEXT = "text"  # completions that a teacher wrote
    SCORES = "scores"  # a teacher's scores of the rollout
    BASELINE = "baseline"  # the evaluation of student 0


@dataclass(frozen=True, slots=True)
class Role:
    """An input's kind, and whose it is: the name of a teacher that is one of several, else nothing."""

    kind: RoleKind
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> Role:
        """The role that prints as `text`; raises ValueError when none does."""
        kind, colon, name = text.partition(":")
        if bool(colon) != bool(name):
            raise ValueError(f"role {text!r}: expected KIND or KIND:NAME")
        return cls(RoleKind(kind), name)

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}" if self.name else str(self.kind)

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: object, _handler: object) -> CoreSchema:
        """A role crosses between processes as it prints."""
        from pydantic_core import core_schema

        written = core_schema.plain_serializer_function_ser_schema(str)
        return core_schema.no_info_plain_validator_function(cls.parse, serialization=written)

    def as_kind(self, kind: RoleKind) -> Role:
        """What is of this kind and of the same teacher."""
        return Role(kind, self.name)


STUDENT_ROLE = Role(RoleKind.STUDENT)
BASE_ROLE = Role(RoleKind.BASE)
EMA_ROLE = Role(RoleKind.EMA)
ROLLOUT_ROLE = Role(RoleKind.ROLLOUT)
BASELINE_ROLE = Role(RoleKind.BASELINE)


def teacher_role(recipe: Recipe, teacher: Teacher) -> Role:
    """The role of one of the recipe's teachers, which has its name where there are several."""
    return Role(RoleKind.TEACHER, "" if len(recipe.teachers) == 1 else teacher.name)
