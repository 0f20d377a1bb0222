"""Divergences, policy-gradient losses and ratio weights: tensors in, tensors out.

Shapes are in the names: N completion tokens (flattened), V token ids in use, K ids of a support (id -1 is
padding), S support points (K + 1 with the tail bucket, or V). Log-probs are in nats. `student` carries the gradient;
what is called teacher, signal, weight or advantage never does.

Left out on purpose: masks. A caller indexes the tokens that count *before* calling, because a `where` on a
result, or a product with 0, still sends nan gradients back from the inputs that it hides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from kdpipe.recipe.objective import (
    DistributionTerm,
    JsdTerm,
    K2Term,
    K3Term,
    RklTerm,
    SkewKlTerm,
    SkewRklTerm,
)

SampledKd: TypeAlias = RklTerm | K2Term | K3Term


def divergence(term: DistributionTerm, student_NS: Tensor, teacher_NS: Tensor) -> Tensor:
    """The term's divergence of each row in nats, [N]."""
    match term:
        case JsdTerm(beta=beta):
            return jsd(student_NS, teacher_NS, beta)
        case SkewKlTerm(alpha=alpha):
            return skew_kl(student_NS, teacher_NS, alpha)
        case SkewRklTerm(alpha=alpha):
            return skew_rkl(student_NS, teacher_NS, alpha)


def signal_of(term: SampledKd, difference_N: Tensor, lengths: Sequence[int]) -> Tensor:
    """The signal a of the term at each token, [N], from d = q - s, which is 0 where it does not look."""
    match term:
        case RklTerm(gamma=gamma):
            return discounted_future_sum(difference_N, lengths, gamma=gamma)
        case K3Term():
            return difference_N.expm1()
        case K2Term():
            return difference_N


def sampled_loss(
    term: SampledKd,
    student_N: Tensor,
    teacher_N: Tensor,
    *,
    signal_N: Tensor,
    baseline_N: Tensor,
    weight_N: Tensor,
) -> Tensor:
    """The loss per token, [N], whose gradient is `-w (a - baseline) grad s`; `signal_N` is a - baseline."""
    match term:
        case RklTerm():
            return rkl_surrogate(student_N, signal_N, weight_N)
        case K2Term():
            loss_N = k2(student_N, teacher_N, weight_N)
        case K3Term():
            loss_N = k3(student_N, teacher_N, weight_N)
    # Value 0, and the gradient that the baseline takes off.
    return loss_N + (weight_N * baseline_N).detach() * (student_N - student_N.detach())


def student_support(logprobs_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """The student's log-probs on a support, [N, K + 1]: the given ids, then the tail bucket.

    The tail is a logsumexp over the complement: `log(1 - sum)` loses all digits where the support holds nearly
    everything. -inf where there is no complement, and at padding. Ids are distinct, the first is no padding.
    """
    is_padding_NK = ids_NK < 0
    ids_NK = torch.where(is_padding_NK, ids_NK[:, :1], ids_NK)
    support_NK = logprobs_NV.gather(-1, ids_NK).masked_fill(is_padding_NK, -math.inf)
    complement_NV = logprobs_NV.scatter(-1, ids_NK, -math.inf)
    # A logsumexp over nothing but -inf is -inf with nan gradients; those rows take the constant instead.
    is_empty_N1 = (complement_NV == -math.inf).all(dim=-1, keepdim=True)
    tail_N1 = complement_NV.masked_fill(is_empty_N1, 0).logsumexp(dim=-1, keepdim=True)
    return torch.cat([support_NK, tail_N1.masked_fill(is_empty_N1, -math.inf)], dim=-1)


def kl(first_NS: Tensor, second_NS: Tensor) -> Tensor:
    """KL(first‖second) of each row in nats, [N], with 0 log 0 = 0; inf where second lacks mass of first."""
    is_zero = first_NS == -math.inf
    first = first_NS.masked_fill(is_zero, 0)
    second = second_NS.masked_fill(is_zero, 0)
    return (first.exp() * (first - second)).sum(dim=-1)


def mixture(first_NS: Tensor, second_NS: Tensor, first_share: float) -> Tensor:
    """Log of `share * first + (1 - share) * second`, [N, S]; the share is in [0, 1)."""
    if first_share == 0:
        return second_NS
    # logaddexp(-inf, -inf) has nan gradients; where neither has mass, no KL to the mixture looks at it.
    is_zero = (first_NS == -math.inf) & (second_NS == -math.inf)
    return torch.logaddexp(
        math.log(first_share) + first_NS, math.log1p(-first_share) + second_NS.masked_fill(is_zero, 0)
    )


def jsd(student_NS: Tensor, teacher_NS: Tensor, beta: float) -> Tensor:
    """Generalised Jensen-Shannon divergence of each row in nats, [N].

    `beta * KL(P‖m) + (1 - beta) * KL(S‖m)` with `m = beta * P + (1 - beta) * S`, P the teacher, S the
    student. 0 and 1 are *defined* as KL(P‖S) and KL(S‖P) (GKD, 2306.13649): the formula itself is 0 there.
    """
    if beta == 0:
        return kl(teacher_NS, student_NS)
    if beta == 1:
        return kl(student_NS, teacher_NS)
    mixture_NS = mixture(teacher_NS, student_NS, beta)
    return beta * kl(teacher_NS, mixture_NS) + (1 - beta) * kl(student_NS, mixture_NS)


def skew_kl(student_NS: Tensor, teacher_NS: Tensor, alpha: float) -> Tensor:
    """`KL(P‖alpha * P + (1 - alpha) * S)` of each row in nats, [N], in [0, -log alpha] (2402.03898)."""
    return kl(teacher_NS, mixture(teacher_NS, student_NS, alpha))


def skew_rkl(student_NS: Tensor, teacher_NS: Tensor, alpha: float) -> Tensor:
    """`KL(S‖alpha * S + (1 - alpha) * P)` of each row in nats, [N], in [0, -log alpha]; S has gradients."""
    return kl(student_NS, mixture(student_NS, teacher_NS, alpha))


def rkl_surrogate(student_N: Tensor, signal_N: Tensor, weight_N: Tensor) -> Tensor:
    """`-w * a * s` per token, [N]: its gradient, not its value, means something."""
    return -(weight_N * signal_N).detach() * student_N


def k2(student_N: Tensor, teacher_N: Tensor, weight_N: Tensor) -> Tensor:
    """`w * (s - q)^2 / 2` per token, [N]; the gradient is that of `rkl_surrogate` with signal q - s."""
    return weight_N.detach() * 0.5 * (student_N - teacher_N.detach()).square()


def k3(student_N: Tensor, teacher_N: Tensor, weight_N: Tensor) -> Tensor:
    """`w * (exp(q - s) - 1 - (q - s))` per token, [N]; the gradient is that of signal `exp(q - s) - 1`."""
    difference_N = teacher_N.detach() - student_N
    return weight_N.detach() * (difference_N.expm1() - difference_N)


def discounted_future_sum(values_N: Tensor, lengths: Sequence[int], *, gamma: float) -> Tensor:
    """`D_t = sum_{u >= t} gamma^(u - t) d_u` within each completion, [N]; 0^0 = 1. Detached.

    `lengths` are the tokens of each completion in order, N in all. Windows double: after the pass with
    offset h, every D_t covers 2h tokens, so a completion of n tokens takes log2(n) passes.
    """
    if sum(lengths) != len(values_N):
        raise ValueError(f"completions of {sum(lengths)} tokens in all, but {len(values_N)} values")
    sums_N = values_N.detach().clone()
    if gamma == 0:
        return sums_N
    counts = torch.tensor(lengths, dtype=torch.long)
    ends_N = counts.cumsum(0).repeat_interleave(counts)
    left_N = (ends_N - torch.arange(len(ends_N))).to(sums_N.device)  # tokens from here to the end, at least 1
    offset = 1
    while offset < max(lengths, default=0):
        later = sums_N[offset:].masked_fill(left_N[:-offset] <= offset, 0)
        sums_N = torch.cat([sums_N[:-offset] + gamma**offset * later, sums_N[-offset:]])
        offset *= 2
    return sums_N


def ppo_loss(
    student_N: Tensor,
    proximal_N: Tensor,
    advantage_N: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> tuple[Tensor, Tensor]:
    """PPO's clipped loss per token, [N], and where it is flat because of a clip, bool [N].

    `L = max(-A u, -A clip(u, 1 - low, 1 + high))` with `u = exp(s - p)`; where A < 0 and `dual_clip` is
    given, `min(L, dual_clip |A|)`.
    """
    ratio_N = (student_N - proximal_N.detach()).exp()
    advantage_N = advantage_N.detach()
    loss_N = torch.maximum(-advantage_N * ratio_N, -advantage_N * ratio_N.clamp(1 - clip_low, 1 + clip_high))
    is_flat_N = moved_enough(ratio_N.detach(), advantage_N, low=clip_low, high=clip_high)
    if dual_clip is not None:
        limit_N = dual_clip * advantage_N.abs()
        is_over_N = loss_N.detach() > limit_N  # only where A < 0: elsewhere the loss is at most 0
        loss_N = torch.where(is_over_N, limit_N, loss_N)
        is_flat_N = is_flat_N | is_over_N
    return loss_N, is_flat_N


def moved_enough(ratio_N: Tensor, signal_N: Tensor, *, low: float, high: float) -> Tensor:
    """Where the ratio has already moved past a bound in the direction in which the signal pushes it."""
    return ((signal_N > 0) & (ratio_N > 1 + high)) | ((signal_N < 0) & (ratio_N < 1 - low))
