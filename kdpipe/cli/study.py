"""What compares runs: those that exist, the control arms of a recipe, and any runs made as one study."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdpipe.cli.one_run import run_one
from kdpipe.cli.parameters import (
    WORKSPACE,
    JsonOption,
    RecipeArgument,
    SetOption,
    WorkspaceOption,
    load_given,
    open_given,
    recipe_names,
    run_given,
)
from kdpipe.cli.terminal import inert, print_error, print_json, say
from kdpipe.errors import Interrupted, KdpipeError, StepError

if TYPE_CHECKING:
    from kdpipe.pipeline.runner import Request
    from kdpipe.pipeline.runs import RunFolder
    from kdpipe.results.comparison import ComparisonRow
    from kdpipe.results.studies import ArmRun, StudyKind
    from kdpipe.tracking.memory import Status


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Names of runs in the workspace, or recipes.",
            autocompletion=recipe_names,
        ),
    ],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    overrides: SetOption = None,
    workspace: WorkspaceOption = WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Compare runs with the first one.

    Shows accuracy, paired difference and cost. Each run counts with its last evaluated student. Runs that differ
    only in their seed are one row. --set changes every recipe given.

    Example: kdpipe compare quickstart-b4335f0f quickstart-3f1b2c4d
    """
    from kdpipe.results.comparison import compare as rows_of
    from kdpipe.results.comparison import comparison_json, read_contender

    folders = [run_given(run, overrides, workspace) for run in dict.fromkeys(runs)]
    rows = rows_of([read_contender(folder) for folder in folders])
    if as_json:
        print_json(comparison_json(rows))
        return
    print_rows(rows, markdown=markdown)


def arms(
    recipe: RecipeArgument,
    seeds: Annotated[int, typer.Option(min=1, help="How many, from the recipe's own seed on.")] = 3,
    which: Annotated[
        str, typer.Option("--arms", metavar="A,B", help="Which arms, in the order of the table.")
    ] = "kd,rl,kdrl,shuffled-teacher,self-teacher",
    rounds: Annotated[int | None, typer.Option(min=1, help="Only the first N rounds of each run.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the runs and what they need; run none.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    overrides: SetOption = None,
    workspace: WorkspaceOption = WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe's control arms on several seeds.

    Their comparison shows where a gain comes from. Each arm is compared with student 0. Arms: kd, rl, kdrl (both),
    shuffled-teacher (the scores of another prompt's completion) and self-teacher (the student itself). Each is an
    ordinary run; they share what does not depend on the arm. Repeating the command resumes.

    Example: kdpipe arms quickstart --seeds 3 --set rollout.samples=4 --set rollout.prompts=32
    """
    from kdpipe.results.studies import arm_runs, parse_arms

    given = tuple(overrides or ())
    study = arm_runs(load_given(recipe, list(given), workspace).recipe, parse_arms(which), seeds=seeds)
    if dry_run:
        _print_forecast(recipe, given, study, workspace, rounds=rounds, as_json=as_json)
    else:
        _run_arms(recipe, given, study, workspace, rounds=rounds, markdown=markdown, as_json=as_json)


def _print_forecast(
    recipe: str,
    given: tuple[str, ...],
    study: "list[ArmRun]",
    workspace: Path,
    *,
    rounds: int | None,
    as_json: bool,
) -> None:
    from dataclasses import asdict

    from kdpipe.results.studies import forecast

    projects = [open_given(recipe, [*given, *one.overrides], workspace) for one in study]
    found = forecast(projects, rounds=rounds)
    named = list(zip(study, projects, found, strict=True))
    if as_json:
        print_json(
            [
                {
                    "arm": one.arm,
                    "seed": one.seed,
                    "run": project.run.name,
                    "set": one.overrides,
                    **asdict(needs),
                }
                for one, project, needs in named
            ]
        )
        return
    lines = [
        f"{one.arm:<16}  seed {one.seed}  {project.run.name}  "
        f"{needs.steps:,} steps, {needs.todo - needs.shared:,} to do"
        + (f", {needs.shared:,} more shared with runs above" if needs.shared else "")
        for one, project, needs in named
    ]
    total = sum(needs.todo - needs.shared for needs in found)
    print("\n".join([*lines, f"{len(study)} runs, {total:,} steps to do in all"]))


def _run_arms(
    recipe: str,
    given: tuple[str, ...],
    study: "list[ArmRun]",
    workspace: Path,
    *,
    rounds: int | None,
    markdown: bool,
    as_json: bool,
) -> None:
    from kdpipe.pipeline.runner import Request
    from kdpipe.results.comparison import read_contender
    from kdpipe.results.studies import arm_rows

    runs = [(f"{one.arm}, seed {one.seed}", [*given, *one.overrides]) for one in study]

    def table(done: "dict[int, RunFolder]") -> "list[ComparisonRow]":
        """The arms in their order, against the students before training."""
        ended = [(study[number].arm, read_contender(folder)) for number, folder in done.items()]
        order = list(dict.fromkeys(one.arm for one in study))
        ended.sort(key=lambda pair: order.index(pair[0]))
        first = {study[number].seed: folder for number, folder in reversed(done.items())}
        before = [read_contender(folder, last_round=0) for _, folder in sorted(first.items())]
        return arm_rows(ended, before)

    run_study(
        "arms",
        recipe,
        runs,
        workspace,
        Request(rounds=rounds),
        compare=table,
        markdown=markdown,
        as_json=as_json,
    )


# ------------------------------------------------------------------------------------- several runs as one


def run_study(
    kind: "StudyKind",
    recipe: str,
    runs: Sequence[tuple[str, list[str]]],
    workspace: Path,
    request: "Request",
    *,
    compare: "Callable[[dict[int, RunFolder]], Sequence[ComparisonRow]]",
    markdown: bool,
    as_json: bool,
) -> None:
    """Runs each of (name, overrides) as one study; prints and keeps the comparison of those that ended.

    `compare` is given their folders by their place. Raises StepError where some failed.
    """
    from kdpipe.cli.comparison_table import markdown_lines
    from kdpipe.pipeline.runs import run_folder
    from kdpipe.results.comparison import comparison_json
    from kdpipe.results.studies import make_study
    from kdpipe.store.locks import run_lock
    from kdpipe.tracking import begin_study, end_study

    # a mistake in the last one is reported before the first one costs anything
    recipes = [load_given(recipe, changes, workspace).recipe for _, changes in runs]
    place, first = workspace.resolve(), recipes[0]
    names = {run_folder(place, one).name: label for one, (label, _) in zip(recipes, runs, strict=True)}
    study = make_study(place, kind, recipe=first.name, runs=names)
    status: Status = "FAILED"
    with run_lock(study.path):
        study.event("study started")
        begin_study(study, first.tracking)
        try:
            done, failed = _run_each(recipe, runs, workspace, request, as_json=as_json)
            rows = compare(done) if done else []
            study.keep(comparison_json(rows), markdown_lines(rows) if rows else [], failed)
            _print_study(rows, failed, len(runs), markdown=markdown, as_json=as_json)
            status = "FINISHED"
        except (Interrupted, KeyboardInterrupt):
            status = "KILLED"
            raise
        finally:
            study.event("study ended", status=status)
            if trouble := end_study(study, first.tracking, status):
                say(
                    f"MLflow: not all of the study is mirrored yet: {trouble}; the next command goes on with it"
                )


def _run_each(
    recipe: str,
    runs: Sequence[tuple[str, list[str]]],
    workspace: Path,
    request: "Request",
    *,
    as_json: bool,
) -> "tuple[dict[int, RunFolder], list[str]]":
    """Runs each of (name, overrides): folders of those that ended, by place, and names of the others."""
    done: dict[int, RunFolder] = {}
    failed: list[str] = []
    for number, (name, changes) in enumerate(runs):
        say(f"\n{number + 1} of {len(runs)}: {name}")
        try:
            done[number] = run_one(recipe, changes, workspace, lambda _project: request, as_json=as_json).run
        except Interrupted:
            raise
        except KdpipeError as error:
            print_error(error)
            failed.append(name)
    return done, failed


def _print_study(
    rows: "Sequence[ComparisonRow]", failed: list[str], count: int, *, markdown: bool, as_json: bool
) -> None:
    """The comparison of the runs that ended; raises StepError where some failed."""
    from kdpipe.results.comparison import comparison_json

    if as_json:
        print(json.dumps({"event": "comparison", "rows": comparison_json(rows)}, sort_keys=True))
    elif rows:
        print()
        print_rows(rows, markdown=markdown)
    if failed:
        raise StepError(f"{len(failed)} of {count} runs failed: {'; '.join(failed)}")


def print_rows(rows: "Sequence[ComparisonRow]", *, markdown: bool) -> None:
    """Prints a comparison as text, or as Markdown."""
    from kdpipe.cli.comparison_table import markdown_lines, text_lines

    lines = markdown_lines(rows) if markdown else text_lines(rows)
    print("\n".join(map(inert, lines)))
