"""AdamW with clipping and its schedule, from the formulas of its papers, on float64 tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tests.replay.reading import Tensors


@dataclass
class AdamW:
    """`settings` are those of the recipe; `step` counts what was taken before, `horizon` the schedule's steps."""

    settings: Mapping[str, Any]
    horizon: int
    step: int
    first: Tensors
    second: Tensors

    def rate(self) -> float:
        """The learning rate of the next step: up linearly, then along the schedule to 0 at the horizon."""
        peak, warmup = self.settings["learning_rate"], self.settings["warmup_steps"]
        if self.step < warmup:
            return float(peak * (self.step + 1) / warmup)
        done = min(1.0, (self.step - warmup) / max(1, self.horizon - warmup))
        match self.settings["schedule"]:
            case "linear":
                return float(peak * (1 - done))
            case "cosine":
                return float(peak * (1 + math.cos(math.pi * done)) / 2)
        return float(peak)

    def update(self, weights: Tensors, gradients: Tensors) -> Tensors:
        """The weights after one step."""
        clip = min(1.0, self.settings["max_grad_norm"] / (norm_of(gradients) + 1e-6))
        rate = self.rate()
        (beta1, beta2), eps = self.settings["betas"], self.settings["eps"]
        self.step += 1
        result = {}
        for name, weight in weights.items():
            gradient = clip * gradients[name]
            first = beta1 * self.first.get(name, 0) + (1 - beta1) * gradient
            second = beta2 * self.second.get(name, 0) + (1 - beta2) * gradient**2
            direction = (first / (1 - beta1**self.step)) / ((second / (1 - beta2**self.step)).sqrt() + eps)
            result[name] = weight * (1 - rate * self.settings["weight_decay"]) - rate * direction
            self.first[name], self.second[name] = first, second
        return result


def norm_of(tensors: Tensors) -> float:
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors.values()))


def flat(tensors: Tensors) -> torch.Tensor:
    """All tensors as one vector, in the order of their names."""
    return torch.cat([torch.zeros(0), *(tensors[name].reshape(-1) for name in sorted(tensors))])


def gradients_of(loss: torch.Tensor, weights: Tensors) -> Tensors:
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
