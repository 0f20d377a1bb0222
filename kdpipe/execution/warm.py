"""What a worker keeps between the steps of a run: models, the trainer with its optimizer, problems, tokenizers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kdpipe.data.rows import Problem
from kdpipe.engines.server.engine import ServerEngine
from kdpipe.execution.placement import Roles
from kdpipe.models.cache import ModelCache
from kdpipe.models.text import Text
from kdpipe.recipe.roles import Role
from kdpipe.recipe.schema import Recipe
from kdpipe.training.local import LocalTrainer


@dataclass(slots=True)
class Warm:
    """What one worker keeps between steps; made anew when the recipe changes."""

    recipe: Recipe
    device: torch.device
    cache: ModelCache
    train: list[Problem]
    test: list[Problem]
    roles: Roles
    servers: dict[Role, ServerEngine] = field(default_factory=dict)
    texts: dict[tuple[Role, str], Text] = field(default_factory=dict)
    trainer: tuple[str, LocalTrainer] | None = None
    lora_fits: bool = False
    dtypes_told: bool = False
