"""Commands to start from: the shipped recipes, the pages, a folder of your own, the schema."""

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from kdpipe.cli.parameters import JsonOption, folder_at, path_named
from kdpipe.cli.terminal import print_json, print_result
from kdpipe.errors import RecipeError
from kdpipe.recipe.place import place_of


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this one.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the shipped recipes, or print one.

    Example: kdpipe recipes quickstart
    """
    from kdpipe.recipe.file import shipped, shipped_path

    _print(shipped() if name is None else shipped_path(name), name, as_json=as_json)


def docs(
    page: Annotated[str | None, typer.Argument(metavar="[PAGE]", help="Print this one.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the pages of the documentation, or print one.

    Example: kdpipe docs objectives
    """
    pages = {path.stem: path for path in sorted(Path(import_module("kdpipe.docs").__path__[0]).glob("*.md"))}
    if page is not None and page not in pages:
        raise RecipeError(f"{page}: no such page", hint=f"pages: {', '.join(pages)}")
    _print(list(pages.values()) if page is None else pages[page], page, as_json=as_json)


def _print(shown: Path | list[Path], name: str | None, *, as_json: bool) -> None:
    """Prints the file called `name`, or lists the files with their titles."""
    from kdpipe.recipe.file import title

    if isinstance(shown, Path):
        text = shown.read_text(encoding="utf-8")
        print_result({"name": name, "text": text}, text, as_json=as_json, end="")
        return
    found = {path.stem: title(path) for path in shown}
    width = max(map(len, found), default=0)
    lines = [f"{stem:<{width}}  {line}" for stem, line in found.items()]
    print_result(found, "\n".join(lines), as_json=as_json)


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", parser=path_named, help="The folder to make.")],
    recipe: Annotated[str, typer.Option("--recipe", help="The shipped recipe to start from.")] = "quickstart",
    as_json: JsonOption = False,
) -> None:
    """Start a project: a folder with a recipe of your own.

    Example: kdpipe init my-distillation --recipe gsm8k-qwen3-opd
    """
    from kdpipe.recipe.file import shipped_path
    from kdpipe.store.target import write_file

    target = folder / "recipe.yaml"
    place = place_of(folder_at(folder) / target.name)
    if place.exists():
        raise RecipeError(f"{target}: exists already", hint="name another folder")
    write_file(place, shipped_path(recipe).read_bytes())
    text = f"{target}: edit it, then\n  kdpipe check {target}\n  kdpipe run {target}"
    print_result({"recipe": str(target)}, text, as_json=as_json)


def schema(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the page `kdpipe docs recipe` instead.")
    ] = False,
) -> None:
    """Print the JSON Schema of recipes, for editors.

    Example: kdpipe schema > recipe.schema.json
    """
    from kdpipe.recipe.reference import described_schema, reference

    if markdown:
        print(reference(), end="")
        return
    print_json(described_schema())
