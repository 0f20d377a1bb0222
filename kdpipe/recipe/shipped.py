"""The recipes that come with the package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from kdpipe.errors import RecipeError


def shipped() -> list[Path]:
    """Their files, by name."""
    return sorted(Path(str(files("kdpipe.recipes"))).glob("*.yaml"))


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
    """The first comment line of a recipe: what it shows."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip()
