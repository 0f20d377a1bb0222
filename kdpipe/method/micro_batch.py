"""From hidden states to the loss of a micro-batch: the one path from student output to gradient.

The trainer and `check-loss` call it. Tokens that are not kept are cut from the hidden states before the output
head: a log-softmax of what may be nan has nan gradients even where its result is masked.

Shapes: N completion tokens of the micro-batch, H the student's hidden size, G the teacher's, V ids in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kdpipe.method.losses import kl
from kdpipe.method.objective import distribution_value, token_loss
from kdpipe.method.token_batch import TeacherSupport, TokenBatch
from kdpipe.models.logprobs import Head, head_logits, support_of, token_logprobs, token_slices
from kdpipe.recipe.objective import Objective


@dataclass(frozen=True, slots=True)
class TeacherHidden:
    """The teacher's distribution as the states before its output head, computed where it is needed.

    `top_k` 0 is the whole vocabulary, else that many most probable ids and a tail.
    """

    hidden_NG: torch.Tensor
    head: Head
    temperature: float
    top_k: int = 0

    @torch.no_grad()
    def at(self, index: torch.Tensor) -> TeacherSupport:
        """The distribution at the positions in `index`."""
        logits_CV = head_logits(self.hidden_NG[index], self.head, temperature=self.temperature)
        return _supported(logits_CV.log_softmax(-1), self.top_k)


@dataclass(frozen=True, slots=True)
class TeacherPart:
    """One of several teachers: its states at M of N positions, and the log of its weight in the mixture.

    `place_N` says which of the M states belongs to a position; -1 where the teacher has no say.
    """

    states: TeacherHidden
    place_N: torch.Tensor
    log_weight: float


@dataclass(frozen=True, slots=True)
class TeacherMixture:
    """The mixture of several teachers' distributions, `log sum_i w_i exp(q_i)`.

    It is computed where it is needed. Weights of the parts that speak at a position sum to 1. `num_ids` is the largest
    number of ids that a part knows: what it does not know has no probability there. `top_k` as in `TeacherHidden`, of
    the mixture.
    """

    parts: Sequence[TeacherPart]
    num_ids: int
    top_k: int = 0

    @torch.no_grad()
    def at(self, index: torch.Tensor) -> TeacherSupport:
        """The distribution at the positions in `index`."""
        wide = any(part.states.hidden_NG.dtype == torch.float64 for part in self.parts)
        dtype = torch.float64 if wide else torch.float32
        mixed_CV = torch.full((len(index), self.num_ids), -torch.inf, dtype=dtype, device=index.device)
        for part in self.parts:
            place_C = part.place_N[index]
            own = (place_C >= 0).nonzero().squeeze(-1)
            logprobs_cV = part.states.at(place_C[own]).logprobs_NS.to(dtype) + part.log_weight
            known = logprobs_cV.shape[-1]
            mixed_CV[own, :known] = torch.logaddexp(mixed_CV[own, :known], logprobs_cV)
        return _supported(mixed_CV, self.top_k)


def _supported(logprobs_CV: torch.Tensor, top_k: int) -> TeacherSupport:
    if top_k == 0:
        return TeacherSupport(logprobs_CV)
    ids_CK, topk_CK, tail_C = support_of(logprobs_CV, top_k)
    return TeacherSupport(topk_CK, ids_CK, tail_C)


@torch.no_grad()
def reverse_kl(
    hidden_NH: torch.Tensor,
    head: Head,
    teacher: TeacherHidden | TeacherMixture,
    *,
    temperature: float,
    chunk: int,
) -> torch.Tensor:
    """KL(student‖teacher) over the whole vocabulary at each position, nats [N]; both have the same ids."""
    results = []
    for part in token_slices(len(hidden_NH), chunk, head):
        logits_CV = head_logits(hidden_NH[part], head, temperature=temperature)
        index = torch.arange(part.start, part.stop, device=hidden_NH.device)
        results.append(kl(logits_CV.log_softmax(-1), teacher.at(index).logprobs_NS))
    return torch.cat(results)


def micro_batch_loss(
    objective: Objective,
    batch: TokenBatch,
    ids_N: torch.Tensor,
    hidden_NH: torch.Tensor,
    head: Head,
    *,
    temperature: float,
    chunk: int,
    teacher: TeacherSupport | TeacherHidden | TeacherMixture | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The share of these tokens in the step's loss, with gradients, and metrics as sums over tokens.

    `ids_N` are the sampled tokens, `hidden_NH` the states that predict them, `temperature` that of the
    rollout, `chunk` the tokens whose logits exist at once. `teacher` is needed where the objective has a
    `distribution_support`. Raises NonFiniteError as `token_loss` does.
    """
    at = batch.kept.nonzero().squeeze(-1)
    is_compared_n = batch.compared(objective)[at]
    needs_distribution = objective.has_kd and objective.distribution_support is not None

    def value(logprobs_CV: torch.Tensor, part: slice) -> torch.Tensor:
        if teacher is None:
            raise ValueError("this objective needs the teacher's distribution")
        places = at[part]
        return distribution_value(
            objective, logprobs_CV, teacher.at(places), taught_N=is_compared_n[part], places_N=places
        )

    student_n, distribution_n = token_logprobs(
        hidden_NH[at],
        head,
        ids_N[at],
        temperature=temperature,
        chunk=chunk,
        extra=value if needs_distribution else None,
    )
    student_N, distribution_N = (
        None if found_n is None else found_n.new_zeros(len(ids_N)).index_put((at,), found_n)
        for found_n in (student_n, distribution_n)
    )
    assert student_N is not None
    return token_loss(objective, batch, student_N, distribution_N)
