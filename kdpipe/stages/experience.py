"""Completions with everything that their loss reads: advantages, masks, baselines, and their tensors."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from kdpipe.data.rows import Rollout
from kdpipe.data.tables import Scores
from kdpipe.method.advantage import advantages, baselines, open_completions
from kdpipe.method.micro_batch import TeacherHidden, TeacherMixture
from kdpipe.method.mixture import RoundScores
from kdpipe.method.objective import shares
from kdpipe.method.token_batch import TeacherSupport, TokenBatch
from kdpipe.recipe.objective import Objective, SampledTerm


@dataclass(frozen=True, slots=True)
class Experience:
    """One completion with everything that its loss reads.

    `number` is its place in the round's tables, `proximal` [n] is p_t, `kept` [n] the tokens that count, `taught`
    whether the KD term looks at it, `baseline` that of its group, `is_dropped` says that it does not count at all.
    Text that the student did not sample has no advantage, and takes no part in KD masks and baselines.
    """

    number: int
    rollout: Rollout
    scores: Scores | None
    proximal: npt.NDArray[np.float32]
    advantage: float | None
    kept: npt.NDArray[np.bool_]
    taught: bool
    is_dropped: bool
    baseline: float = 0.0

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.rollout.prompt_token_ids) + len(self.rollout.completion_token_ids)

    @property
    def is_sampled(self) -> bool:
        return self.rollout.source == "student"

    @property
    def tokens(self) -> int:
        """Tokens of the completion that count."""
        return int(self.kept.sum())

    @property
    def behaviour(self) -> npt.NDArray[np.float32]:
        """The b of each token [n]; nan where nobody sampled, so that a term that reads it is noticed."""
        if self.rollout.sampler_logprobs is None:
            return np.full(len(self.rollout.completion_token_ids), math.nan, np.float32)
        return np.asarray(self.rollout.sampler_logprobs, np.float32)


def experiences(
    objective: Objective,
    rollouts: Sequence[Rollout],
    scores: Sequence[Scores] | None,
    *,
    proximal: Sequence[npt.NDArray[np.float32]],
    end_ids: Sequence[int],
) -> list[Experience]:
    """The round's completions with their advantages, masks and group baselines, in order.

    What is dropped takes no part in its group's mean either, nor does what the student did not sample.
    """
    counted = [
        number
        for number, rollout in enumerate(rollouts)
        if rollout.source == "student" and not _is_cut(objective, rollout, "drop")
    ]
    advantage = _advantages(objective, rollouts, counted)
    taught = _taught(objective, rollouts, counted)
    found = [
        Experience(
            number=number,
            rollout=rollout,
            scores=None if scores is None else scores[number],
            proximal=proximal[number],
            advantage=advantage.get(number),
            kept=_kept(objective, rollout, end_ids),
            taught=number in taught,
            is_dropped=_is_cut(objective, rollout, "drop"),
        )
        for number, rollout in enumerate(rollouts)
    ]
    return with_baselines(objective, found, "group")


def with_baselines(
    objective: Objective, rows: list[Experience], scope: Literal["group", "step"]
) -> list[Experience]:
    """The rows with the mean signal of the scope's other completions, where the KD term subtracts one.

    The signals are those at the start of the round.
    """
    kd = objective.kd
    if not objective.has_kd or not isinstance(kd, SampledTerm) or kd.baseline != scope:
        return rows
    pairs = [(row, row.scores) for row in rows if row.scores is not None]
    scopes: list[Hashable] = [row.rollout.prompt_id if scope == "group" else None for row in rows]
    found = baselines(
        kd,
        [torch.from_numpy(scores.teacher_logprobs - row.proximal) for row, scores in pairs],
        [torch.from_numpy(scores.scorable & row.kept & row.taught) for row, scores in pairs],
        scopes,
    )
    return [replace(row, baseline=value) for row, value in zip(rows, found, strict=True)]


def share_of(objective: Objective, rows: Sequence[Experience], *, max_new_tokens: int) -> Mapping[int, float]:
    """The share of each token of a row in the optimizer step's loss, by the row's number."""
    counts = [None if row.is_dropped else row.tokens for row in rows]
    found = shares(objective, counts, max_new_tokens=max_new_tokens)
    return {row.number: share for row, share in zip(rows, found, strict=True)}


def _is_cut(objective: Objective, rollout: Rollout, treatment: Literal["drop", "no_reward"]) -> bool:
    """Whether a completion was truncated and is treated so."""
    return rollout.finish_reason == "length" and objective.truncated == treatment


def _advantages(
    objective: Objective, rollouts: Sequence[Rollout], counted: Sequence[int]
) -> dict[int, float]:
    """The advantage of each completion that the student sampled, 0 without RL and where it does not count."""
    found = {number: 0.0 for number, rollout in enumerate(rollouts) if rollout.source == "student"}
    if not objective.has_rl:
        return found
    rows = [rollouts[number] for number in counted]
    rewards = [_reward(objective, row) for row in rows]
    groups = [row.prompt_id for row in rows]
    return found | dict(zip(counted, advantages(objective, rewards, groups), strict=True))


def _reward(objective: Objective, row: Rollout) -> float:
    """The reward that counts; an objective that reads rewards is refused where nothing is graded."""
    assert row.reward is not None
    return 0.0 if _is_cut(objective, row, "no_reward") else row.reward


def _taught(objective: Objective, rollouts: Sequence[Rollout], counted: Sequence[int]) -> frozenset[int]:
    """The completions that the KD term looks at."""
    rows = [rollouts[number] for number in counted]
    correct = [bool(row.correct) and not _is_cut(objective, row, "no_reward") for row in rows]
    is_open = open_completions(objective, correct, [row.prompt_id for row in rows])
    return frozenset(number for number, taught in zip(counted, is_open, strict=True) if taught)


def _kept(objective: Objective, rollout: Rollout, end_ids: Sequence[int]) -> npt.NDArray[np.bool_]:
    """The tokens of a completion that count: all, all but its end token, or none."""
    ids = rollout.completion_token_ids
    kept = np.full(len(ids), not _is_cut(objective, rollout, "drop"), np.bool_)
    if objective.end_token == "mask" and rollout.finish_reason == "stop" and ids and ids[-1] in end_ids:  # noqa: S105
        kept[-1] = False
    return kept


def token_batch(
    rows: Sequence[Experience],
    share: Mapping[int, float],
    device: torch.device,
    *,
    signal: float | None = None,
) -> TokenBatch:
    """The per-token data of rows, one after another; `signal` stands in the place of q - s."""

    def column(arrays: Iterable[npt.NDArray[Any]]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(list(arrays))).to(device)

    def spread(values: Iterable[float], dtype: Any = np.float32) -> torch.Tensor:
        return column(np.full(len(row.kept), value, dtype) for row, value in zip(rows, values, strict=True))

    scores = [row.scores for row in rows if row.scores is not None]
    return TokenBatch(
        behaviour=column(row.behaviour for row in rows),
        proximal=column(row.proximal for row in rows),
        advantage=spread(math.nan if row.advantage is None else row.advantage for row in rows),
        kept=column(row.kept for row in rows),
        scorable=column(score.scorable for score in scores)
        if scores
        else spread((1.0 for _ in rows), np.bool_),
        kd_open=spread((row.taught for row in rows), np.bool_),
        share=spread(share[row.number] for row in rows),
        lengths=[len(row.kept) for row in rows],
        teacher=column(score.teacher_logprobs for score in scores) if scores else None,
        baseline=spread(row.baseline for row in rows),
        off_policy=spread((not row.is_sampled for row in rows), np.bool_),
        signal=None if signal is None else spread(signal for _ in rows),
    )


def teacher_distribution(
    objective: Objective, rows: Sequence[Experience], scores: RoundScores | None, device: torch.device
) -> TeacherSupport | TeacherHidden | TeacherMixture | None:
    """The teacher's distribution at the completion tokens of `rows`, where the objective needs one."""
    support = objective.distribution_support
    if support is None:
        return None
    if scores is not None and any(teacher.hidden is not None for teacher in scores.teachers):
        top_k = 0 if support == "vocabulary" else support.teacher_top_k or 0
        return scores.distribution([row.number for row in rows], top_k=top_k, device=device)
    ids, logprobs, tail = (
        torch.from_numpy(np.concatenate([getattr(row.scores, name) for row in rows])).to(device)
        for name in ("topk_ids", "topk_logprobs", "tail_logprobs")
    )
    return TeacherSupport(logprobs, ids, tail)
