"""Intervals and tests against closed forms, enumeration and small simulations."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from kdpipe.errors import DataError
from kdpipe.method import statistics
from kdpipe.method.statistics import (
    bootstrap_ratio,
    majority_at_k,
    mcnemar,
    paired_bootstrap,
    pass_at_k,
    pooled,
    pooled_difference,
    wilson,
)

Z = 1.959963984540054


def right(successes: int, trials: int) -> list[float]:
    return [1.0] * successes + [0.0] * (trials - successes)


@pytest.mark.parametrize(("successes", "trials"), [(1, 10), (50, 100), (700, 1319), (1318, 1319)])
def test_wilson_bounds_are_the_proportions_whose_score_test_just_rejects(successes: int, trials: int) -> None:
    interval = wilson(right(successes, trials))
    assert interval.low < interval.estimate == successes / trials < interval.high
    for bound in (interval.low, interval.high):
        score = abs(successes / trials - bound) / math.sqrt(bound * (1 - bound) / trials)
        assert score == pytest.approx(Z, rel=1e-9)


def test_wilson_at_the_ends_has_its_closed_form() -> None:
    none, all_of_them = wilson(right(0, 10)), wilson(right(10, 10))
    assert (none.low, all_of_them.high) == (0.0, 1.0)
    assert none.high == pytest.approx(Z**2 / (10 + Z**2), rel=1e-12)
    assert all_of_them.low == pytest.approx(10 / (10 + Z**2), rel=1e-12)


@pytest.mark.parametrize("nonsense", [[], [-1.0, 0.0], [2.0, 1.0], [math.nan]])
def test_wilson_refuses_what_are_no_fractions(nonsense: list[float]) -> None:
    with pytest.raises(ValueError, match="successes"):
        wilson(nonsense)


def test_wilson_covers_the_truth_about_as_often_as_it_says() -> None:
    n, p = 60, 0.3
    coverage = sum(
        math.comb(n, k) * p**k * (1 - p) ** (n - k)
        for k in range(n + 1)
        if (found := wilson(right(k, n))).low <= p <= found.high
    )
    assert 0.93 < coverage < 0.97


def test_the_accuracy_interval_counts_problems_not_samples() -> None:
    assert wilson([0.5, 1.0]).estimate == 0.75
    assert wilson([0.5, 0.5, 0.5, 0.5]) == wilson(right(2, 4))


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 0), (3, 4), (0, 60), (17, 9), (700, 619)])
def test_wilson_and_mcnemar_equal_those_of_scipy(first: int, second: int) -> None:
    found, trials = wilson(right(first, first + second)), first + second
    theirs = stats.binomtest(first, trials).proportion_ci(0.95, method="wilson")
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), rel=1e-12, abs=1e-15)
    assert mcnemar(first, second) == pytest.approx(stats.binomtest(first, trials).pvalue, rel=1e-10)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (3, 3), (2, 7), (7, 2), (0, 9), (5, 6)])
def test_mcnemar_equals_the_enumeration_of_all_outcomes(first: int, second: int) -> None:
    n = first + second
    outcomes = [sum(flips) for flips in itertools.product((0, 1), repeat=n)]
    as_extreme = sum(abs(heads - n / 2) >= abs(first - n / 2) for heads in outcomes)
    assert mcnemar(first, second) == pytest.approx(as_extreme / len(outcomes), rel=1e-14)


def test_mcnemar_stays_exact_where_floats_overflow() -> None:
    n, fewer = 3000, 1400
    exact = 2 * sum(math.comb(n, k) for k in range(fewer + 1))
    assert mcnemar(fewer, n - fewer) == pytest.approx(float(exact // 2 ** (n - 60)) / 2**60, rel=1e-12)
    assert mcnemar(0, 5000) == 0.0


def test_pass_at_k_is_the_fraction_of_subsets_with_a_right_sample() -> None:
    for num_samples, num_correct in itertools.product(range(1, 7), range(7)):
        if num_correct > num_samples:
            continue
        samples = [True] * num_correct + [False] * (num_samples - num_correct)
        for k in range(1, num_samples + 1):
            subsets = list(itertools.combinations(samples, k))
            expected = sum(any(subset) for subset in subsets) / len(subsets)
            assert pass_at_k(num_samples, num_correct, k) == pytest.approx(expected, abs=1e-14)
    with pytest.raises(ValueError, match="pass@3"):
        pass_at_k(2, 1, 3)


def test_the_majority_of_the_first_k_votes_counts() -> None:
    answers = ["7", "8", None, "8", "9"]
    right = [answer == "8" for answer in answers]
    assert majority_at_k(answers, right, 1) == 0.0
    assert majority_at_k(answers, right, 2) == 0.5
    assert majority_at_k(answers, right, 4) == 1.0
    assert majority_at_k([None, None], [False, False], 2) == 0.0
    assert majority_at_k(answers[::-1], right[::-1], 5) == majority_at_k(answers, right, 5)
    with pytest.raises(ValueError, match="both right and wrong"):
        majority_at_k(["7", "7"], [True, False], 2)
    with pytest.raises(ValueError, match="maj@6"):
        majority_at_k(answers, right, 6)


def test_the_bootstrap_repeats_with_its_seed_and_moves_with_another(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = np.random.default_rng(0).normal(size=(2, 40))
    found = paired_bootstrap(first, second)
    assert paired_bootstrap(first, second) == found
    monkeypatch.setattr(statistics, "BOOTSTRAP_SEED", 1)
    assert paired_bootstrap(first, second) != found


def test_the_bootstrap_of_two_problems_has_its_enumerated_quantiles(monkeypatch: pytest.MonkeyPatch) -> None:
    # resample means of (0, 1) are 0, 1/2, 1 with probability 1/4, 1/2, 1/4
    interval = paired_bootstrap([0.0, 1.0], [0.0, 0.0])
    assert (interval.estimate, interval.low, interval.high) == (0.5, 0.0, 1.0)
    monkeypatch.setattr("kdpipe.method.statistics.CONFIDENCE", 0.4)
    interval = paired_bootstrap([0.0, 1.0], [0.0, 0.0])
    assert (interval.low, interval.high) == (0.5, 0.5)


def test_the_bootstrap_does_not_depend_on_how_draws_are_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    sums, counts = [1.0, 5.0, 2.0], [2.0, 3.0, 9.0]
    whole = bootstrap_ratio((sums, counts))
    monkeypatch.setattr("kdpipe.method.statistics.MAX_DRAWS", 30)
    assert bootstrap_ratio((sums, counts)) == whole


def test_pairing_removes_what_problems_have_in_common() -> None:
    generator = np.random.default_rng(5)
    difficulty = generator.normal(scale=10, size=300)
    interval = paired_bootstrap(difficulty + 1 + generator.normal(size=300), difficulty)
    assert interval.high - interval.low < 0.4
    assert interval.low < 1 < interval.high
    assert interval.low <= interval.estimate <= interval.high


def test_the_token_mean_weighs_problems_by_their_tokens() -> None:
    interval = bootstrap_ratio(([10.0, 0.0], [1.0, 9.0]))
    assert interval.estimate == 1.0
    assert bootstrap_ratio(([2.0, 6.0, 4.0], [1.0, 3.0, 2.0])).high == pytest.approx(2.0)


def test_the_difference_of_token_means_draws_the_same_problems_for_both() -> None:
    sums, counts = [3.0, 1.0, 8.0], [4.0, 2.0, 5.0]
    same = bootstrap_ratio((sums, counts), (sums, counts))
    assert (same.estimate, same.low, same.high) == (0.0, 0.0, 0.0)
    shifted = bootstrap_ratio(([s + c for s, c in zip(sums, counts, strict=True)], counts), (sums, counts))
    assert (shifted.low, shifted.high) == (pytest.approx(1.0), pytest.approx(1.0))


def test_bootstraps_refuse_what_has_no_mean() -> None:
    with pytest.raises(ValueError, match="no token at all"):
        bootstrap_ratio(([1.0, 0.0], [1.0, 0.0]))
    with pytest.raises(ValueError, match="at least one problem"):
        paired_bootstrap([], [])
    with pytest.raises(ValueError, match="only finite"):
        bootstrap_ratio(([math.nan], [1.0]))
    with pytest.raises(ValueError, match="argument 2"):
        paired_bootstrap([1.0], [1.0, 2.0])


@pytest.mark.parametrize("kind", ["difference", "token mean", "difference of token means"])
def test_bootstrap_intervals_cover_the_truth_about_as_often_as_they_say(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 400)
    generator = np.random.default_rng(10)
    trials, problems, hits = 300, 80, 0
    for trial in range(trials):
        counts = generator.integers(1, 50, size=problems).astype(float)
        noise = generator.normal(size=(2, problems)) + generator.normal(size=problems)
        sums = counts * (0.3 + noise[0])
        others = counts * (0.1 + noise[1])
        monkeypatch.setattr(statistics, "BOOTSTRAP_SEED", trial)
        match kind:
            case "difference":
                interval, truth = paired_bootstrap(0.3 + noise[0], 0.1 + noise[1]), 0.2
            case "token mean":
                interval, truth = bootstrap_ratio((sums, counts)), 0.3
            case _:
                interval, truth = bootstrap_ratio((sums, counts), (others, counts)), 0.2
        hits += interval.low <= truth <= interval.high
    assert 0.90 < hits / trials < 0.98


# ------------------------------------------------------------------------------------------ several seeds


def test_one_seed_is_students_t_over_the_problems() -> None:
    values = np.array([0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    found = pooled(values[None, :])
    low, high = stats.t.interval(0.95, len(values) - 1, loc=values.mean(), scale=stats.sem(values))
    assert (found.estimate, found.low, found.high) == pytest.approx((values.mean(), low, high), abs=1e-12)


def test_without_problem_effects_several_seeds_are_students_t_over_the_seeds() -> None:
    """Every problem alike within a seed: only the seeds vary, with their number less one degrees of freedom."""
    means = np.array([0.2, 0.5, 0.4])
    found = pooled(np.repeat(means[:, None], 50, axis=1))
    low, high = stats.t.interval(0.95, 2, loc=means.mean(), scale=stats.sem(means))
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-12)


@pytest.mark.parametrize(("seed_spread", "problem_spread"), [(0.0, 0.3), (0.1, 0.3), (0.2, 0.0), (0.05, 0.1)])
def test_the_pooled_interval_covers_the_truth_about_as_often_as_it_says(
    seed_spread: float, problem_spread: float
) -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(1500):
        seeds = generator.normal(0, seed_spread, (3, 1))
        problems = generator.normal(0, problem_spread, (1, 40))
        found = pooled(0.1 + seeds + problems + generator.normal(0, 0.3, (3, 40)))
        covered += found.low <= 0.1 <= found.high
    assert 0.925 < covered / 1500 < 0.98


def test_a_difference_of_other_seeds_on_each_side_covers_the_truth_too() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(1500):
        problems = generator.normal(0, 0.3, (1, 40))
        sides = [
            level + problems + generator.normal(0, 0.1, (count, 1)) + generator.normal(0, 0.3, (count, 40))
            for level, count in ((0.6, 3), (0.5, 4))
        ]
        found = pooled_difference(*sides)
        covered += found.low <= 0.1 <= found.high
    assert 0.925 < covered / 1500 < 0.98


def test_one_problem_has_no_interval() -> None:
    with pytest.raises(DataError, match="two or more"):
        pooled(np.array([[1.0], [0.0]]))
