"""The arguments and options of commands, and the recipe or project that they name."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdpipe.cli.terminal import say
from kdpipe.errors import RecipeError

if TYPE_CHECKING:
    from kdpipe.pipeline.project import Project
    from kdpipe.pipeline.runs import RunFolder
    from kdpipe.recipe.file import LoadedRecipe


def recipe_names(context: typer.Context, incomplete: str) -> list[str]:
    """Shipped recipes and the workspace's runs for shell completion; where none fits, it offers files."""
    from kdpipe.pipeline.runs import all_runs
    from kdpipe.recipe.file import shipped

    runs = all_runs(Path(context.params.get("workspace") or WORKSPACE))
    names = [*(path.stem for path in shipped()), *(run.name for run in runs)]
    return [name for name in names if name.startswith(incomplete)]


RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe file, the name of a shipped one, or that of a run in the workspace.",
        autocompletion=recipe_names,
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
MAX_NAMES = 8


def load_given(recipe: str, overrides: list[str] | None, workspace: Path) -> "LoadedRecipe":
    """The recipe of a file, a shipped one or that of a run, changed as --set says; raises RecipeError."""
    from kdpipe.pipeline.runs import all_runs, named_run
    from kdpipe.recipe.file import load_recipe, shipped_path

    path, changes = Path(recipe), tuple(overrides or ())
    if path.is_file() or path.suffix in (".yaml", ".yml") or "/" in recipe:
        return load_recipe(path, changes)
    if (run := named_run(workspace.resolve(), recipe)) is not None:
        return run.loaded(changes)
    try:
        return load_recipe(shipped_path(recipe), changes)
    except RecipeError as error:
        if path.exists():  # a folder, which the error of reading it says
            return load_recipe(path, changes)
        names = ", ".join(one.name for one in all_runs(workspace.resolve())[:MAX_NAMES])
        raise RecipeError(
            error.message, hint=f"{error.hint}; runs in {workspace}: {names}" if names else error.hint
        ) from None


def open_given(recipe: str, overrides: list[str] | None, workspace: Path) -> "Project":
    """The recipe's project in a workspace, to read; nothing is made or fetched. Raises RecipeError."""
    from kdpipe.pipeline.project import read_project

    project = read_project(load_given(recipe, overrides, workspace), workspace.resolve())
    if project.is_older:
        say(
            f"{project.run.name}: made by an older kdpipe, and shown as that made it; kdpipe run would perform its "
            "steps again, under new names in the store"
        )
    return project


def run_given(run: str, overrides: list[str] | None, workspace: Path) -> "RunFolder":
    """The folder of a run by its name, or of the run of a recipe; raises RecipeError where there is none."""
    from kdpipe.pipeline.runs import named_run

    if not overrides and (named := named_run(workspace.resolve(), run)) is not None:
        return named
    folder = open_given(run, overrides, workspace).run
    if not folder.path.exists():
        raise RecipeError(f"{folder.name}: nothing was run yet", hint=f"kdpipe run {run}")
    return folder
