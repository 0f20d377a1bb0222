"""A recipe's objective applied to tensors: each token's weight, a micro-batch's loss and metrics.

The trainer and `check-loss` call these same functions; what a KD term computes is in `losses.py`. Shapes as
there: N flattened completion tokens, V ids in use, S support points; n is the part of N that a term looks at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kdpipe.method import losses
from kdpipe.method.token_batch import NonFiniteError, TeacherSupport, TokenBatch, require_finite
from kdpipe.recipe.objective import (
    BehaviourControl,
    DistillSchedule,
    DistributionTerm,
    K1LossTerm,
    KdTerm,
    Objective,
    RatioControl,
    SampledTerm,
)

ROUNDING_NATS = 2**-14
"""A difference of teacher and student at a token that float32 may have made up.

A log-prob is a logit less a logsumexp. Between 8 and 16 one rounding of either is at most 2^-21 nats, and kernels that
add in another order differ by some dozens of them: 1.3e-5 nats was seen, of 6.1e-5 here.
"""


def at_step(objective: Objective, step: int, horizon: int) -> Objective:
    """The objective with the distill weight of optimizer step `step` (from 0) of `horizon`."""
    schedule, start = objective.distill_schedule, objective.distill_weight
    if schedule.end is None:
        return objective
    done = min(1.0, step / max(1, horizon - 1))
    left = 1 - done if schedule.kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    weight = schedule.end if done == 1 else schedule.end + (start - schedule.end) * left
    return objective.model_copy(update={"distill_weight": weight, "distill_schedule": DistillSchedule()})


def shares(objective: Objective, kept: Sequence[int | None], *, max_new_tokens: int) -> list[float]:
    """The weight of each completion's tokens in an optimizer step's loss, which is a weighted sum.

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


def distribution_value(
    objective: Objective, logprobs_NV: Tensor, support: TeacherSupport, *, taught_N: Tensor, places_N: Tensor
) -> Tensor:
    """What the KD term needs of two whole distributions at each position, [N]; 0 where not taught.

    The divergence, with gradient to `logprobs_NV`, or for `baseline: exact` the expectation of `q - s` under
    the student, without. `logprobs_NV` are the student's at T over the ids in use. Raises NonFiniteError naming
    the token id that makes a KL infinite; `places_N` are the positions in the micro-batch, for its index.
    """
    kd = objective.kd
    at = taught_N.nonzero().squeeze(-1)
    student_nS, teacher_nS = support.at(at).pair(logprobs_NV[at])
    values_n = _compared(kd, student_nS, teacher_nS)
    if not bool(torch.isfinite(values_n).all()):
        _explain(kd, places_N[at], support.at(at), student_nS.detach(), teacher_nS)
    return logprobs_NV.new_zeros(len(logprobs_NV)).index_put((at,), values_n)


def _compared(kd: KdTerm, student_NS: Tensor, teacher_NS: Tensor) -> Tensor:
    if isinstance(kd, DistributionTerm):
        return losses.divergence(kd, student_NS, teacher_NS)
    return -losses.kl(student_NS.detach(), teacher_NS)


def _explain(
    kd: KdTerm, places_N: Tensor, support: TeacherSupport, student_NS: Tensor, teacher_NS: Tensor
) -> None:
    """Raises NonFiniteError for the first row whose divergence is not finite."""
    # A bounded divergence is finite whatever has no mass, so that a nan came from what is not a log-prob.
    not_numbers_NS = ~((student_NS < math.inf) & (teacher_NS < math.inf))
    bad_NS = not_numbers_NS
    if not bool(bad_NS.any()):
        points = (tensor_NS.reshape(-1, 1) for tensor_NS in (student_NS, teacher_NS))
        bad_NS = ~torch.isfinite(_compared(kd, *points).reshape(student_NS.shape))
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


def token_loss(
    objective: Objective, batch: TokenBatch, student_N: Tensor, distribution_N: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's share of the step's loss, and detached metrics as *sums* over tokens.

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
        if objective.kind != "srpo":
            kd_n, kd_metrics = _kd_term(objective.kd, batch, student_N, distribution_N, taught)
            parts.append(objective.distill_weight * (batch.share[taught] * kd_n).sum())
            metrics |= kd_metrics
        if batch.off_policy is not None:
            at = batch.given(objective).nonzero().squeeze(-1)
            given_n = _off_policy_term(objective, student_N, distribution_N, at)
            parts.append(objective.distill_weight * (batch.share[at] * given_n).sum())
            metrics["off_policy_tokens"] = torch.tensor(len(at), device=at.device)
            metrics["off_policy_loss"] = given_n.detach().sum()
        metrics |= _signal_metrics(objective, batch, student_N.detach(), distribution_N)
    return torch.stack(parts).sum(), metrics


def _signal_metrics(
    objective: Objective, batch: TokenBatch, student_N: Tensor, distribution_N: Tensor | None
) -> dict[str, Tensor]:
    """Counts of `signal_tokens`, which teach something, and of `rounding_tokens`, which do not.

    A token is the latter if all that the KD term reads there is within ROUNDING_NATS: `q - s`, the divergence
    or the baseline. `k1_loss` pushes with a constant, cross-entropy and an advantage other than 0 with their own size.
    """
    at = batch.compared(objective)
    is_rounding_N = at & (not isinstance(objective.kd, K1LossTerm))
    difference_N = batch.signal
    if difference_N is None and batch.teacher is not None:
        difference_N = batch.teacher - student_N
    for read_N in (difference_N, distribution_N, batch.baseline):
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
        require_finite(at, {"the student's log-prob": student_N[at]})
        return -student_N[at]
    given = _needed(distribution_N, "distribution_N")[at]
    require_finite(at, {"the divergence": given})
    return given


def _rl_signal(objective: Objective, batch: TokenBatch, student_N: Tensor, taught: Tensor) -> Tensor:
    """What takes the advantage's place in the RL loss, [N]."""
    if objective.kind != "srpo":
        return batch.advantage
    # Weighted c A + (1 - c) d_t: the KD part where the completion is wrong, which is where KD is open.
    signal_N = torch.where(batch.kd_open, 0.0, objective.rl_weight * batch.advantage)
    if objective.distill_weight == 0:
        return signal_N
    student_n, teacher_n = student_N[taught].detach(), _needed(batch.teacher, "TokenBatch.teacher")[taught]
    require_finite(taught, {"the student's log-prob": student_n, "the teacher's log-prob": teacher_n})
    difference_n = teacher_n - student_n
    return signal_N.index_put((taught,), (objective.distill_weight * difference_n).to(signal_N.dtype))


def _rl_term(
    objective: Objective, batch: TokenBatch, student_N: Tensor, signal_N: Tensor, at: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    student, proximal, behaviour, signal = (
        student_N[at],
        batch.proximal[at],
        batch.behaviour[at],
        signal_N[at],
    )
    require_finite(
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
    weight = _ratio_weight(objective.behaviour, ratio, signal)
    loss = weight * loss
    return loss, {
        "rl_loss": loss.detach().sum(),
        "rl_clipped": is_flat.sum(),
        "rl_behaviour_acted": (weight != ratio).sum(),
    }


def _kd_metrics(batch: TokenBatch, student_N: Tensor, at: Tensor) -> dict[str, Tensor]:
    metrics = {"kd_tokens": torch.tensor(len(at), device=at.device)}
    if batch.teacher is not None:
        require_finite(
            at, {"the student's log-prob": student_N[at], "the teacher's log-prob": batch.teacher[at]}
        )
        metrics["kd_reverse_kl_nats"] = (student_N[at].detach() - batch.teacher[at]).sum()
    return metrics


def _kd_term(
    kd: KdTerm, batch: TokenBatch, student_N: Tensor, distribution_N: Tensor | None, at: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    metrics: dict[str, Tensor] = {}
    if isinstance(kd, DistributionTerm):
        loss = _needed(distribution_N, "distribution_N")[at]
        require_finite(at, {"the divergence": loss})
    elif isinstance(kd, K1LossTerm):
        loss = student_N[at] - _needed(batch.teacher, "TokenBatch.teacher")[at].detach()
    else:
        loss, metrics["kd_ratio_acted"] = _sampled_token_term(kd, batch, student_N, distribution_N, at)
    return loss, metrics | {"kd_loss": loss.detach().sum()}


def _sampled_token_term(
    kd: losses.SampledKd, batch: TokenBatch, student_N: Tensor, distribution_N: Tensor | None, at: Tensor
) -> tuple[Tensor, Tensor]:
    """The weighted term at the positions `at`, and how many of them the ratio control acted on."""
    student = student_N[at]
    teacher = _needed(batch.teacher, "TokenBatch.teacher")[at].detach()
    if batch.signal is not None:
        teacher = student.detach() + batch.signal[at]
    # Tokens that are not looked at keep their place in the discounting and contribute d = 0.
    difference_N = torch.zeros_like(student_N.detach()).index_put((at,), teacher - student.detach())
    baseline = _baseline(kd, batch, distribution_N, at)
    signal = losses.signal_of(kd, difference_N, batch.lengths)[at] - baseline
    weight, acted = _weight(kd, batch, student.detach(), signal, at)
    loss = losses.sampled_loss(kd, student, teacher, signal_N=signal, baseline_N=baseline, weight_N=weight)
    require_finite(at, {"the KD term": loss})
    return loss, acted


def _baseline(kd: SampledTerm, batch: TokenBatch, distribution_N: Tensor | None, at: Tensor) -> Tensor:
    if kd.baseline == "none":
        return torch.zeros((), device=at.device)
    found_N = distribution_N if kd.baseline == "exact" else batch.baseline
    return _needed(found_N, f"baseline {kd.baseline}")[at].detach()


def _needed(values_N: Tensor | None, name: str) -> Tensor:
    if values_N is None:
        raise ValueError(f"this objective needs {name}")
    return values_N


def _weight(
    kd: SampledTerm, batch: TokenBatch, now: Tensor, signal: Tensor, at: Tensor
) -> tuple[Tensor, Tensor]:
    """The weight w of each position, and at how many the control acted."""
    behaviour, proximal = batch.behaviour[at], batch.proximal[at]
    require_finite(at, {"the sampler's log-prob": behaviour})
    if kd.decoupled is None:
        ratio = (now - behaviour).exp()
        weight = _ratio_weight(kd.ratio, ratio, signal)
        return weight, (weight != ratio).sum()
    require_finite(at, {"the proximal log-prob": proximal})
    update, before = (now - proximal).exp(), (proximal - behaviour).exp()
    update_weight = _ratio_weight(kd.decoupled.update, update, signal)
    before_weight = _ratio_weight(kd.decoupled.behaviour, before, signal)
    acted = (update_weight != update) | (before_weight != before)
    return update_weight * before_weight, acted.sum()


def _ratio_weight(settings: RatioControl | BehaviourControl, ratio_N: Tensor, signal_N: Tensor) -> Tensor:
    """The ratio as its control leaves it: at most `cap`, or 0 outside a range (IcePop) or PPO's clip."""
    match settings:
        case RatioControl(control="mask", low=float(low), high=float(high)):
            return ratio_N.masked_fill((ratio_N < low) | (ratio_N > high), 0)
        case RatioControl(control="clip", low=float(low), high=float(high)):
            return ratio_N.masked_fill(losses.moved_enough(ratio_N, signal_N, low=low, high=high), 0)
        case BehaviourControl(control="mask", cap=float(cap)):
            return ratio_N.masked_fill(ratio_N > cap, 0)
    return ratio_N if settings.cap is None else ratio_N.clamp(max=settings.cap)
