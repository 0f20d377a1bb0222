"""What a worker keeps between the steps of a run: models, the trainer with its optimizer, problems, tokenizers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kdpipe.engines.server import ServerEngine
from kdpipe.job import Text
from kdpipe.recipe import Recipe
from kdpipe.roles import Roles
from kdpipe.rows import Problem
from kdpipe.shelf import ModelShelf
from kdpipe.trainer import Trainer


@dataclass(slots=True)
class Warm:
    """What one worker keeps between steps; made anew when the recipe changes."""

    recipe: Recipe
    device: torch.device
    shelf: ModelShelf
    train: list[Problem]
    test: list[Problem]
    roles: Roles
    servers: dict[str, ServerEngine] = field(default_factory=dict)
    texts: dict[tuple[str, str], Text] = field(default_factory=dict)
    trainer: tuple[str, Trainer] | None = None
    lora_fits: bool = False
    dtypes_told: bool = False
