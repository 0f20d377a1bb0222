"""What the doctor examines: a recipe's student and teachers, each with its engine, and what both sides share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from kdpipe.doctor.engine import TOLERANCES, Tolerance
from kdpipe.doctor.finding import Outcome
from kdpipe.errors import EngineError
from kdpipe.models.devices import dtype_name, resolve_dtype
from kdpipe.stages.job import Job, Text

if TYPE_CHECKING:
    from kdpipe.data.rows import Problem
    from kdpipe.engines.protocol import Engine
    from kdpipe.models.source import ModelSource
    from kdpipe.recipe.schema import Recipe, Teacher

Depth = Literal["full", "quick"]
PROMPTS: dict[Depth, int] = {"full": 8, "quick": 4}
NEW_TOKENS: dict[Depth, int] = {"full": 48, "quick": 16}
LONGEST = 32
"""Problems of the longest texts, whose prompts are rendered for the context probe."""


@dataclass(frozen=True, slots=True)
class Model:
    """The student or a teacher as it is examined.

    `open_engine` gives the engine that will run it, and may fail. `is_here` is false where a server has the weights.
    `stand_in` says what the weights are where they are not yet those that a run would use.
    """

    name: str
    source: ModelSource
    text: Text
    open_engine: Callable[[], Engine]
    engine_name: str
    is_here: bool = True
    stand_in: str = ""

    def dtype(self, device: torch.device) -> torch.dtype:
        """The dtype that it computes in: a server's is not known, and taken to be the coarsest."""
        return resolve_dtype(self.source.dtype, device)[0] if self.is_here else torch.bfloat16

    def tolerance(self, device: torch.device) -> Tolerance:
        """How far two passes over it may be apart."""
        return TOLERANCES[dtype_name(self.dtype(device))]


@dataclass(frozen=True, slots=True)
class Case:
    """What is examined: a recipe with its student, what samples from it, and its teachers with their settings."""

    job: Job
    device: torch.device
    student: Model
    teachers: Sequence[tuple[Teacher, Model]]
    depth: Depth

    @property
    def recipe(self) -> Recipe:
        """The recipe."""
        return self.job.recipe

    def rest(self, model: Model, engine: Engine) -> None:
        """Lets an engine with memory of its own free it for a forward pass made elsewhere on the same GPU."""
        if self.device.type == "cuda" and model.engine_name != "hf" and model.is_here:
            engine.sleep()


def load(model: Model) -> Outcome:
    """Whether the model's engine starts and takes the model."""
    model.open_engine().load(model.source)
    return Outcome(f"engine {model.engine_name}" + (f", {model.stand_in}" if model.stand_in else ""))


def longest_problems(job: Job) -> list[Problem]:
    """The problems of either split with the longest texts: their prompts are likely the longest."""

    def length(problem: Problem) -> int:
        return len(problem.question) + len(problem.solution)

    by_question = sorted(job.train, key=lambda p: len(p.question))[-LONGEST:]
    return [*by_question, *sorted(job.train, key=length)[-LONGEST:]]


def context_of(source: ModelSource) -> int | None:
    """How many tokens the model holds, by its config; None where there is none, or it does not say."""
    if not (source.folder / "config.json").is_file():
        return None
    sizes = sizes_of(source)
    value = sizes.get("max_position_embeddings", sizes.get("n_positions"))
    return value if isinstance(value, int) else None


def sizes_of(source: ModelSource) -> dict[str, object]:
    """What config.json says that decides which weights fit."""
    try:
        config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineError(f"{source.folder / 'config.json'}: cannot be read: {error}") from error
    text = config.get("text_config", config)
    left_out = ("eos_token_id", "bos_token_id", "pad_token_id", "_name_or_path", "transformers_version")
    return {name: value for name, value in text.items() if name not in left_out}
