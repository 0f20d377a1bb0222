"""The recipe: the only schema and the only defaults. Never imports torch.

`file.py` reads one from YAML. `runtime` and `tracking` cannot change results beyond floating-point rounding;
every other field is part of some step's fingerprint (`plan.py`), which a test enforces leaf by leaf.
"""

from collections.abc import Iterator
from typing import Any

from pydantic import JsonValue

from kdpipe.recipe.checks import CONCERNS
from kdpipe.recipe.fields import RecipeFields
from kdpipe.recipe.models import Student
from kdpipe.recipe.teacher import ABSENT, ModelTeacher, ScratchTeacher, SelfTeacher, ServedTeacher, Teacher

__all__ = [
    "ModelTeacher",
    "Recipe",
    "ScratchTeacher",
    "SelfTeacher",
    "ServedTeacher",
    "Student",
    "Teacher",
    "resolved",
]


class Recipe(RecipeFields):
    """One experiment: a task, a student, its teachers, and how the student learns from them."""

    def faults(self) -> Iterator[str]:
        return (fault for concern in CONCERNS for fault in concern(self))


def resolved(recipe: Recipe) -> dict[str, JsonValue]:
    """Every field of the recipe with defaults filled in, as JSON; a teacher has the fields of every kind."""
    value: dict[str, Any] = recipe.model_dump(mode="json", by_alias=True)
    value["teachers"] = [{**ABSENT, **teacher} for teacher in value["teachers"]]
    return value
