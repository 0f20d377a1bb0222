"""What an evaluation says of the one before training: now less then, each problem against itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kdpipe.method.statistics import wilson
from kdpipe.stages.evaluate import _accuracy, _accuracy_change, _by_problem, _reverse_kl


def graded(**right: list[bool]) -> list[dict[str, Any]]:
    return [
        {"prompt_id": name, "sample": sample, "correct": correct}
        for name, found in right.items()
        for sample, correct in enumerate(found)
    ]


def test_a_change_of_accuracy_is_now_less_then_whatever_the_order_of_the_rows() -> None:
    now = graded(a=[True], b=[True], c=[True], d=[False])
    then = graded(d=[True], b=[False], a=[False], c=[True])
    found = _accuracy_change(now, then)
    assert found["accuracy_change"] == 0.25
    worse = _accuracy_change(then, now)
    assert worse["accuracy_change"] == -0.25
    assert (worse["accuracy_change_low"], worse["accuracy_change_high"]) == pytest.approx(
        (-found["accuracy_change_high"], -found["accuracy_change_low"])  # type: ignore[operator]
    )
    assert _accuracy_change(graded(a=[True]), graded(a=[False]))["accuracy_change"] == 1.0


def test_with_several_samples_it_is_of_the_fraction_that_is_right() -> None:
    found = _accuracy_change(
        graded(a=[True, False, False, True], b=[True] * 4), graded(a=[False] * 4, b=[True] * 4)
    )
    assert found["accuracy_change"] == 0.25
    assert "accuracy_change_p_value" not in found


def test_the_interval_of_an_accuracy_is_over_problems_and_not_over_samples() -> None:
    settings: Any = SimpleNamespace(task=SimpleNamespace(grader="exact"))
    grades = graded(a=[True, True, False, False], b=[True] * 4, c=[False] * 4, d=[True] * 4)
    found = _accuracy(settings, grades, _by_problem(grades))
    expected = wilson([0.5, 1.0, 0.0, 1.0])
    assert (found["accuracy"], found["accuracy_low"], found["accuracy_high"]) == (
        expected.estimate,
        expected.low,
        expected.high,
    )
    assert expected.high - expected.low > 0.6


def divergent(*differences: list[float], exact: float) -> list[dict[str, Any]]:
    """Problems with the sampler's log-prob less the teacher's at each token, the last of which has no score."""
    return [
        {
            "prompt_id": str(number),
            "sampler_logprobs": [*found, 0.0],
            "teacher_logprobs": [0.0] * len(found) + [99.0],
            "scorable": [True] * len(found) + [False],
            "reverse_kl_nats": [exact] * (len(found) + 1),
        }
        for number, found in enumerate(differences)
    ]


def test_a_change_of_the_reverse_kl_is_now_less_then_over_tokens_with_a_score() -> None:
    now, then = divergent([1.0, 2.0], [6.0], exact=0.5), divergent([2.0], [8.0, 8.0], exact=1.5)
    assert _reverse_kl(now)["reverse_kl_nats"] == pytest.approx(3.0)
    assert _reverse_kl(now)["reverse_kl_exact_nats"] == pytest.approx(0.5)
    found = _reverse_kl(now, then)
    assert found["reverse_kl_change_nats"] == pytest.approx(3.0 - 6.0)
    assert found["reverse_kl_exact_change_nats"] == pytest.approx(-1.0)
