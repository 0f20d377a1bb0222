"""What `kdpipe plan --estimate` asks a worker, both ends of it. Never imports torch."""

from __future__ import annotations

from pathlib import Path

from kdpipe.doctor.budget import Sizes
from kdpipe.recipe.schema import Recipe
from kdpipe.workers.message import Nothing, Talk, message


@message
class AskSizes:
    """What does this recipe take?

    `folders` has the models by role and hub data as "data"; paths in the recipe start from `folder`. `gpus` are the
    bytes of GPUs to plan for; empty means what is here.
    """

    recipe: Recipe
    folder: Path
    folders: dict[str, Path]
    gpus: tuple[int, ...] = ()


@message
class Measured:
    """The sizes."""

    sizes: Sizes


SIZING = Talk[AskSizes, Nothing, Measured]((AskSizes,), (Nothing,), (Measured,))
