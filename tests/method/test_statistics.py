"""Intervals and tests against closed forms, enumeration and small simulations."""

import itertools
import math

import numpy as np
import pytest
from scipy import optimize, stats

from kdpipe.errors import DataError
from kdpipe.method import statistics
from kdpipe.method.statistics import (
    majority_at_k,
    paired_difference,
    pass_at_k,
    pooled,
    pooled_difference,
    ratio_shares,
    score_difference,
    score_p_value,
    token_mean,
    wilson,
)
from kdpipe.pipeline.headline import ACCURACY

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
def test_wilson_equals_that_of_scipy(first: int, second: int) -> None:
    found, trials = wilson(right(first, first + second)), first + second
    theirs = stats.binomtest(first, trials).proportion_ci(0.95, method="wilson")
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), rel=1e-12, abs=1e-15)


# ------------------------------------------------------------------------------ one sample a problem, paired


@pytest.mark.parametrize("problems", [1, 2, 5, 6, 8, 12, 32, 1319])
def test_zero_is_in_the_paired_interval_if_and_only_if_p_is_not_below_5_percent(problems: int) -> None:
    called = 0
    for gained, lost in itertools.product((0, 1, 2, 4, 5, 6, 9, 14), repeat=2):
        if gained + lost > problems:
            continue
        found, p = score_difference(gained, lost, problems), score_p_value(gained, lost)
        assert (found.low <= 0 <= found.high) == (p >= 0.05), (gained, lost)
        assert -1 <= found.low <= found.estimate <= found.high <= 1
        assert found.low < found.high
        mirrored = score_difference(lost, gained, problems)
        assert (-mirrored.high, -mirrored.low) == (found.low, found.high)
        called += p < 0.05
    assert (called > 0) == (problems >= ACCURACY.fewest)


@pytest.mark.parametrize(
    ("gained", "lost", "n"), [(12, 2, 50), (0, 0, 32), (1, 0, 8), (3, 9, 12), (130, 3, 200)]
)
def test_the_paired_bounds_are_where_the_score_test_just_rejects(
    gained: int, lost: int, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uncorrected, against the likelihood maximised numerically for each difference (Tango 1998, section 2)."""

    def score(difference: float) -> float:
        def loss(share: float) -> float:
            shares = (share + difference, share, 1 - 2 * share - difference)
            counts = (gained, lost, n - gained - lost)
            return -sum(k * math.log(max(p, 1e-300)) for k, p in zip(counts, shares, strict=True) if k)

        least, most = max(0.0, -difference), (1 - difference) / 2
        share = optimize.minimize_scalar(
            loss, bounds=(least, most), method="bounded", options={"xatol": 1e-12}
        ).x
        return (gained - lost - n * difference) / math.sqrt(n * (2 * share + difference - difference**2))

    monkeypatch.setattr(statistics, "CORRECTION", 0)
    found = score_difference(gained, lost, n)
    assert (score(found.low), score(found.high)) == pytest.approx((Z, -Z), rel=2e-5)


def test_the_p_value_of_a_paired_difference_is_mcnemars_with_the_correction() -> None:
    for gained, lost in itertools.product(range(0, 30, 4), repeat=2):
        if gained == lost:  # there the correction would reach past 0
            assert score_p_value(gained, lost) == 1
        else:
            squared = (abs(gained - lost) - 1) ** 2 / (gained + lost)
            assert score_p_value(gained, lost) == pytest.approx(stats.chi2.sf(squared, 1), rel=1e-12)


def test_no_null_is_called_more_often_than_5_percent_at_any_number_of_problems() -> None:
    for problems in (*range(1, 25), 64):
        counts = np.arange(problems + 1)
        called = np.zeros(problems + 1)
        for discordant in counts:
            rejected = [k for k in range(discordant + 1) if score_p_value(k, discordant - k) < 0.05]
            called[discordant] = stats.binom.pmf(rejected, discordant, 0.5).sum()
        shares = np.linspace(0.005, 1, 60)[:, None]
        assert (stats.binom.pmf(counts, problems, shares) @ called).max() <= 0.05, problems


def test_the_paired_interval_refuses_what_are_no_counts() -> None:
    for counts in ((1, 0, 0), (-1, 2, 5), (3, 3, 5)):
        with pytest.raises(ValueError, match="gained"):
            score_difference(*counts)
    with pytest.raises(ValueError, match="no problem"):
        paired_difference([], [])


def test_fractions_of_right_samples_are_students_t_with_one_gained_and_one_lost_more() -> None:
    assert paired_difference([1.0, 0.0, 1.0], [0.0, 0.0, 1.0]) == score_difference(1, 0, 3)
    found = paired_difference([0.5, 0.25, 1.0, 0.0], [0.0, 0.0, 1.0, 0.5])
    values = [0.5, 0.25, 0.0, -0.5, 1.0, -1.0]
    low, high = stats.t.interval(0.95, 5, loc=np.mean(values), scale=stats.sem(values))
    assert (found.estimate, found.low, found.high) == pytest.approx((0.0625, low, high), abs=1e-12)
    still = paired_difference([0.5] * 32, [0.5] * 32)
    assert -0.1 < still.low < 0 < still.high < 0.1
    sure = paired_difference([0.9, 0.8], [0.0, 0.0])
    assert (sure.low, sure.high) == (-1.0, 1.0)


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
    assert majority_at_k([None, None, "8"], [False, False, True], 3) == 1.0
    assert majority_at_k(answers[::-1], right[::-1], 5) == majority_at_k(answers, right, 5)
    with pytest.raises(ValueError, match="both right and wrong"):
        majority_at_k(["7", "7"], [True, False], 2)
    with pytest.raises(ValueError, match="maj@6"):
        majority_at_k(answers, right, 6)


def test_pairing_removes_what_problems_have_in_common() -> None:
    difficulty = np.random.default_rng(5).normal(scale=10, size=300)
    noise = np.random.default_rng(6).normal(size=300)
    ones = [1.0] * 300
    interval = token_mean((difficulty + 1 + noise, ones), (difficulty, ones))
    assert interval.high - interval.low < 0.4
    assert interval.low < 1 < interval.high


def test_the_token_mean_weighs_problems_by_their_tokens() -> None:
    assert token_mean(([10.0, 0.0], [1.0, 9.0])).estimate == 1.0
    assert ratio_shares(([10.0, 0.0], [1.0, 9.0])) == pytest.approx([1 + 9 / 5, 1 - 9 / 5])
    same = token_mean(([2.0, 6.0, 4.0], [1.0, 3.0, 2.0]))
    assert (same.low, same.estimate, same.high) == pytest.approx((2.0, 2.0, 2.0))


def test_without_a_far_problem_the_token_mean_is_students_t_with_two_more_of_each_size() -> None:
    """Of values +-1 every problem is the farthest: their squares sum to n + 2."""
    values = [1.0, -1.0] * 8
    found = token_mean((values, [1.0] * 16))
    reach = stats.t.ppf(0.975, 15) * math.sqrt(18 / (16 * 15))
    assert (found.low, found.estimate, found.high) == pytest.approx((-reach, 0.0, reach), abs=1e-12)


def test_divergences_have_the_same_reach_as_a_factor() -> None:
    sums, counts = [3.0, 1.0, 8.0, 0.0, -1e-4], [4.0, 2.0, 5.0, 1.0, 2.0]
    found = token_mean((sums, counts))
    assert 0 < found.low < found.estimate < found.high
    assert found.high / found.estimate == pytest.approx(found.estimate / found.low)
    signed = token_mean(([*sums[:4], -1.0], counts))
    assert signed.high - signed.estimate == pytest.approx(signed.estimate - signed.low)
    few = token_mean((sums[:3], counts[:3]))  # a reach beyond 0, where no divergence is
    assert few.low == 0 < few.estimate < few.high


def test_the_difference_of_token_means_is_over_the_same_problems() -> None:
    sums, counts = [3.0, 1.0, 8.0], [4.0, 2.0, 5.0]
    same = token_mean((sums, counts), (sums, counts))
    assert (same.estimate, same.low, same.high) == (0.0, 0.0, 0.0)
    shifted = token_mean(([s + c for s, c in zip(sums, counts, strict=True)], counts), (sums, counts))
    assert (shifted.low, shifted.high) == (pytest.approx(1.0), pytest.approx(1.0))


def test_a_lone_problem_has_no_interval_of_width_zero() -> None:
    found = token_mean(([6.0], [3.0]))
    assert (found.estimate, found.low, found.high > 4) == (2.0, 0.0, True)


def test_token_means_refuse_what_has_no_mean() -> None:
    for totals in (([0.0, 0.0], [0.0, 0.0]), ([], []), ([math.nan], [1.0])):
        with pytest.raises(ValueError, match="at least one token"):
            token_mean(totals)


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


def test_the_variances_over_seeds_and_problems_add_each_with_its_own_t() -> None:
    table = np.array([[0.0, 1.0, 4.0, 2.0], [2.0, 3.5, 7.0, 1.0], [2.0, 2.0, 9.0, 5.0]])
    mean = table.mean()
    of_seeds, of_problems = (stats.sem(table.mean(axis=axis)) ** 2 for axis in (1, 0))
    ts, tp = (stats.t.ppf(0.975, freedom) ** 2 for freedom in (2, 3))
    reach, lone = ((ts * of_seeds * more + tp * of_problems) ** 0.5 for more in (1, 4))
    found = pooled(table)
    assert (found.low, found.high) == pytest.approx((mean - reach, mean + reach), abs=1e-12)
    apart = pooled_difference(table, 0 * table[:1])
    assert (apart.low, apart.high) == pytest.approx((mean - lone, mean + lone), abs=1e-12)
    other = table[:2] - table[:1].mean(axis=0)
    by_problem = table.mean(axis=0) - other.mean(axis=0)
    squares = sum(((side.mean(axis=1) - side.mean()) ** 2).sum() for side in (table, other))
    of_seeds = squares / 3 * (1 / 3 + 1 / 2) * stats.t.ppf(0.975, 3) ** 2
    reach = (of_seeds + tp * stats.sem(by_problem) ** 2) ** 0.5
    both = pooled_difference(table, other)
    middle = by_problem.mean()
    assert (both.low, both.high) == pytest.approx((middle - reach, middle + reach), abs=1e-12)


@pytest.mark.parametrize(("seed_spread", "problem_spread"), [(0.0, 0.3), (0.1, 0.3), (0.2, 0.0), (0.05, 0.1)])
def test_the_pooled_interval_covers_the_truth_about_as_often_as_it_says(
    seed_spread: float, problem_spread: float
) -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(600):
        seeds = generator.normal(0, seed_spread, (3, 1))
        problems = generator.normal(0, problem_spread, (1, 40))
        found = pooled(0.1 + seeds + problems + generator.normal(0, 0.3, (3, 40)))
        covered += found.low <= 0.1 <= found.high
    assert covered / 600 > 0.935


def test_a_difference_of_other_seeds_on_each_side_covers_the_truth_too() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(600):
        problems = generator.normal(0, 0.3, (1, 40))
        sides = [
            level + problems + generator.normal(0, 0.1, (count, 1)) + generator.normal(0, 0.3, (count, 40))
            for level, count in ((0.6, 3), (0.5, 4))
        ]
        found = pooled_difference(*sides)
        covered += found.low <= 0.1 <= found.high
    assert covered / 600 > 0.935


def test_a_lone_seed_is_taken_to_vary_as_those_that_it_is_compared_with() -> None:
    generator = np.random.default_rng(3)
    trials, covered = 400, 0
    for _ in range(trials):
        problems = generator.normal(0, 0.3, (1, 200))
        sides = [
            problems + generator.normal(0, 0.1, (count, 1)) + generator.normal(0, 0.3, (count, 200))
            for count in (3, 1)
        ]
        found, mirrored = pooled_difference(*sides), pooled_difference(*sides[::-1])
        assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low), abs=1e-12)
        covered += found.low <= 0 <= found.high
    assert covered / trials > 0.92


def test_one_problem_has_no_interval() -> None:
    with pytest.raises(DataError, match="two or more"):
        pooled(np.array([[1.0], [0.0]]))
