"""Intervals and paired tests for evaluations. The unit is the problem, never the sample or the token.

Left out: the normal approximation, which is wrong near 0 and 1 and for few problems, where evaluations live. And
scipy.stats, whose values for whole counts are these (tests/method/test_statistics.py): its import takes 0.7 s of CPU
time, which the end of every run would pay, and its Wilson interval takes no fractional successes.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kdpipe.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

Floats = npt.NDArray[np.float64]
BOOTSTRAP_SEED = 0
"""The same draws for every interval, so that the same tables have the same interval."""
MAX_DRAWS = 1 << 21  # of a resampling chunk, so that memory stays near 64 MB


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its confidence bounds."""

    estimate: float
    low: float
    high: float


# ------------------------------------------------------------------------------------------ proportions


def wilson(successes: float, trials: int, *, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion; `successes` may be fractional (see `accuracy`)."""
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials")
    z = _z(confidence)
    p = successes / trials
    centre = p + z * z / (2 * trials)
    spread = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    # At 0 and at all successes the bound is 0 or 1 in exact arithmetic.
    low = 0.0 if successes == 0 else (centre - spread) / scale
    high = 1.0 if successes == trials else (centre + spread) / scale
    return Interval(estimate=p, low=low, high=high)


def accuracy(correct_by_problem: Sequence[Sequence[bool]], *, confidence: float = 0.95) -> Interval:
    """Mean over problems of the fraction of right samples, with a Wilson interval that counts problems.

    Samples of one problem are not independent. Counting problems is Wilson's own interval for one sample each
    and conservative for several: the variance of a mean of n fractions is at most p (1 - p) / n.
    """
    if not all(len(samples) > 0 for samples in correct_by_problem):
        raise ValueError("every problem needs at least one sample")
    fractions = [sum(samples) / len(samples) for samples in correct_by_problem]
    return wilson(math.fsum(fractions), len(fractions), confidence=confidence)


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p-value of McNemar's test.

    `only_first` and `only_second` count the problems that only one of the two models got right. It sums
    integers, so it is exact for any count.
    """
    if only_first < 0 or only_second < 0:
        raise ValueError(f"counts are not negative: {only_first}, {only_second}")
    n, fewer = only_first + only_second, min(only_first, only_second)
    ways = total = 1
    for chosen in range(fewer):
        ways = ways * (n - chosen) // (chosen + 1)
        total += ways
    return min(1.0, 2 * total / (1 << n))


def unpaired_difference(first: Interval, second: Interval) -> Interval:
    """The difference of two independent proportions, by Newcombe's interval (1998, method 10)."""
    low = math.hypot(first.estimate - first.low, second.high - second.estimate)
    high = math.hypot(first.high - first.estimate, second.estimate - second.low)
    difference = first.estimate - second.estimate
    return Interval(difference, difference - low, difference + high)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The unbiased estimate of the chance that one of k samples is right (2107.03374), for one problem."""
    if not (0 <= num_correct <= num_samples and 1 <= k <= num_samples):
        raise ValueError(f"pass@{k} of {num_correct} right in {num_samples} samples")
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def majority_at_k(answers: Sequence[Hashable | None], correct: Sequence[bool], k: int) -> float:
    """Whether the most frequent answer of the first k samples is right, for one problem, as 0 to 1.

    None (no answer found) has no vote. Ties give the fraction of the tied answers that is right: the
    expectation of a fair draw, which does not depend on the order of the samples.
    """
    if not 1 <= k <= len(answers):
        raise ValueError(f"maj@{k} of {len(answers)} samples")
    verdicts: dict[Hashable, bool] = {}
    for answer, is_right in zip(answers, correct, strict=True):
        if answer is not None and verdicts.setdefault(answer, is_right) != is_right:
            raise ValueError(f"answer {answer!r} is graded both right and wrong")
    votes = Counter(answer for answer in answers[:k] if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = [answer for answer, count in votes.items() if count == most]
    return sum(verdicts[answer] for answer in winners) / len(winners)


# -------------------------------------------------------------------------------------------- bootstrap


def paired_bootstrap(
    first: Sequence[float],
    second: Sequence[float],
    *,
    seed: int,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> Interval:
    """Mean of `first - second` over problems (index i is the same problem in both), percentile interval."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    ones = [1.0] * len(differences)
    return bootstrap_ratio(differences, ones, seed=seed, resamples=resamples, confidence=confidence)


def bootstrap_ratio(
    sums: Sequence[float],
    counts: Sequence[float],
    *,
    seed: int,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> Interval:
    """`sum(sums) / sum(counts)` with problems resampled: a token mean, entry i being problem i's totals."""
    columns = _columns(sums, counts)
    draws = _resampled_totals(columns, seed=seed, resamples=resamples)
    return _percentile(_ratio(columns.sum(axis=1)), _ratio(draws), confidence)


def bootstrap_ratio_difference(
    first_sums: Sequence[float],
    first_counts: Sequence[float],
    second_sums: Sequence[float],
    second_counts: Sequence[float],
    *,
    seed: int,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> Interval:
    """The difference first - second of two such ratios, each resample drawing the same problems for both."""
    columns = _columns(first_sums, first_counts, second_sums, second_counts)
    totals = columns.sum(axis=1)
    draws = _resampled_totals(columns, seed=seed, resamples=resamples)
    return _percentile(
        _ratio(totals[:2]) - _ratio(totals[2:]), _ratio(draws[:2]) - _ratio(draws[2:]), confidence
    )


def _columns(*values: Sequence[float]) -> Floats:
    lengths = {len(column) for column in values}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(f"every column needs the same problems, at least one; found {sorted(lengths)}")
    columns = np.array(values, dtype=np.float64)
    if not np.isfinite(columns).all():
        raise ValueError("a value is not finite")
    return columns


def _resampled_totals(columns_CP: Floats, *, seed: int, resamples: int) -> Floats:
    """Column totals [C, R] of R resamples of the P problems, with replacement."""
    generator = np.random.default_rng(seed)
    num_problems = columns_CP.shape[1]
    totals_CR = np.empty((len(columns_CP), resamples))
    step = max(1, MAX_DRAWS // num_problems)
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        drawn = generator.integers(num_problems, size=(stop - start, num_problems))
        for column, totals in zip(columns_CP, totals_CR, strict=True):
            totals[start:stop] = column[drawn].sum(axis=1)
    return totals_CR


def _ratio(totals: Floats) -> Floats:
    if not (totals[1] > 0).all():
        raise ValueError(
            "a resample holds no token at all: leave out problems without any, and use more problems"
        )
    return np.asarray(totals[0] / totals[1])


def _percentile(estimate: Floats, draws_R: Floats, confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws_R, [tail, 1 - tail])
    return Interval(estimate=float(estimate), low=float(low), high=float(high))


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2)


# ----------------------------------------------------------------------------------------- several seeds


def pooled(values_SP: Floats, *, confidence: float = 0.95) -> Interval:
    """The mean over S seeds and P problems, for other seeds and other problems: Student's t around it.

    Two crossed random effects (Searle, Casella and McCulloch, Variance Components, 1992, ch. 4): with mean squares of
    seeds, problems and residual, the variance of the mean is (MS_seeds + MS_problems - MS_residual) / (S P); degrees of
    freedom after Satterthwaite (1946). With one seed only problems vary. Of simulated 95 % intervals of three seeds
    94 to 96 % hold the truth (tests/method/test_statistics.py).
    """
    variance, freedom = _variance(values_SP)
    return _around(float(values_SP.mean()), variance, freedom=freedom, confidence=confidence)


def pooled_difference(first_SP: Floats, second_SP: Floats, *, confidence: float = 0.95) -> Interval:
    """The difference of two such means over the same problems, the seeds of the two being unrelated."""
    num_problems = first_SP.shape[1]
    by_problem = first_SP.mean(axis=0) - second_SP.mean(axis=0)
    parts = [(float(by_problem.var(ddof=1)) / num_problems, num_problems - 1)]
    parts += [
        (max(0.0, float(values.mean(axis=1).var(ddof=1)) / len(values)), len(values) - 1)
        for values in (first_SP, second_SP)
        if len(values) > 1
    ]
    variance = sum(part for part, _ in parts)
    freedom = _satterthwaite(variance, parts)
    return _around(float(by_problem.mean()), variance, freedom=freedom, confidence=confidence)


def _variance(values_SP: Floats) -> tuple[float, float]:
    """Of the mean, and its degrees of freedom."""
    num_seeds, num_problems = values_SP.shape
    if num_problems < 2:
        raise DataError(f"{num_problems} problem in common: an interval needs two or more")
    if num_seeds == 1:
        return float(values_SP[0].var(ddof=1)) / num_problems, num_problems - 1
    mean = values_SP.mean()
    seeds, problems = values_SP.mean(axis=1), values_SP.mean(axis=0)
    residual = values_SP - seeds[:, None] - problems[None, :] + mean
    freedoms = (num_seeds - 1, num_problems - 1, (num_seeds - 1) * (num_problems - 1))
    squares = (
        num_problems * float(((seeds - mean) ** 2).sum()) / freedoms[0],
        num_seeds * float(((problems - mean) ** 2).sum()) / freedoms[1],
        float((residual**2).sum()) / freedoms[2],
    )
    count = num_seeds * num_problems
    # An effect's own variance is not below 0, although its estimate may be.
    total = max(squares[0] + squares[1] - squares[2], squares[0], squares[1]) / count
    parts = [(square / count, freedom) for square, freedom in zip(squares, freedoms, strict=True)]
    return total, _satterthwaite(total, parts)


def _satterthwaite(total: float, parts: Sequence[tuple[float, float]]) -> float:
    spread = sum(part**2 / freedom for part, freedom in parts)
    return total**2 / spread if spread > 0 else math.inf


def _around(estimate: float, variance: float, *, freedom: float, confidence: float) -> Interval:
    if variance == 0:
        return Interval(estimate, estimate, estimate)
    from scipy.special import stdtrit  # its import costs more than the rest of this module

    reach = float(stdtrit(freedom, 0.5 + confidence / 2)) * math.sqrt(variance)
    return Interval(estimate, estimate - reach, estimate + reach)
