"""What commands take, as it is typed, and what they make of it: a recipe, a project."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from kdpipe.project import Project
    from kdpipe.recipe_file import LoadedRecipe


def _shipped(incomplete: str) -> list[str]:
    """Names of shipped recipes for the shell's completion; where none begins so, the shell offers files."""
    from kdpipe.recipes_shipped import shipped

    return [path.stem for path in shipped() if path.stem.startswith(incomplete)]


RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe file, or the name of a shipped one.",
        autocompletion=_shipped,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Change one field of the recipe; repeatable."),
]
WorkspaceOption = Annotated[Path, typer.Option("--workspace", help="Where everything is written.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
RoundOption = Annotated[int | None, typer.Option("--round", min=0, help="The round; 0 is before training.")]
WORKSPACE = Path("kdpipe-out")


def load_given(recipe: str, overrides: list[str] | None) -> "LoadedRecipe":
    """The recipe of a file, or a shipped one, changed as --set says; raises RecipeError."""
    from kdpipe.recipe_file import load_recipe

    return load_recipe(_recipe_path(recipe), tuple(overrides or ()))


def open_given(recipe: str, overrides: list[str] | None, workspace: Path) -> "Project":
    """The recipe's project in a workspace; nothing is made or fetched. Raises RecipeError."""
    from kdpipe.project import open_project

    return open_project(load_given(recipe, overrides), workspace.resolve())


def _recipe_path(recipe: str) -> Path:
    path = Path(recipe)
    if path.exists() or path.suffix in (".yaml", ".yml") or "/" in recipe:
        return path
    from kdpipe.recipes_shipped import shipped_path

    return shipped_path(recipe)
