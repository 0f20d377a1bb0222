"""The shares of a gap and of a distance that were closed, from tables of known problems."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kdpipe.method.interval import Interval
from kdpipe.results import measures as module
from kdpipe.results.evaluations import Evaluation
from kdpipe.results.measures import Measures
from tests.results.told import graded

BEFORE, AFTER, TEACHER = (
    Evaluation(graded(number, model=model))
    for number, model in ((0, "student"), (4, "student"), (0, "teacher"))
)


def measures_of(
    fractions: dict[int, list[int]], monkeypatch: pytest.MonkeyPatch, *, teaches: int
) -> Measures:
    """Measures of right answers by problem: 0 and 4 are the student's rounds, -1 is the teacher's first problems."""

    def known(_self: Measures, one: Evaluation) -> dict[str, float]:
        row = fractions[one.round if one.is_student else -1]
        return {
            f"p/{number}": float(right)
            for number, right in enumerate(row[: len(row) if one.is_student else teaches])
        }

    monkeypatch.setattr(Measures, "_fractions", known)
    return object.__new__(Measures)


@pytest.mark.parametrize("teaches", [60, 40])
def test_the_share_of_the_gap_is_over_the_problems_that_the_teacher_teaches(
    monkeypatch: pytest.MonkeyPatch, teaches: int
) -> None:
    rows = {0: [0] * 40 + [1] * 20, 4: [1] * 30 + [0] * 10 + [1] * 20, -1: [1] * 60}
    found = measures_of(rows, monkeypatch, teaches=teaches).closed(TEACHER, BEFORE, AFTER)
    assert found is not None
    assert found.estimate == pytest.approx(30 / 40)
    assert found.low < found.estimate < found.high


def test_without_a_clear_lead_or_enough_problems_no_share_of_the_gap_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = {0: [0] * 29 + [1] * 31, 4: [1] * 60, -1: [1] * 60}
    assert measures_of(rows, monkeypatch, teaches=60).closed(TEACHER, BEFORE, AFTER) is not None
    assert measures_of(rows, monkeypatch, teaches=29).closed(TEACHER, BEFORE, AFTER) is None
    level = {0: [1, 0] * 30, 4: [1] * 60, -1: [0, 1] * 29 + [1, 1]}
    assert measures_of(level, monkeypatch, teaches=60).closed(TEACHER, BEFORE, AFTER) is None


@pytest.mark.parametrize("problems", [64, 29])
def test_the_share_of_the_distance_is_that_of_the_token_means(
    monkeypatch: pytest.MonkeyPatch, problems: int
) -> None:
    generator = np.random.default_rng(5)
    totals: dict[int, dict[str, tuple[float, float]]] = {}
    for number, nats in ((0, 0.8), (4, 0.2)):
        counts = generator.integers(1, 40, problems)
        sums = nats * counts * generator.gamma(4.0, 0.25, problems)
        totals[number] = {
            f"p/{n}": (float(a), float(b)) for n, (a, b) in enumerate(zip(sums, counts, strict=True))
        }
    totals[0]["p/only-before"] = (1e6, 1.0)
    monkeypatch.setattr(module, "reverse_kl_totals", lambda number, **_: totals[number])
    monkeypatch.setattr(Measures, "_entry", lambda _self, one: one.round)
    measures: Any = object.__new__(Measures)
    measures.project = SimpleNamespace(recipe=SimpleNamespace(teachers=["one"]))
    found = measures.approached(BEFORE, AFTER)
    if problems < 30:
        assert found is None
        return
    shared = [[totals[n][f"p/{number}"] for number in range(problems)] for n in (0, 4)]
    had, left = (sum(a for a, _ in row) / sum(b for _, b in row) for row in shared)
    assert isinstance(found, Interval)
    assert found.estimate == pytest.approx(1 - left / had)
    assert found.low < found.estimate < found.high
