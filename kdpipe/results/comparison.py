"""Runs compared: their headline, paired differences to the first, several seeds as one, and cost.

The unit is the problem, and where a recipe was run with several seeds also the seed. Both are random: another seed
would train another student, other problems would be other questions. `pooled` takes both into account.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from kdpipe.errors import DataError
from kdpipe.method import statistics
from kdpipe.method.interval import Interval
from kdpipe.pipeline.headline import REVERSE_KL, Headline
from kdpipe.results.contender import Contender

HEADLINE = "task.headline"
BEFORE = "student before"
MAX_FIELDS = 4  # of a label
Group = Sequence[Contender]


@dataclass(frozen=True, slots=True)
class Difference:
    """How much more one row has than another.

    `p_value` belongs to the interval, for one run on each side with every problem right or wrong as a whole.
    `is_paired` is false where the problems are not the same: the interval is then that of two independent groups.
    """

    interval: Interval
    p_value: float | None
    is_paired: bool


@dataclass(frozen=True, slots=True)
class ComparisonRow:
    """One recipe of a comparison by one measure: its runs, their mean, and what changed.

    `change` is since the student before training, `difference` that to the first recipe; None where either side is not
    measured, or is this one. `beside` is the same by held-out reverse KL where that is measured and not the headline.
    `fields` are those of the recipe that tell it from the others. Students before training have rows of their own,
    whose `is_before` is true. `pairs` are differences to other recipes than the first, by their labels.
    """

    label: str
    contenders: tuple[Contender, ...]
    level: Interval
    change: Difference | None
    difference: Difference | None
    fields: str = ""
    is_before: bool = False
    beside: ComparisonRow | None = None
    pairs: Mapping[str, Difference] = field(default_factory=dict)

    @property
    def headline(self) -> Headline:
        return self.contenders[0].headline

    @property
    def measured(self) -> tuple[ComparisonRow, ...]:
        """The row by its headline, and by what was measured beside it."""
        return (self,) if self.beside is None else (self, self.beside)

    @property
    def seconds(self) -> float:
        """Seconds of a run, the mean over its seeds."""
        return sum(sum(one.seconds.values()) for one in self.contenders) / len(self.contenders)

    @property
    def tokens(self) -> float:
        """Tokens of a run that engines and trainer read and wrote, the mean over its seeds."""
        return sum(sum(one.tokens.values()) for one in self.contenders) / len(self.contenders)


def own_name(group: Group, fields: str) -> str:
    """A lone run's name; of several seeds the fields that differ, or their recipe's name."""
    run = group[0].run
    return run if len(group) == 1 else fields or run.rpartition("-")[0]


def compare(contenders: Group, *, named: Callable[[Group, str], str] = own_name) -> list[ComparisonRow]:
    """Rows of the students before training, then one for each recipe in the order given.

    Runs that differ only in their seed are one row. `named` says what their group is called, given it and the fields in
    which it differs from others.

    Raises DataError where answers are not graded by the same rule: such headlines are not of one kind.
    """
    _require_one_measure(contenders)
    groups: dict[tuple[tuple[str, str], ...], list[Contender]] = {}
    for one in contenders:
        groups.setdefault(tuple(sorted(one.settings.items())), []).append(one)
    first, *_ = groups.values()
    rows = []
    for fields, group in zip(_labels([dict(key) for key in groups]), groups.values(), strict=True):
        row = _row(named(group, fields), group, None if group is first else first)
        rows.append(replace(row, fields=fields))
    return [*_rows_before(rows), *rows]


def _require_one_measure(contenders: Group) -> None:
    measures = {one.headline.name: one.run for one in contenders}
    if len(measures) > 1:
        told = ", ".join(f"{run} has {name}" for name, run in measures.items())
        raise DataError(
            f"runs with different headlines: {told}",
            hint="compare runs that have a grader, or runs that have none",
        )
    headlines = {_rule(one.settings): one.run for one in contenders}
    if len(headlines) > 1:
        told = ", ".join(f"{run} by {headline}" for headline, run in headlines.items())
        raise DataError(
            f"accuracies of different headlines: {told}",
            hint=f"run one of them again with --set {HEADLINE}=... of the other",
        )


def _row(label: str, group: Group, first: Group | None = None, *, is_before: bool = False) -> ComparisonRow:
    """The row of a group; `first` is what it is compared with."""
    before, beside = _all(one.before for one in group), _all(one.beside for one in group)
    beside_first = _all(one.beside for one in first or ())
    return ComparisonRow(
        label,
        tuple(group),
        _level(group),
        change=difference(group, before) if before else None,
        difference=difference(group, first) if first else None,
        is_before=is_before,
        beside=_row(label, beside, beside_first, is_before=is_before) if beside else None,
    )


def _all(found: Iterable[Contender | None]) -> Group:
    """What was found, or nothing where one is missing."""
    each = list(found)
    return [one for one in each if one is not None] if all(each) else []


def _rows_before(rows: Sequence[ComparisonRow]) -> list[ComparisonRow]:
    """One row where no two runs of a seed began with other students, else one for each recipe."""
    groups = {row.label: _all(one.before for one in row.contenders) for row in rows}
    by_seed: dict[int, Contender] = {}
    for one in (one for group in groups.values() for one in group):
        known = by_seed.setdefault(one.seed, one)
        if not _is_same(known, one):
            return [
                _row(f"{BEFORE}, {label}", group, is_before=True) for label, group in groups.items() if group
            ]
        by_seed[one.seed] = one if known.beside is None else known
    return [_row(BEFORE, list(by_seed.values()), is_before=True)] if by_seed else []


def _is_same(one: Contender, other: Contender) -> bool:
    """Whether two students before training were measured alike, as far as both were."""
    divergences = [each.beside.totals for each in (one, other) if each.beside is not None]
    return (one.values, one.totals) == (other.values, other.totals) and divergences[1:] in (
        [],
        divergences[:1],
    )


def _rule(settings: Mapping[str, str]) -> object:
    """What an accuracy is by: the grader, or of numbers the reader."""
    grader = settings.get("task.grader", settings.get("task.grader.python", "number"))
    return settings.get(HEADLINE) if grader == "number" else grader


def _labels(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """What tells the recipes apart: fields that differ, first those that tell most of them apart.

    No two labels are the same. A number stands for further fields that differ; those that only some recipes have, and
    that are not needed to tell them apart, follow from the others.
    """
    keys = sorted(set().union(*settings))
    differing = [key for key in keys if len({one.get(key) for one in settings}) > 1]
    told = _telling(settings, differing)
    others = [key for key in differing if key not in told and all(key in one for one in settings)]
    room = max(0, MAX_FIELDS - len(told))
    told += others[:room]
    tail = f" and {len(others) - room} more" if len(others) > room else ""
    return [", ".join(f"{key}={one.get(key, 'none')}" for key in told) + tail for one in settings]


def _telling(settings: Sequence[Mapping[str, str]], keys: Sequence[str]) -> list[str]:
    """A few of `keys` that tell all settings apart; those that all settings have come first."""
    told: list[str] = []

    def distinct(key: str) -> tuple[int, bool]:
        count = len({tuple(one.get(each) for each in (*told, key)) for one in settings})
        return count, all(key in one for one in settings)

    while len({tuple(one.get(key) for key in told) for one in settings}) < len(settings):
        told.append(max(keys, key=distinct))
    return told


def _level(group: Sequence[Contender]) -> Interval:
    """The interval of `wilson` or `token_mean` for one run; that of `pooled` for several seeds."""
    matrix, measure = _matrix(group), group[0].headline
    if len(group) == 1 or matrix is None:
        if measure is REVERSE_KL:
            return statistics.token_mean(
                _totals([pair for one in group for pair in (one.totals or {}).values()])
            )
        return statistics.wilson([value for one in group for value in one.values.values()])
    found = statistics.pooled(matrix)
    if measure is REVERSE_KL:
        return found
    if found.low == found.high:  # all runs are right, or wrong, everywhere
        return statistics.wilson(matrix.mean(axis=0).tolist())
    return Interval(found.estimate, max(0.0, found.low), min(1.0, found.high))


def _totals(pairs: Sequence[tuple[float, float]]) -> statistics.Totals:
    sums, counts = zip(*pairs, strict=True)
    return sums, counts


def difference(group: Group, other: Group) -> Difference:
    """How much more a group has than another, over the same problems where they have the same."""
    interval, is_paired = _difference(group, other)
    return Difference(interval, _p_value(group, other) if is_paired else None, is_paired)


def _difference(group: Sequence[Contender], first: Sequence[Contender]) -> tuple[Interval, bool]:
    mine, theirs = _matrix(group), _matrix(first)
    if mine is None or theirs is None or group[0].values.keys() != first[0].values.keys():
        return statistics.unpaired_difference(_level(group), _level(first)), False
    is_alone = len(group) == len(first) == 1
    if group[0].headline is REVERSE_KL:
        if not is_alone:
            return _pooled_difference(group, first, mine, theirs), True
        pairs = ([(one.totals or {})[key] for key in first[0].values] for one in (group[0], first[0]))
        return statistics.token_mean(*map(_totals, pairs)), True
    found = None if is_alone else _pooled_difference(group, first, mine, theirs)
    if found is None or found.low == found.high:  # or no run of either differs from another anywhere
        return statistics.paired_difference(mine.mean(axis=0).tolist(), theirs.mean(axis=0).tolist()), True
    return Interval(found.estimate, max(-1.0, found.low), min(1.0, found.high)), True


def _pooled_difference(
    group: Group, first: Group, mine: statistics.Floats, theirs: statistics.Floats
) -> Interval:
    """The same seeds are paired. Of others the variances add, and the problems stay paired."""
    seeds = [one.seed for one in group], [one.seed for one in first]
    if sorted(seeds[0]) != sorted(seeds[1]):
        return statistics.pooled_difference(mine, theirs)
    order = [np.argsort(numbers, kind="stable") for numbers in seeds]
    return statistics.pooled(mine[order[0]] - theirs[order[1]])


def _matrix(group: Sequence[Contender]) -> statistics.Floats | None:
    """The values [seeds, problems] in one order of problems; None where the runs have not the same ones."""
    keys = sorted(group[0].values)
    if any(one.values.keys() != group[0].values.keys() for one in group):
        return None
    return np.array([[one.values[key] for key in keys] for one in group], dtype=np.float64)


def _p_value(group: Sequence[Contender], first: Sequence[Contender]) -> float | None:
    if len(group) != 1 or len(first) != 1 or group[0].headline is REVERSE_KL:
        return None
    mine, theirs = group[0].values, first[0].values
    changed = statistics.flips(list(mine.values()), [theirs[key] for key in mine])
    return None if changed is None else statistics.score_p_value(*changed)
