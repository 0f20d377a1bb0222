"""The loss of an optimizer step, written from the formulas of docs/objectives.md.

A sampled-token term is written as its value and its gradient `-w a grad s`, which the docs state separately. Log-probs
are in nats, of n completion tokens, over V ids or the points of a support (its ids and a tail).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Settings = Mapping[str, Any]
ROUNDING = 2**-14
"""What is nearer to 0, in nats, may be rounding of float32; a step of nothing else is skipped."""


@dataclass(frozen=True)
class Support:
    """The teacher's distribution at one token: on ids, whose rest is a tail, or on all ids in use."""

    logprobs: Tensor
    ids: Tensor | None = None

    def of_student(self, logprobs: Tensor) -> Tensor:
        """The student's log-probs [V] on the same points."""
        if self.ids is None:
            return logprobs
        others = torch.ones_like(logprobs, dtype=torch.bool)
        others[self.ids] = False
        return torch.cat([logprobs[self.ids], logprobs[others].logsumexp(0)[None]])


@dataclass
class Sample:
    """A completion as its loss reads it: b, p, q and scorable [n], and the teacher's distribution at each token."""

    prompt_id: str
    prompt: Sequence[int]
    ids: Sequence[int]
    is_sampled: bool
    is_cut: bool
    correct: bool
    reward: float
    behaviour: Tensor
    proximal: Tensor
    teacher: Tensor
    scorable: Tensor
    supports: Sequence[Support]
    advantage: float = 0.0
    is_open: bool = True
    """Whether the KD term looks at it."""

    def kept(self, objective: Settings) -> Tensor:
        """Which tokens count [n]."""
        kept = torch.full((len(self.ids),), not (objective["truncated"] == "drop" and self.is_cut))
        if objective["end_token"] == "mask" and not self.is_cut:
            kept[-1:] = False
        return kept

    def taught(self, objective: Settings) -> Tensor:
        """Which tokens the KD term looks at [n]."""
        return self.scorable & self.kept(objective) & self.is_open


# ------------------------------------------------------------------------------------- before the first step


def prepare(objective: Settings, samples: Sequence[Sample]) -> None:
    """Sets the advantage of each sample of a round, and whether the KD term looks at it."""
    counted = [
        sample
        for sample in samples
        if sample.is_sampled and not (objective["truncated"] == "drop" and sample.is_cut)
    ]
    if objective["truncated"] == "no_reward":
        for sample in counted:
            if sample.is_cut:
                sample.reward, sample.correct = 0.0, False
    if has_rl(objective):
        for sample, advantage in zip(counted, advantages(objective, counted), strict=True):
            sample.advantage = advantage
    solved = {sample.prompt_id for sample in counted if sample.correct}
    for sample in counted:
        if objective["kind"] == "srpo" or objective["mask"] == "wrong":
            sample.is_open = not sample.correct
        elif objective["mask"] == "all_wrong_groups":
            sample.is_open = sample.prompt_id not in solved


def advantages(objective: Settings, samples: Sequence[Sample]) -> list[float]:
    """Rewards less the mean of their group, over its deviation, over that of all."""
    clip = objective["reward_clip"]
    groups: dict[str, list[float]] = {}
    shaped = []
    for sample in samples:
        reward = (sample.reward + objective["reward_bias"]) * objective["reward_scaling"]
        shaped.append(max(-clip, min(clip, reward)))
        groups.setdefault(sample.prompt_id, []).append(shaped[-1])
    found = []
    for sample, reward in zip(samples, shaped, strict=True):
        group = groups[sample.prompt_id]
        by = deviation(group) + 1e-5 if objective["group_normalization"] == "mean_std" else 1.0
        found.append((reward - statistics.fmean(group)) / by)
    if not objective["batch_normalization"]:
        return found
    mean, by = statistics.fmean(found), deviation(found) + 1e-5
    return [(value - mean) / by for value in found]


def deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def distill_weight(objective: Settings, step: int, horizon: int) -> float:
    """The weight of the KD term in optimizer step `step`, from 0; both ends of the schedule are reached."""
    start, end = objective["distill_weight"], objective["distill_schedule"]["end"]
    if end is None:
        return float(start)
    done = min(1.0, step / max(1, horizon - 1))
    if objective["distill_schedule"]["kind"] == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return float(start + (end - start) * done)


def has_rl(objective: Settings) -> bool:
    return bool(objective["kind"] != "kd" and objective["rl_weight"] > 0)


def has_kd(objective: Settings) -> bool:
    moves = bool(objective["distill_schedule"]["end"])  # a schedule may begin with 0
    return bool(objective["kind"] != "grpo" and (objective["distill_weight"] > 0 or moves))


def is_divergence(objective: Settings) -> bool:
    """Whether the KD term is one of whole distributions."""
    return objective["kd"]["term"] in ("jsd", "skew_kl", "skew_rkl")


def subtracts(objective: Settings, baseline: str) -> bool:
    return has_kd(objective) and objective["kd"].get("baseline") == baseline


def reads_distributions(objective: Settings) -> bool:
    return has_kd(objective) and (is_divergence(objective) or subtracts(objective, "exact"))


def of_given(objective: Settings) -> str:
    """The term of text that the student did not sample."""
    return str(objective["off_policy_term"] or ("kd" if is_divergence(objective) else "cross_entropy"))


# ----------------------------------------------------------------------------------------------- a step


@dataclass(frozen=True)
class Step:
    """The samples of one optimizer step; `objective` has the distill weight of this step."""

    objective: Settings
    samples: Sequence[Sample]
    max_new_tokens: int
    baselines: Sequence[float]

    def loss(self, student: Sequence[Tensor]) -> Tensor:
        """The loss, from the student's log-probs [n, V] of each sample."""
        total = torch.zeros((), dtype=torch.float64)
        for sample, share, baseline, logprobs in zip(
            self.samples, self._shares(), self.baselines, student, strict=True
        ):
            kept = sample.kept(self.objective)
            if kept.any():
                total = total + share * token_losses(self.objective, sample, logprobs, baseline)[kept].sum()
        return total

    def is_rounding(self, student: Sequence[Tensor]) -> bool:
        """Whether KD looks at a token, teacher and student agree at all, and nothing else is to be learned."""
        objective, read = self.objective, [torch.zeros(0)]
        for sample, baseline, logprobs in zip(self.samples, self.baselines, student, strict=True):
            kept, taught = sample.kept(objective), sample.taught(objective)
            if not sample.is_sampled and of_given(objective) == "cross_entropy" and kept.any():
                return False
            is_paid = has_rl(objective) and not (objective["kind"] == "srpo" and sample.is_open)
            if is_paid and sample.advantage and kept.any():
                return False
            if has_kd(objective) and taught.any():
                read += what_kd_reads(objective, sample, logprobs.detach(), baseline)
        values = torch.cat(read)
        return bool(len(values)) and bool((values.abs() <= ROUNDING).all())

    def _shares(self) -> list[float]:
        """What each token of a sample counts."""
        counts = [int(sample.kept(self.objective).sum()) for sample in self.samples]
        match self.objective["normalization"]:
            case "token":
                return [1 / sum(counts)] * len(counts)
            case "sequence":
                number = sum(count > 0 for count in counts)
                return [1 / (number * count) if count else 0.0 for count in counts]
        dropped = self.objective["truncated"] == "drop"
        number = sum(not (dropped and sample.is_cut) for sample in self.samples)
        return [1 / (number * (self.objective["fixed_length"] or self.max_new_tokens))] * len(counts)


def token_losses(objective: Settings, sample: Sample, logprobs: Tensor, baseline: float) -> Tensor:
    """The loss of each token [n], of which those that do not count are cut by the caller."""
    s = logprobs[torch.arange(len(sample.ids)), torch.tensor(sample.ids)]
    if not sample.is_sampled:
        return float(objective["distill_weight"]) * given_losses(objective, sample, logprobs, s)
    total = torch.zeros_like(s)
    if objective["kind"] == "srpo":
        difference = torch.where(sample.scorable, sample.teacher - s.detach(), 0.0)
        signal = (
            objective["distill_weight"] * difference
            if sample.is_open
            else torch.full_like(s, objective["rl_weight"] * sample.advantage)
        )
        return ppo(objective, sample, s, signal)
    if has_rl(objective):
        total = total + objective["rl_weight"] * ppo(
            objective, sample, s, torch.full_like(s, sample.advantage)
        )
    if has_kd(objective) and sample.is_open:
        value = kd_losses(objective, sample, logprobs, s, baseline=baseline)
        total = total + objective["distill_weight"] * torch.where(sample.taught(objective), value, 0.0)
    return total


def given_losses(objective: Settings, sample: Sample, logprobs: Tensor, s: Tensor) -> Tensor:
    """Of text that the student did not sample."""
    if of_given(objective) == "cross_entropy":
        return -s
    return torch.where(sample.scorable, divergences(objective["kd"], sample, logprobs), 0.0)


def ppo(objective: Settings, sample: Sample, s: Tensor, signal: Tensor) -> Tensor:
    """PPO's clipped loss, times the weight of sampler against trainer."""
    u = (s - sample.proximal).exp()
    low, high = 1 - objective["clip_low"], 1 + objective["clip_high"]
    loss = torch.maximum(-signal * u, -signal * u.clamp(low, high))
    if objective["dual_clip"] is not None:
        bound = objective["dual_clip"] * signal.abs()
        loss = torch.where(signal < 0, torch.minimum(loss, bound), loss)
    return loss * controlled(objective["behaviour"], (sample.proximal - sample.behaviour).exp(), signal)


def controlled(control: Settings, ratio: Tensor, signal: Tensor) -> Tensor:
    """A ratio as its control leaves it."""
    match control["control"]:
        case "truncate":
            return ratio.clamp(max=control["cap"])
        case "mask":
            low, high = (0.0, control["cap"]) if "low" not in control else (control["low"], control["high"])
            return torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)
        case "clip":
            up = (signal > 0) & (ratio > 1 + control["high"])
            down = (signal < 0) & (ratio < 1 - control["low"])
            return torch.where(up | down, 0.0, ratio)
    return ratio


# ------------------------------------------------------------------------------------------------- KD


def what_kd_reads(objective: Settings, sample: Sample, logprobs: Tensor, baseline: float) -> list[Tensor]:
    """All that decides the KD term at the tokens it looks at."""
    s = logprobs[torch.arange(len(sample.ids)), torch.tensor(sample.ids)]
    found = [sample.teacher - s, torch.full_like(s, baseline)]
    if objective["kd"]["term"] == "k1_loss" or objective["control"] == "constant_advantage":
        found.append(torch.ones_like(s))
    if is_divergence(objective):
        found.append(divergences(objective["kd"], sample, logprobs))
    elif subtracts(objective, "exact"):
        found.append(expected(sample, logprobs))
    return [value[sample.taught(objective)] for value in found]


def kd_losses(objective: Settings, sample: Sample, logprobs: Tensor, s: Tensor, *, baseline: float) -> Tensor:
    kd = objective["kd"]
    if is_divergence(objective):
        return divergences(kd, sample, logprobs)
    if kd["term"] == "k1_loss":
        return s - sample.teacher
    now, taught = s.detach(), sample.taught(objective)
    off = expected(sample, logprobs.detach()) if subtracts(objective, "exact") else baseline
    difference = sample.teacher - now
    if objective["control"] == "constant_advantage":
        difference = torch.full_like(now, -1.0)
    signal = signals(kd, torch.where(taught, difference, 0.0)) - off
    if kd["decoupled"] is None:
        weight = controlled(kd["ratio"], (now - sample.behaviour).exp(), signal)
    else:
        update, before = (now - sample.proximal).exp(), (sample.proximal - sample.behaviour).exp()
        weight = controlled(kd["decoupled"]["update"], update, signal) * controlled(
            kd["decoupled"]["behaviour"], before, signal
        )
    match kd["term"]:
        case "rkl":
            value = -weight * signal * now
        case "k2":
            value = weight * difference**2 / 2
        case _:
            value = weight * (difference.exp() - 1 - difference)
    return value - weight * signal * (s - now)


def signals(kd: Settings, differences: Tensor) -> Tensor:
    """What multiplies `grad s` at each token, from q - s, before baselines and weights."""
    match kd["term"]:
        case "rkl":
            found, later = differences.clone(), 0.0
            for t in reversed(range(len(found))):
                found[t] += kd["gamma"] * later
                later = float(found[t])
            return found
        case "k3":
            return differences.exp() - 1
    return differences


def baselines(objective: Settings, samples: Sequence[Sample], groups: Sequence[object]) -> list[float]:
    """The mean signal of the other samples of the same group, from q - p."""
    totals: list[tuple[float, int]] = []
    for sample in samples:
        taught = sample.taught(objective) & sample.is_sampled
        signal = signals(objective["kd"], torch.where(taught, sample.teacher - sample.proximal, 0.0))
        totals.append((float(signal[taught].sum()), int(taught.sum())))
    found = []
    for place, group in enumerate(groups):
        others = [total for n, total in enumerate(totals) if n != place and groups[n] == group]
        tokens = sum(count for _, count in others)
        found.append(sum(total for total, _ in others) / tokens if tokens else 0.0)
    return found


def expected(sample: Sample, logprobs: Tensor) -> Tensor:
    """The expectation of q - s under the student at each token [n], on its support."""
    pairs = [
        (support.of_student(line), support.logprobs)
        for line, support in zip(logprobs, sample.supports, strict=True)
    ]
    return torch.stack([-kl(student, teacher) for student, teacher in pairs])


def divergences(kd: Settings, sample: Sample, logprobs: Tensor) -> Tensor:
    """The divergence of teacher and student at each token [n]."""
    return torch.stack(
        [
            divergence(kd, support.of_student(line), support.logprobs)
            for line, support in zip(logprobs, sample.supports, strict=True)
        ]
    )


def divergence(kd: Settings, student: Tensor, teacher: Tensor) -> Tensor:
    """From the log-probs of both on the same points."""
    match kd["term"]:
        case "skew_kl":
            return kl(teacher, mixture(kd["alpha"], teacher, student))
        case "skew_rkl":
            return kl(student, mixture(kd["alpha"], student, teacher))
    match beta := kd["beta"]:
        case 0:
            return kl(teacher, student)
        case 1:
            return kl(student, teacher)
    middle = mixture(beta, teacher, student)
    return beta * kl(teacher, middle) + (1 - beta) * kl(student, middle)


def mixture(share: float, one: Tensor, other: Tensor) -> Tensor:
    return (share * one.exp() + (1 - share) * other.exp()).log()


def kl(one: Tensor, other: Tensor) -> Tensor:
    return (one.exp() * (one - other)).sum()
