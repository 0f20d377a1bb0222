"""One run, from the typed arguments to the lines printed at its end."""

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kdpipe.cli.parameters import WORKSPACE, load_given
from kdpipe.cli.terminal import shown

if TYPE_CHECKING:
    from kdpipe.pipeline.project import Project
    from kdpipe.pipeline.runner import Request
    from kdpipe.recipe.file import LoadedRecipe
    from kdpipe.store.step import Fields


def run_one(
    recipe: str,
    overrides: list[str] | None,
    workspace: Path,
    request: "Callable[[Project], Request]",
    *,
    as_json: bool,
) -> "Project":
    """The project after its run, whose outcome is printed; `request` is called when the project is open."""
    from kdpipe.cli.display import JsonLines, Terminal
    from kdpipe.pipeline.runner import run as run_steps
    from kdpipe.report.writing import renew_report
    from kdpipe.tracking import open_mirror

    display = JsonLines() if as_json else Terminal()
    try:
        loaded = load_given(recipe, overrides, workspace)
        commands = commands_again(loaded, recipe, workspace)
        project = run_steps(
            loaded,
            workspace.resolve(),
            request,
            display=display,
            open_mirror=open_mirror,
            report=lambda project, digests: renew_report(
                project, digests, commands=commands, warn=display.warn
            ),
        )
    finally:
        display.stop()
    if as_json:
        print(json.dumps({"event": "end", **_outcome(project)}, sort_keys=True))
    else:
        _print_outcome(project, project.run.name if overrides else recipe, workspace)
    return project


def commands_again(loaded: "LoadedRecipe", recipe: str, workspace: Path) -> list[str]:
    """The commands that repeat this run and look further into it; `recipe` is as typed, or a run's name."""
    from kdpipe.recipe.file import shipped

    if loaded.path in shipped():
        recipe = loaded.path.stem
    elif Path(recipe).resolve() != loaded.path:  # a run's name, which says nothing elsewhere
        recipe = shown(loaded.path)
    sets = [word for override in loaded.overrides for word in ("--set", override)]
    place = [] if workspace == WORKSPACE else ["--workspace", str(workspace)]
    tails = (["run"], ["verify", "--full"], ["samples", "--worst"])
    return [shlex.join(["kdpipe", command, recipe, *sets, *place, *flags]) for command, *flags in tails]


def _outcome(project: "Project") -> dict[str, object]:
    return {
        "run": project.run.name,
        "folder": str(project.run.path),
        "evaluations": dict(_evaluations(project)),
    }


def _evaluations(project: "Project") -> list[tuple[str, "Fields"]]:
    """What to call the model of each evaluation that is shown, and its summary.json."""
    from kdpipe.pipeline.project import summary_of
    from kdpipe.recipe.roles import STUDENT
    from kdpipe.store.stage import Stage

    done = [
        (step, summary)
        for step in project.plan.steps
        if step.stage == Stage.EVALUATE and (summary := summary_of(project, step.id)) is not None
    ]
    of_student = [(step, summary) for step, summary in done if step.subject == STUDENT]
    rows = [("student before", summary) for step, summary in of_student if step.round == 0]
    rows += [
        (f"student after round {step.round}", summary) for step, summary in of_student[-1:] if step.round
    ]
    return [*rows, *((step.subject, summary) for step, summary in done if step.subject != STUDENT)]


def _print_outcome(project: "Project", recipe: str, workspace: Path) -> None:
    from kdpipe.cli.display import change_lines, outcome_lines
    from kdpipe.cli.terminal import painter
    from kdpipe.report.writing import report_path

    lines = []
    rows = [(label, _numbers(summary)) for label, summary in _evaluations(project)]
    if rows:
        after = [numbers for label, numbers in rows if label.startswith("student after")]
        changes = change_lines(after[-1]) if after else []
        lines = [*outcome_lines(rows, painter(sys.stdout)), *changes, ""]
    place = "" if workspace == WORKSPACE else f" --workspace {shlex.quote(str(workspace))}"
    lines += [f"artifacts  {shown(project.run.path)}"]
    if (page := report_path(project)).exists():
        lines.append(f"report     {shown(page)}")
    lines += [
        f"next       kdpipe samples {recipe} --wrong{place}",
        f"           kdpipe export {recipe} my-student{place}",
        f"           kdpipe ui{place}",
    ]
    print("\n".join(lines))


def _numbers(summary: "Fields") -> dict[str, float]:
    return {name: value for name, value in summary.items() if isinstance(value, int | float)}
