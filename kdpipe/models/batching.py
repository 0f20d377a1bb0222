"""Token ids to padded tensors, and where each completion token is predicted. No model call.

Padding stands on the right: a causal model never looks there, so no mask is needed. This module holds the
only shift by one outside an engine's decoding: completion token t is predicted at position prompt - 1 + t.

Shapes: B sequences, T padded positions, N completion tokens of all sequences, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences ready for a forward pass.

    `input_ids_BT` is without the last token, which predicts nothing. `rows_N`, `positions_N` point at the
    hidden state that predicts `target_ids_N`; `counts` is the number of completion tokens per sequence.
    """

    input_ids_BT: torch.Tensor
    rows_N: torch.Tensor
    positions_N: torch.Tensor
    target_ids_N: torch.Tensor
    counts: list[int]


def batches_by_tokens(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indexes into `lengths`, longest first, in batches of at most `max_tokens` padded tokens.

    A sequence longer than `max_tokens` is a batch of its own. Equal lengths keep their order.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def pad_right(sequences: Sequence[Sequence[int]], *, device: torch.device | None = None) -> torch.Tensor:
    """Ids [B, T] int64 of the sequences, filled with id 0 on the right."""
    width = max(map(len, sequences))
    return torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in sequences], device=device)


def make_batch(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    device: torch.device | None = None,
) -> Batch:
    """One batch of the given sequences, in their order; prompts have at least one token."""
    counts = [len(completion) for completion in completions]
    rows_N = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    positions = [
        len(prompt) - 1 + t for prompt, count in zip(prompts, counts, strict=True) for t in range(count)
    ]
    inputs = [[*prompt, *completion[:-1]] for prompt, completion in zip(prompts, completions, strict=True)]
    targets = [token for completion in completions for token in completion]
    return Batch(
        input_ids_BT=pad_right(inputs, device=device),
        rows_N=rows_N.to(device),
        positions_N=torch.tensor(positions, dtype=torch.long, device=device),
        target_ids_N=torch.tensor(targets, dtype=torch.long, device=device),
        counts=counts,
    )
