"""What a task's problems and prompts are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from kdpipe.recipe.task import Task
    from kdpipe.store.step import Fields

    Headline: TypeAlias = Literal["strict", "flexible"]

FILES = ("data", "revision", "train", "test")
"""Fields that name files and folders: what those hold enters a fingerprint by its digest."""


@dataclass(frozen=True, slots=True)
class TaskSettings:
    """How problems are made and asked, and which answer is graded."""

    problems: Fields
    headline: Headline

    @classmethod
    def of(cls, task: Task) -> TaskSettings:
        """The settings of a stage that grades."""
        return cls(problems_of(task), task.headline)


def problems_of(task: Task) -> Fields:
    """How problems are made and asked, which is all that a stage reads that grades nothing."""
    return {name: getattr(task, name) for name in type(task).model_fields if name not in (*FILES, "headline")}
