"""The page of a comparison: `comparison.html.j2`, whose values are prepared here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kdpipe.pipeline.runs import run_at
from kdpipe.pipeline.status import leaves
from kdpipe.recipe.schema import resolved
from kdpipe.report.comparison_tables import cost_table, field_table, forests_of, run_table
from kdpipe.report.template import template
from kdpipe.results.comparison import ComparisonRow
from kdpipe.results.contender import SEEDLESS
from kdpipe.results.table import notes_on


def render_comparison(
    rows: Sequence[ComparisonRow],
    workspace: Path,
    *,
    title: str,
    commands: Sequence[str],
    missing: Sequence[str] = (),
) -> str:
    """The whole page. `commands` make it again; `missing` says what it cannot show, and why."""
    recipes = [row for row in rows if not row.is_before]
    return template("comparison").render(
        title=title,
        missing=missing,
        forests=forests_of(rows),
        notes=notes_on([replace(row, fields="") for row in rows]),  # the fields have a table
        fields=field_table({row.label: _settings(workspace, row) for row in recipes}),
        costs=cost_table(rows),
        runs=run_table(rows),
        commands=commands,
    )


def _settings(workspace: Path, row: ComparisonRow) -> dict[str, str]:
    """The recipe's fields, flat, as the first run of the row has them."""
    document = resolved(run_at(workspace, row.contenders[0].run).recipe())
    kept = {name: value for name, value in document.items() if name not in SEEDLESS}
    return {name: "null" if leaf is None else str(leaf) for name, leaf in leaves(kept)}
