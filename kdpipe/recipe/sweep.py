"""A sweep: every combination of the values given for some fields, each one a run of its own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from kdpipe.errors import RecipeError
from kdpipe.recipe.yaml_source import split_list

MAX_RUNS = 1_000
EXAMPLE = "for example: --sweep train.optimizer.learning_rate=1e-5,3e-5"


def points(sweeps: Sequence[str]) -> list[tuple[str, ...]]:
    """The overrides `a.b=value` of every point of the grid, the last field's values changing fastest.

    Each sweep is `a.b=v1,v2,...`, whose values are the items of a YAML list. Raises RecipeError.
    """
    axes = [_axis(sweep) for sweep in sweeps]
    fields = [axis[0].partition("=")[0] for axis in axes]
    if twice := next((field for field in fields if fields.count(field) > 1), None):
        raise RecipeError(f"--sweep {twice}: given twice", hint=f"one list: --sweep {twice}=v1,v2,v3")
    require_runs(math.prod(map(len, axes)))
    return list(itertools.product(*axes))


def require_runs(count: int) -> None:
    """Raises RecipeError where a study has more runs than anybody starts."""
    if count > MAX_RUNS:
        raise RecipeError(f"{count:,} runs, and a study has at most {MAX_RUNS:,}")


def _axis(sweep: str) -> list[str]:
    field, sign, text = sweep.partition("=")
    try:
        values = split_list(text, f"--sweep {sweep}")
    except RecipeError as error:
        raise RecipeError(error.message, hint=EXAMPLE) from None
    if not (field.strip() and sign and values):
        raise RecipeError(f"--sweep {sweep}: expected a field and its values", hint=EXAMPLE)
    if len(values) != len(set(values)):
        raise RecipeError(f"--sweep {sweep}: the same value twice")
    return [f"{field.strip()}={value}" for value in values]
