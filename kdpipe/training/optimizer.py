"""AdamW and its moments by parameter name.

Left out on purpose: parameter groups (one weight decay for all, as AReaL).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kdpipe.errors import ArtifactError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kdpipe.recipe.schema import Optimizer, SftOptimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


def adamw(weights: Mapping[str, torch.nn.Parameter], settings: Optimizer | SftOptimizer) -> torch.optim.AdamW:
    """An AdamW over all of the weights, without moments yet."""
    return torch.optim.AdamW(
        list(weights.values()),
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        foreach=True,
    )


def moments(
    optimizer: torch.optim.AdamW, weights: Mapping[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """Both moments of each weight as `exp_avg.NAME` and `exp_avg_sq.NAME`; empty before the first step."""
    return {
        f"{key}.{name}": optimizer.state[weight][key]
        for name, weight in weights.items()
        if weight in optimizer.state
        for key in MOMENTS
    }


def restore_moments(
    optimizer: torch.optim.AdamW,
    weights: Mapping[str, torch.nn.Parameter],
    tensors: Mapping[str, torch.Tensor],
    *,
    step: int,
) -> None:
    """Gives the optimizer the moments in `tensors`, as after `step` optimizer steps.

    Raises ArtifactError where one is missing or of another shape than its weight.
    """
    if step == 0:
        return
    for name, weight in weights.items():
        found = {key: tensors[f"{key}.{name}"] for key in MOMENTS if f"{key}.{name}" in tensors}
        if len(found) != len(MOMENTS) or any(moment.shape != weight.shape for moment in found.values()):
            raise ArtifactError(f"trainer state: no moments of the right shape for {name}")
        optimizer.state[weight] = {
            "step": torch.tensor(float(step)),
            **{key: moment.to(weight.device, weight.dtype) for key, moment in found.items()},
        }
