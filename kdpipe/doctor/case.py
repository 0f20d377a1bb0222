"""What the doctor examines: a recipe's student and teachers with their engines."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdpipe.data.rows import Problem
from kdpipe.doctor import text as texts
from kdpipe.doctor.budget import Sizes, sizes
from kdpipe.doctor.engine import Forward, Passed, tolerance_of
from kdpipe.doctor.estimate import Sized
from kdpipe.doctor.finding import Outcome
from kdpipe.doctor.lengths import PromptReader, Split
from kdpipe.engines.handle import ModelHandle
from kdpipe.errors import EngineError
from kdpipe.models import config
from kdpipe.models.devices import dtype_name, memory_of, resolve_dtype
from kdpipe.models.reference import (
    Pair,
    adapter_parameters,
    logprobs_of,
    open_plain,
    rounding_noise,
    shape_of,
)
from kdpipe.models.source import ModelSource
from kdpipe.pipeline.request import Depth
from kdpipe.recipe.schema import Recipe, SelfTeacher, Teacher
from kdpipe.stages.job import Job

PROMPTS: dict[Depth, int] = {"full": 8, "quick": 4, "servers": 2}
NEW_TOKENS: dict[Depth, int] = {"full": 48, "quick": 16, "servers": 4}
LONGEST = 32
"""Problems of the longest texts, whose prompts are rendered for the context probe."""


@dataclass(frozen=True, slots=True)
class Case:
    """The student and the teachers of a recipe, with their settings.

    `stand_ins` describes the weights of each model, by its name, that no step has made yet; `folder` is for
    what the examination writes.
    """

    recipe: Recipe
    job: Job
    device: torch.device
    student: ModelHandle
    teachers: Sequence[tuple[Teacher, ModelHandle]]
    stand_ins: Mapping[str, str]
    depth: Depth
    folder: Path

    def dtype(self, model: ModelHandle) -> torch.dtype:
        """The dtype that a model computes in; of a served model, which does not say, what it would be here."""
        return resolve_dtype(model.source.dtype, self.device)[0]

    def load(self, model: ModelHandle) -> Outcome:
        """Whether a model's engine starts and takes it."""
        model.load()
        stand_in = self.stand_ins.get(model.name)
        return Outcome(f"engine {model.engine_name}" + (f", {stand_in}" if stand_in else ""))

    def context(self, reader: PromptReader) -> Outcome:
        """Whether all that a model reads fits its context. A run has counted that: quickly, the longest."""
        splits: dict[Split, Sequence[Problem]] = {"train": self.job.train, "test": self.job.test}
        if self.depth == "quick":
            splits = {
                split: sorted(problems, key=_characters)[-LONGEST:] for split, problems in splits.items()
            }
        return texts.context(reader, self.recipe, splits)

    def plain(self, model: ModelHandle, source: ModelSource, num_ids: int) -> Forward:
        """What transformers alone computes of the weights in `source`, in the dtype of the model."""

        def forward(pairs: Sequence[Pair], temperature: float) -> Passed:
            dtype = self.dtype(model)
            network = open_plain(source, dtype=dtype, device=self.device)
            asked: Any = {"temperature": temperature, "num_ids": num_ids}
            found = [logprobs_of(network, pair, **asked)[0] for pair in pairs]
            return found, tolerance_of(
                rounding_noise(network, pairs, **asked, dtype=dtype), dtype_name(dtype)
            )

        return forward

    def rest(self, model: ModelHandle) -> None:
        """Lets an engine with memory of its own free it for a forward pass made elsewhere on the same GPU."""
        if self.device.type == "cuda" and model.engine_name not in ("hf", "server"):
            model.open_engine().sleep()

    def sizes(self) -> Sizes:
        """What the recipe takes, from the configs of its models and the length of its prompts."""
        recipe, text, source = self.recipe, self.student.text, self.student.source
        prompts = [text.prompt(problem) for problem in self.job.train[:LONGEST]]
        lora = recipe.student.lora
        adapter = 0 if lora is None else adapter_parameters(source.folder, lora)
        student = self._sized(self.student, adapter=adapter)
        teachers: dict[str, Sized | None] = {}
        for settings, model in self.teachers:
            is_student = isinstance(settings, SelfTeacher)
            teachers[model.name] = student if is_student else None if model.is_served else self._sized(model)
        mean = sum(map(len, prompts)) / len(prompts)
        return sizes(
            recipe, student, teachers, prompt_tokens=round(mean), memory=memory_of(recipe.runtime.device)
        )

    def _sized(self, model: ModelHandle, *, adapter: int = 0) -> Sized:
        shape = shape_of(model.source.folder, trust_remote_code=model.source.trust_remote_code)
        return Sized(model.name, shape, dtype_name(self.dtype(model)), adapter)


def _characters(problem: Problem) -> int:
    return len(problem.question) + len(problem.solution or "")


def context_of(source: ModelSource) -> int | None:
    """How many tokens the model holds, by its config; None where there is none, or it sets no limit."""
    if not (source.folder / "config.json").is_file():
        return None
    return config.context_of(config.open_config(source.folder, trust_remote_code=source.trust_remote_code))


def sizes_of(source: ModelSource) -> dict[str, object]:
    """What config.json says that decides which weights fit."""
    try:
        settings = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineError(f"{source.folder / 'config.json'}: cannot be read: {error}") from error
    text = settings.get("text_config", settings)
    left_out = ("eos_token_id", "bos_token_id", "pad_token_id", "_name_or_path", "transformers_version")
    return {name: value for name, value in text.items() if name not in left_out}
