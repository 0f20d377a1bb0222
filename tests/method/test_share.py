"""The share of a gap that was closed, with Fieller's interval."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kdpipe.method.statistics import ratio_shares, share_of

Z = 1.959963984540054


def drawn(generator: np.random.Generator, problems: int, levels: tuple[float, ...]) -> np.ndarray:
    """Right answers [P, models] to problems of unlike difficulty, each model at its level."""
    difficulty_P = 0.6 * (generator.random(problems) - 0.5)
    chances_PM = np.clip(np.array(levels) + difficulty_P[:, None], 0, 1)
    return (generator.random(chances_PM.shape) < chances_PM).astype(float)


def test_a_share_that_every_problem_has_is_known() -> None:
    wholes = [1.0, 0.5, 2.0, 0.25, 1.5]
    found = share_of([0.4 * whole for whole in wholes], wholes)
    assert found is not None
    assert (found.estimate, found.low, found.high) == pytest.approx((0.4, 0.4, 0.4), abs=1e-7)


def test_the_bounds_are_the_shares_that_a_test_just_does_not_reject() -> None:
    before, teacher, after = drawn(np.random.default_rng(1), 120, (0.3, 0.7, 0.55)).T
    found = share_of((after - before).tolist(), (teacher - before).tolist())
    assert found is not None
    assert found.low < found.estimate < found.high
    for bound in (found.low, found.high):
        rest = (after - before) - bound * (teacher - before)
        assert abs(rest.mean()) == pytest.approx(Z * rest.std(ddof=1) / math.sqrt(120), rel=1e-9)


@pytest.mark.parametrize("wholes", [[1.0, -1.0, 1.0, -1.0, 0.5], [0.0] * 5, [-1.0] * 5], ids=str)
def test_without_a_clear_whole_there_is_no_share(wholes: list[float]) -> None:
    assert share_of([0.5] * 5, wholes) is None


@pytest.mark.slow
@pytest.mark.parametrize("problems", [30, 64, 200, 1319])
@pytest.mark.parametrize("levels", [(0.3, 0.95, 0.9), (0.3, 0.6, 0.5), (0.1, 0.5, 0.1)], ids=str)
def test_92_to_96_percent_of_the_intervals_of_a_gap_hold_the_truth(
    problems: int, levels: tuple[float, float, float]
) -> None:
    generator, held = np.random.default_rng(2), []
    spread = 0.6 * (np.linspace(0, 1, 100_001) - 0.5)
    before, teacher, after = (np.clip(level + spread, 0, 1).mean() for level in levels)
    truth = (after - before) / (teacher - before)
    for _ in range(3000):
        answers = drawn(generator, problems, levels).T
        found = share_of((answers[2] - answers[0]).tolist(), (answers[1] - answers[0]).tolist())
        held += [] if found is None else [found.low <= truth <= found.high]
    assert 0.92 <= np.mean(held) <= 0.965


@pytest.mark.slow
@pytest.mark.parametrize("problems", [30, 64, 200])
def test_92_to_97_percent_of_the_intervals_of_a_distance_hold_the_truth(problems: int) -> None:
    """Held-out reverse KL before and after: sums over completions of unlike length, in the mean 0.7 and 0.2 nats."""
    generator, held = np.random.default_rng(3), []
    for _ in range(3000):
        hardness = generator.gamma(2.0, 0.5, problems)  # of the problem, in both
        totals = []
        for nats in (0.7, 0.2):
            counts = generator.integers(5, 60, problems)
            totals.append((nats * hardness * generator.gamma(4.0, 0.25, problems) * counts, counts))
        had, left = (np.array(ratio_shares((sums.tolist(), counts.tolist()))) for sums, counts in totals)
        found = share_of((had - left).tolist(), had.tolist())
        assert found is not None
        held.append(found.low <= 1 - 0.2 / 0.7 <= found.high)
    assert 0.92 <= np.mean(held) <= 0.97
