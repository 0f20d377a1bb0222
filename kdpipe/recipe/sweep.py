"""A sweep: every combination of the values given for some fields, each one a run of its own."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from kdpipe.errors import RecipeError

OPEN, CLOSE, QUOTES = "[{", "]}", "\"'"


def points(sweeps: Sequence[str]) -> list[tuple[str, ...]]:
    """The overrides `a.b=value` of every point of the grid, the last field's values changing fastest.

    Each sweep is `a.b=v1,v2,...`; commas inside brackets, braces or quotes belong to a value. Raises RecipeError.
    """
    axes = [_axis(sweep) for sweep in sweeps]
    fields = [axis[0].partition("=")[0] for axis in axes]
    if twice := next((field for field in fields if fields.count(field) > 1), None):
        raise RecipeError(f"--sweep {twice}: given twice", hint=f"one list: --sweep {twice}=v1,v2,v3")
    return list(itertools.product(*axes))


def _axis(sweep: str) -> list[str]:
    field, sign, text = sweep.partition("=")
    values = [value.strip() for value in _split(text)]
    if not (field.strip() and sign) or not all(values):
        raise RecipeError(
            f"--sweep {sweep}: expected a field and its values",
            hint="for example: --sweep train.optimizer.learning_rate=1e-5,3e-5",
        )
    if len(values) != len(set(values)):
        raise RecipeError(f"--sweep {sweep}: a value is there twice")
    return [f"{field.strip()}={value}" for value in values]


def _split(text: str) -> list[str]:
    """`text` at its commas, those inside brackets, braces and quotes excepted."""
    values, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in QUOTES:
            quote = character
        elif character in OPEN:
            depth += 1
        elif character in CLOSE:
            depth -= 1
        elif character == "," and depth <= 0:
            values.append("")
            continue
        values[-1] += character
    return values
