"""Runs compared: accuracy, paired differences to the first, several seeds as one, and cost.

The unit is the problem, and where a recipe was run with several seeds also the seed. Both are random: another seed
would train another student, other problems would be other questions. `pooled` takes both into account.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from pydantic import JsonValue

from kdpipe.errors import ArtifactError, DataError
from kdpipe.method import statistics
from kdpipe.method.interval import Interval
from kdpipe.pipeline.runs import RunFolder
from kdpipe.pipeline.status import leaves
from kdpipe.recipe.roles import STUDENT
from kdpipe.recipe.schema import resolved
from kdpipe.results.measures import cost_of, right_fractions
from kdpipe.store.artifacts import MANIFEST, linked_entry
from kdpipe.store.stage import Stage
from kdpipe.store.step import link_name_of

HEADLINE = "task.headline"
HEADER = (
    "",
    "seeds",
    "round",
    "accuracy",
    "95 % interval",
    "against the first, points",
    "p",
    "tokens",
    "seconds",
)
"""What is shown of a row, in the terminal and on the page."""
MAX_FIELDS = 4  # of a label
SEEDLESS = ("name", "seed", "tracking", "runtime")


@dataclass(frozen=True, slots=True)
class Contender:
    """The last evaluated student of one run, and what the run cost.

    `correct` is the fraction of right samples of each problem, `settings` the recipe's fields, flat, without its name,
    seed, tracking and runtime; a student's dtype of auto stands there with what it was, as machines differ in it.
    `seconds` and `tokens` are by stage; a reused step costs what it took where it was made.
    """

    run: str
    seed: int
    round: int
    samples: int
    correct: Mapping[str, float]
    settings: Mapping[str, str]
    seconds: Mapping[str, float]
    tokens: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class ComparisonRow:
    """One recipe of a comparison: its runs, mean accuracy, and the difference to the first row.

    Both are shares of problems. `p_value` is McNemar's exact one, for one run on each side with one sample per problem.
    `is_paired` is false where the problems are not the same: `difference` is then that of two independent groups.
    """

    label: str
    contenders: tuple[Contender, ...]
    accuracy: Interval
    difference: Interval | None
    p_value: float | None
    is_paired: bool

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

    Raises DataError where answers are not graded by the same rule: such accuracies are not of one kind.
    """
    headlines = {one.settings.get(HEADLINE): one.run for one in contenders}
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
        rows.append(ComparisonRow(label, tuple(group), _accuracy(group), difference, p_value, is_paired))
    return rows


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


def _accuracy(group: Sequence[Contender]) -> Interval:
    """Wilson's interval for one run; for several seeds of the same problems, that of `pooled`."""
    matrix = _matrix(group)
    if len(group) == 1 or matrix is None:
        fractions = [value for one in group for value in one.correct.values()]
        return statistics.wilson(fractions)
    found = statistics.pooled(matrix)
    return Interval(found.estimate, max(0.0, found.low), min(1.0, found.high))


def _difference(group: Sequence[Contender], first: Sequence[Contender]) -> tuple[Interval, bool]:
    mine, theirs = _matrix(group), _matrix(first)
    if mine is None or theirs is None or group[0].correct.keys() != first[0].correct.keys():
        return statistics.unpaired_difference(_accuracy(group), _accuracy(first)), False
    seeds = [one.seed for one in group], [one.seed for one in first]
    if len(group) == len(first) == 1:
        return statistics.paired_bootstrap(list(mine[0]), list(theirs[0])), True
    if sorted(seeds[0]) == sorted(seeds[1]):
        order = [np.argsort(numbers, kind="stable") for numbers in seeds]
        return statistics.pooled(mine[order[0]] - theirs[order[1]]), True
    # Other seeds on each side: their variances add, and the problems stay paired.
    return statistics.pooled_difference(mine, theirs), True


def _matrix(group: Sequence[Contender]) -> statistics.Floats | None:
    """Correctness [seeds, problems] in one order of problems; None where the runs have not the same ones."""
    keys = sorted(group[0].correct)
    if any(one.correct.keys() != group[0].correct.keys() for one in group):
        return None
    return np.array([[one.correct[key] for key in keys] for one in group], dtype=np.float64)


def _mcnemar(group: Sequence[Contender], first: Sequence[Contender]) -> float | None:
    if len(group) != 1 or len(first) != 1 or {group[0].samples, first[0].samples} != {1}:
        return None
    mine, theirs = group[0].correct, first[0].correct
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
    found: tuple[int, dict[str, float], int] | None = None
    for link in links:
        entry, document = linked_entry(link.target)
        stage, manifest = str(document["stage"]), entry.manifest()
        if manifest is not None and (stage == Stage.TRAIN or link in evaluated):
            dtypes.add(str(manifest.provenance.get("dtype")))
        took, read = cost_of(entry.metrics())
        seconds[stage] = seconds.get(stage, 0.0) + took
        tokens[stage] = tokens.get(stage, 0.0) + read
        if link in evaluated:
            found = (link.round, *right_fractions(entry))
    if found is None:
        raise DataError(f"{run.name}: no student was evaluated yet", hint=f"kdpipe run {run.name}")
    number, correct, samples = found
    kept = {key: value for key, value in resolved(recipe).items() if key not in SEEDLESS}
    settings = {name: "null" if leaf is None else str(leaf) for name, leaf in leaves(kept)}
    if recipe.student.dtype == "auto":
        settings["student.dtype"] = f"auto ({', '.join(sorted(dtypes))})"
    return Contender(run.name, recipe.seed, number, samples, correct, settings, seconds, tokens)


def comparison_json(rows: Sequence[ComparisonRow]) -> list[dict[str, JsonValue]]:
    """Every row with its runs; intervals as {estimate, low, high}."""
    return [
        {
            "label": row.label,
            "accuracy": asdict(row.accuracy),
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
                    "problems": len(one.correct),
                    "accuracy": sum(one.correct.values()) / len(one.correct),
                    "seconds": dict(one.seconds),
                    "tokens": dict(one.tokens),
                }
                for one in row.contenders
            ],
        }
        for row in rows
    ]


def cells_of(row: ComparisonRow) -> tuple[str, ...]:
    """What stands under each word of `HEADER`."""
    rounds = sorted({one.round for one in row.contenders})
    return (
        row.label,
        str(len(row.contenders)),
        "-".join(str(number) for number in dict.fromkeys((rounds[0], rounds[-1]))),
        f"{row.accuracy.estimate:.1%}",
        f"{row.accuracy.low:.1%} to {row.accuracy.high:.1%}",
        "" if row.difference is None else _points(row.difference) + ("" if row.is_paired else " *"),
        "" if row.p_value is None else f"{row.p_value:.2g}",
        f"{row.tokens:,.0f}",
        f"{row.seconds:,.0f}",
    )


def _points(change: Interval) -> str:
    return f"{100 * change.estimate:+.1f} ({100 * change.low:+.1f} to {100 * change.high:+.1f})"


def notes_on(rows: Sequence[ComparisonRow]) -> list[str]:
    """A sentence for whatever the cells cannot say."""
    notes = []
    if any(not row.is_paired for row in rows):
        notes.append("* other problems than the first row's: two independent groups, not pairs")
    for field in ("evaluate.temperature", "evaluate.samples"):
        found = {one.settings.get(field) for row in rows for one in row.contenders}
        if len(found) > 1:
            notes.append(f"{field} is not the same in all rows: part of a difference may be that")
    if any(len(row.contenders) > 1 for row in rows):
        notes.append("several seeds: mean, with the interval for other seeds and other problems")
    return notes
