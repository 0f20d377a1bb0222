"""A model folder run as plainly as transformers can: the reference for engines and trainer.

Shares no code with `logprobs.py`, `batching.py` or the engines: one sequence at a time, the model's own logits, and a
shift by one of its own.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kdpipe.models.adapters import merge_adapter, targets_of
from kdpipe.models.folder import load_text_model, skeleton
from kdpipe.models.source import ModelSource
from kdpipe.recipe.models import Lora

Pair = tuple[list[int], list[int]]
"""The token ids of a prompt and of a completion."""
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a model, from its config alone. `parameters` counts a tied matrix once."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    kv_width: int
    rows: int


def plain_logprobs(
    source: ModelSource,
    pairs: Sequence[Pair],
    *,
    temperature: float,
    num_ids: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Floats]:
    """Log-probs of every completion's tokens, over the first `num_ids` ids, by the model's own forward."""
    model = open_plain(source, dtype=dtype, device=device)
    found = (logprobs_of(model, pair, temperature=temperature, num_ids=num_ids) for pair in pairs)
    return [rows[0] for rows in found]


def open_plain(source: ModelSource, *, dtype: torch.dtype, device: torch.device) -> Any:
    """The model in a folder as transformers opens it, its adapter merged."""
    model: Any = load_text_model(source.folder, dtype=dtype, trust_remote_code=source.trust_remote_code)[0]
    model.to(device)
    if source.adapter is not None:
        merge_adapter(model, source.adapter.folder)
    return model.eval()


@torch.no_grad()
def logprobs_of(model: Any, pair: Pair, *, temperature: float, num_ids: int, copies: int = 1) -> Floats:
    """Log-probs [copies, n] of a completion's tokens, over the first `num_ids` ids, of equal sequences."""
    prompt, completion = pair
    ids = torch.tensor([[*prompt, *completion]] * copies, device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[..., :num_ids].double() / temperature
    before = logits[:, len(prompt) - 1 : len(prompt) - 1 + len(completion)]  # what stands before each token
    own = torch.tensor([completion] * copies, dtype=torch.long, device=model.device)[..., None]
    found: Floats = (before.gather(2, own)[..., 0] - before.logsumexp(2)).cpu().numpy()
    return found


def rounding_noise(
    model: Any, pairs: Sequence[Pair], *, temperature: float, num_ids: int, dtype: torch.dtype
) -> Floats:
    """How far other roundings in `dtype` move log-probs of the completions' tokens, in nats.

    The forward pass is made again in another batching, of two copies, where each layer's output is moved by a random
    part of a rounding error: another engine multiplies in another order, and rounds elsewhere.
    """
    asked: Any = {"temperature": temperature, "num_ids": num_ids}
    with computing_in(dtype, model):
        as_it_is = [logprobs_of(model, pair, **asked) for pair in pairs]
        with _rounding_otherwise(model, torch.finfo(dtype).eps / 2):
            found = [logprobs_of(model, pair, **asked, copies=2) for pair in pairs]
    moved = [np.abs(rows - row).ravel() for rows, row in zip(found, as_it_is, strict=True)]
    return np.concatenate(moved) if moved else np.zeros(0)


def computing_in(dtype: torch.dtype, model: Any) -> contextlib.AbstractContextManager[None]:
    """The context in which a model computes in `dtype`: autocast where that is narrower than its weights."""
    if dtype in (torch.float32, model.dtype):
        return contextlib.nullcontext()
    return torch.autocast(model.device.type, dtype=dtype)


@contextlib.contextmanager
def _rounding_otherwise(model: Any, error: float) -> Iterator[None]:
    """Moves the output of each innermost layer, by up to `error` of its size."""
    generator = torch.Generator(model.device).manual_seed(0)

    def move(_module: Any, _inputs: Any, output: Any) -> Any:
        if not isinstance(output, torch.Tensor) or not output.is_floating_point():
            return output
        wide = output.float()
        part = torch.rand(wide.shape, generator=generator, device=wide.device) * 2 - 1
        return (wide * (1 + error * part)).to(output.dtype)

    innermost = [module for module in model.modules() if not any(module.children())]
    handles = [module.register_forward_hook(move) for module in innermost]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def perturb(source: ModelSource, folder: Path, *, dtype: torch.dtype, share: float) -> None:
    """Writes a copy of the model with noise on each weight, the output head's too: `share` of its spread."""
    model, _ = load_text_model(source.folder, dtype=dtype, trust_remote_code=source.trust_remote_code)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float32)
            weight.add_((noise * weight.float().std(correction=0) * share).to(weight.dtype))
    model.save_pretrained(str(folder))


def shape_of(folder: Path, *, trust_remote_code: bool = False) -> Shape:
    """The sizes of the model in a folder, of which only config.json is read."""
    return shape_of_model(skeleton(folder, trust_remote_code=trust_remote_code))


def shape_of_model(model: Any) -> Shape:
    """The sizes of a model that is open."""
    text = model.config.get_text_config()
    hidden = int(text.hidden_size)
    written = text.to_dict()
    heads = _largest(
        getattr(text, "num_attention_heads", None)
    )  # 0 of a state-space model, which keeps no keys
    # Not every architecture has these fields: without them heads are all alike, and the MLP four times as wide.
    kv_heads = _largest(written.get("num_key_value_heads")) or heads
    head_dim = _largest(written.get("head_dim")) or hidden // max(1, heads)
    intermediate = (
        _largest(written.get("intermediate_size")) or _largest(written.get("n_inner")) or 4 * hidden
    )
    return Shape(
        parameters=sum(weight.numel() for weight in model.parameters()),
        layers=int(text.num_hidden_layers),
        hidden=hidden,
        intermediate=intermediate,
        kv_width=kv_heads * head_dim,
        rows=int(model.get_input_embeddings().weight.shape[0]),
    )


def _largest(found: Any) -> int:
    """A size, the largest where each layer has its own (Gemma 3n), 0 where there is none."""
    return max(map(int, found), default=0) if isinstance(found, list | tuple) else int(found or 0)


def adapter_parameters(folder: Path, lora: Lora) -> int:
    """How many weights the adapter that `lora` describes has."""
    model = skeleton(folder, trust_remote_code=False)
    targets = targets_of(model, lora)
    layers = [name for name, module in model.named_modules() if name.rpartition(".")[2] in targets.layers]
    shapes = [model.get_submodule(name).weight.shape for name in layers]
    shapes += [
        weight.shape
        for name, weight in model.named_parameters()
        if any(name.endswith(target) for target in targets.parameters)
    ]
    return sum(lora.rank * math.prod(shape[:-2]) * sum(shape[-2:]) for shape in shapes)
