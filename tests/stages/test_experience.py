"""A round's completions with all that their loss reads, against numbers written out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kdpipe.data.rows import Rollout
from kdpipe.data.tables import Scores
from kdpipe.recipe.objective import Objective
from kdpipe.stages.experience import Experience, experiences, share_of, token_batch, with_baselines

END = 1


def rollout(prompt: str, sample: int, ids: list[int], **changes: Any) -> Rollout:
    """A right answer that ends with its end token, unless `changes` say otherwise."""
    row = Rollout(
        prompt_id=prompt,
        sample=sample,
        question="",
        expected="",
        prompt_token_ids=[9],
        completion_token_ids=ids,
        sampler_logprobs=[-0.5 - 0.25 * t - sample for t in range(len(ids))],
        source="student",
        finish_reason="stop",
        text="",
        answer_strict=None,
        answer_flexible=None,
        answer=None,
        correct=True,
        reward=1.0,
    )
    return replace(row, **changes)


def cut(row: Rollout) -> Rollout:
    return replace(row, finish_reason="length")


def wrong(row: Rollout) -> Rollout:
    return replace(row, correct=False, reward=0.0)


def scored(row: Rollout, teacher: list[float], scorable: list[bool] | None = None) -> Scores:
    return Scores(
        prompt_id=row.prompt_id,
        sample=row.sample,
        teacher="teacher",
        teacher_prompt_token_ids=[],
        teacher_logprobs=np.array(teacher, np.float32),
        scorable=np.array(scorable or [True] * len(teacher)),
    )


def objective(**settings: Any) -> Objective:
    return Objective.model_validate({"kind": "kdrl", "group_normalization": "mean", **settings})


def made(
    goal: Objective, rows: list[Rollout], scores: list[Scores] | None = None, *, shift: float = 0.0
) -> list[Experience]:
    """The rows' experiences, where the trainer's log-probs are those of the sampler plus `shift`."""
    proximal = [
        np.asarray(row.sampler_logprobs or [0.0] * len(row.completion_token_ids), np.float32)
        + np.float32(shift)
        for row in rows
    ]
    return experiences(goal, rows, scores, proximal=proximal, end_ids=(END,))


SIX = [
    rollout("a", 0, [5, END]),
    wrong(rollout("a", 1, [5, 6, END])),
    wrong(rollout("a", 2, [7, END])),
    cut(rollout("b", 0, [5, 6, 7])),
    wrong(rollout("b", 1, [8, END])),
    wrong(rollout("b", 2, [END])),
]
"""Two groups; the only right answer of the second is cut."""


@pytest.mark.parametrize(
    ("settings", "taught"),
    [
        ({"mask": "wrong"}, [False, True, True, True, True, True]),
        ({"kind": "srpo"}, [False, True, True, True, True, True]),
        ({"mask": "all_wrong_groups"}, [False, False, False, True, True, True]),
    ],
)
def test_a_cut_completion_that_gets_no_reward_is_not_a_right_one(
    settings: dict[str, Any], taught: list[bool]
) -> None:
    rows = made(objective(truncated="no_reward", **settings), SIX)
    assert [row.taught for row in rows] == taught
    assert [row.advantage for row in rows][3:] == [0.0, 0.0, 0.0]  # nobody of the group has a reward
    kept = made(objective(**settings), SIX)
    assert [row.taught for row in kept] != taught
    assert [row.advantage for row in kept][3:] == pytest.approx([2 / 3, -1 / 3, -1 / 3])


def test_the_reward_counts_and_not_whether_the_answer_is_right() -> None:
    rewards = [0.25, 1.0, 0.0]
    rows = [
        replace(rollout("a", sample, [5, END]), reward=reward, correct=reward == 0)
        for sample, reward in enumerate(rewards)
    ]
    found = [row.advantage for row in made(objective(), rows)]
    assert found == pytest.approx([reward - sum(rewards) / 3 for reward in rewards])


def test_a_group_is_the_completions_of_one_prompt_wherever_they_stand() -> None:
    found = [row.advantage for row in made(objective(), [SIX[3], SIX[0], SIX[4], SIX[1], SIX[5], SIX[2]])]
    assert found == pytest.approx([2 / 3, 2 / 3, -1 / 3, -1 / 3, -1 / 3, -1 / 3])


def test_a_dropped_completion_counts_nowhere() -> None:
    goal = objective(truncated="drop", normalization="fixed", fixed_length=4)
    rows = made(goal, [SIX[0], cut(SIX[1]), SIX[2], SIX[3]])
    assert [row.advantage for row in rows] == [0.5, 0.0, -0.5, 0.0]
    assert [row.taught for row in rows] == [True, False, True, False]
    assert [row.tokens for row in rows] == [2, 0, 2, 0]
    assert share_of(goal, rows, max_new_tokens=99) == dict.fromkeys(range(4), 1 / (2 * 4))


def test_the_end_token_alone_is_masked_and_only_where_it_ends() -> None:
    rows = [
        rollout("a", 0, [5, 6, END]),
        rollout("a", 1, [5, 6, 7]),  # a stop string
        cut(rollout("a", 2, [5, END, END])),
        rollout("a", 3, [END]),
        cut(rollout("a", 4, [])),
    ]
    masked = [row.kept.tolist() for row in made(objective(end_token="mask"), rows)]
    assert masked == [[True, True, False], [True] * 3, [True] * 3, [False], []]
    assert all(row.kept.all() for row in made(objective(), rows))


BASELINE = {"kd": {"term": "rkl", "baseline": "group"}, "mask": "wrong", "end_token": "mask"}


def test_a_groups_baseline_is_the_mean_signal_of_its_other_taught_tokens_at_the_start_of_the_round() -> None:
    rows = [SIX[0], SIX[1], SIX[2], wrong(rollout("b", 0, [5, 6, END]))]
    teacher = [[-9.0, -9.0], [-1.0, -2.0, -9.0], [-3.0, -9.0], [-1.0, -1.0, -9.0]]
    scores = [scored(row, said) for row, said in zip(rows, teacher, strict=True)]
    scores[1] = scored(SIX[1], teacher[1], [True, False, True])
    found = made(objective(**BASELINE), rows, scores, shift=0.125)
    # Sample 0 is right and closed, the second token of sample 1 has no score, ends are masked.
    one = -1.0 - (-0.5 - 1 + 0.125)
    two = -3.0 - (-0.5 - 2 + 0.125)
    assert [row.baseline for row in found] == pytest.approx([(one + two) / 2, two, one, 0.0])
    step = objective(**{**BASELINE, "kd": {"term": "rkl", "baseline": "step"}})
    alone = with_baselines(step, found[1:3], "step")
    assert [row.baseline for row in alone] == pytest.approx([two, one])
    assert with_baselines(step, found, "group") is found


def test_the_columns_of_a_batch_are_each_rows_own() -> None:
    given = replace(rollout("c", 0, [5, END]), source="reference", sampler_logprobs=None)
    rows = [SIX[1], given, SIX[0]]
    scores = [scored(row, [-1.0 * number] * len(row.completion_token_ids)) for number, row in enumerate(rows)]
    batch = token_batch(
        made(objective(), rows, scores, shift=0.5), {0: 0.1, 1: 0.2, 2: 0.3}, torch.device("cpu")
    )
    assert batch.lengths == [3, 2, 2]
    assert batch.behaviour.tolist() == pytest.approx(
        [-1.5, -1.75, -2.0, *[math.nan] * 2, -0.5, -0.75], nan_ok=True
    )
    assert batch.proximal.tolist() == pytest.approx([-1.0, -1.25, -1.5, 0.5, 0.5, 0.0, -0.25])
    assert batch.advantage.tolist() == pytest.approx([-0.5] * 3 + [math.nan] * 2 + [0.5] * 2, nan_ok=True)
    assert batch.share.tolist() == pytest.approx([0.1] * 3 + [0.2] * 2 + [0.3] * 2)
    assert batch.teacher is not None
    assert batch.teacher.tolist() == [0.0] * 3 + [-1.0] * 2 + [-2.0] * 2
    assert batch.off_policy is not None
    assert batch.off_policy.tolist() == [False] * 3 + [True] * 2 + [False] * 2
    assert batch.kd_open.tolist() == [True] * 3 + [False] * 2 + [True] * 2
