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
    """How problems are made and asked, and which answer is graded: None where a stage grades nothing."""

    problems: Fields
    headline: Headline | None

    @classmethod
    def of(cls, task: Task) -> TaskSettings:
        """The settings of a stage that grades."""
        return cls(_problems(task), task.headline)

    @classmethod
    def ungraded(cls, task: Task) -> TaskSettings:
        """The settings of a stage that only asks."""
        return cls(_problems(task), None)


def _problems(task: Task) -> Fields:
    return {name: getattr(task, name) for name in type(task).model_fields if name not in (*FILES, "headline")}
