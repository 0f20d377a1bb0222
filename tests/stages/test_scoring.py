"""What a teacher is asked and what becomes of its answers, with a teacher that says of each id what it was asked."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kdpipe.data.rows import Problem
from kdpipe.engines.protocol import ScoreRequest, Scoring, TokenScores
from kdpipe.models.logprobs import Head
from kdpipe.models.tokenizer import Vocabulary
from kdpipe.stages.scoring import TeacherHandle, score_completions, score_metrics, swapped_head
from kdpipe.stages.teacher_score import teacher_score
from tests.stages.test_experience import rollout, scored

PROBLEM = Problem("a", "", "", "")


class Asked:
    """A teacher's model: a token's log-prob is less its id, its support that id and the next."""

    text: Any = SimpleNamespace(num_ids=40, prompt=lambda _problem, _own: [30])

    def __init__(self) -> None:
        self.calls: list[tuple[Sequence[ScoreRequest], Scoring]] = []

    def score(self, requests: Sequence[ScoreRequest], scoring: Scoring, **_: Any) -> list[TokenScores]:
        self.calls.append((requests, scoring))
        return [
            TokenScores(
                logprobs=-np.array(request.scored_ids, np.float32),
                topk_ids=np.array([[each, each + 1] for each in request.scored_ids], np.int32).reshape(-1, 2),
            )
            for request in requests
        ]


def handle(*, reads_own: bool = False, unscorable: Sequence[int] = (), swap: Any = None) -> TeacherHandle:
    settings: Any = SimpleNamespace(name="teacher", temperature=0.7, reads_own=reads_own, prompt="own")
    student: Any = SimpleNamespace(prompt=lambda _problem: [2])
    model: Any = Asked()
    return TeacherHandle(model, student, settings, Vocabulary(20, 25, frozenset(unscorable)), swap)


def asked_of(teacher: TeacherHandle, *completions: list[int]) -> tuple[Any, list[Any]]:
    """The one call of the model, and what score_completions makes of it."""
    job: Any = SimpleNamespace(
        asking=lambda _ids: contextlib.nullcontext(),
        pulse=SimpleNamespace(tokens=None),
        require_finite=lambda *_: None,
    )
    found = score_completions(job, [(PROBLEM, [3, 4], ids) for ids in completions], teacher=teacher, top_k=2)
    [call] = teacher.model.calls  # type: ignore[attr-defined]
    return call, found


def test_a_teacher_is_asked_at_its_temperature_over_the_ids_that_both_have() -> None:
    for vocabulary, shared in ((Vocabulary(20, 25, frozenset()), 20), (Vocabulary(25, 20, frozenset()), 20)):
        teacher = handle()
        teacher = TeacherHandle(teacher.model, teacher.student, teacher.settings, vocabulary)
        (requests, scoring), _ = asked_of(teacher, [5, 6])
        assert scoring == Scoring(temperature=0.7, num_ids=shared, top_k=2, hidden=False)
        assert [(one.prompt_token_ids, one.completion_token_ids) for one in requests] == [([3, 4], [5, 6])]


def test_a_teacher_reads_its_own_prompt_where_it_has_one_or_lacks_an_id_of_the_students() -> None:
    assert asked_of(handle(reads_own=True), [5])[0][0][0].prompt_token_ids == [30]
    assert asked_of(handle(unscorable=[4]), [5])[0][0][0].prompt_token_ids == [30]


def test_scores_stand_at_the_tokens_that_the_teacher_has() -> None:
    (requests, _), [first, second] = asked_of(handle(unscorable=[8]), [5, 8, 6, 8], [7])
    assert [one.completion_token_ids for one in requests] == [[5, 6], [7]]
    prompt, scores, scorable = first
    assert (prompt, scorable.tolist()) == ([3, 4], [True, False, True, False])
    assert scores.logprobs.tolist() == [-5, 0, -6, 0]
    assert scores.topk_ids.tolist() == [[5, 6], [0, 0], [6, 7], [0, 0]]
    assert second[1].logprobs.tolist() == [-7]


def test_two_end_ids_trade_places_in_what_is_asked_and_in_what_is_answered() -> None:
    (requests, _), [(_, scores, _)] = (
        asked_of(handle(swap=(1, 9)), [5, 1], [9])[0],
        asked_of(handle(swap=(1, 9)), [5, 1, 9])[1],
    )
    assert [one.completion_token_ids for one in requests] == [[5, 1], [9]]
    assert [one.scored_ids for one in requests] == [[5, 9], [1]]
    assert scores.logprobs.tolist() == [-5, -9, -1]
    assert scores.topk_ids.tolist() == [[5, 6], [1, 10], [9, 2]]
    head = swapped_head(Head(torch.arange(12.0)[:, None], torch.arange(12.0)), (1, 9))
    assert head.weight_VH[:, 0].tolist() == [0, 9, 2, 3, 4, 5, 6, 7, 8, 1, 10, 11]
    assert head.bias_V is not None
    assert head.bias_V.tolist() == head.weight_VH[:, 0].tolist()


def test_the_reverse_kl_of_a_round_is_sampler_less_teacher_over_scorable_tokens() -> None:
    row = rollout("a", 0, [5, 6, 7])  # sampled at -0.5, -0.75 and -1.0
    found = score_metrics([(row, scored(row, [-1.5, -9.0, -3.0], [True, False, True]))])
    assert found == {"reverse_kl_nats": pytest.approx((1.0 + 2.0) / 2), "unscorable_tokens": 1}


class Built(Exception):
    """The rows that a stage would write."""


def test_a_round_is_scored_row_by_row_with_the_students_choice_among_the_ids_of_both() -> None:
    def in_parts(_name: str, items: Any, *, build: Any, **_: Any) -> None:
        raise Built(build(items))

    rows = [rollout("a", 0, [5, 6]), rollout("a", 1, [7, 8, 1])]
    teacher, student = handle(), Asked()
    job: Any = SimpleNamespace(
        train=[PROBLEM],
        asking=lambda _ids: contextlib.nullcontext(),
        pulse=SimpleNamespace(tokens=None),
        require_finite=lambda *_: None,
        in_parts=in_parts,
    )
    context: Any = SimpleNamespace(
        rollouts=lambda: rows, teacher=lambda _: teacher, student=lambda *_, **__: student
    )
    settings: Any = SimpleNamespace(
        teacher=SimpleNamespace(only=None, engine="hf"),
        student=SimpleNamespace(),
        keep=SimpleNamespace(hidden=False, teacher_top_k=2, student_top_k=2),
        logprobs="float32",
        temperature=1.3,
    )
    with pytest.raises(Built) as caught:
        teacher_score(settings, job, context)
    [found] = caught.value.args
    assert [(one.sample, one.teacher_logprobs.tolist()) for one in found] == [
        (0, [-5, -6]),
        (1, [-7, -8, -1]),
    ]
    [(_, scoring)] = student.calls
    assert scoring == Scoring(temperature=1.3, num_ids=20, top_k=2)
    [(requests, _)] = teacher.model.calls  # type: ignore[attr-defined]
    assert [one.support_ids.tolist() for one in requests] == [[[5, 6], [6, 7]], [[7, 8], [8, 9], [1, 2]]]
