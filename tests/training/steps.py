"""Tiny models, micro-batches and optimizer steps, by what every trainer offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kdpipe.models.batching import Batch, make_batch
from kdpipe.models.logprobs import Head, token_logprobs
from kdpipe.training.protocol import Loss, Trainer, Update

NUM_IDS = 12
SEQUENCES = [([3, 5], [7, 2, 9, 4]), ([1], [8, 6, 6, 0, 2]), ([4, 4, 4], [1]), ([10, 2], [11, 3, 7])]
NUM_TOKENS = sum(len(completion) for _, completion in SEQUENCES)
WHOLE = [list(range(len(SEQUENCES)))]
"""All sequences as one micro-batch."""


def tiny_llama(*, dropout: float = 0.0, rows: int = NUM_IDS) -> LlamaForCausalLM:
    """A model with so many rows of its output head; ids in use are NUM_IDS."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        attention_dropout=dropout,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def batch_of(indices: Sequence[int]) -> Batch:
    picked = [SEQUENCES[index] for index in indices]
    return make_batch([prompt for prompt, _ in picked], [completion for _, completion in picked])


def cross_entropy(batch: Batch, *, factor: float = 1.0) -> Loss:
    """The micro-batch's share of the token mean over all sequences."""

    def loss(hidden_NH: torch.Tensor, head: Head) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logprobs_N, _ = token_logprobs(hidden_NH, head, batch.target_ids_N, temperature=1.0, chunk=64)
        return -factor * logprobs_N.sum() / NUM_TOKENS, {"tokens": torch.tensor(len(logprobs_N))}

    return loss


def take_step(
    trainer: Trainer,
    micro_batches: Sequence[Sequence[int]] = WHOLE,
    *,
    factor: float = 1.0,
    is_rounding: bool = False,
) -> Update:
    trainer.begin()
    for indices in micro_batches:
        batch = batch_of(indices)
        trainer.accumulate(batch, cross_entropy(batch, factor=factor))
    update = trainer.apply(is_rounding=is_rounding)
    trainer.end()
    return update


def copied(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.weights().items()}


def equal(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
