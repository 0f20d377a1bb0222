"""What the training of a round reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kdpipe.stages.settings.document import named
from kdpipe.stages.settings.model import ModelSettings
from kdpipe.stages.settings.sampling import DrawSettings

if TYPE_CHECKING:
    from kdpipe.recipe.schema import Lora, Objective, Recipe
    from kdpipe.recipe.stages import TrainSection


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """How a round becomes optimizer steps. Its `train.objective` is that of the round.

    `distill_horizon` are the optimizer steps over which a distill weight moves, `weights` those of a mixture,
    `lora` the adapter that begins in this round, `ema_decay` that of the average which is kept. Where some round has an
    RL term (`has_rl`) all have its metrics.
    """

    train: TrainSection
    rollout: DrawSettings
    student: ModelSettings
    lora: Lora | None = field(metadata=named("student.lora"))
    reproduce: bool
    distill_horizon: int = field(metadata=named("train.distill_horizon"))
    weights: Mapping[str, float] | None = field(metadata=named("teachers.weights"))
    has_several_teachers: bool
    has_rl: bool
    ema_decay: float | None = field(metadata=named("teachers.decay"))

    @classmethod
    def of(cls, recipe: Recipe, number: int) -> TrainSettings:
        """The settings of round `number`."""
        objective = _objective(recipe, number)
        lora = recipe.student.lora if number == 1 else None  # later rounds go on with the adapter of this one
        if lora is not None and lora.seed is None:
            lora = lora.model_copy(update={"seed": recipe.seed})
        moves = objective.distill_schedule.kind != "constant"
        return cls(
            train=_section(recipe, objective),
            rollout=DrawSettings.of(recipe.rollout),
            student=ModelSettings.of(recipe.student),
            lora=lora,
            reproduce=recipe.reproduce,
            distill_horizon=recipe.distill_horizon if moves else 1,
            weights=recipe.mixture if objective.has_kd else None,
            has_several_teachers=len(recipe.teachers) > 1,
            has_rl=recipe.train.objective.has_rl,
            ema_decay=recipe.ema_decay,
        )


def _objective(recipe: Recipe, number: int) -> Objective:
    """The objective of the round, with what it leaves to be inferred."""
    objective = recipe.train.objective.in_round(number)
    if recipe.rollout.on_policy_fraction == 1:
        return objective
    return objective.model_copy(update={"off_policy_term": objective.off_policy_loss})


def _section(recipe: Recipe, objective: Objective) -> TrainSection:
    """The section with the horizon of its schedule, None if constant. The seed is the step's."""
    optimizer = recipe.train.optimizer
    horizon = None if optimizer.schedule == "constant" else optimizer.schedule_rounds or recipe.rounds
    update = {
        "objective": objective,
        "optimizer": optimizer.model_copy(update={"schedule_rounds": horizon}),
        "seed": None,
    }
    return recipe.train.model_copy(update=update)
