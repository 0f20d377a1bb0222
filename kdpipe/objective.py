"""A recipe's objective applied to tensors: advantages, the loss of a micro-batch, and its metrics.

The trainer and `check-loss` call these same functions. Shapes as in `losses.py`: N flattened completion
tokens, V ids in use, K ids of the teacher's top k, S support points; n is the part of N that a term looks at.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kdpipe import losses
from kdpipe.errors import StepError
from kdpipe.recipe import BehaviourControl, JsdTerm, K2Term, Objective, RatioControl, RklTerm

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from torch import Tensor

STD_EPSILON = 1e-5  # AReaL's


class NonFiniteError(StepError):
    """A number that should be finite is not; `index` is its place in the input, for the caller to name."""

    def __init__(self, index: int, found: str) -> None:
        super().__init__(f"position {index}: {found}")
        self.index = index
        self.found = found


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """The completion tokens of one micro-batch: [N] tensors on one device, completions one after another.

    `student` s carries the gradient; `behaviour` b, `proximal` p and `teacher` q are data; `advantage` is
    that of each token's completion. `kept` is False where no term may look, `scorable` where the KD term may
    not (the teacher lacks the id): whatever stands there is never read. `lengths` are the tokens of each
    completion, N in all. `divergence` comes from `distribution_term`, with its gradient.
    """

    student: Tensor
    behaviour: Tensor
    proximal: Tensor
    advantage: Tensor
    kept: Tensor
    scorable: Tensor
    lengths: Sequence[int]
    teacher: Tensor | None = None
    divergence: Tensor | None = None

    def __post_init__(self) -> None:
        shape = (sum(self.lengths),)
        for name in (
            "student",
            "behaviour",
            "proximal",
            "advantage",
            "kept",
            "scorable",
            "teacher",
            "divergence",
        ):
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, but the lengths add up to {shape[0]} tokens"
                )


# -------------------------------------------------------------------------------------------- advantages


def advantages(objective: Objective, rewards: Sequence[float], groups: Sequence[Hashable]) -> list[float]:
    """The advantage A of each completion, from raw rewards; call it once with all completions of a round.

    `groups` names the prompt of each completion. A group of one, and one of equal rewards, gets exactly 0.
    """
    clipped = []
    for index, reward in enumerate(rewards):
        scaled = (reward + objective.reward_bias) * objective.reward_scaling
        if not abs(scaled) < math.inf:
            raise NonFiniteError(index, f"reward is {reward}, expected a finite number")
        clipped.append(min(max(scaled, -objective.reward_clip), objective.reward_clip))
    members: dict[Hashable, list[float]] = {}
    for group, reward in zip(groups, clipped, strict=True):
        members.setdefault(group, []).append(reward)
    # `statistics` computes exactly, so equal rewards leave no rounding residue for the division to blow up.
    centres = {group: statistics.mean(values) for group, values in members.items()}
    scales = dict.fromkeys(members, 1.0)
    if objective.group_normalization == "mean_std":
        scales = {group: _sample_std(values) + STD_EPSILON for group, values in members.items()}
    result = [
        (reward - centres[group]) / scales[group] for group, reward in zip(groups, clipped, strict=True)
    ]
    return _batch_normalized(result) if objective.batch_normalization else result


def _batch_normalized(values: Sequence[float]) -> list[float]:
    """Mean and sample std over *completions*.

    AReaL's `adv_norm` takes them over unmasked tokens, so long completions weigh more and the mean that it
    subtracts is not 0: where long answers are the bad ones, every token gets a push upwards. Over
    completions the group means have already made the mean 0, and only the scale changes.
    """
    if not values:
        return []
    centre, scale = statistics.mean(values), _sample_std(values) + STD_EPSILON
    return [(value - centre) / scale for value in values]


def _sample_std(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


# ----------------------------------------------------------------------------------- distribution terms


def distribution_term(
    kd: JsdTerm,
    logprobs_NV: Tensor,
    *,
    scorable_N: Tensor,
    topk_ids_NK: Tensor,
    topk_logprobs_NK: Tensor,
    tail_N: Tensor,
    offset: int = 0,
) -> Tensor:
    """The divergence at each position, [N], with gradient to `logprobs_NV`; exactly 0 where not scorable.

    `logprobs_NV` are the student's at T over the ids in use. Positions that are not kept are cut by the
    caller before its log-softmax. Raises NonFiniteError naming the token id that makes a KL infinite; its
    index counts from `offset`, the place of the first row in the micro-batch.
    """
    result_N = logprobs_NV.new_zeros(len(logprobs_NV))
    at = scorable_N.nonzero().squeeze(-1)
    ids_nK = topk_ids_NK[at].long()
    student_nS = losses.student_support(logprobs_NV[at], ids_nK)
    teacher_nS = losses.teacher_support(
        topk_logprobs_NK[at].to(student_nS.dtype),
        tail_N[at].to(student_nS.dtype),
        num_ids=logprobs_NV.shape[-1],
    )
    values_n = losses.jsd(student_nS, teacher_nS, kd.beta)
    if not bool(torch.isfinite(values_n).all()):
        _explain_divergence(kd, at + offset, ids_nK, student_nS.detach(), teacher_nS)
    return result_N.index_put((at,), values_n)


def _explain_divergence(
    kd: JsdTerm, at: Tensor, ids_nK: Tensor, student_nS: Tensor, teacher_nS: Tensor
) -> None:
    """Raises NonFiniteError for the first row whose divergence is not finite."""
    infinite_nS = losses.infinite_points(student_nS, teacher_nS, kd.beta)
    not_numbers_nS = ~((student_nS < math.inf) & (teacher_nS < math.inf))
    row, column = (infinite_nS | not_numbers_nS).nonzero()[0].tolist()
    token = f"token id {int(ids_nK[row, column])}" if column < ids_nK.shape[-1] else "the tail bucket"
    student, teacher = float(student_nS[row, column]), float(teacher_nS[row, column])
    reason = "makes the divergence infinite" if bool(infinite_nS[row, column]) else "is not a log-prob"
    raise NonFiniteError(
        int(at[row]),
        f"{token} has log-prob {student:.6g} under the student and {teacher:.6g} under the teacher, "
        f"which {reason}",
    )


# ------------------------------------------------------------------------------------------- token loss


def token_loss(
    objective: Objective, batch: TokenBatch, *, denominator: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's share of an optimizer step's loss, and detached metrics as *sums* over tokens.

    `denominator` is the number of kept tokens of the whole optimizer step, across micro-batches and ranks,
    so the shares simply add up; it counts what a KD mask, a clip or a ratio mask zeroes. Metrics:
    `kept_tokens`; with an RL term `rl_loss`, `rl_clipped`, `rl_behaviour_acted` (divide by `kept_tokens`);
    with a KD term `kd_tokens` and, to divide by it, `kd_loss`, `kd_reverse_kl_nats` (s - q), `kd_ratio_acted`.
    Raises NonFiniteError where a kept token's s, b, p, q or advantage is not finite and a term needs it.
    """
    if not denominator > 0:
        raise ValueError(f"denominator is {denominator}: a step without tokens is skipped by the caller")
    kept = batch.kept.nonzero().squeeze(-1)
    shares: list[Tensor] = []
    metrics: dict[str, Tensor] = {"kept_tokens": batch.kept.sum()}
    if objective.has_rl:
        rl_N, rl_metrics = _rl_term(objective, batch, kept)
        shares.append(objective.rl_weight * rl_N.sum() / denominator)
        metrics |= rl_metrics
    if objective.has_kd:
        kd_N, kd_metrics = _kd_term(objective, batch, (batch.kept & batch.scorable).nonzero().squeeze(-1))
        shares.append(objective.distill_weight * kd_N.sum() / denominator)
        metrics |= kd_metrics
    return torch.stack(shares).sum(), metrics


def _rl_term(objective: Objective, batch: TokenBatch, at: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    student, proximal, behaviour = batch.student[at], batch.proximal[at], batch.behaviour[at]
    advantage = batch.advantage[at]
    _require_finite(
        at,
        {
            "the student's log-prob": student,
            "the proximal log-prob": proximal,
            "the sampler's log-prob": behaviour,
            "the advantage": advantage,
        },
    )
    loss, is_flat = losses.ppo_loss(
        student,
        proximal,
        advantage,
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        dual_clip=objective.dual_clip,
    )
    ratio = (proximal - behaviour).exp().detach()
    weight = _behaviour_weight(objective.behaviour, ratio)
    loss = weight * loss
    return loss, {
        "rl_loss": loss.detach().sum(),
        "rl_clipped": is_flat.sum(),
        "rl_behaviour_acted": (weight != ratio).sum(),
    }


def _kd_term(objective: Objective, batch: TokenBatch, at: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    metrics = {"kd_tokens": torch.tensor(len(at), device=at.device)}
    if batch.teacher is not None:
        _require_finite(
            at, {"the student's log-prob": batch.student[at], "the teacher's log-prob": batch.teacher[at]}
        )
        metrics["kd_reverse_kl_nats"] = (batch.student[at].detach() - batch.teacher[at]).sum()
    if isinstance(objective.kd, JsdTerm):
        if batch.divergence is None:
            raise ValueError("a distribution term needs TokenBatch.divergence")
        loss = batch.divergence[at]
        _require_finite(at, {"the divergence": loss})
    else:
        loss, metrics["kd_ratio_acted"] = _sampled_token_term(objective.kd, batch, at)
    return loss, metrics | {"kd_loss": loss.detach().sum()}


def _sampled_token_term(kd: RklTerm | K2Term, batch: TokenBatch, at: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted term at the positions `at`, and how many of them the ratio control acted on."""
    if batch.teacher is None:
        raise ValueError(f"{kd.term} needs TokenBatch.teacher")
    student, teacher, behaviour = batch.student[at], batch.teacher[at], batch.behaviour[at]
    _require_finite(at, {"the sampler's log-prob": behaviour})
    ratio = (student.detach() - behaviour).exp()
    signal = teacher.detach() - student.detach()
    match kd:
        case RklTerm(gamma=gamma):
            # Masked tokens keep their place in the discounting and contribute d = 0.
            difference_N = torch.zeros_like(batch.student.detach()).index_put((at,), signal)
            signal = losses.discounted_future_sum(difference_N, batch.lengths, gamma=gamma)[at]
            weight = _ratio_weight(kd.ratio, ratio, signal)
            loss = losses.rkl_surrogate(student, signal, weight)
        case K2Term():
            weight = _ratio_weight(kd.ratio, ratio, signal)
            loss = losses.k2(student, teacher, weight)
    return loss, (weight != ratio).sum()


def _ratio_weight(settings: RatioControl, ratio_N: Tensor, signal_N: Tensor) -> Tensor:
    match settings:
        case RatioControl(control="none"):
            return ratio_N
        case RatioControl(control="truncate", cap=float(cap)):
            return losses.truncated(ratio_N, cap=cap)
        case RatioControl(control="mask", low=float(low), high=float(high)):
            return losses.masked(ratio_N, low=low, high=high)
        case RatioControl(control="clip", low=float(low), high=float(high)):
            return losses.clipped(ratio_N, signal_N, low=low, high=high)
    raise AssertionError(f"the recipe lets no such control through: {settings}")


def _behaviour_weight(settings: BehaviourControl, ratio_N: Tensor) -> Tensor:
    match settings:
        case BehaviourControl(control="none"):
            return ratio_N
        case BehaviourControl(control="truncate", cap=float(cap)):
            return losses.truncated(ratio_N, cap=cap)
        case BehaviourControl(control="mask", cap=float(cap)):
            return losses.masked(ratio_N, low=0, high=cap)
    raise AssertionError(f"the recipe lets no such control through: {settings}")


def _require_finite(at: Tensor, values: Mapping[str, Tensor]) -> None:
    for name, tensor in values.items():
        is_finite = torch.isfinite(tensor)
        if not bool(is_finite.all()):
            row = int((~is_finite).nonzero()[0])
            raise NonFiniteError(int(at[row]), f"{name} is {float(tensor[row])}, expected a finite number")
