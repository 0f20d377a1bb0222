"""One round of a run: its tables, its objective, and the student that sampled in it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from tests.replay import student
from tests.replay.forward import logprobs
from tests.replay.reading import Key, Record, Run, Tensors, key


class Round:
    """Round `number`, from 1."""

    def __init__(self, run: Run, number: int) -> None:
        self.run, self.number, self.recipe = run, number, run.recipe
        self.tokenizer: Any = AutoTokenizer.from_pretrained(student.student_folder(run, 0))
        self.num_ids = len(self.tokenizer)
        self.temperature = self.recipe["rollout"]["temperature"]
        self.rollouts = run.rows(number, "rollout/rollouts.parquet")
        self.policy = student.sampler(run, number, self.num_ids)

    @functools.cached_property
    def problems(self) -> dict[str, Record]:
        return {problem["prompt_id"]: problem for problem in self.run.problems()}

    @functools.cached_property
    def objective(self) -> Record:
        """That of the round, and the arm's `control`: `then` is `kd` in its first rounds, and `grpo` after."""
        found = {**self.recipe["train"]["objective"], "control": self.recipe["train"]["control"]}
        if found["kind"] == "then":
            found["kind"] = "kd" if self.number <= found["kd_rounds"] else "grpo"
        return found

    @functools.cached_property
    def completions(self) -> list[Record]:
        return self.run.rows(self.number, "train/completions.parquet")

    @functools.cached_property
    def proximal(self) -> dict[Key, Tensor]:
        """The stored p of each completion."""
        return {key(row): tensor(row["proximal_logprobs"]) for row in self.completions}

    @functools.cached_property
    def metrics(self) -> Mapping[tuple[int | None, str], float]:
        return self.run.metrics(self.number, "train")

    @functools.cached_property
    def weights(self) -> Tensors | None:
        """The trained weights at the start of the round; None where an adapter is new, which nothing stores."""
        is_new = student.has_adapter(self.run) and self.number == 1
        return None if is_new else student.trained(self.run, self.number - 1)

    def sampled_from(self, row: Record) -> Tensor:
        """The log-probs [n, V] of the student that sampled, at a completion."""
        return self._logprobs(row, None)

    def trained_from(self, row: Record) -> Tensor:
        """Those of the weights that train begins with, which may be wider."""
        return self._logprobs(row, self.weights)

    def _logprobs(self, row: Record, weights: Tensors | None) -> Tensor:
        logits = self.policy.logits(row["prompt_token_ids"], row["completion_token_ids"], weights)
        return logprobs(logits, self.temperature).detach()


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
