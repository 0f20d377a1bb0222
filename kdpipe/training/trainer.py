"""A model being trained: float32 masters, AdamW, schedule, clipping, and their state on disk.

Only weights that require gradients are trained: with a LoRA adapter those of the adapter.

Left out on purpose: loss scaling (bfloat16 needs none) and parameter groups (one weight decay for all, as AReaL).
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING

import torch

from kdpipe.errors import ArtifactError, StepError
from kdpipe.recipe.schema import Optimizer, SftOptimizer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic import JsonValue
    from transformers import PreTrainedModel


MAX_STEPS = 2**53  # what a float counts by ones


class Trainer:
    """Takes gradients and optimizer steps on one model; `step` counts optimizer steps since its start.

    `compute` is the dtype of matrix products: where it is neither float32 nor that of the model's own weights, the
    float32 weights are cast under autocast. (Frozen weights below an adapter are narrow themselves.)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: Optimizer | SftOptimizer,
        *,
        horizon: int,
        compute: torch.dtype = torch.float32,
        gradient_checkpointing: bool = False,
    ) -> None:
        _switch_dropout_off(model)
        self.model = model
        self.settings = settings
        self.horizon = horizon
        self.compute = compute
        self.step = 0
        self._checkpointing = gradient_checkpointing
        self._named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._optimizer = torch.optim.AdamW(
            list(self._named.values()),
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            foreach=True,
        )

    def learning_rate(self) -> float:
        """The rate of the next optimizer step: linear warm-up, then the schedule down to 0 at the horizon."""
        settings, warmup = self.settings, self.settings.warmup_steps
        if self.step < warmup:
            return settings.learning_rate * (self.step + 1) / warmup
        if settings.schedule == "constant":
            return settings.learning_rate
        left = 1 - min(1.0, (self.step - warmup) / max(1, self.horizon - warmup))
        factor = left if settings.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))
        return settings.learning_rate * factor

    def computing(self) -> contextlib.AbstractContextManager[None]:
        """The context of a forward pass: autocast where the compute dtype is not the weights'."""
        if self.compute in (torch.float32, self.model.dtype):
            return contextlib.nullcontext()
        return torch.autocast(self.model.device.type, dtype=self.compute)

    def begin(self) -> None:
        """Prepares for gradients."""
        if self._checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train(self._checkpointing)  # recomputing in backward is all that train mode changes here
        self._optimizer.zero_grad(set_to_none=True)

    def apply(self) -> float:
        """Takes one optimizer step on the gathered gradients; returns their norm before clipping.

        Raises StepError when the norm is not finite; the weights are then unchanged.
        """
        weights = list(self._named.values())
        norm = float(torch.nn.utils.clip_grad_norm_(weights, self.settings.max_grad_norm))
        if not math.isfinite(norm):
            raise StepError(
                f"optimizer step {self.step + 1}: the gradient norm is {norm}, expected a finite number",
                hint="lower train.optimizer.learning_rate, or look at the round's rollouts and scores",
            )
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return norm

    def end(self) -> None:
        """Back to eval mode, without gradients."""
        if self._checkpointing:
            self.model.gradient_checkpointing_disable()
        self.model.eval()

    def tensors(self, *, masters: bool) -> dict[str, torch.Tensor]:
        """Optimizer moments by parameter name, and the float32 weights where the saved ones are narrower."""
        found: dict[str, torch.Tensor] = {}
        for name, weight in self._named.items():
            moments = self._optimizer.state.get(weight, {})
            for key in ("exp_avg", "exp_avg_sq"):
                if key in moments:
                    found[f"{key}.{name}"] = moments[key]
            if masters:
                found[f"master.{name}"] = weight
        return found

    def state(self) -> dict[str, JsonValue]:
        """What is not a tensor. No generator: every order and draw is derived from seeds by hashing."""
        return {"optimizer_step": self.step, "learning_rate": self.learning_rate()}

    def restore(self, tensors: Mapping[str, torch.Tensor], state: Mapping[str, JsonValue]) -> None:
        """Continues from what `tensors` and `state` gave; raises ArtifactError when they do not fit the model."""
        step = state.get("optimizer_step")
        if type(step) is not int or not 0 <= step < MAX_STEPS:
            raise ArtifactError(f"trainer state: optimizer_step is {step!r}, expected a whole number")
        self.step = step
        with torch.no_grad():
            for name, weight in self._named.items():
                if (master := tensors.get(f"master.{name}")) is not None:
                    weight.copy_(master)
                moments = {key: tensors.get(f"{key}.{name}") for key in ("exp_avg", "exp_avg_sq")}
                if step and any(
                    moment is None or moment.shape != weight.shape for moment in moments.values()
                ):
                    raise ArtifactError(f"trainer state: no moments of the right shape for {name}")
                if step:
                    self._optimizer.state[weight] = {
                        "step": torch.tensor(float(step)),
                        **{
                            key: moment.to(weight.device, weight.dtype)
                            for key, moment in moments.items()
                            if moment is not None
                        },
                    }


def _switch_dropout_off(model: PreTrainedModel) -> None:
    """Dropout is off wherever a log-prob is taken, and here one always is."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
