"""What `kdpipe check-loss` asks its worker, both ends of it. Never imports torch."""

from __future__ import annotations

from kdpipe.doctor.finding import Phase
from kdpipe.recipe.schema import Recipe
from kdpipe.workers.message import Nothing, Talk, message


@message
class CheckLoss:
    """Check the objective of a recipe, phase by phase."""

    recipe: Recipe


@message
class CheckedLoss:
    """Each phase with its findings."""

    phases: tuple[Phase, ...]


CHECK_LOSS = Talk[CheckLoss, Nothing, CheckedLoss]((CheckLoss,), (Nothing,), (CheckedLoss,))
