"""A comparison as tables with intervals drawn beneath each other: a forest plot for each measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kdpipe.pipeline.headline import MEASURES, Headline
from kdpipe.pipeline.progress import duration
from kdpipe.report.figure import axis_of, axis_svg, change_axis, element, interval_svg
from kdpipe.results.comparison import ComparisonRow, Difference
from kdpipe.results.table import Table, difference_cell, level_cell, tables_of
from kdpipe.store.stage import Stage


@dataclass(frozen=True, slots=True)
class Forest:
    """A table of intervals on one axis, and what they are of."""

    title: str
    table: Table


def forests_of(rows: Sequence[ComparisonRow]) -> list[Forest]:
    """By each measure the levels, and differences to the student before, the first, and one another."""
    forests: list[Forest] = []
    recipes = [row for row in rows if not row.is_before]
    for measure in MEASURES:
        levels = [(row, one) for row in rows for one in row.measured if one.headline is measure]
        changes = [(row.label, one.change) for row, one in levels if one.change and not row.is_before]
        differences = [(row.label, one.difference) for row, one in levels if one.difference]
        pairs = [(f"{row.label} less {of}", found) for row, one in levels for of, found in one.pairs.items()]
        if levels:
            name = f"{measure.title[0].upper()}{measure.title[1:]}"
            better = "more is better" if measure.sign > 0 else "less is better"
            forests.append(Forest(f"{name} ({better})", _levels(measure, levels)))
            what = f"{measure.name}, {measure.change_unit}"
            forests += _differences(f"Change of {what}, since the student before training", measure, changes)
            title = f"Difference in {what}, to {recipes[0].label}"
            forests += _differences(title, measure, differences)
            forests += _differences(f"Difference in {what}, of one to another", measure, pairs)
    return forests


def _levels(measure: Headline, rows: Sequence[tuple[ComparisonRow, ComparisonRow]]) -> Table:
    axis = axis_of(measure, [one.level for _, one in rows])
    return Table(
        ["", axis_svg(axis), measure.name],
        [
            [
                _named(row),
                interval_svg(one.level, axis, style=1 if row.is_before else 2),
                level_cell(row, measure).replace("-", "−"),
            ]
            for row, one in rows
        ],
    )


def _differences(title: str, measure: Headline, rows: Sequence[tuple[str, Difference]]) -> list[Forest]:
    """The forest of these, if there are any: right of the line is more."""
    if not rows:
        return []
    axis = change_axis(measure, [found.interval for _, found in rows])
    has_p = any(found.p_value is not None for _, found in rows)
    cells = [
        [
            label,
            interval_svg(found.interval, axis, style=0),
            difference_cell(found, measure).replace("-", "−"),
            *(["" if found.p_value is None else f"{found.p_value:.2g}"] if has_p else []),
        ]
        for label, found in rows
    ]
    return [Forest(title, Table(["", axis_svg(axis), measure.change_unit, *(["p"] if has_p else [])], cells))]


def _named(row: ComparisonRow) -> str:
    """A row's label, its runs below it where they are called otherwise."""
    runs = [one.run for one in row.contenders]
    below = [] if runs == [row.label] else [element("span", {"class": "sub"}, ", ".join(runs))]
    return element("span", {}, row.label, *below)


def cost_table(rows: Sequence[ComparisonRow]) -> Table:
    """What a run of each recipe took, and in which stages."""
    of_a_run = tables_of(rows)[-1]
    recipes = [row for row in rows if not row.is_before]
    stages = [
        stage for stage in Stage if any(stage in one.seconds for row in recipes for one in row.contenders)
    ]
    return Table(
        ["", *of_a_run.columns[1:], *(f"{stage}, time" for stage in stages)],
        [
            [*cells, *(duration(_mean_seconds(row, stage)) for stage in stages)]
            for row, cells in zip(recipes, of_a_run.rows, strict=True)
        ],
    )


def _mean_seconds(row: ComparisonRow, stage: Stage) -> float:
    return sum(one.seconds.get(stage, 0.0) for one in row.contenders) / len(row.contenders)


def field_table(settings: Mapping[str, Mapping[str, str]]) -> Table | None:
    """The fields in which recipes differ, a column for each; None where they are all the same."""
    names = sorted(set().union(*settings.values()))
    rows = [
        [name, *found]
        for name in names
        if len(set(found := [one.get(name, "not there") for one in settings.values()])) > 1
    ]
    return Table(["field", *settings], rows) if rows else None


def run_table(rows: Sequence[ComparisonRow]) -> Table:
    """Every run that counts."""
    return Table(
        ["run", "of", "seed", "last evaluated round", "problems"],
        [
            [one.run, row.label, str(one.seed), str(one.round), str(len(one.values))]
            for row in rows
            if not row.is_before
            for one in row.contenders
        ],
    )
