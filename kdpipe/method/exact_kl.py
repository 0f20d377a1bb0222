"""The exact reverse KL of two models over whole distributions, a chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kdpipe.method.losses import kl
from kdpipe.models.logprobs import Head, chunk_tokens, head_logits, token_slices

Side = tuple[torch.Tensor, Head, float]
"""Hidden states [N, H] with the output head and the temperature that turn them into a distribution."""


@torch.no_grad()
def reverse_kl(student: Side, teacher: Side | Callable[[slice], torch.Tensor], *, chunk: int) -> torch.Tensor:
    """KL(student‖teacher) over the whole vocabulary at each position, nats [N].

    The teacher is a side too, whose head holds the same ids, or gives its log-probs [C, V] of a slice of N.
    """

    def logprobs(side: Side, part: slice) -> torch.Tensor:
        hidden_NH, head, temperature = side
        return head_logits(hidden_NH[part], head, temperature=temperature).log_softmax(-1)

    results = []
    for part in token_slices(len(student[0]), chunk_tokens(chunk, student[1])):
        teacher_CV = logprobs(teacher, part) if isinstance(teacher, tuple) else teacher(part)
        results.append(kl(logprobs(student, part), teacher_CV))
    return torch.cat(results)
