"""How often each interval of kdpipe.method.statistics holds the truth, and how often a verdict calls chance an effect.

    python benchmarks/coverage.py > benchmarks/results/coverage.jsonl
    python benchmarks/coverage.py --markdown benchmarks/results/coverage.jsonl

One sample a problem is enumerated: every number of problems that only one of two models gets right, times its
probability. The rest is simulated, with a fixed seed. One JSON line for each setting; all of it in about a minute.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binom
from study import ROOT, Rows, commit, parsed, parser_of

sys.path.insert(0, str(ROOT))

from kdpipe.method import statistics
from kdpipe.method.interval import Interval
from kdpipe.pipeline.headline import ACCURACY

Floats = npt.NDArray[np.float64]
TRIALS = 2000
DISCORDANT = (0.005, 0.01, 0.02, 0.05, 0.1)
SHAPES = {"balanced": 0.5, "three to one": 0.75, "one-sided": 1.0}
"""Of the problems that only one model gets right, the share that the second does."""
TASKS = {"mixed": (0.3, 1.0), "hard": (0.02, 5.0), "hard for most": (0.1, 0.3), "all or nothing": (0.5, 0.05)}
"""Mean and concentration of the beta distribution that problems' chances of a right sample are of."""
EFFECTS = {"none": (0.0, 0.0), "small": (1.0, 0.5), "large": (3.0, 0.0)}
"""Mean and spread over problems of the change of such a chance's logit."""
TAILS = {"moderate": (1.0, 0.7), "heavy": (1.5, 1.0)}
"""Of a problem's nats a token and of its number of tokens, the spread of the logarithm."""


def main() -> int:
    parsed(parser_of(__doc__), markdown)
    run_on = commit()
    for rows in (null_errors(), one_sample(), several_samples(), reverse_kl(), seeds()):
        for row in rows:
            print(json.dumps({"benchmark": "coverage", "commit": run_on, **row}), flush=True)
    return 0


# ----------------------------------------------------------------------------------- one sample, enumerated


def null_errors() -> Iterator[dict[str, Any]]:
    """At each number of problems, how often no difference is called one at the worst share of discordant problems."""
    shares = np.concatenate([np.linspace(0.001, 0.1, 100), np.linspace(0.1, 1, 181)])[:, None]
    for n in (*range(1, 201), 300, 500, 1000, 1319):
        most = np.arange(n + 1)
        called = np.array([_called(int(discordant), n) for discordant in most])
        errors = binom.pmf(most, n, shares) @ called
        yield {"of": "null", "problems": n, "error": float(errors.max())}


def _called(discordant: int, n: int) -> float:
    if n < ACCURACY.fewest:
        return 0.0
    gained = np.arange(discordant + 1)
    is_called = [statistics.score_p_value(int(k), discordant - int(k)) < 0.05 for k in gained]
    return float(binom.pmf(gained, discordant, 0.5)[is_called].sum())


def one_sample() -> Iterator[dict[str, Any]]:
    """Coverage of the paired interval where each problem is right or wrong."""
    interval = cache(statistics.score_difference)
    for n in (8, 32, 200, 1319):
        for discordant in DISCORDANT:
            for shape, share in SHAPES.items():
                truth, held, total = discordant * (2 * share - 1), 0.0, 0.0
                for gained, lost, chance in _outcomes(n, discordant, share):
                    found = interval(gained, lost, n)
                    held += chance * (found.low <= truth <= found.high)
                    total += chance
                yield {
                    "of": "one sample",
                    "problems": n,
                    "discordant": discordant,
                    "shape": shape,
                    "coverage": held / total,
                }


def _outcomes(n: int, discordant: float, share: float) -> Iterator[tuple[int, int, float]]:
    """Those that are not rarer than 1e-7, with their probability."""
    for count in range(n + 1):
        some = binom.pmf(count, n, discordant)
        if some < 1e-7:
            continue
        for gained, chance in enumerate(some * binom.pmf(np.arange(count + 1), count, share)):
            if chance >= 1e-7:
                yield gained, count - gained, float(chance)


# --------------------------------------------------------------------------------------------- simulated


def several_samples() -> Iterator[dict[str, Any]]:
    """Coverage of the paired interval where each problem has several samples."""
    generator = np.random.default_rng(0)
    for n in (8, 32, 200):
        for samples in (2, 4, 16):
            for task, shape in TASKS.items():
                for effect, change in EFFECTS.items():
                    truth = 0.0 if effect == "none" else _mean_change(generator, shape, change)
                    found = []
                    for _ in range(TRIALS // 2):
                        first, second = _chances(generator, n, shape, change)
                        drawn = [generator.binomial(samples, each) / samples for each in (second, first)]
                        found.append(statistics.paired_difference(*(each.tolist() for each in drawn)))
                    yield {
                        "of": "several samples",
                        "problems": n,
                        "samples": samples,
                        "task": task,
                        "effect": effect,
                        **_held(found, truth),
                    }


def _chances(
    generator: np.random.Generator,
    n: int,
    shape: tuple[float, float],
    change: tuple[float, float],
) -> tuple[Floats, Floats]:
    """Of a right sample, for each problem before and after."""
    (mean, concentration), (shift, spread) = shape, change
    before = np.clip(generator.beta(mean * concentration, (1 - mean) * concentration, n), 1e-12, 1 - 1e-12)
    if change == EFFECTS["none"]:
        return before, before
    logit = np.log(before / (1 - before)) + shift + spread * generator.normal(size=n)
    return before, 1 / (1 + np.exp(-logit))


def _mean_change(
    generator: np.random.Generator, shape: tuple[float, float], change: tuple[float, float]
) -> float:
    before, after = _chances(generator, 1_000_000, shape, change)
    return float((after - before).mean())


def reverse_kl() -> Iterator[dict[str, Any]]:
    """Coverage of a held-out reverse KL and of its paired change by a factor."""
    generator = np.random.default_rng(1)
    for tails, (of_rate, of_tokens) in TAILS.items():
        for factor in (1.0, 0.5, 0.1, 2.0):
            before, after = _totals(generator, 1_000_000, of_rate, of_tokens, factor)
            level = float(after[0].sum() / after[1].sum())
            change = 0.0 if factor == 1 else level - float(before[0].sum() / before[1].sum())
            for n in (8, 12, 32, 64, 200):
                levels, changes = [], []
                for _ in range(TRIALS):
                    old, new = _totals(generator, n, of_rate, of_tokens, factor)
                    totals = [(sums.tolist(), counts.tolist()) for sums, counts in (new, old)]
                    levels.append(statistics.token_mean(totals[0]))
                    changes.append(statistics.token_mean(*totals))
                yield {
                    "of": "reverse KL",
                    "problems": n,
                    "tails": tails,
                    "factor": factor,
                    "level": _held(levels, level),
                    "change": _held(changes, change),
                }


def _totals(
    generator: np.random.Generator, n: int, of_rate: float, of_tokens: float, factor: float
) -> tuple[tuple[Floats, Floats], tuple[Floats, Floats]]:
    """Nats and tokens of n problems before and after: other answers to the same questions."""
    hard = generator.normal(0, of_rate, n)

    def side(scale: float) -> tuple[Floats, Floats]:
        lengths = np.exp(5 + of_tokens * generator.normal(size=n))
        tokens = np.ceil(np.minimum(lengths, 1024))
        return scale * tokens * np.exp(hard + generator.normal(0, 0.5, n)), tokens

    return side(0.1), side(0.1 * factor)


def seeds() -> Iterator[dict[str, Any]]:
    """Coverage of means over seeds and problems, and of differences between two groups of seeds."""
    generator = np.random.default_rng(2)
    for spread in (0.0, 0.02, 0.05, 0.1):
        for first, second in ((2, 0), (3, 0), (5, 0), (2, 2), (3, 3), (3, 2), (3, 1), (5, 1), (2, 1)):
            found = []
            for _ in range(TRIALS):
                problems = generator.normal(0, 0.3, (1, 200))
                sides = [
                    problems
                    + generator.normal(0, spread, (count, 1))
                    + generator.normal(0, 0.3, (count, 200))
                    for count in (first, second)
                ]
                found.append(statistics.pooled_difference(*sides) if second else statistics.pooled(sides[0]))
            yield {"of": "seeds", "seeds": [first, second], "spread": spread, **_held(found, 0.0)}


def _held(found: list[Interval], truth: float) -> dict[str, Any]:
    held = sum(one.low <= truth <= one.high for one in found)
    width = float(np.median([one.high - one.low for one in found]))
    return {"truth": truth, "coverage": held / len(found), "width": width}


# ------------------------------------------------------------------------------------------------ tables


def markdown(rows: Rows) -> str:
    of: dict[str, Rows] = {}
    for row in rows:
        of.setdefault(row["of"], []).append(row)
    tables = (
        _null_table(of["null"]),
        _one_sample_table(of["one sample"]),
        _several_table(of["several samples"]),
        _reverse_kl_table(of["reverse KL"]),
        _seeds_table(of["seeds"]),
    )
    return "\n\n".join("\n".join(f"| {' | '.join(cells)} |" for cells in table) for table in tables)


def _table(heading: list[str], body: list[list[str]]) -> list[list[str]]:
    return [heading, ["---"] * len(heading), *body]


def _range(values: list[float]) -> str:
    low, high = (f"{100 * value:.1f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _null_table(rows: Rows) -> list[list[str]]:
    spans = ((1, 5), (6, 12), (13, 32), (33, 100), (101, 200), (300, 1319))
    body = []
    for low, high in spans:
        worst = max((row for row in rows if low <= row["problems"] <= high), key=lambda row: row["error"])
        at = f"{worst['problems']}" if worst["error"] else "-"
        body.append([f"{low} to {high}", f"{100 * worst['error']:.2f} %", at])
    return _table(["problems", "chance called an effect, at most", "at so many"], body)


def _one_sample_table(rows: Rows) -> list[list[str]]:
    counts = list(dict.fromkeys(row["problems"] for row in rows))
    body = []
    for discordant in DISCORDANT:
        for shape in SHAPES:
            found = {
                row["problems"]: row
                for row in rows
                if (row["discordant"], row["shape"]) == (discordant, shape)
            }
            body.append(
                [f"{100 * discordant:g} %, {shape}", *(f"{100 * found[n]['coverage']:.1f}" for n in counts)]
            )
    return _table(["discordant", *(f"{n:,} problems" for n in counts)], body)


def _several_table(rows: Rows) -> list[list[str]]:
    body = []
    for n in dict.fromkeys(row["problems"] for row in rows):
        for samples in dict.fromkeys(row["samples"] for row in rows):
            here = [row for row in rows if (row["problems"], row["samples"]) == (n, samples)]
            null = [1 - row["coverage"] for row in here if row["effect"] == "none"]
            held = [row["coverage"] for row in here if row["effect"] != "none"]
            body.append([f"{n}", f"{samples}", _range(held), _range(null)])
    return _table(["problems", "samples", "coverage, %", "chance called an effect, %"], body)


def _reverse_kl_table(rows: Rows) -> list[list[str]]:
    body = []
    for tails in TAILS:
        for n in dict.fromkeys(row["problems"] for row in rows):
            here = [row for row in rows if (row["problems"], row["tails"]) == (n, tails)]
            null = [1 - row["change"]["coverage"] for row in here if row["factor"] == 1]
            body.append(
                [
                    tails,
                    f"{n}",
                    _range([row["level"]["coverage"] for row in here]),
                    _range([row["change"]["coverage"] for row in here if row["factor"] != 1]),
                    _range(null),
                ]
            )
    return _table(["tails", "problems", "level, %", "change, %", "chance called an effect, %"], body)


def _seeds_table(rows: Rows) -> list[list[str]]:
    spreads = list(dict.fromkeys(row["spread"] for row in rows))
    body = []
    for first, second in dict.fromkeys(tuple(row["seeds"]) for row in rows):
        found = {row["spread"]: row for row in rows if row["seeds"] == [first, second]}
        name = f"{first} against {second}" if second else f"{first}"
        body.append([name, *(f"{100 * found[spread]['coverage']:.1f}" for spread in spreads)])
    return _table(["seeds", *(f"{100 * spread:g} points" for spread in spreads)], body)


if __name__ == "__main__":
    sys.exit(main())
