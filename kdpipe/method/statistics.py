"""Intervals and paired tests for evaluations. The unit is the problem, never the sample or the token.

Left out: the normal approximation, which is wrong near 0 and 1 and for few problems, where evaluations live. And
scipy.stats, whose values for whole counts are these (tests/method/test_statistics.py): its import takes 0.7 s of CPU
time, which the end of every run would pay, and its Wilson interval takes no fractional successes.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist, multimode
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kdpipe.errors import DataError
from kdpipe.method.interval import Interval

Floats = npt.NDArray[np.float64]
Totals: TypeAlias = "tuple[Sequence[float], Sequence[float]]"
"""A sum and the number of its tokens, for each problem."""
CONFIDENCE = 0.95
RESAMPLES = 10_000
BOOTSTRAP_SEED = 0
"""The same draws for every interval, so that the same tables have the same interval."""
MAX_DRAWS = 1 << 21  # of a resampling chunk, so that memory stays near 64 MB


def wilson(fractions: Sequence[float]) -> Interval:
    """The mean of the fraction of right samples of each problem, with Wilson's score interval.

    Samples of one problem are not independent. Counting problems is Wilson's own interval for one sample each
    and conservative for several: the variance of a mean of n fractions is at most p (1 - p) / n.
    """
    successes, trials = math.fsum(fractions), len(fractions)
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials")
    z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    p = successes / trials
    centre = p + z * z / (2 * trials)
    spread = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    # At 0 and at all successes the bound is 0 or 1 in exact arithmetic.
    low = 0.0 if successes == 0 else (centre - spread) / scale
    high = 1.0 if successes == trials else (centre + spread) / scale
    return Interval(estimate=p, low=low, high=high)


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p-value of McNemar's test; each count is of problems that only one got right."""
    n, fewer = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(n, chosen) for chosen in range(fewer + 1)) / (1 << n))


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
    winners = multimode(answer for answer in answers[:k] if answer is not None)
    return sum(verdicts[answer] for answer in winners) / len(winners) if winners else 0.0


def paired_bootstrap(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Mean of `first - second` over problems (index i is the same problem in both), percentile interval."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    return bootstrap_ratio((differences, [1.0] * len(differences)))


def bootstrap_ratio(totals: Totals, before: Totals | None = None) -> Interval:
    """`sum(sums) / sum(counts)` with problems resampled: a token mean, entry i being problem i's totals.

    With `before` it is the difference of the two ratios, each resample drawing the same problems for both.
    """
    columns_CP = np.array([*totals, *(before or ())], dtype=np.float64)
    if columns_CP.shape[1] == 0 or not np.isfinite(columns_CP).all():
        raise ValueError("a bootstrap needs at least one problem, and only finite values")
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    num_problems = columns_CP.shape[1]
    drawn_CR = np.empty((len(columns_CP), RESAMPLES))
    step = max(1, MAX_DRAWS // num_problems)
    for start in range(0, RESAMPLES, step):
        stop = min(start + step, RESAMPLES)
        drawn = generator.integers(num_problems, size=(stop - start, num_problems))
        for column, sums in zip(columns_CP, drawn_CR, strict=True):
            sums[start:stop] = column[drawn].sum(axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(_ratio(drawn_CR), [tail, 1 - tail])
    return Interval(float(_ratio(columns_CP.sum(axis=1))), float(low), float(high))


def _ratio(totals: Floats) -> Floats:
    """The ratio of the first two rows, less that of the next two where there are any."""
    if not (totals[1::2] > 0).all():
        raise ValueError(
            "a resample holds no token at all: leave out problems without any, and use more problems"
        )
    ratios = totals[::2] / totals[1::2]
    return np.asarray(ratios[0] - ratios[1] if len(ratios) > 1 else ratios[0])


def ratio_shares(totals: Totals) -> list[float]:
    """What each problem adds to `sum(sums) / sum(counts)`: their mean is that ratio.

    Their spread is that of the ratio over problems: the linear term of its error (Cochran, Sampling Techniques, 1977,
    6.5).
    """
    sums_P, counts_P = np.array(totals, dtype=np.float64)
    ratio = sums_P.sum() / counts_P.sum()
    shares: list[float] = (ratio + (sums_P - ratio * counts_P) / counts_P.mean()).tolist()
    return shares


def pooled(values_SP: Floats) -> Interval:
    """The mean over S seeds and P problems, for other seeds and other problems: Student's t around it.

    Two crossed random effects (Searle, Casella and McCulloch, Variance Components, 1992, ch. 4): with mean squares of
    seeds, problems and residual, the variance of the mean is (MS_seeds + MS_problems - MS_residual) / (S P); degrees of
    freedom after Satterthwaite (1946). With one seed only problems vary. Of simulated 95 % intervals of three seeds
    94 to 96 % hold the truth (tests/method/test_statistics.py).
    """
    variance, freedom = _variance(values_SP)
    return _around(float(values_SP.mean()), variance, freedom=freedom)


def pooled_difference(first_SP: Floats, second_SP: Floats) -> Interval:
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
    return _around(float(by_problem.mean()), variance, freedom=freedom)


def _variance(values_SP: Floats) -> tuple[float, float]:
    """Of the mean, and its degrees of freedom."""
    num_seeds, num_problems = values_SP.shape
    if num_problems < 2:
        raise DataError(f"{num_problems} problem in common: an interval needs two or more")
    if num_seeds == 1:
        return float(values_SP[0].var(ddof=1)) / num_problems, num_problems - 1
    seeds, problems = values_SP.mean(axis=1), values_SP.mean(axis=0)
    residual = values_SP - seeds[:, None] - problems[None, :] + values_SP.mean()
    freedoms = (num_seeds - 1, num_problems - 1, (num_seeds - 1) * (num_problems - 1))
    found = (
        num_problems * seeds.var(ddof=1),
        num_seeds * problems.var(ddof=1),
        (residual**2).sum() / freedoms[2],
    )
    squares = [float(square) for square in found]
    count = num_seeds * num_problems
    # An effect's own variance is not below 0, although its estimate may be.
    total = max(squares[0] + squares[1] - squares[2], squares[0], squares[1]) / count
    parts = [(square / count, freedom) for square, freedom in zip(squares, freedoms, strict=True)]
    return total, _satterthwaite(total, parts)


def _satterthwaite(total: float, parts: Sequence[tuple[float, float]]) -> float:
    spread = sum(part**2 / freedom for part, freedom in parts)
    return total**2 / spread if spread > 0 else math.inf


def _around(estimate: float, variance: float, *, freedom: float) -> Interval:
    if variance == 0:
        return Interval(estimate, estimate, estimate)
    from scipy.special import stdtrit  # its import costs more than the rest of this module

    reach = float(stdtrit(freedom, 0.5 + CONFIDENCE / 2)) * math.sqrt(variance)
    return Interval(estimate, estimate - reach, estimate + reach)
