"""One run, from the typed arguments to the lines printed at its end."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kdpipe.cli.parameters import Given
from kdpipe.cli.stream import outlive_reader
from kdpipe.cli.terminal import painter, print_event, shown
from kdpipe.cli.trust import require_trust

if TYPE_CHECKING:
    from kdpipe.pipeline.project import Project
    from kdpipe.pipeline.runner import Request
    from kdpipe.recipe.file import LoadedRecipe


def run_one(given: Given, request: "Callable[[Project], Request]") -> "Project":
    """The project after its run, whose outcome is printed; `request` is called when the project is open."""
    from kdpipe.cli.display import JsonLines, Terminal
    from kdpipe.pipeline.runner import run as run_steps
    from kdpipe.report.writing import renew_report
    from kdpipe.tracking.mirror import open_mirror

    outlive_reader()
    display = JsonLines() if given.as_json else Terminal()
    try:
        loaded = given.load()
        require_trust(loaded, given.place, trusts=given.trusts)
        commands = commands_again(loaded, given)
        project = run_steps(
            loaded,
            given.place,
            request,
            display=display,
            open_mirror=open_mirror,
            report=lambda project, digests: renew_report(
                project, digests, commands=commands, warn=display.warn
            ),
        )
    finally:
        display.stop()
    _print_outcome(project, given)
    return project


def commands_again(loaded: "LoadedRecipe", given: Given) -> list[str]:
    """The commands that repeat this run and look further into it."""
    from kdpipe.recipe.file import shipped

    recipe = given.recipe
    if loaded.path in shipped():
        recipe = loaded.path.stem
    elif Path(recipe).resolve() != loaded.path:  # a run's name, which says nothing elsewhere
        recipe = shown(loaded.path)
    sets = given._replace(overrides=loaded.overrides).set_words
    tails = (["run"], ["verify", "--full"], ["samples", "--worst"])
    return [given.command(command, recipe, *sets, *flags) for command, *flags in tails]


def _print_outcome(project: "Project", given: Given) -> None:
    from kdpipe.cli.display import change_lines, outcome_lines
    from kdpipe.report.writing import report_path
    from kdpipe.results.evaluations import Evaluations, summaries_of

    evaluated, lines = Evaluations(summaries_of(project, project.plan.steps)), []
    rounds = project.recipe.rounds
    if given.as_json:
        evaluations = {one.label: one.summary for one in evaluated.shown}
        result = evaluated.result(rounds)
        folder = str(project.run.path)
        print_event("end", run=project.run.name, folder=folder, evaluations=evaluations, result=result)
        return
    if evaluated.shown:
        changes = [] if evaluated.after is None else change_lines(evaluated.after, rounds)
        lines = [*outcome_lines(evaluated.shown, painter(sys.stdout)), *changes, ""]
    lines += [f"artifacts  {shown(project.run.path)}"]
    if (page := report_path(project)).exists():
        lines.append(f"report     {shown(page)}")
    recipe = project.run.name if given.overrides else given.recipe
    lines += [
        f"next       {given.command('samples', recipe, '--wrong' if project.recipe.is_graded else '--worst')}",
        f"           {given.command('export', recipe, 'my-student')}",
        f"           {given.command('ui')}",
    ]
    print("\n".join(lines))
