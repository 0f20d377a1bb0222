"""A model in training as stages see it: gradients, optimizer steps, state on disk, published weights.

Stages know each token's share of the step's loss before the step. So gradients are sums: however a step is cut into
micro-batches, on however many devices, adding up their gradients gives the gradient of the whole step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from kdpipe.models.batching import Batch
from kdpipe.models.cache import ModelCache
from kdpipe.models.logprobs import Head

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Loss = Callable[[torch.Tensor, Head], tuple[torch.Tensor, Mapping[str, torch.Tensor]]]
"""From hidden states [N, H] and output head to the micro-batch's share of the step's loss, and metrics as sums."""


@dataclass(frozen=True, slots=True)
class Update:
    """The gradient norm before clipping, the learning rate, and whether the optimizer step was skipped."""

    gradient_norm: float
    learning_rate: float
    is_skipped: bool = False


class Trainer(Protocol):
    """Adds up gradients and takes optimizer steps on one model.

    Between `begin` and `end`, a step is one `accumulate` for each micro-batch and then `apply`.
    """

    @property
    def device(self) -> torch.device:
        """Where micro-batches are expected."""

    @property
    def step(self) -> int:
        """Optimizer steps taken since the model's start; skipped ones are not counted."""

    @property
    def version(self) -> str | None:
        """The version under which the present weights are published, None where they are not."""

    def logprobs(self, batch: Batch, *, temperature: float, chunk: int) -> torch.Tensor:
        """Log-probs [N] of the completion tokens, float32 on the CPU, without gradient; `chunk` is in tokens."""

    def begin(self) -> None:
        """Prepares for gradients, and withdraws the published version: its weights are about to change."""

    def accumulate(self, batch: Batch, loss: Loss) -> dict[str, float]:
        """Adds the gradient of a micro-batch's share of the step; returns its `loss` and its metrics as sums."""

    def apply(self, *, is_rounding: bool = False) -> Update:
        """Clips the sum of the gradients, takes one optimizer step and drops them.

        With `is_rounding` there was no signal: the gradients are what rounding left of an exact 0, which AdamW would
        scale up to steps of its full rate. The step is skipped; weights, moments, `step` and schedule stay as they are.
        Raises StepError when the norm is not finite; the weights are then unchanged.
        """

    def end(self) -> None:
        """Leaves the model in eval mode, without gradients."""

    def weights(self) -> Mapping[str, torch.Tensor]:
        """The present weights by parameter name, whole and as wide as they are trained."""

    def write_weights(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Writes what engines load, as wide as the model computes."""

    def write_state(self, folder: Path) -> None:
        """Writes what continues from `write_weights`: moments, counters, and masters.

        Masters are written only where the weights that `write_weights` wrote are narrower.
        """

    def write_checkpoint(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Writes what continues in the middle of a step: `model/` in full width, and `trainer/`."""

    def restore(self, folder: Path) -> None:
        """Continues from a folder of `write_state`; raises ArtifactError if it is damaged or of another model."""

    def publish(self, version: str, cache: ModelCache) -> None:
        """Makes the present weights what `cache` returns for `version`, the digest of the written ones."""
