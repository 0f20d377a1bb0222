"""Intervals and paired tests for evaluations. The unit is the problem, never the sample or the token.

How often each interval holds the truth, and how often each calls chance an effect, was enumerated or simulated:
`kdpipe docs statistics`.

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
NORMAL_REACH = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
FEWEST_OF_A_LOGARITHM = 4  # problems: of fewer, t reaches over many powers of ten
CORRECTION = 1  # of the paired score interval, in problems: Edwards'


def wilson(fractions: Sequence[float]) -> Interval:
    """The mean of the fraction of right samples of each problem, with Wilson's score interval.

    Samples of one problem are not independent. Counting problems is Wilson's own interval for one sample each
    and conservative for several: the variance of a mean of n fractions is at most p (1 - p) / n.
    """
    successes, trials = math.fsum(fractions), len(fractions)
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials")
    z = NORMAL_REACH
    p = successes / trials
    centre = p + z * z / (2 * trials)
    spread = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    # At 0 and at all successes the bound is 0 or 1 in exact arithmetic.
    low = 0.0 if successes == 0 else (centre - spread) / scale
    high = 1.0 if successes == trials else (centre + spread) / scale
    return Interval(estimate=p, low=low, high=high)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Interval:
    """The mean of `first - second`, fractions of right samples; index i is the same problem in both.

    `score_difference` where each is 0 or 1, as with one sample a problem; else Student's t over problems, two more
    being added: one that is wholly gained and one that is wholly lost, as Bonett and Price (2012) do for one sample.
    Without them it is too short where few problems change, and of no width where none does.
    """
    if (changed := flips(first, second)) is not None:
        return score_difference(*changed, len(first))
    differences = np.subtract(first, second)
    found = pooled(np.array([[*differences, 1.0, -1.0]]))
    return Interval(float(differences.mean()), max(-1.0, found.low), min(1.0, found.high))


def flips(first: Sequence[float], second: Sequence[float]) -> tuple[int, int] | None:
    """How many problems only the first and only the second has right; None where one is in between."""
    pairs = list(zip(first, second, strict=True))
    if not pairs:
        raise ValueError("no problem in common")
    if not {*first, *second} <= {0.0, 1.0}:
        return None
    return sum(x > y for x, y in pairs), sum(x < y for x, y in pairs)


def score_difference(gained: int, lost: int, problems: int) -> Interval:
    """Of two paired proportions, Tango's (1998) score interval with Edwards' (1948) continuity correction.

    It holds every difference that the test of `score_p_value`, asked for that difference, does not reject: 0 is outside
    if and only if that p-value is below 0.05. The correction keeps the error under the null at or below 5 % at every
    number of problems (`kdpipe docs statistics`); without it, it is 8 % at 16.
    """
    if problems < 1 or min(gained, lost) < 0 or gained + lost > problems:
        raise ValueError(f"{gained} gained and {lost} lost of {problems} problems")
    low, high = -_highest(lost, gained, problems), _highest(gained, lost, problems)
    return Interval((gained - lost) / problems, low, high)


def score_p_value(gained: int, lost: int) -> float:
    """The two-sided p-value of no difference: McNemar's test with Edwards' continuity correction."""
    score = max(0, abs(gained - lost) - CORRECTION) / math.sqrt(max(1, gained + lost))
    return math.erfc(score / math.sqrt(2))


def _highest(gained: int, lost: int, problems: int) -> float:
    """The highest difference that is not rejected, by bisection."""
    held, rejected = (gained - lost) / problems, 1.0
    if _is_held(gained, lost, problems, rejected):
        return rejected
    while held != (middle := (held + rejected) / 2) != rejected:
        if _is_held(gained, lost, problems, middle):
            held = middle
        else:
            rejected = middle
    return held


def _is_held(gained: int, lost: int, problems: int, difference: float) -> bool:
    """Whether the score test does not reject this difference, the share lost being at its likeliest then."""
    linear = (2 * problems - gained + lost) * difference - gained - lost
    constant = -lost * difference * (1 - difference)
    share = (math.sqrt(max(0.0, linear**2 - 8 * problems * constant)) - linear) / (4 * problems)
    variance = problems * max(0.0, 2 * share + difference * (1 - difference))
    distance = abs(gained - lost - problems * difference) - CORRECTION
    return distance <= NORMAL_REACH * math.sqrt(variance)


def unpaired_difference(first: Interval, second: Interval) -> Interval:
    """The difference of two independent proportions, by Newcombe's interval (1998, method 10)."""
    low = math.hypot(first.estimate - first.low, second.high - second.estimate)
    high = math.hypot(first.high - first.estimate, second.estimate - second.low)
    difference = first.estimate - second.estimate
    return Interval(difference, difference - low, difference + high)


def share_of(parts: Sequence[float], wholes: Sequence[float]) -> Interval | None:
    """`sum(parts) / sum(wholes)`, entry i being problem i's, by Fieller's (1954) interval.

    It holds every share s for which the mean of `parts - s wholes` may be 0. None where the mean of the wholes may be
    0, as then any share may be. Of simulated 95 % intervals of 30 to 1,319 problems 92 to 96 % hold the truth; fewer
    where the wholes are only just clear, and so are large by chance (tests/method/test_share.py).
    """
    values_2P = np.array([parts, wholes], dtype=np.float64)
    squared = NORMAL_REACH**2 / values_2P.shape[1]
    mean_part, mean_whole = (float(mean) for mean in values_2P.mean(axis=1))
    (var_part, covariance), (_, var_whole) = (squared * np.cov(values_2P)).tolist()
    if mean_whole <= 0 or (curvature := mean_whole**2 - var_whole) <= 0:
        return None
    middle = (mean_part * mean_whole - covariance) / curvature
    reach = math.sqrt(max(0.0, middle**2 - (mean_part**2 - var_part) / curvature))
    return Interval(mean_part / mean_whole, middle - reach, middle + reach)


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


def token_mean(totals: Totals, before: Totals | None = None) -> Interval:
    """`sum(sums) / sum(counts)`, entry i being problem i's totals; with `before` less that of theirs.

    Student's t over what each problem adds to it, with the farthest problem's square counted three times: totals have
    heavy tails, and a sample without a far problem has too small a variance. Sums that are 0 or more but for rounding,
    as divergences are, are skewed too: there t is of the logarithm. Bootstraps (percentile, studentised) were shorter
    than they say, or called chance an effect (`kdpipe docs statistics`). The spread of a lone problem is its value.
    """
    shares, estimate = np.array(ratio_shares(totals)), sum(totals[0]) / sum(totals[1])
    if before is not None:
        shares -= ratio_shares(before)
        estimate -= sum(before[0]) / sum(before[1])
    count = len(shares)
    squares = (shares - (estimate if count > 1 else 0)) ** 2
    freedom = max(1, count - 1)
    found = _around(estimate, [(float(squares.sum() + 2 * squares.max()) / (count * freedom), freedom)])
    is_divergence = estimate > 0 and sum(map(abs, totals[0])) < 1.01 * sum(totals[0])
    if before is not None or not is_divergence:
        return found
    if count < FEWEST_OF_A_LOGARITHM:
        return Interval(estimate, max(0.0, found.low), found.high)
    factor = math.exp((found.high - estimate) / estimate)
    return Interval(estimate, estimate / factor, estimate * factor)


def ratio_shares(totals: Totals) -> list[float]:
    """What each problem adds to `sum(sums) / sum(counts)`: their mean is that ratio.

    Their spread is that of the ratio over problems: the linear term of its error (Cochran, Sampling Techniques, 1977,
    6.5).
    """
    sums_P, counts_P = columns = np.array(totals, dtype=np.float64)
    if not (np.isfinite(columns).all() and counts_P.sum() > 0):
        raise ValueError("a mean over tokens needs at least one token, and only finite values")
    ratio = sums_P.sum() / counts_P.sum()
    shares: list[float] = (ratio + (sums_P - ratio * counts_P) / counts_P.mean()).tolist()
    return shares


def pooled(values_SP: Floats) -> Interval:
    """The mean over S seeds and P problems, for other seeds and other problems: Student's t around it.

    Two crossed random effects, of the seed and of the problem: the variances of the means of both add, each with the t
    of its own degrees of freedom (after Graybill and Wang 1980). The residual is in both, so that the interval is never
    shorter than it says; with one freedom for the sum (Satterthwaite 1946) it is, at two and three seeds
    (`kdpipe docs statistics`). With one seed only problems vary.
    """
    return _over_seeds(values_SP.mean(axis=0), [values_SP])


def pooled_difference(first_SP: Floats, second_SP: Floats) -> Interval:
    """The difference of two such means over the same problems, the seeds of the two being unrelated.

    How far seeds spread is taken to be the same on both sides: one seed alone cannot say it.
    """
    return _over_seeds(first_SP.mean(axis=0) - second_SP.mean(axis=0), [first_SP, second_SP])


def _over_seeds(by_problem_P: Floats, sides: Sequence[Floats]) -> Interval:
    """The mean of what was made of these sides' means over seeds, for other seeds and other problems."""
    num_problems = len(by_problem_P)
    if num_problems < 2:
        raise DataError(f"{num_problems} problem in common: an interval needs two or more")
    parts = [(float(by_problem_P.var(ddof=1)) / num_problems, num_problems - 1)]
    if freedom := sum(len(values_SP) - 1 for values_SP in sides):
        squares = sum(len(values_SP) * float(values_SP.mean(axis=1).var()) for values_SP in sides)
        parts.append((squares / freedom * sum(1 / len(values_SP) for values_SP in sides), freedom))
    return _around(float(by_problem_P.mean()), parts)


def _around(estimate: float, parts: Sequence[tuple[float, float]]) -> Interval:
    """An estimate whose error is of these parts, each with its variance and degrees of freedom."""
    if not any(variance for variance, _ in parts):
        return Interval(estimate, estimate, estimate)
    from scipy.special import stdtrit  # its import costs more than the rest of this module

    reach = math.sqrt(
        sum(variance * stdtrit(freedom, 0.5 + CONFIDENCE / 2) ** 2 for variance, freedom in parts)
    )
    return Interval(estimate, estimate - reach, estimate + reach)
