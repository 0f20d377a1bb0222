"""Code that comes with models, or that grades: it is announced, and asked about once in a workspace."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdpipe.cli.terminal import say
from kdpipe.errors import RecipeError

if TYPE_CHECKING:
    from kdpipe.recipe.file import LoadedRecipe

TRUSTED = "trusted.json"
TO_RUN = "is to run here with all your rights"
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Let code run that comes with the recipe's models (trust_remote_code) or grades (task.grader).",
    ),
]


def require_trust(loaded: "LoadedRecipe", workspace: Path, *, trusts: bool) -> None:
    """Raises RecipeError where code would run that nobody has trusted in this workspace."""
    from kdpipe.store.durable import write_json

    trusted = _trusted(workspace)
    models = [name for name in dict.fromkeys(_models_with_code(loaded)) if name not in trusted]
    graders = [name for name in _graders_with_code(loaded) if name not in trusted]
    new = models + graders
    if not new:
        return
    if models:
        say(f"trust_remote_code: Python code that comes with {' and '.join(models)} {TO_RUN}")
    for name in graders:
        say(f"task.grader: the Python code in {name} {TO_RUN}")
    if not trusts and not (sys.stdin.isatty() and sys.stderr.isatty() and typer.confirm("Run it?", err=True)):
        raise RecipeError(
            f"{'trust_remote_code' if models else 'task.grader'}: the code was not trusted",
            hint="read it, then repeat the command with --trust, once in a workspace; or leave the field out",
        )
    workspace.mkdir(parents=True, exist_ok=True)
    write_json(workspace / TRUSTED, {"folder": workspace.stat().st_ino, "models": [*trusted, *new]})


def _trusted(workspace: Path) -> list[str]:
    """The models trusted in this very folder: a file that came with it, or with a copy, trusts none."""
    try:
        found = json.loads((workspace / TRUSTED).read_bytes())
        return list(map(str, found["models"])) if found["folder"] == workspace.stat().st_ino else []
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def _models_with_code(loaded: "LoadedRecipe") -> Iterator[str]:
    """Folders, and hub names with their revision, of the models whose code the recipe lets run."""
    from kdpipe.recipe.place import place_of
    from kdpipe.recipe.schema import ModelTeacher, ServedTeacher

    recipe = loaded.recipe
    named = [(recipe.student.model, recipe.student.revision)] if recipe.student.trust_remote_code else []
    for teacher in recipe.teachers:
        if teacher.trust_remote_code and isinstance(teacher, ModelTeacher):
            named.append((teacher.model, teacher.revision))
        elif teacher.trust_remote_code and isinstance(teacher, ServedTeacher):
            named.append((teacher.server.tokenizer, teacher.server.revision))
    for name, revision in named:
        if name is not None:
            place = place_of(name, loaded.folder)
            yield str(place.resolve()) if place.exists() else f"{name}@{revision or 'its newest revision'}"


def _graders_with_code(loaded: "LoadedRecipe") -> Iterator[str]:
    """The file of the recipe's own grader."""
    from kdpipe.recipe.place import place_of
    from kdpipe.recipe.task import PythonGrader

    if isinstance(grader := loaded.recipe.task.grader, PythonGrader):
        yield str(place_of(grader.file, loaded.folder).resolve())
