"""AdamW: its learning-rate schedule, its moments by parameter name, and its state on disk.

Left out on purpose: parameter groups (one weight decay for all, as AReaL).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import JsonValue
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kdpipe.errors import ArtifactError
from kdpipe.models.folder import disk_errors
from kdpipe.recipe.models import Optimizer, SftOptimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
TENSORS_FILE = "trainer.safetensors"
STATE_FILE = "trainer.json"


def learning_rate(settings: Optimizer | SftOptimizer, step: int, *, horizon: int) -> float:
    """The rate after `step` optimizer steps: linear warm-up, then the schedule down to 0 at the horizon."""
    warmup = settings.warmup_steps
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    if settings.schedule == "constant":
        return settings.learning_rate
    left = 1 - min(1.0, (step - warmup) / max(1, horizon - warmup))
    factor = left if settings.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))
    return settings.learning_rate * factor


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


def write_trainer(
    folder: Path, *, tensors: Mapping[str, torch.Tensor], state: Mapping[str, JsonValue]
) -> None:
    """Writes optimizer moments, masters, RNG and the like, and all that is not a tensor as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors refuses tensors that share memory or are not contiguous.
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    with disk_errors(folder):
        save_file(plain, folder / TENSORS_FILE)
    text = json.dumps(dict(state), sort_keys=True, indent=1, allow_nan=False)
    (folder / STATE_FILE).write_text(text + "\n", encoding="utf-8")


def read_trainer(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, JsonValue]]:
    """Tensors (on the CPU) and state as written; raises ArtifactError when damaged or missing."""
    try:
        tensors: dict[str, torch.Tensor] = load_file(folder / TENSORS_FILE)
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{folder}: trainer state cannot be read: {error}") from error
    if not isinstance(state, dict):
        raise ArtifactError(f"{folder / STATE_FILE}: expected a JSON object, found {type(state).__name__}")
    return tensors, state
