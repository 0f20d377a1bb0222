"""Logits to tokens: seeded uniforms and draws by inverse CDF. No model call.

Shapes: B rows (completions being sampled), V token ids in use, T steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import pad

from kdpipe.engines.protocol import Sampling

LAST_BELOW_ONE = 1 - 2**-53
_BLOCK = 512


def uniforms(seeds: Sequence[int], num_steps: int) -> npt.NDArray[np.float64]:
    """Uniforms in [0, 1), one row of `num_steps` for each seed; a row depends on its seed only.

    SplitMix64 (Steele, Lea, Flood 2014), vectorised. Torch's CPU generator reads only the low 32 bits of a
    seed, and a generator for each completion costs more than all its draws.
    """
    start_B = _mix(np.array(seeds, dtype=np.uint64))
    steps_T = np.arange(1, num_steps + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    bits_BT = _mix(start_B[:, None] + steps_T[None, :])
    return (bits_BT >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw(
    logits_BV: torch.Tensor, uniforms_B: torch.Tensor, *, sampling: Sampling
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B] and their log-probs [B] under the distribution that they were drawn from.

    `logits_BV` are float32 or float64. Temperature 0 takes the lowest of the most probable ids, with its
    log-prob at temperature 1.
    """
    if sampling.temperature == 0:
        # Argmax promises no order among ties. Rows of nan have no best id; the caller finds them by their log-prob.
        num_ids = logits_BV.shape[-1]
        is_best_BV = logits_BV == logits_BV.amax(-1, keepdim=True)
        ids_B = torch.where(is_best_BV, torch.arange(num_ids, device=logits_BV.device), num_ids - 1).amin(-1)
        logprobs_BV = logits_BV.log_softmax(-1)
    else:
        if sampling.temperature != 1:
            logits_BV = logits_BV / sampling.temperature
        if sampling.top_k or sampling.top_p < 1:
            logits_BV = truncated(logits_BV, top_k=sampling.top_k, top_p=sampling.top_p)
        logprobs_BV = logits_BV.log_softmax(-1)
        ids_B = _invert(logprobs_BV.exp(), uniforms_B)
    return ids_B, logprobs_BV.gather(-1, ids_B[:, None]).squeeze(-1)


def truncated(logits_BV: torch.Tensor, *, top_k: int, top_p: float) -> torch.Tensor:
    """Logits with -inf outside the `top_k` most probable ids (0: all), then outside the `top_p` nucleus.

    The nucleus is the smallest set of most probable ids whose mass reaches `top_p`; ties go to the lower id.
    """
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    if 0 < top_k < logits_BV.shape[-1]:
        sorted_BV[:, top_k:] = -torch.inf
    if top_p < 1:
        probs_BV = sorted_BV.softmax(-1, dtype=torch.float64)
        before_BV = probs_BV.cumsum(-1) - probs_BV
        # The first id stands even where rounding leaves no mass before it.
        before_BV[:, 0] = 0
        sorted_BV = sorted_BV.masked_fill(before_BV >= top_p, -torch.inf)
    return torch.empty_like(logits_BV).scatter_(-1, order_BV, sorted_BV)


def _invert(probs_BV: torch.Tensor, uniforms_B: torch.Tensor) -> torch.Tensor:
    """The first id whose cumulated probability exceeds the uniform; never an id of probability 0.

    A wide vocabulary is searched in two levels: a float64 cumulation of all of it costs more than the
    softmax, one of block sums does not.
    """
    if probs_BV.shape[-1] <= 2 * _BLOCK:
        ids_B, _ = _search(probs_BV, uniforms_B)
        return ids_B
    padding = -probs_BV.shape[-1] % _BLOCK
    blocks_BNK = pad(probs_BV, (0, padding)).view(len(probs_BV), -1, _BLOCK)
    block_B, within_B = _search(blocks_BNK.sum(-1, dtype=torch.float64), uniforms_B)
    rows_B = torch.arange(len(block_B), device=block_B.device)
    ids_B, _ = _search(blocks_BNK[rows_B, block_B], within_B)
    return block_B * _BLOCK + ids_B


def _search(masses_BK: torch.Tensor, uniforms_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index [B] of the mass that each uniform falls into, and how far into it, in [0, 1)."""
    cdf_BK = masses_BK.cumsum(-1, dtype=torch.float64)
    # u < 1 rounds to a target below the total, so the mass found is never 0; the clamp is for nan.
    target_B1 = uniforms_B[:, None] * cdf_BK[:, -1:]
    index_B1 = torch.searchsorted(cdf_BK, target_B1, right=True).clamp_(max=masses_BK.shape[-1] - 1)
    mass_B1 = masses_BK.gather(-1, index_B1).double()
    within_B1 = 1 - (cdf_BK.gather(-1, index_B1) - target_B1) / mass_B1
    return index_B1.squeeze(-1), within_B1.squeeze(-1).clamp_(0, LAST_BELOW_ONE)


def _mix(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64; wraps around at 64 bits, as numpy arrays do."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
