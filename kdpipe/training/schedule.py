"""Learning-rate schedules."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kdpipe.recipe.schema import Optimizer, SftOptimizer


def learning_rate(settings: Optimizer | SftOptimizer, step: int, *, horizon: int) -> float:
    """The rate after `step` optimizer steps: linear warm-up, then the schedule down to 0 at the horizon."""
    warmup = settings.warmup_steps
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    if settings.schedule == "constant":
        return settings.learning_rate
    left = 1 - min(1.0, (step - warmup) / max(1, horizon - warmup))
    factor = left if settings.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))
    return settings.learning_rate * factor
