"""The arguments and options of commands, and the recipe or project that they name."""

import functools
import inspect
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, NamedTuple, ParamSpec

import typer

from kdpipe.cli.terminal import print_result, say
from kdpipe.errors import RecipeError
from kdpipe.recipe.place import place_of

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


def path_named(text: str) -> Path:
    """The path that an argument names; an empty text, which would be the working folder, is refused."""
    if not text:
        raise typer.BadParameter("names no place; expected a path")
    return Path(text)


WorkspaceOption = Annotated[
    Path,
    typer.Option("--workspace", parser=path_named, metavar="PATH", help="Where everything is written."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def output_option(help_text: str) -> Any:
    """The option of where a command writes its page."""
    return typer.Option("--output", "-o", parser=path_named, metavar="PATH", help=help_text)


OutputOption = Annotated[Path | None, output_option("Write it as an HTML page there; - is stdout.")]
RoundOption = Annotated[int | None, typer.Option("--round", min=0, help="The round; 0 is before training.")]
WORKSPACE = Path("kdpipe-out")
MAX_NAMES = 8
Own = ParamSpec("Own")


def workspace_at(named: Path) -> Path:
    """A workspace's absolute path, whether it is there or not; raises RecipeError where it can be none."""
    path = place_of(named).resolve()
    if path.exists() and not path.is_dir():
        raise RecipeError(f"{path}: is no folder", hint="name another place with --workspace")
    return path


def page_at(named: Path, *, as_json: bool) -> Path:
    """Where a page goes; raises RecipeError where none can."""
    from kdpipe.store.target import STDOUT

    path = named if named == STDOUT else place_of(named)
    if as_json and path == STDOUT:
        raise RecipeError("--json and -o -: both go to stdout", hint="one of them")
    if path.is_dir():
        raise RecipeError(f"{path}: is a folder", hint=f"name the file: -o {path / 'report.html'}")
    return path


def folder_at(named: Path) -> Path:
    """The absolute path of a folder to make, links followed; raises RecipeError where it can be none."""
    if named == Path("-"):
        raise RecipeError("-: a folder cannot be written to stdout", hint="name a folder")
    return place_of(named).resolve()


class Given(NamedTuple):  # a dataclass would take a hundredth of what `kdpipe --help` does
    """What a command was given: a recipe or run, how to change it, where runs are, how to print."""

    recipe: str
    overrides: tuple[str, ...] = ()
    workspace: Path = WORKSPACE
    as_json: bool = False
    trusts: bool = False

    @property
    def place(self) -> Path:
        """The workspace's absolute path; raises RecipeError where it can be none."""
        return workspace_at(self.workspace)

    @property
    def set_words(self) -> list[str]:
        """How the changes of the recipe are typed."""
        return [word for override in self.overrides for word in ("--set", override)]

    def varied(self, changes: Iterable[str]) -> "Given":
        return self._replace(overrides=(*self.overrides, *changes))

    def load(self) -> "LoadedRecipe":
        """The recipe of a file, a shipped one or that of a run, changed as --set says; raises RecipeError."""
        from kdpipe.pipeline.runs import all_runs, named_run
        from kdpipe.recipe.file import load_recipe, shipped_path

        recipe, path = self.recipe, Path(self.recipe)
        if not recipe:
            raise RecipeError("'': names no recipe", hint="kdpipe recipes lists those that are shipped")
        if place_of(path).is_file() or path.suffix in (".yaml", ".yml") or "/" in recipe:
            return load_recipe(path, self.overrides)
        if (run := named_run(self.place, recipe)) is not None:
            return run.loaded(self.overrides)
        try:
            return load_recipe(shipped_path(recipe), self.overrides)
        except RecipeError as error:
            if path.exists():  # a folder, which the error of reading it says
                return load_recipe(path, self.overrides)
            names = ", ".join(one.name for one in all_runs(self.place)[:MAX_NAMES])
            raise RecipeError(
                error.message,
                hint=f"{error.hint}; runs in {self.workspace}: {names}" if names else error.hint,
            ) from None

    def open(self) -> "Project":
        """The recipe's project in the workspace, to read; nothing is made or fetched. Raises RecipeError."""
        from kdpipe.pipeline.project import read_project

        project = read_project(self.load(), self.place)
        if project.is_older:
            say(
                f"{project.run.name}: made by an older kdpipe, and shown as that made it; kdpipe run would perform "
                "its steps again, under new names in the store"
            )
        return project

    def run_folder(self) -> "RunFolder":
        """The folder of a run by its name, or of a recipe's run; raises RecipeError where there is none."""
        from kdpipe.pipeline.runs import named_run

        if not self.overrides and (named := named_run(self.place, self.recipe)) is not None:
            return named
        folder = self.open().run
        if not folder.path.exists():
            raise RecipeError(f"{folder.name}: nothing was run yet", hint=f"kdpipe run {self.recipe}")
        return folder

    def command(self, *words: str) -> str:
        """A command line of kdpipe for the same workspace."""
        place = [] if self.workspace == WORKSPACE else ["--workspace", str(self.workspace)]
        return shlex.join(["kdpipe", *words, *place])

    def show(self, document: object, text: str) -> None:
        """Prints the command's result: with --json the document, else the text."""
        print_result(document, text, as_json=self.as_json)


def on_recipe(command: Callable[Concatenate[Given, Own], None]) -> Callable[..., None]:
    """The command as it is typed: RECIPE, --set, --workspace and --json stand for its first parameter."""

    def typed(
        recipe: RecipeArgument,
        overrides: SetOption = None,
        workspace: WorkspaceOption = WORKSPACE,
        as_json: JsonOption = False,
        *args: Own.args,
        **own: Own.kwargs,
    ) -> None:
        command(Given(recipe, tuple(overrides or ()), workspace, as_json), *args, **own)

    recipe, *shared = list(inspect.signature(typed).parameters.values())[:4]
    _, *own = inspect.signature(command).parameters.values()
    parameters = [recipe, *own, *shared]
    functools.update_wrapper(typed, command)
    typed.__annotations__ = {one.name: one.annotation for one in parameters}
    typed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # which typer reads
    return typed
