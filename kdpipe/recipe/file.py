"""A recipe's file: read as YAML, changed by `--set`, validated; every error with its line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import ValidationError

from kdpipe.errors import RecipeError
from kdpipe.recipe.place import place_of
from kdpipe.recipe.schema import Recipe
from kdpipe.recipe.section import Section
from kdpipe.recipe.yaml_source import Document, dotted, read_yaml

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


MAX_BYTES = 1_000_000
"""Bytes of a recipe's file."""
MAX_TOLD = 20
"""Mistakes that are told at once."""


@dataclass(frozen=True, slots=True)
class LoadedRecipe:
    """A validated recipe with the text it came from; relative paths in it start from `folder`."""

    recipe: Recipe
    text: str
    path: Path
    overrides: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Where relative paths in the recipe start from."""
        return self.path.parent


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> LoadedRecipe:
    """The recipe in `path` with `a.b=c` overrides applied; raises RecipeError naming every bad field."""
    try:
        with place_of(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise RecipeError(f"{path}: more than {MAX_BYTES:,} bytes, which no recipe has")
        text = data.decode("utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe", hint="kdpipe recipes  lists the shipped ones") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    recipe = read_recipe(text, str(path), overrides)
    return LoadedRecipe(recipe=recipe, text=text, path=place_of(path).resolve(), overrides=overrides)


def read_recipe(text: str, name: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """The recipe that `text` means with `overrides` applied; errors say the line and call the text `name`."""
    document = read_yaml(text, name)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key):
            hint = "for example: --set train.optimizer.learning_rate=3e-5"
            raise RecipeError(f"--set {override}: not of the form a.b=c", hint=hint)
        document = document.with_value(tuple(key.split(".")), value, f"--set {override}")
    try:
        return Recipe.model_validate(document.value, strict=True)
    except ValidationError as error:
        told = [_explain(document, item) for item in error.errors()[:MAX_TOLD]]
        more = error.error_count() - len(told)
        raise RecipeError("\n".join([*told, f"and {more:,} more"] if more else told)) from None


def shipped() -> list[Path]:
    """The files of the recipes that come with the package, by name."""
    return sorted(Path(import_module("kdpipe.recipes").__path__[0]).glob("*.yaml"))


def shipped_path(name: str) -> Path:
    """The file of the shipped recipe called `name`; raises RecipeError listing those there are."""
    found = {path.stem: path for path in shipped()}
    stem = name.removesuffix(".yaml")
    if stem not in found:
        raise RecipeError(
            f"{name}: no such recipe file, and no shipped recipe", hint=f"shipped: {', '.join(found)}"
        )
    return found[stem]


def title(path: Path) -> str:
    """The first line of a recipe or a page: what it shows."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip()


def _explain(document: Document, item: ErrorDetails) -> str:
    """One pydantic error as `file:line: field: what, expected`."""
    # pydantic puts the names of union members into the location; the document's own keys have none.
    path = document.own_path(item["loc"])
    where = f"{document.where(path)}: {dotted(path)}: " if path else f"{document.where(path)}: "
    found = document.spellings.get(path, "")
    match item["type"]:
        case "extra_forbidden":
            import difflib  # for this error alone

            known = _known_keys(item["loc"])
            near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
            return f"{where}unknown key" + (
                f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            )
        case "missing":
            return f"{where}is required and missing"
        case "string_type" if isinstance(item["input"], bool):
            return f"{where}{found} without quotes is YAML for {str(item['input']).lower()}; write '{found}' in quotes"
        case "model_type" | "dict_type":
            message = "expected a mapping, as in {key: value}"
        case "list_type" | "tuple_type":
            message = "expected a list, as in [1, 2]"
        case _:
            message = item["msg"].removeprefix("Value error, ")
            message = message[0].lower() + message[1:]
    is_leaf = not isinstance(item["input"], (dict, list))
    return f"{where}{message}" + (f" (found {found})" if is_leaf and found else "")


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """The keys allowed beside the unknown one at `location`."""
    kinds: list[type[Section]] = [Recipe]
    for part in location[:-1]:
        inside = [each for kind in kinds for each in _sections_in(_fields(kind).get(str(part)))]
        # Where it is no field, it is the tag of a union's member, or a place in a list.
        members = [kind for kind in kinds if part == kind.__name__ or _has_constant(kind, part)]
        kinds = inside or members or kinds
    return sorted({key for kind in kinds for key in _fields(kind)})


def _fields(kind: type[Section]) -> dict[str, Any]:
    """The types of a section's fields, by their names in a recipe."""
    return {info.alias or name: info.annotation for name, info in kind.model_fields.items()}


def _has_constant(kind: type[Section], tag: int | str) -> bool:
    return any(tag in get_args(annotation) for annotation in _fields(kind).values())


def _sections_in(annotation: Any) -> list[type[Section]]:
    """The sections that a field of this type may hold."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [each for inner in get_args(annotation) for each in _sections_in(inner)]
