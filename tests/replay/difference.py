"""How far what a run stored lies from what its replay computed, and how far it may."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch

BOUNDS = {
    "ids, order, grades": 0.0,
    "log-probs": 2**-14,  # 128 roundings of a logit between 8 and 16 that all agree
    "log-probs in float16": 2**-8,  # one rounding of a number between 8 and 16
    "kept mass": 1e-6,
    "advantage": 1e-6,
    "schedules": 1e-12,
    "loss": 2e-5,
    "gradient norm": 2e-4,
    "moments": 5e-4,
    "weights": 0.3,  # AdamW divides: a weight whose gradient is rounding moves by rounding over rounding
    "direction": 1e-5,
    "average": 1e-6,
}
"""What float32 may be off by: nats, the loss, advantages, rates and averages as they are; the norm and moments relative
to the largest; weights, of the largest move of one in the round; direction, 1 less the cosine of the moves of all."""
BOUNDS_IN_BFLOAT16 = BOUNDS | {
    "log-probs": 0.25,  # 8 bits: 4 roundings of a logit between 8 and 16
    "loss": 0.01,
    "gradient norm": 0.05,
    "moments": 0.15,
    "weights": 2.0,
    "direction": 0.02,
}


class Differences(defaultdict[str, float]):
    """The largest difference seen of each kind."""

    def __init__(self) -> None:
        super().__init__(float)

    def note(self, kind: str, stored: object, own: object, *, relative: bool = False) -> None:
        """Compares two numbers, sequences or tensors of the same shape; `relative` is to the largest entry."""
        one, other = (torch.as_tensor(value, dtype=torch.float64).detach() for value in (stored, own))
        if one.shape != other.shape:
            self[kind] = math.inf
            return
        equal = one == other  # infinities too
        distance = torch.where(equal, 0.0, (one - other).abs())
        if distance.numel():
            found = float(distance.max()) / (max(float(other.abs().max()), 1e-300) if relative else 1.0)
            self[kind] = max(self[kind], math.inf if math.isnan(found) else found)

    def require(self, stored: object, own: object) -> None:
        """Counts where two things that have to be equal are not."""
        self["ids, order, grades"] += stored != own

    def over(self, bounds: dict[str, float]) -> dict[str, float]:
        """Those that are larger than they may be."""
        return {kind: found for kind, found in self.items() if not found <= bounds[kind]}


def joined(values: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.reshape(-1) for value in values] or [torch.zeros(0)])
