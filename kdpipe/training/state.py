"""The optimizer's state on disk, beside the model of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kdpipe.errors import ArtifactError
from kdpipe.models.folder import disk_errors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic import JsonValue


TENSORS_FILE = "trainer.safetensors"
STATE_FILE = "trainer.json"


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
