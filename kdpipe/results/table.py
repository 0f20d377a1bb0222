"""A comparison as small tables of words, and as a document for programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass

from pydantic import JsonValue

from kdpipe.method.interval import Interval
from kdpipe.pipeline.headline import ACCURACY, MEASURES, REVERSE_KL, Headline
from kdpipe.results.comparison import ComparisonRow, Difference
from kdpipe.results.contender import Contender, Divergence

MEASURED_BY = {
    ACCURACY: ("evaluate.temperature", "evaluate.samples"),
    REVERSE_KL: (
        "teachers",
        *(f"rollout.{name}" for name in ("temperature", "top_p", "top_k", "max_new_tokens")),
    ),
}
"""Fields that a measure depends on, and not the student alone."""
DIVERGENCES: dict[Divergence, str] = {
    "exact": "of whole distributions",
    "sampled": "of sampled tokens",
    "cut": "of sampled tokens and the distribution that top_p or top_k cut, which adds minus the log of the kept mass",
}
MISSING = "-"


@dataclass(frozen=True, slots=True)
class Table:
    """Words above columns, and rows of as many cells, the first of which is what the row is called."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables_of(rows: Sequence[ComparisonRow]) -> list[Table]:
    """Levels, changes since the student before, differences to the first or between recipes, costs."""
    measures = [one for one in MEASURES if one in (rows[0].headline, rows[0].headline.beside)]
    recipes = [row for row in rows if not row.is_before]
    levels = [(row.label, *(level_cell(row, measure) for measure in measures)) for row in rows]
    found = [Table(["", *(measure.title for measure in measures)], levels)]
    changes = [(row.label, [one.change for one in row.measured]) for row in recipes]
    differences = [(row.label, [one.difference for one in row.measured]) for row in recipes[1:]]
    pairs = [
        (f"{row.label} less {other}", [one.pairs.get(other) for one in row.measured])
        for row in recipes
        for other in row.pairs
    ]
    titles = ("since before", "against the first", "one against another")
    for title, each in zip(titles, (changes, differences, pairs), strict=True):
        if any(any(cells) for _, cells in each):
            found.append(_differences(title, measures, each))
    return [
        *found,
        Table(["cost of a run", "seeds", "round", "tokens", "seconds"], [_cost(row) for row in recipes]),
    ]


def _differences(
    title: str, measures: Sequence[Headline], rows: Sequence[tuple[str, Sequence[Difference | None]]]
) -> Table:
    """Differences of each row by each measure, with their p value where one has any."""
    has_p = any(one and one.p_value is not None for _, cells in rows for one in cells)
    columns = [title]
    for measure in measures:
        columns += [
            f"{measure.name}, {measure.change_unit}",
            *(["p"] if has_p and measure is ACCURACY else []),
        ]
    body: list[list[str]] = []
    for label, found in rows:
        cells = [label]
        for measure, one in zip(measures, [*found, None], strict=False):
            cells.append(difference_cell(one, measure))
            if has_p and measure is ACCURACY:
                cells.append("" if one is None or one.p_value is None else f"{one.p_value:.2g}")
        body.append(cells)
    return Table(columns, body)


def level_cell(row: ComparisonRow, measure: Headline) -> str:
    """A row's value by a measure with its interval."""
    found = next((one.level for one in row.measured if one.headline is measure), None)
    return MISSING if found is None else _bounded(map(measure.show, astuple(found)))


def difference_cell(found: Difference | None, measure: Headline) -> str:
    """A difference with its interval, marked where it is not paired."""
    if found is None:
        return MISSING
    cell = _bounded(map(measure.show_change, astuple(found.interval)))
    return cell if found.is_paired else f"{cell} *"


def _bounded(texts: Iterator[str]) -> str:
    return "{} ({} to {})".format(*texts)


def _cost(row: ComparisonRow) -> list[str]:
    rounds = sorted({one.round for one in row.contenders})
    return [
        row.label,
        f"{len(row.contenders)}",
        "-".join(f"{number}" for number in dict.fromkeys((rounds[0], rounds[-1]))),
        f"{row.tokens:,.0f}",
        f"{row.seconds:,.0f}",
    ]


def notes_on(rows: Sequence[ComparisonRow]) -> list[str]:
    """A sentence for whatever the cells cannot say."""
    if not rows:
        return []
    recipes = [row for row in rows if not row.is_before]
    notes = ["(a to b): 95 % interval"]
    found = [
        each
        for row in recipes
        for one in row.measured
        for each in (one.change, one.difference, *one.pairs.values())
    ]
    if any(one and not one.is_paired for one in found):
        notes.append("* other problems on each side: two independent groups, not pairs")
    if rows[0].headline.beside is REVERSE_KL and not all(row.beside for row in rows):
        notes.append(
            f"{MISSING}: held-out reverse KL was not measured; evaluate.reverse_kl_problems says on how many prompts"
        )
    notes += _notes_on_divergence(rows)
    for measure, fields in MEASURED_BY.items():
        measured = [one for row in recipes for one in row.measured if one.headline is measure]
        contenders = [one for row in measured for one in row.contenders]
        notes += [
            f"{field} is not the same in all rows: part of a difference in {measure.name} may be that"
            for field in fields
            if len({_set_by(one, field) for one in contenders}) > 1
        ]
    notes += _notes_on_seeds({len(row.contenders) for row in recipes})
    return notes + [f"{row.label}: {row.fields}" for row in recipes if row.fields and row.label != row.fields]


def _notes_on_seeds(counts: set[int]) -> Iterator[str]:
    """What the intervals are for, with these numbers of seeds in a row."""
    if 1 in counts:
        told = "one seed: intervals are for other problems, and for these runs only"
        yield told + ("; against several seeds it is taken to vary as they do" if counts - {1} else "")
    if counts - {1}:
        yield "several seeds: mean, with the interval for other seeds and other problems"
    if 2 in counts:
        yield "two seeds cannot tell how far seeds spread, so intervals are wide: a third makes them far shorter"


def _notes_on_divergence(rows: Sequence[ComparisonRow]) -> Iterator[str]:
    """What a reverse KL is of where it is not of whole distributions."""
    found: dict[Divergence, list[str]] = {}
    for row in (one for each in rows for one in each.measured if one.headline is REVERSE_KL):
        found.setdefault(row.contenders[0].divergence, []).append(row.label)
    if len(found) > 1:
        told = "; ".join(f"{DIVERGENCES[kind]} in {', '.join(labels)}" for kind, labels in found.items())
        yield f"held-out reverse KL is not one measure: {told}"
    elif "cut" in found:
        yield f"held-out reverse KL is {DIVERGENCES['cut']}"


def _set_by(contender: Contender, field: str) -> tuple[tuple[str, str], ...]:
    """What a run has under this field."""
    return tuple(found for found in contender.settings.items() if found[0].startswith(field))


def comparison_json(rows: Sequence[ComparisonRow]) -> list[dict[str, JsonValue]]:
    """Every row with its runs; intervals as {estimate, low, high}."""
    return [
        {
            "label": row.label,
            "fields": row.fields,
            "headline": row.headline.metric,
            "before": row.is_before,
            **{one.headline.metric: _measured_json(one) for one in row.measured},
            "seconds": row.seconds,
            "tokens": row.tokens,
            "runs": [_run_json(one) for one in row.contenders],
        }
        for row in rows
    ]


def _measured_json(row: ComparisonRow) -> dict[str, JsonValue]:
    """A measure of a row: its level, and what changed."""
    how: JsonValue = row.contenders[0].divergence
    return {
        **_interval_json(row.level),
        **({"divergence": how} if row.headline is REVERSE_KL else {}),
        "change": _difference_json(row.change),
        "difference": _difference_json(row.difference),
        "pairs": {other: _difference_json(found) for other, found in row.pairs.items()},
    }


def _difference_json(found: Difference | None) -> dict[str, JsonValue] | None:
    if found is None:
        return None
    return {**_interval_json(found.interval), "p_value": found.p_value, "paired": found.is_paired}


def _interval_json(found: Interval) -> dict[str, JsonValue]:
    return asdict(found)


def _run_json(contender: Contender) -> dict[str, JsonValue]:
    return {
        "run": contender.run,
        "seed": contender.seed,
        "round": contender.round,
        "problems": len(contender.values),
        **{one.headline.metric: sum(one.values.values()) / len(one.values) for one in contender.measured},
        "seconds": dict(contender.seconds),
        "tokens": dict(contender.tokens),
    }
