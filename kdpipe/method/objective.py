"""A recipe's objective applied to tensors: advantages, baselines, shares, the loss of a micro-batch, its metrics.

The trainer and `check-loss` call these same functions. Shapes as in `losses.py`: N flattened completion
tokens, V ids in use, K ids of a support, S support points; n is the part of N that a term looks at.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch

from kdpipe.errors import StepError
from kdpipe.method import losses
from kdpipe.recipe.schema import (
    BehaviourControl,
    DistillSchedule,
    DistributionTerm,
    JsdTerm,
    K1LossTerm,
    K2Term,
    K3Term,
    Objective,
    RatioControl,
    RklTerm,
    SampledTerm,
    SkewKlTerm,
    SkewRklTerm,
)

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from torch import Tensor

STD_EPSILON = 1e-5  # AReaL's
ROUNDING_NATS = 2**-14
"""A difference of teacher and student at a token that float32 may have made up.

A log-prob is a logit less a logsumexp. Between 8 and 16 one rounding of either is at most 2^-21 nats, and kernels that
add in another order differ by some dozens of them: 1.3e-5 nats was seen, of 6.1e-5 here.
"""


class NonFiniteError(StepError):
    """A number that should be finite is not; `index` is its place in the input, for the caller to name."""

    def __init__(self, index: int, found: str) -> None:
        super().__init__(f"position {index}: {found}")
        self.index = index
        self.found = found


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """What is given about the completion tokens of one micro-batch: [N] tensors, completions one after another.

    `behaviour` b, `proximal` p and `teacher` q are log-probs of the sampled tokens; `advantage` A and
    `baseline` (of the sampled-token terms) are those of each token's completion. `kept` is False where no term
    may look, `scorable` where the KD term may not (the teacher lacks the id), `kd_open` where a KD mask closes
    the completion: whatever stands there is never read. `share` is the weight of each token in the optimizer
    step's loss (see `shares`). `lengths` are the tokens of each completion, N in all. `off_policy` is True in text
    that the student did not sample, which has neither b, p, A, baseline nor KD mask: none of them is read there.
    """

    behaviour: Tensor
    proximal: Tensor
    advantage: Tensor
    kept: Tensor
    scorable: Tensor
    kd_open: Tensor
    share: Tensor
    lengths: Sequence[int]
    teacher: Tensor | None = None
    baseline: Tensor | None = None
    off_policy: Tensor | None = None

    def __post_init__(self) -> None:
        shape = (sum(self.lengths),)
        for field in fields(self):
            tensor = getattr(self, field.name)
            if field.name != "lengths" and tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{field.name} has shape {tuple(tensor.shape)}, but the lengths add up to {shape[0]} tokens"
                )

    @property
    def sampled(self) -> Tensor:
        """Bool [N]: the tokens that count and that the student sampled."""
        return self.kept if self.off_policy is None else self.kept & ~self.off_policy

    @property
    def taught(self) -> Tensor:
        """Bool [N]: the student's own tokens that the KD term looks at."""
        return self.sampled & self.scorable & self.kd_open

    def given(self, objective: Objective) -> Tensor:
        """Bool [N]: the off-policy tokens that `off_policy_term` looks at."""
        if self.off_policy is None:
            return torch.zeros_like(self.kept)
        given = self.kept & self.off_policy
        return given & self.scorable if objective.off_policy_loss == "kd" else given

    def compared(self, objective: Objective) -> Tensor:
        """Bool [N]: the tokens at which a term looks at two whole distributions."""
        if objective.off_policy_loss == "kd":
            return self.taught | self.given(objective)
        return self.taught


@dataclass(frozen=True, slots=True)
class TeacherSupport:
    """The teacher's distribution at N positions: on K ids with the log-mass of all others, or on all V ids.

    `ids_NK` (-1 is padding) with `logprobs_NS` [N, K] and `tail_N`; or `logprobs_NS` [N, V] alone.
    """

    logprobs_NS: Tensor
    ids_NK: Tensor | None = None
    tail_N: Tensor | None = None

    def at(self, index: Tensor) -> TeacherSupport:
        """The positions in `index`."""
        if self.ids_NK is None or self.tail_N is None:
            return TeacherSupport(self.logprobs_NS[index])
        return TeacherSupport(self.logprobs_NS[index], self.ids_NK[index].long(), self.tail_N[index])

    def pair(self, logprobs_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Student and teacher on the same support points, [N, S] each; `logprobs_NV` are the student's."""
        if self.ids_NK is None or self.tail_N is None:
            return logprobs_NV, self.logprobs_NS.to(logprobs_NV.dtype)
        student_NS = losses.student_support(logprobs_NV, self.ids_NK)
        teacher_NS = losses.teacher_support(
            self.logprobs_NS.to(student_NS.dtype), self.tail_N.to(student_NS.dtype)
        )
        return student_NS, teacher_NS


# ------------------------------------------------------------------------------------ one step of a run


def at_step(objective: Objective, step: int, horizon: int) -> Objective:
    """The objective of optimizer step `step` (from 0) of `horizon`: its distill weight is the scheduled one."""
    schedule, start = objective.distill_schedule, objective.distill_weight
    if schedule.end is None:
        return objective
    done = min(1.0, step / max(1, horizon - 1))
    left = 1 - done if schedule.kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    weight = schedule.end if done == 1 else schedule.end + (start - schedule.end) * left
    return objective.model_copy(update={"distill_weight": weight, "distill_schedule": DistillSchedule()})


def shares(objective: Objective, kept: Sequence[int | None], *, max_new_tokens: int) -> list[float]:
    """The weight of each token of each completion in an optimizer step's loss, which is their weighted sum.

    `kept` counts the tokens of each completion that count, whatever clips and KD masks do to them; None is a
    dropped completion. `token`: 1 / all of them. `sequence`: a mean per completion, then over
    completions with a token. `fixed`: 1 / (completions * L), L = `fixed_length` or `max_new_tokens`.
    """
    counts = [count or 0 for count in kept]
    match objective.normalization:
        case "token":
            return [1 / max(1, sum(counts))] * len(counts)
        case "sequence":
            completions = sum(count > 0 for count in counts)
            return [1 / (completions * count) if count else 0.0 for count in counts]
        case "fixed":
            completions = sum(count is not None for count in kept)
            return [1 / (max(1, completions) * (objective.fixed_length or max_new_tokens))] * len(counts)


def open_completions(objective: Objective, correct: Sequence[bool], groups: Sequence[Hashable]) -> list[bool]:
    """Which completions the KD term looks at: all, the wrong ones, or those of groups without a right one."""
    if objective.kind == "srpo" or objective.mask == "wrong":
        return [not right for right in correct]
    if objective.mask == "all_wrong_groups":
        solved = {group for group, right in zip(groups, correct, strict=True) if right}
        return [group not in solved for group in groups]
    return [True] * len(correct)


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


# --------------------------------------------------------------------------------------------- baselines


def baselines(
    kd: SampledTerm, differences: Sequence[Tensor], taught: Sequence[Tensor], scopes: Sequence[Hashable]
) -> list[float]:
    """The mean signal of the *other* completions of the same scope, for each completion; 0 without any.

    `differences` are `q_t - p_t` [n] of each completion: with the proximal log-prob in the student's place the
    baseline is known before the step, so micro-batches need no second pass, and any function of the other
    completions leaves the expected gradient what it is. `taught` [n] are the tokens that the term looks at.
    """
    totals: list[tuple[float, int]] = []
    for difference, mask in zip(differences, taught, strict=True):
        clean = torch.zeros_like(difference, dtype=torch.float64)
        clean[mask] = difference[mask].double()
        signal = _signal(kd, clean, [len(clean)])
        totals.append((float(signal[mask].sum()), int(mask.sum())))
    sums: dict[Hashable, list[float]] = {}
    for scope, (total, count) in zip(scopes, totals, strict=True):
        entry = sums.setdefault(scope, [0.0, 0.0])
        entry[0] += total
        entry[1] += count
    return [
        (sums[scope][0] - total) / (sums[scope][1] - count) if sums[scope][1] > count else 0.0
        for scope, (total, count) in zip(scopes, totals, strict=True)
    ]


def _signal(kd: SampledTerm, difference_N: Tensor, lengths: Sequence[int]) -> Tensor:
    """`a_t` of a sampled-token term from `d_t`, which is 0 at tokens that the term does not look at."""
    match kd:
        case RklTerm(gamma=gamma):
            return losses.discounted_future_sum(difference_N, lengths, gamma=gamma)
        case K3Term():
            return difference_N.expm1()
    return difference_N


# ----------------------------------------------------------------------------------- distribution terms


def distribution_value(
    objective: Objective, logprobs_NV: Tensor, support: TeacherSupport, *, taught_N: Tensor, places_N: Tensor
) -> Tensor:
    """What the KD term needs of two whole distributions at each position, [N]; exactly 0 where not taught.

    The divergence, with gradient to `logprobs_NV`, or for `baseline: exact` the expectation of `q - s` under
    the student, without. `logprobs_NV` are the student's at T over the ids in use. Raises NonFiniteError naming
    the token id that makes a KL infinite; `places_N` are the positions in the micro-batch, for its index.
    """
    kd = objective.kd
    result_N = logprobs_NV.new_zeros(len(logprobs_NV))
    at = taught_N.nonzero().squeeze(-1)
    student_nS, teacher_nS = support.at(at).pair(logprobs_NV[at])
    if isinstance(kd, DistributionTerm):
        values_n = _divergence(kd, student_nS, teacher_nS)
    else:
        student_nS = student_nS.detach()
        values_n = -losses.kl(student_nS, teacher_nS)
    if not bool(torch.isfinite(values_n).all()):
        _explain(kd, places_N[at], support.at(at), student_nS.detach(), teacher_nS)
    return result_N.index_put((at,), values_n)


def _divergence(kd: DistributionTerm, student_NS: Tensor, teacher_NS: Tensor) -> Tensor:
    match kd:
        case JsdTerm(beta=beta):
            return losses.jsd(student_NS, teacher_NS, beta)
        case SkewKlTerm(alpha=alpha):
            return losses.skew_kl(student_NS, teacher_NS, alpha)
        case SkewRklTerm(alpha=alpha):
            return losses.skew_rkl(student_NS, teacher_NS, alpha)


def _explain(
    kd: object, places_N: Tensor, support: TeacherSupport, student_NS: Tensor, teacher_NS: Tensor
) -> None:
    """Raises NonFiniteError for the first row whose divergence is not finite."""
    forward = isinstance(kd, SkewKlTerm) or (isinstance(kd, JsdTerm) and kd.beta == 0)
    order = (teacher_NS, student_NS) if forward else (student_NS, teacher_NS)
    infinite_NS = losses.infinite_points(*order)
    not_numbers_NS = ~((student_NS < math.inf) & (teacher_NS < math.inf))
    # A bounded divergence is finite whatever has no mass, so that a nan came from what is not a log-prob.
    bad_NS = not_numbers_NS if bool(not_numbers_NS.any()) else infinite_NS
    row, column = bad_NS.nonzero()[0].tolist()
    ids_NK = support.ids_NK
    if ids_NK is None:
        token = f"token id {column}"
    else:
        token = f"token id {int(ids_NK[row, column])}" if column < ids_NK.shape[-1] else "the tail bucket"
    student, teacher = float(student_NS[row, column]), float(teacher_NS[row, column])
    reason = "is not a log-prob" if bool(not_numbers_NS[row, column]) else "makes the divergence infinite"
    raise NonFiniteError(
        int(places_N[row]),
        f"{token} has log-prob {student:.6g} under the student and {teacher:.6g} under the teacher, "
        f"which {reason}",
    )


# ------------------------------------------------------------------------------------------- token loss


def token_loss(
    objective: Objective, batch: TokenBatch, student_N: Tensor, distribution_N: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's share of an optimizer step's loss, and detached metrics as *sums* over tokens.

    `student_N` s carries the gradient; `distribution_N` is that of `distribution_value`, where the objective
    has a `distribution_support`. Metrics: `kept_tokens`; with an RL term `rl_loss`, `rl_clipped`,
    `rl_behaviour_acted` (divide by `sampled_tokens`); with a KD term `kd_tokens` and, to divide by it, `kd_loss`,
    `kd_reverse_kl_nats` (s - q), `kd_ratio_acted`; with off-policy text `off_policy_tokens` and, to divide by it,
    `off_policy_loss`; with a KD term those of `_signal_metrics`. Raises NonFiniteError where a kept token's s, b, p, q
    or advantage is not finite and a term needs it.
    """
    if objective.kind == "then":
        raise ValueError("then is kd or grpo, depending on the round: see Objective.in_round")
    sampled, taught = (mask.nonzero().squeeze(-1) for mask in (batch.sampled, batch.taught))
    parts: list[Tensor] = []
    metrics: dict[str, Tensor] = {"kept_tokens": batch.kept.sum(), "sampled_tokens": batch.sampled.sum()}
    if objective.has_rl or objective.kind == "srpo":
        signal = _rl_signal(objective, batch, student_N, taught)
        rl_n, rl_metrics = _rl_term(objective, batch, student_N, signal, sampled)
        weight = 1.0 if objective.kind == "srpo" else objective.rl_weight
        parts.append(weight * (batch.share[sampled] * rl_n).sum())
        metrics |= rl_metrics
    if objective.has_kd:
        metrics |= _kd_metrics(batch, student_N, taught)
    if objective.has_kd and objective.kind != "srpo":
        kd_n, kd_metrics = _kd_term(objective.kd, batch, student_N, distribution_N, taught)
        parts.append(objective.distill_weight * (batch.share[taught] * kd_n).sum())
        metrics |= kd_metrics
    if objective.has_kd and batch.off_policy is not None:
        at = batch.given(objective).nonzero().squeeze(-1)
        given_n = _off_policy_term(objective, student_N, distribution_N, at)
        parts.append(objective.distill_weight * (batch.share[at] * given_n).sum())
        metrics["off_policy_tokens"] = torch.tensor(len(at), device=at.device)
        metrics["off_policy_loss"] = given_n.detach().sum()
    if objective.has_kd:
        metrics |= _signal_metrics(objective, batch, student_N.detach(), distribution_N)
    return torch.stack(parts).sum(), metrics


def _signal_metrics(
    objective: Objective, batch: TokenBatch, student_N: Tensor, distribution_N: Tensor | None
) -> dict[str, Tensor]:
    """`signal_tokens`, which have something to teach, and `rounding_tokens`, where teacher and student are one.

    A token counts as the latter if all that the KD term reads there is within ROUNDING_NATS: `q - s`, the divergence
    or the baseline. `k1_loss` pushes with a constant, cross-entropy and an advantage other than 0 with their own size.
    """
    at = batch.compared(objective)
    is_rounding_N = at & (not isinstance(objective.kd, K1LossTerm))
    for read_N in (
        None if batch.teacher is None else batch.teacher - student_N,
        distribution_N,
        batch.baseline,
    ):
        if read_N is not None:
            is_rounding_N = is_rounding_N & (read_N.detach().abs() <= ROUNDING_NATS)
    signal = (at & ~is_rounding_N).sum()
    if objective.has_rl or objective.kind == "srpo":
        paid_N = batch.sampled & ~batch.kd_open if objective.kind == "srpo" else batch.sampled
        signal = signal + (paid_N & (batch.advantage != 0)).sum()
    if objective.off_policy_loss == "cross_entropy":
        signal = signal + batch.given(objective).sum()
    return {"signal_tokens": signal, "rounding_tokens": is_rounding_N.sum()}


def _off_policy_term(
    objective: Objective, student_N: Tensor, distribution_N: Tensor | None, at: Tensor
) -> Tensor:
    """The term of the off-policy tokens `at`: their cross-entropy, or the divergence at them."""
    if objective.off_policy_loss == "cross_entropy":
        _require_finite(at, {"the student's log-prob": student_N[at]})
        return -student_N[at]
    if distribution_N is None:
        raise ValueError("off_policy_term kd needs distribution_N")
    _require_finite(at, {"the divergence": distribution_N[at]})
    return distribution_N[at]


def _rl_signal(objective: Objective, batch: TokenBatch, student_N: Tensor, taught: Tensor) -> Tensor:
    """What takes the advantage's place in the RL loss, [N]."""
    if objective.kind != "srpo":
        return batch.advantage
    # Weighted c A + (1 - c) d_t: the KD part where the completion is wrong, which is where KD is open.
    signal_N = torch.where(batch.kd_open, 0.0, objective.rl_weight * batch.advantage)
    if objective.distill_weight == 0:
        return signal_N
    if batch.teacher is None:
        raise ValueError("srpo needs TokenBatch.teacher")
    _require_finite(
        taught,
        {"the student's log-prob": student_N[taught], "the teacher's log-prob": batch.teacher[taught]},
    )
    difference_n = batch.teacher[taught] - student_N[taught].detach()
    return signal_N.index_put((taught,), (objective.distill_weight * difference_n).to(signal_N.dtype))


def _rl_term(
    objective: Objective, batch: TokenBatch, student_N: Tensor, signal_N: Tensor, at: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    student, proximal, behaviour = student_N[at], batch.proximal[at], batch.behaviour[at]
    signal = signal_N[at]
    _require_finite(
        at,
        {
            "the student's log-prob": student,
            "the proximal log-prob": proximal,
            "the sampler's log-prob": behaviour,
            "the advantage": signal,
        },
    )
    loss, is_flat = losses.ppo_loss(
        student,
        proximal,
        signal,
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


def _kd_metrics(batch: TokenBatch, student_N: Tensor, at: Tensor) -> dict[str, Tensor]:
    metrics = {"kd_tokens": torch.tensor(len(at), device=at.device)}
    if batch.teacher is not None:
        _require_finite(
            at, {"the student's log-prob": student_N[at], "the teacher's log-prob": batch.teacher[at]}
        )
        metrics["kd_reverse_kl_nats"] = (student_N[at].detach() - batch.teacher[at]).sum()
    return metrics


def _kd_term(
    kd: SampledTerm | K1LossTerm | DistributionTerm,
    batch: TokenBatch,
    student_N: Tensor,
    distribution_N: Tensor | None,
    at: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    metrics: dict[str, Tensor] = {}
    if isinstance(kd, DistributionTerm):
        if distribution_N is None:
            raise ValueError("a distribution term needs distribution_N")
        loss = distribution_N[at]
        _require_finite(at, {"the divergence": loss})
    elif batch.teacher is None:
        raise ValueError("a sampled-token term needs TokenBatch.teacher")
    elif isinstance(kd, K1LossTerm):
        loss = student_N[at] - batch.teacher[at].detach()
    else:
        loss, metrics["kd_ratio_acted"] = _sampled_token_term(kd, batch, student_N, distribution_N, at)
    return loss, metrics | {"kd_loss": loss.detach().sum()}


def _sampled_token_term(
    kd: SampledTerm, batch: TokenBatch, student_N: Tensor, distribution_N: Tensor | None, at: Tensor
) -> tuple[Tensor, Tensor]:
    """The weighted term at the positions `at`, and how many of them the ratio control acted on."""
    assert batch.teacher is not None
    student, teacher = student_N[at], batch.teacher[at].detach()
    # Tokens that are not looked at keep their place in the discounting and contribute d = 0.
    difference_N = torch.zeros_like(student_N.detach()).index_put((at,), teacher - student.detach())
    baseline = _baseline(kd, batch, distribution_N, at)
    signal = _signal(kd, difference_N, batch.lengths)[at] - baseline
    weight, acted = _weight(kd, batch, student, signal, at)
    match kd:
        case RklTerm():
            return losses.rkl_surrogate(student, signal, weight), acted
        case K2Term():
            loss = losses.k2(student, teacher, weight)
        case _:
            loss = losses.k3(student, teacher, weight)
            _require_finite(at, {"exp(q - s) of the k3 term": loss})
    # Value 0, and the gradient that the baseline takes off: -w (a - baseline) grad s in all.
    return loss + (weight * baseline).detach() * (student - student.detach()), acted


def _baseline(kd: SampledTerm, batch: TokenBatch, distribution_N: Tensor | None, at: Tensor) -> Tensor:
    match kd.baseline:
        case "none":
            return torch.zeros((), device=at.device)
        case "exact":
            found = distribution_N
        case _:
            found = batch.baseline
    if found is None:
        raise ValueError(f"baseline {kd.baseline} was not computed")
    return found[at].detach()


def _weight(
    kd: SampledTerm, batch: TokenBatch, student: Tensor, signal: Tensor, at: Tensor
) -> tuple[Tensor, Tensor]:
    """The weight w of each position, and at how many the control acted."""
    behaviour, proximal, now = batch.behaviour[at], batch.proximal[at], student.detach()
    _require_finite(at, {"the sampler's log-prob": behaviour})
    if kd.decoupled is None:
        ratio = (now - behaviour).exp()
        weight = _ratio_weight(kd.ratio, ratio, signal)
        return weight, (weight != ratio).sum()
    _require_finite(at, {"the proximal log-prob": proximal})
    update, before = (now - proximal).exp(), (proximal - behaviour).exp()
    update_weight = _ratio_weight(kd.decoupled.update, update, signal)
    before_weight = _ratio_weight(kd.decoupled.behaviour, before, signal)
    acted = (update_weight != update) | (before_weight != before)
    return update_weight * before_weight, acted.sum()


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
            found = float(tensor[row].detach())
            raise NonFiniteError(int(at[row]), f"{name} is {found}, expected a finite number")
