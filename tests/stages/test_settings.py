"""Settings of stages: all that a stage reads of a recipe is in them, and all that is in them is hashed."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import FrozenInstanceError, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

import kdpipe.stages
from kdpipe.recipe.file import load_recipe, shipped
from kdpipe.recipe.roles import STUDENT
from kdpipe.recipe.schema import Recipe
from kdpipe.recipe.section import Section
from kdpipe.stages.settings.document import NAME, document
from kdpipe.stages.settings.model import TaskSettings
from kdpipe.stages.settings.stage import (
    EvaluateSettings,
    RolloutSettings,
    ScoreSettings,
    SftSettings,
    TextSettings,
    TrainSettings,
)
from kdpipe.store.step import canonical

STAGES = Path(kdpipe.stages.__file__).parent
RECIPES = {path.stem: load_recipe(path).recipe for path in shipped()}


def settings_of(recipe: Recipe) -> Iterator[Any]:
    yield RolloutSettings.of(recipe)
    yield TrainSettings.of(recipe, 1)
    yield EvaluateSettings.of(recipe)
    yield SftSettings.of(recipe, recipe.student)
    for teacher in recipe.teachers:
        yield ScoreSettings.of(recipe, teacher)
        yield EvaluateSettings.of(recipe, teacher)
        yield from (TextSettings.of(recipe, number, teacher) for number in (0, 1))


def parts(value: Any) -> Iterator[tuple[str, Any]]:
    """The name and value of each field of settings, as `document` should have them."""
    match value:
        case TaskSettings():
            yield from [*value.problems.items(), *value.grading.items()]
        case Section():
            for name, info in type(value).model_fields.items():
                yield info.alias or name, getattr(value, name)
        case Mapping():
            yield from value.items()
        case _:
            for field in fields(value):
                yield field.metadata.get(NAME, field.name.rstrip("_")), getattr(value, field.name)


def require_whole(value: Any, found: Any, path: str) -> None:
    if not (isinstance(value, Section | Mapping) or is_dataclass(value)):
        wanted = list(value) if isinstance(value, tuple) else value
        assert found == wanted, path
        return
    known = list(parts(value))
    assert len({name for name, _ in known}) == len(known), f"{path}: two fields of one name"
    assert set(found) == {name for name, _ in known}, path
    for name, item in known:
        require_whole(item, found[name], f"{path}.{name}")


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_field_of_the_settings_is_in_the_document_that_is_hashed(name: str) -> None:
    for settings in settings_of(RECIPES[name]):
        found = document(settings)
        canonical(found)
        require_whole(settings, found, type(settings).__name__)


def test_settings_cannot_be_changed_after_they_were_hashed() -> None:
    for settings in settings_of(RECIPES["quickstart"]):
        with pytest.raises(FrozenInstanceError):
            setattr(settings, fields(settings)[0].name, None)


def test_every_class_of_settings_is_among_those_that_are_compared() -> None:
    made = {type(settings).__name__ for recipe in RECIPES.values() for settings in settings_of(recipe)}
    tree = ast.parse((STAGES / "settings" / "stage.py").read_text(encoding="utf-8"))
    classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    assert {name for name in classes if name.endswith("Settings")} == made


@pytest.mark.parametrize("path", sorted(STAGES.glob("*.py")), ids=lambda path: path.stem)
def test_a_stage_knows_no_recipe(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            taken = {alias.name for alias in node.names}
            assert not taken & {"Recipe", "Teacher", "Student", "Project", "Store"}, node.lineno
            assert node.module not in ("time", "subprocess", "os"), node.lineno
        elif isinstance(node, ast.Import):
            assert not {alias.name for alias in node.names} & {"time", "subprocess", "os"}, node.lineno
        elif isinstance(node, ast.Attribute | ast.Name):
            name = node.attr if isinstance(node, ast.Attribute) else node.id
            assert name != "recipe", node.lineno
        elif isinstance(node, ast.arg):
            assert node.arg != "recipe", node.lineno


def test_a_cold_start_is_of_the_student_or_of_a_teacher() -> None:
    recipe = RECIPES["quickstart"]
    own, its = SftSettings.of(recipe, recipe.student), SftSettings.of(recipe, recipe.teacher)
    assert (own.teacher, its.student) == (None, None)
    assert own.model.sft is not None
    assert own.model.sft.seed is None, f"the seed of the {STUDENT}'s cold start is the step's"
