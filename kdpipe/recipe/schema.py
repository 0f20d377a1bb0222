"""The recipe: the only schema and the only defaults. Never imports torch.

`file.py` reads one from YAML. `runtime` and `tracking` cannot change results beyond floating-point rounding;
every other field is part of some step's fingerprint (`plan.py`), which a test enforces leaf by leaf.
"""

from typing import Any

from pydantic import JsonValue, model_validator

from kdpipe.recipe.checks import check_fields
from kdpipe.recipe.fields import RecipeFields
from kdpipe.recipe.models import (
    Lora,
    Optimizer,
    Scratch,
    Sft,
    SftOptimizer,
    Student,
)
from kdpipe.recipe.objective import (
    Objective,
    Support,
)
from kdpipe.recipe.runtime import Placement, Runtime, ServerRuntime, Tracking, Vllm
from kdpipe.recipe.section import EngineName, Section
from kdpipe.recipe.stages import Keeping
from kdpipe.recipe.task import ArithmeticTask, Gsm8kTask, JsonlTask
from kdpipe.recipe.teacher import (
    ABSENT,
    PROMPT_PIECE,
    ModelTeacher,
    OwnTeacher,
    ScratchTeacher,
    SelfTeacher,
    ServedTeacher,
    Server,
    Teacher,
)

__all__ = [
    "PROMPT_PIECE",
    "ArithmeticTask",
    "EngineName",
    "Gsm8kTask",
    "JsonlTask",
    "Keeping",
    "Lora",
    "ModelTeacher",
    "Objective",
    "Optimizer",
    "OwnTeacher",
    "Placement",
    "Recipe",
    "Runtime",
    "Scratch",
    "ScratchTeacher",
    "Section",
    "SelfTeacher",
    "ServedTeacher",
    "Server",
    "ServerRuntime",
    "Sft",
    "SftOptimizer",
    "Student",
    "Support",
    "Teacher",
    "Tracking",
    "Vllm",
    "resolved",
]


class Recipe(RecipeFields):
    """One experiment: a task, a student, its teachers, and how the student learns from them."""

    @model_validator(mode="after")
    def _fields_fit(self) -> "Recipe":
        check_fields(self)
        return self


def resolved(recipe: Recipe) -> dict[str, JsonValue]:
    """Every field of the recipe with defaults filled in, as JSON; a teacher has the fields of every kind."""
    value: dict[str, Any] = recipe.model_dump(mode="json", by_alias=True)
    value["teachers"] = [{**ABSENT, **teacher} for teacher in value["teachers"]]
    return value
