"""What is known of a step's completions before it: advantages, KD masks, baselines.

Shapes: n the completion tokens of one completion.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from kdpipe.method.losses import SampledKd, signal_of
from kdpipe.method.token_batch import NonFiniteError
from kdpipe.recipe.objective import Objective

STD_EPSILON = 1e-5  # AReaL's


def open_completions(objective: Objective, correct: Sequence[bool], groups: Sequence[Hashable]) -> list[bool]:
    """Which completions the KD term looks at: all, the wrong ones, or those of groups without a right one."""
    if objective.kind == "srpo" or objective.mask == "wrong":
        return [not right for right in correct]
    if objective.mask == "all_wrong_groups":
        solved = {group for group, right in zip(groups, correct, strict=True) if right}
        return [group not in solved for group in groups]
    return [True] * len(correct)


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


def baselines(
    kd: SampledKd, differences: Sequence[Tensor], taught: Sequence[Tensor], scopes: Sequence[Hashable]
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
        signal = signal_of(kd, clean, [len(clean)])
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
