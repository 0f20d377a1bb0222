"""What the rollout of a round reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdpipe.stages.settings.model import ModelSettings
from kdpipe.stages.settings.task import TaskSettings

if TYPE_CHECKING:
    from kdpipe.recipe.schema import Recipe
    from kdpipe.recipe.stages import RolloutSection


@dataclass(frozen=True, slots=True)
class RolloutSettings:
    """How the student samples, and how its completions are graded. The seed is the step's."""

    task: TaskSettings
    student: ModelSettings
    rollout: RolloutSection

    @classmethod
    def of(cls, recipe: Recipe) -> RolloutSettings:
        """The settings of every round."""
        rollout = recipe.rollout.model_copy(update={"seed": None})
        return cls(TaskSettings.of(recipe.task), ModelSettings.of(recipe.student), rollout)
