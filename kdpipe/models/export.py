"""Writes a trained model in a dtype, and measures what that rounds away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kdpipe.data.tables import read_rollouts
from kdpipe.models.adapters import merge_adapter
from kdpipe.models.devices import dtype_name, resolve_device, resolve_dtype
from kdpipe.models.export_request import WEIGHTS, Rounded, WriteWeights, WrittenWeights
from kdpipe.models.folder import open_model, write_model
from kdpipe.models.tokenizer import open_tokenizer
from kdpipe.workers.message import Nothing
from kdpipe.workers.worker import Report

COMPLETIONS = 8
TOKENS = 64
"""How many completions are compared, and how many tokens of each at most."""
Pairs = list[tuple[list[int], list[int]]]


class ExportServer:
    """What a worker runs for `kdpipe export`."""

    talk = WEIGHTS

    def __call__(self, request: WriteWeights, _report: Report[Nothing]) -> WrittenWeights:
        trust, pairs = request.trust_remote_code, _pairs(request.rollouts)
        dtype, _ = resolve_dtype(request.dtype, resolve_device(request.device))
        model = _open(request.folder, trust=trust)
        if request.adapter is not None:
            merge_adapter(model, request.adapter)
        trained = _logits(model, pairs)
        tokenizer = open_tokenizer(request.folder, trust_remote_code=trust)
        write_model(model, tokenizer, request.target, dtype=dtype)
        del model
        if not trained:
            return WrittenWeights(dtype_name(dtype), None)
        written = _logits(_open(request.target, trust=trust), pairs)
        start = request.start and _logits(_open(request.start, trust=trust), pairs)
        distance = Rounded(
            tokens=sum(map(len, trained)),
            written=_divergence(trained, written),
            back=_divergence(written, trained),
            start=_divergence(trained, start) if start else None,
        )
        return WrittenWeights(dtype_name(dtype), distance)


def _pairs(rollouts: Path | None) -> Pairs:
    """Prompts with completions of different problems."""
    rows = [] if rollouts is None else read_rollouts(rollouts)
    each = {row.prompt_id: (row.prompt_token_ids, row.completion_token_ids[:TOKENS]) for row in rows}
    return [pair for pair in each.values() if pair[1]][:COMPLETIONS]


def _open(folder: Path, *, trust: bool) -> Any:
    """A model in float32: of two that are compared only the weights shall differ."""
    return open_model(folder, dtype=torch.float32, device=torch.device("cpu"), trust_remote_code=trust)


@torch.no_grad()
def _logits(model: Any, pairs: Pairs) -> list[torch.Tensor]:
    """Logits [n, V] before each token of each completion."""
    found = []
    for prompt, completion in pairs:
        every = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0]
        found.append(every[len(prompt) - 1 : -1])
    return found


def _divergence(ones: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """KL(one‖other) of the distributions at these logits, mean of all positions, in nats."""
    each = []
    for one, other in zip(ones, others, strict=True):
        p, q = (logits.double().log_softmax(-1) for logits in (one, other))
        each.append((p.exp() * (p - q)).sum(-1))
    return float(torch.cat(each).mean())
