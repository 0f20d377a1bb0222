"""Runs compared: their headline, paired differences to the first, several seeds as one, and cost.

The unit is the problem, and where a recipe was run with several seeds also the seed. Both are random: another seed
would train another student, other problems would be other questions. `pooled` takes both into account.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass

import numpy as np
from pydantic import JsonValue

from kdpipe.data.payload import SUMMARY_FILE
from kdpipe.errors import ArtifactError, DataError
from kdpipe.method import statistics
from kdpipe.method.interval import Interval
from kdpipe.pipeline.headline import ACCURACY, REVERSE_KL, Headline, headline_of
from kdpipe.pipeline.runs import RunFolder
from kdpipe.pipeline.status import leaves
from kdpipe.recipe.roles import STUDENT
from kdpipe.recipe.schema import resolved
from kdpipe.results.measures import cost_of, reverse_kl_totals, right_fractions
from kdpipe.store.artifacts import MANIFEST, Entry, linked_entry
from kdpipe.store.stage import Stage
from kdpipe.store.step import link_name_of

HEADLINE = "task.headline"
MEASURED_BY = {
    ACCURACY.name: ("evaluate.temperature", "evaluate.samples"),
    REVERSE_KL.name: (
        "teachers",
        *(f"rollout.{name}" for name in ("temperature", "top_p", "top_k", "max_new_tokens")),
    ),
}
"""Fields that a headline depends on, and not the student alone."""
MAX_FIELDS = 4  # of a label
SEEDLESS = ("name", "seed", "tracking", "runtime")


@dataclass(frozen=True, slots=True)
class Contender:
    """The last evaluated student of one run, and what the run cost.

    `values` has what each problem adds to the mean that is the headline: its fraction of right samples, or its share of
    the held-out reverse KL, whose sum and tokens `totals` then has. `settings` are the recipe's fields, flat, without
    its name, seed, tracking and runtime; a student's dtype of auto stands there with what it was, as machines differ in
    it. `seconds` and `tokens` are by stage; a reused step costs what it took where it was made.
    """

    run: str
    seed: int
    round: int
    samples: int
    values: Mapping[str, float]
    settings: Mapping[str, str]
    seconds: Mapping[str, float]
    tokens: Mapping[str, float]
    totals: Mapping[str, tuple[float, float]] | None = None

    @property
    def headline(self) -> Headline:
        return ACCURACY if self.totals is None else REVERSE_KL


@dataclass(frozen=True, slots=True)
class ComparisonRow:
    """One recipe of a comparison: its runs, their mean headline, its difference to the first row.

    `p_value` is McNemar's exact one, for one run on each side with one graded sample per problem.
    `is_paired` is false where the problems are not the same: `difference` is then that of two independent groups.
    """

    label: str
    contenders: tuple[Contender, ...]
    level: Interval
    difference: Interval | None
    p_value: float | None
    is_paired: bool

    @property
    def headline(self) -> Headline:
        return self.contenders[0].headline

    @property
    def seconds(self) -> float:
        """Seconds of a run, the mean over its seeds."""
        return sum(sum(one.seconds.values()) for one in self.contenders) / len(self.contenders)

    @property
    def tokens(self) -> float:
        """Tokens of a run that engines and trainer read and wrote, the mean over its seeds."""
        return sum(sum(one.tokens.values()) for one in self.contenders) / len(self.contenders)


def compare(contenders: Sequence[Contender]) -> list[ComparisonRow]:
    """A row for each recipe, in the order given; runs that differ only in their seed are one row.

    Raises DataError where answers are not graded by the same rule: such headlines are not of one kind.
    """
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
    groups: dict[tuple[tuple[str, str], ...], list[Contender]] = {}
    for one in contenders:
        groups.setdefault(tuple(sorted(one.settings.items())), []).append(one)
    labels = _labels([dict(key) for key in groups])
    first, *_ = groups.values()
    rows = []
    for label, group in zip(labels, groups.values(), strict=True):
        difference, is_paired = (None, True) if group is first else _difference(group, first)
        p_value = None if difference is None or not is_paired else _mcnemar(group, first)
        rows.append(ComparisonRow(label, tuple(group), _level(group), difference, p_value, is_paired))
    return rows


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
    return [
        (", ".join(f"{key}={one.get(key, 'none')}" for key in told) or "the recipe") + tail
        for one in settings
    ]


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
    """Wilson's interval or the bootstrap's for one run; that of `pooled` for several seeds."""
    matrix, measure = _matrix(group), group[0].headline
    if len(group) == 1 or matrix is None:
        if measure is REVERSE_KL:
            return statistics.bootstrap_ratio(
                _totals([pair for one in group for pair in (one.totals or {}).values()])
            )
        return statistics.wilson([value for one in group for value in one.values.values()])
    found = statistics.pooled(matrix)
    if measure is REVERSE_KL:
        return found
    return Interval(found.estimate, max(0.0, found.low), min(1.0, found.high))


def _totals(pairs: Sequence[tuple[float, float]]) -> statistics.Totals:
    sums, counts = zip(*pairs, strict=True)
    return sums, counts


def _difference(group: Sequence[Contender], first: Sequence[Contender]) -> tuple[Interval, bool]:
    mine, theirs = _matrix(group), _matrix(first)
    if mine is None or theirs is None or group[0].values.keys() != first[0].values.keys():
        return statistics.unpaired_difference(_level(group), _level(first)), False
    seeds = [one.seed for one in group], [one.seed for one in first]
    if len(group) == len(first) == 1:
        if group[0].headline is REVERSE_KL:
            pairs = ([(one.totals or {})[key] for key in first[0].values] for one in (group[0], first[0]))
            return statistics.bootstrap_ratio(*map(_totals, pairs)), True
        return statistics.paired_bootstrap(list(mine[0]), list(theirs[0])), True
    if sorted(seeds[0]) == sorted(seeds[1]):
        order = [np.argsort(numbers, kind="stable") for numbers in seeds]
        return statistics.pooled(mine[order[0]] - theirs[order[1]]), True
    # Other seeds on each side: their variances add, and the problems stay paired.
    return statistics.pooled_difference(mine, theirs), True


def _matrix(group: Sequence[Contender]) -> statistics.Floats | None:
    """The values [seeds, problems] in one order of problems; None where the runs have not the same ones."""
    keys = sorted(group[0].values)
    if any(one.values.keys() != group[0].values.keys() for one in group):
        return None
    return np.array([[one.values[key] for key in keys] for one in group], dtype=np.float64)


def _mcnemar(group: Sequence[Contender], first: Sequence[Contender]) -> float | None:
    if len(group) != 1 or len(first) != 1 or {group[0].samples, first[0].samples} != {1}:
        return None
    if group[0].headline is REVERSE_KL:
        return None
    mine, theirs = group[0].values, first[0].values
    gained = sum(mine[key] > theirs[key] for key in mine)
    return statistics.mcnemar(gained, sum(mine[key] < theirs[key] for key in mine))


def read_contender(run: RunFolder, *, last_round: int | None = None) -> Contender:
    """The run's last evaluated student, from its folder alone.

    Every table is checked by its digest before it is read. With `last_round` as if the run had ended there: 0 is the
    student before training, and what it cost to get there. Raises DataError where no student was evaluated, and
    ArtifactError where a table is damaged.
    """
    try:
        recipe = run.recipe()
    except (OSError, ValueError, KeyError, TypeError):
        raise ArtifactError(
            f"{run.path}: its resolved.json is missing or damaged", hint="repeat the run: it is written again"
        ) from None
    done = [link for link in run.links() if (link.target / MANIFEST).exists()]
    links = [link for link in done if last_round is None or link.round <= last_round]
    evaluated = [link for link in links if link.name == link_name_of(Stage.EVALUATE, STUDENT)]
    seconds, tokens, dtypes = dict[str, float](), dict[str, float](), set[str]()
    evaluation: tuple[int, Entry] | None = None
    for link in links:
        entry, document = linked_entry(link.target)
        stage, manifest = str(document["stage"]), entry.manifest()
        if manifest is not None and (stage == Stage.TRAIN or link in evaluated):
            dtypes.add(str(manifest.provenance.get("dtype")))
        took, read = cost_of(entry.metrics())
        seconds[stage] = seconds.get(stage, 0.0) + took
        tokens[stage] = tokens.get(stage, 0.0) + read
        if link in evaluated:
            evaluation = (link.round, entry)
    if evaluation is None:
        raise DataError(f"{run.name}: no student was evaluated yet", hint=f"kdpipe run {run.name}")
    number, entry = evaluation
    kept = {key: value for key, value in resolved(recipe).items() if key not in SEEDLESS}
    settings = {name: "null" if leaf is None else str(leaf) for name, leaf in leaves(kept)}
    if recipe.student.dtype == "auto":
        settings["student.dtype"] = f"auto ({', '.join(sorted(dtypes))})"
    if headline_of(entry.read_json(SUMMARY_FILE)) is ACCURACY:
        values, samples = right_fractions(entry)
        return Contender(run.name, recipe.seed, number, samples, values, settings, seconds, tokens)
    totals = reverse_kl_totals(entry, several=len(recipe.teachers) > 1)
    shares = statistics.ratio_shares(_totals(list(totals.values())))
    values = dict(zip(totals, shares, strict=True))
    return Contender(run.name, recipe.seed, number, 1, values, settings, seconds, tokens, totals)


def comparison_json(rows: Sequence[ComparisonRow]) -> list[dict[str, JsonValue]]:
    """Every row with its runs; intervals as {estimate, low, high}."""
    return [
        {
            "label": row.label,
            "headline": row.headline.metric,
            row.headline.metric: asdict(row.level),
            "difference": None if row.difference is None else asdict(row.difference),
            "p_value": row.p_value,
            "paired": row.is_paired,
            "seconds": row.seconds,
            "tokens": row.tokens,
            "runs": [
                {
                    "run": one.run,
                    "seed": one.seed,
                    "round": one.round,
                    "problems": len(one.values),
                    row.headline.metric: sum(one.values.values()) / len(one.values),
                    "seconds": dict(one.seconds),
                    "tokens": dict(one.tokens),
                }
                for one in row.contenders
            ],
        }
        for row in rows
    ]


def header_of(measure: Headline) -> tuple[str, ...]:
    """The words above the cells of a row, in the terminal and on the page."""
    against = f"against the first, {measure.change_unit}"
    p = ("p",) if measure is ACCURACY else ()
    return ("", "seeds", "round", measure.title, "95 % interval", against, *p, "tokens", "seconds")


def cells_of(row: ComparisonRow) -> tuple[str, ...]:
    """What stands under each word of `header_of`."""
    measure, change = row.headline, row.difference
    rounds = sorted({one.round for one in row.contenders})
    p = ("" if row.p_value is None else f"{row.p_value:.2g}",) if measure is ACCURACY else ()
    estimate, low, high = map(measure.show, astuple(row.level))
    moved = ""
    if change is not None:
        moved = "{} ({} to {})".format(*map(measure.show_change, astuple(change)))
    return (
        row.label,
        str(len(row.contenders)),
        "-".join(str(number) for number in dict.fromkeys((rounds[0], rounds[-1]))),
        estimate,
        f"{low} to {high}",
        moved + ("" if row.is_paired else " *"),
        *p,
        f"{row.tokens:,.0f}",
        f"{row.seconds:,.0f}",
    )


def notes_on(rows: Sequence[ComparisonRow]) -> list[str]:
    """A sentence for whatever the cells cannot say."""
    notes = []
    if any(not row.is_paired for row in rows):
        notes.append("* other problems than the first row's: two independent groups, not pairs")
    contenders = [one for row in rows for one in row.contenders]
    for field in MEASURED_BY[rows[0].headline.name]:
        found = {
            tuple(found for found in one.settings.items() if found[0].startswith(field)) for one in contenders
        }
        if len(found) > 1:
            notes.append(f"{field} is not the same in all rows: part of a difference may be that")
    if any(len(row.contenders) > 1 for row in rows):
        notes.append("several seeds: mean, with the interval for other seeds and other problems")
    return notes
