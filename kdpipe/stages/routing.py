"""Which of several teachers a problem has."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kdpipe.data.rows import Problem
    from kdpipe.stages.settings.model import Routes


def teaches(only: Routes | None, problem: Problem) -> bool:
    """Whether the problem's record has the values of a teacher's `only`; without one, always."""
    for name, values in (only or {}).items():
        found = problem.fields.get(name)
        # A column of whole numbers may have become text or floats on its way here.
        if found is None or not any(found == value or str(found) == str(value) for value in values):
            return False
    return True
