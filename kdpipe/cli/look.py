"""Commands that look at a run: how far it is, what its student wrote, the pages about it."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from kdpipe.cli.one_run import commands_again
from kdpipe.cli.parameters import (
    WORKSPACE,
    Given,
    RoundOption,
    WorkspaceOption,
    on_recipe,
    output_option,
    page_at,
    recipe_names,
    workspace_at,
)
from kdpipe.cli.terminal import painter, print_json, shown
from kdpipe.errors import PreflightError, RecipeError


@on_recipe
def status(
    given: Given,
    check_only: Annotated[bool, typer.Option("--check", help="Exit 6 when work is left.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh each second while it runs.")] = False,
) -> None:
    """Show how far a run is, and how fast it goes.

    Example: kdpipe status recipes/quickstart.yaml --watch
    """
    from kdpipe.cli.overview import overview, status_lines
    from kdpipe.cli.terminal import watch_lines

    project, paint = given.open(), painter(sys.stdout)
    if watch and given.as_json:
        raise RecipeError("--watch and --json: one of them", hint="--json prints one document and ends")
    if watch:

        def look() -> tuple[list[str], bool]:
            now = overview(project)
            return status_lines(now, paint), now.running

        watch_lines(look)
    found = overview(project)
    if given.as_json:
        print_json(found.to_json())
    elif not watch:
        print("\n".join(status_lines(found, paint)))
    if check_only and found.left:
        raise typer.Exit(6)


@on_recipe
def samples(
    given: Given,
    round_number: RoundOption = None,
    wrong: Annotated[bool, typer.Option("--wrong", help="Only wrong answers.")] = False,
    flipped: Annotated[
        bool, typer.Option("--flipped", help="Held-out answers right at first and wrong now, or the reverse.")
    ] = False,
    worst: Annotated[
        bool, typer.Option("--worst", help="Those with the largest disagreement about a token first.")
    ] = False,
    held_out: Annotated[
        bool,
        typer.Option("--held-out", help="Held-out samples that the teacher scored, not those trained on."),
    ] = False,
    limit: Annotated[int, typer.Option(min=1, help="How many.")] = 5,
) -> None:
    """Show what the student wrote, token by token.

    Tokens are coloured where the teacher disagrees. Orange: the student is surer than the teacher; blue: the
    teacher is. Without colours the tokens that they disagree about most are listed with their numbers.

    Example: kdpipe samples recipes/quickstart.yaml --wrong --worst --limit 3
    """
    from kdpipe.cli.terminal import is_coloured
    from kdpipe.cli.transcript import transcript_lines
    from kdpipe.results.samples import Choice, choose_samples, samples_json

    choice = Choice(round_number, wrong, flipped, worst, held_out, limit)
    found = choose_samples(given.open(), choice)
    if given.as_json:
        print_json(samples_json(found))
        return
    print("\n".join(transcript_lines(found, painter(sys.stdout), coloured=is_coloured(sys.stdout))))


@on_recipe
def report(
    given: Given,
    output: Annotated[
        Path | None, output_option("Where to write it, - for stdout; else into the run's folder.")
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RUN",
            help="Compare it with this run, as `compare` does; repeatable.",
            autocompletion=recipe_names,
        ),
    ] = None,
) -> None:
    """Write one HTML page about a run.

    It shows verdict, curves, costs, and completions token by token. `run` writes it too, at its end. The page loads
    nothing, so it can be sent on: it holds texts of model and data.

    Example: kdpipe report recipes/quickstart.yaml -o report.html
    """
    from kdpipe.report.writing import report_path, write_report
    from kdpipe.store.target import STDOUT

    project = given.open()
    path = report_path(project) if output is None else page_at(output, as_json=given.as_json)
    if all(state.verdict == "to do" for state in project.states()):
        raise RecipeError(f"{project.run.name}: no step is done yet", hint=f"kdpipe run {given.recipe}")
    others = [Given(run, workspace=given.workspace).run_folder() for run in dict.fromkeys(against or ())]
    size = write_report(project, path, commands=commands_again(project.loaded, given), others=others)
    if path != STDOUT:
        given.show({"report": str(path), "bytes": size}, f"{shown(path.resolve())}  {size / 1e6:.2f} MB")


def ui(
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The first port to try.")] = 5000,
    workspace: WorkspaceOption = WORKSPACE,
) -> None:
    """Open MLflow's own page over this workspace's runs.

    Example: kdpipe ui --port 5001
    """
    from kdpipe.tracking.mirror import settle
    from kdpipe.tracking.page import serve_ui

    settle(workspace_at(workspace))
    code = serve_ui(workspace_at(workspace), host, port)
    if code:
        raise PreflightError(f"MLflow's page ended with exit status {code}")
