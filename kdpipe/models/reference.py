"""A model folder run as plainly as transformers can: the reference for engines and trainer.

Shares no code with `logprobs.py`, `batching.py` or the engines: one sequence at a time, the model's own logits, and a
shift by one of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM

from kdpipe.models.adapters import merge_adapter, target_names
from kdpipe.models.folder import skeleton
from kdpipe.models.model_folder import unfit
from kdpipe.models.source import ModelSource
from kdpipe.recipe.models import Lora

Pair = tuple[list[int], list[int]]
"""The token ids of a prompt and of a completion."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a model, from its config alone. `parameters` counts a tied matrix once."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    kv_width: int
    rows: int


@torch.no_grad()
def plain_logprobs(
    source: ModelSource,
    pairs: Sequence[Pair],
    *,
    temperature: float,
    num_ids: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[npt.NDArray[np.float64]]:
    """Log-probs of every completion's tokens, over the first `num_ids` ids, by the model's own forward."""
    model = _open(source.folder, dtype=dtype, trust_remote_code=source.trust_remote_code).to(device)
    if source.adapter is not None:
        merge_adapter(model, source.adapter.folder)
    model.eval()
    results = []
    for prompt, completion in pairs:
        ids = torch.tensor([[*prompt, *completion]], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :, :num_ids].double() / temperature
        before = logits[len(prompt) - 1 : len(prompt) - 1 + len(completion)]  # what stands before each token
        own = torch.tensor(completion, dtype=torch.long, device=model.device)[:, None]
        results.append((before.gather(1, own)[:, 0] - before.logsumexp(1)).cpu().numpy())
    return results


def perturb(source: ModelSource, folder: Path, *, dtype: torch.dtype, seed: int) -> None:
    """Writes a copy of the model whose weights are all others, the output head too; sizes and config stay."""
    model = _open(source.folder, dtype=dtype, trust_remote_code=source.trust_remote_code)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float32)
            weight.add_(noise.to(weight.dtype) * weight.float().std(correction=0).to(weight.dtype))
    model.save_pretrained(str(folder))


def shape_of(folder: Path, *, trust_remote_code: bool = False) -> Shape:
    """The sizes of the model in a folder, of which only config.json is read."""
    model = skeleton(folder, trust_remote_code=trust_remote_code)
    text = model.config.get_text_config()
    heads, hidden = int(text.num_attention_heads), int(text.hidden_size)
    written = text.to_dict()
    # Not every architecture has these fields: without them heads are all alike, and the MLP four times as wide.
    kv_heads = written.get("num_key_value_heads") or heads
    head_dim = written.get("head_dim") or hidden // heads
    intermediate = written.get("intermediate_size") or written.get("n_inner") or 4 * hidden
    return Shape(
        parameters=sum(weight.numel() for weight in model.parameters()),
        layers=int(text.num_hidden_layers),
        hidden=hidden,
        intermediate=int(intermediate),
        kv_width=int(kv_heads) * int(head_dim),
        rows=int(model.get_input_embeddings().weight.shape[0]),
    )


def adapter_parameters(folder: Path, lora: Lora) -> int:
    """How many weights the adapter that `lora` describes has."""
    model = skeleton(folder, trust_remote_code=False)
    targets = target_names(model, lora)
    adapted = [module for name, module in model.named_modules() if name.rpartition(".")[2] in targets]
    return sum(lora.rank * (module.in_features + module.out_features) for module in adapted)


def _open(folder: Path, *, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    with unfit(f"{folder}: transformers cannot open it"):
        return AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
        )
