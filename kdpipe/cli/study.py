"""What compares runs: those that exist, the control arms of a recipe, and any runs made as one study."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdpipe.cli.one_run import run_one
from kdpipe.cli.parameters import (
    WORKSPACE,
    Given,
    JsonOption,
    OutputOption,
    SetOption,
    WorkspaceOption,
    on_recipe,
    page_at,
    recipe_names,
)
from kdpipe.cli.terminal import print_error, print_event, print_result, say, shown
from kdpipe.cli.trust import TrustOption
from kdpipe.errors import Interrupted, KdpipeError, RecipeError, StepError
from kdpipe.results.visible_text import visible
from kdpipe.store.target import STDOUT

if TYPE_CHECKING:
    from kdpipe.pipeline.runner import Request
    from kdpipe.pipeline.runs import RunFolder
    from kdpipe.results.comparison import ComparisonRow
    from kdpipe.results.studies import ArmRun, StudyKind
    from kdpipe.tracking.memory import Status

    Show = Callable[[Sequence[ComparisonRow], Sequence[str]], None]


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...", help="Names of runs in the workspace, or recipes.", autocompletion=recipe_names
        ),
    ],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    output: OutputOption = None,
    overrides: SetOption = None,
    workspace: WorkspaceOption = WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Compare runs with the first one.

    Shows accuracy and held-out reverse KL, what changed since the student before training, the difference to the first
    run, and cost. Each run counts with its last evaluated student. Runs that differ only in their seed are one row.
    --set changes every recipe given.

    Example: kdpipe compare quickstart-b4335f0f quickstart-3f1b2c4d
    """
    from kdpipe.results.comparison import compare as rows_of
    from kdpipe.results.contender import read_contender
    from kdpipe.results.table import comparison_json, notes_on

    page = None if output is None else page_at(output, as_json=as_json)
    changes = tuple(overrides or ())
    folders = (Given(run, changes, workspace).run_folder() for run in runs)
    rows = rows_of(
        [read_contender(folder) for folder in {folder.path: folder for folder in folders}.values()]
    )
    if page is not None:
        given = Given(runs[0], changes, workspace)
        names = [row.label for row in rows if not row.is_before]
        title = " against ".join(names) if len(names) < 3 else f"{names[0]} and {len(names) - 1} others"
        _write_page(page, rows, given, title=title, command=["compare", *runs, *given.set_words])
    if page != STDOUT:
        found = {"rows": comparison_json(rows), "notes": notes_on(rows)}
        print_result(found, table_text(rows, markdown=markdown), as_json=as_json)


def _write_page(
    page: Path,
    rows: "Sequence[ComparisonRow]",
    given: Given,
    *,
    title: str,
    command: Sequence[str],
    missing: Sequence[str] = (),
) -> None:
    """Writes the page of a comparison and says where it is."""
    from kdpipe.report.writing import write_comparison

    commands = [given.command(*command)]
    size = write_comparison(page, rows, given.place, title=title, commands=commands, missing=missing)
    if page != STDOUT:
        say(f"{shown(page.resolve())}  {size / 1e6:.2f} MB")


@on_recipe
def arms(
    given: Given,
    seeds: Annotated[int, typer.Option(min=1, help="How many, from the recipe's own seed on.")] = 3,
    which: Annotated[
        str | None,
        typer.Option(
            "--arms",
            metavar="A,B",
            help="Which arms, in the order of the table.",
            show_default="all that the recipe can have",
        ),
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Only the first N rounds of each run.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the runs and what they need; run none.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    output: OutputOption = None,
    trust: TrustOption = False,
) -> None:
    """Run a recipe's control arms on several seeds.

    Their comparison shows where a gain comes from. Each arm is compared with student 0. Arms: kd, rl, kdrl (both),
    shuffled-teacher (the scores of another prompt's completion), self-teacher (the student itself) and
    constant-advantage (one fixed negative signal at every token). Each is an ordinary run; they share what does not
    depend on the arm. Repeating the command resumes.

    Example: kdpipe arms quickstart --seeds 3 --set rollout.samples=4 --set rollout.prompts=32
    """
    from kdpipe.results.studies import arm_runs, parse_arms, possible_arms

    given = given._replace(trusts=trust)
    loaded = given.load()
    wanted, left_out = (parse_arms(which), []) if which is not None else possible_arms(loaded)
    for error in left_out:
        say(f"left out: {error.message}\n  {error.hint}")
    study = arm_runs(loaded, wanted, seeds=seeds)
    if dry_run:
        _print_forecast(given, study, rounds)
        return
    reasons = [error.message for error in left_out]
    show = _arms_page(output, given, {"--seeds": seeds, "--arms": which, "--rounds": rounds}, reasons)
    _run_arms(given, study, rounds, markdown=markdown, left_out=reasons, show=show)


def _arms_page(
    output: Path | None, given: Given, flags: Mapping[str, object], left_out: Sequence[str]
) -> "Show":
    """What writes the page, where one is asked for; raises RecipeError where none can be."""
    if output is None:
        return lambda _rows, _failed: None
    if output == STDOUT:
        raise RecipeError("-o -: what the runs say goes to stdout too", hint="name a file: -o arms.html")
    page = page_at(output, as_json=given.as_json)
    again = [word for flag, value in flags.items() if value is not None for word in (flag, str(value))]

    def show(rows: "Sequence[ComparisonRow]", failed: Sequence[str]) -> None:
        title = f"{given.load().recipe.name}: control arms"
        command = ["arms", given.recipe, *again, *given.set_words]
        missing = [*left_out, *(f"{label} failed" for label in failed)]
        _write_page(page, rows, given, title=title, command=command, missing=missing)

    return show


def _print_forecast(given: Given, study: "list[ArmRun]", rounds: int | None) -> None:
    from dataclasses import asdict

    from kdpipe.results.studies import forecast

    projects = [given.varied(one.overrides).open() for one in study]
    found = forecast(projects, rounds=rounds)
    documents, lines = [], []
    for one, project, needs in zip(study, projects, found, strict=True):
        run, shared = project.run.name, f", {needs.shared:,} more shared with runs above"
        documents.append(
            {"arm": one.arm, "seed": one.seed, "run": run, "set": one.overrides, **asdict(needs)}
        )
        lines.append(
            f"{one.arm:<18}  seed {one.seed}  {run}  {needs.steps:,} steps, {needs.todo - needs.shared:,} to do"
            f"{shared if needs.shared else ''}"
        )
    total = sum(needs.todo - needs.shared for needs in found)
    given.show(documents, "\n".join([*lines, f"{len(study)} runs, {total:,} steps to do in all"]))


def _run_arms(
    given: Given,
    study: "list[ArmRun]",
    rounds: int | None,
    *,
    markdown: bool,
    left_out: Sequence[str],
    show: "Show",
) -> None:
    from kdpipe.pipeline.runner import Request
    from kdpipe.results.contender import read_contender
    from kdpipe.results.studies import arm_rows

    def table(done: "dict[int, RunFolder]") -> "list[ComparisonRow]":
        """The students before training, then the arms in their order."""
        ended = [(study[number].arm, read_contender(folder)) for number, folder in done.items()]
        order = list(dict.fromkeys(one.arm for one in study))
        return arm_rows(sorted(ended, key=lambda pair: order.index(pair[0])))

    runs = [(f"{one.arm}, seed {one.seed}", given.varied(one.overrides)) for one in study]
    run_study(
        "arms", runs, Request(rounds=rounds), compare=table, markdown=markdown, left_out=left_out, show=show
    )


def run_study(
    kind: "StudyKind",
    runs: Sequence[tuple[str, Given]],
    request: "Request",
    *,
    compare: "Callable[[dict[int, RunFolder]], Sequence[ComparisonRow]]",
    markdown: bool,
    left_out: Sequence[str] = (),
    show: "Show" = lambda _rows, _failed: None,
) -> None:
    """Performs each (label, run) as one study; prints and keeps the comparison of those that ended.

    `compare` is given their folders by their place, and `show` what it made of them with the labels of those that
    failed. Raises StepError where some failed.
    """
    from kdpipe.cli.comparison_table import markdown_lines
    from kdpipe.pipeline.runs import run_folder
    from kdpipe.results.studies import make_study
    from kdpipe.results.table import comparison_json, notes_on
    from kdpipe.store.locks import run_lock
    from kdpipe.tracking.mirror import begin_study, end_study

    # a mistake in the last one is reported before the first one costs anything
    recipes = [given.load().recipe for _, given in runs]
    given, first = runs[0][1], recipes[0]
    place = given.place
    names = {run_folder(place, one).name: label for one, (label, _) in zip(recipes, runs, strict=True)}
    study = make_study(place, kind, recipe=first.name, runs=names, left_out=left_out)
    status: Status = "FAILED"
    with run_lock(study.path):
        study.event("study started")
        begin_study(study, first.tracking)
        try:
            done, failed = _run_each(runs, request)
            rows = compare(done) if done else []
            found = comparison_json(rows)
            study.keep(found, markdown_lines(rows) if rows else [], failed)
            if given.as_json:
                print_event("comparison", rows=found, notes=notes_on(rows), left_out=[*left_out])
            elif rows:
                print(f"\n{table_text(rows, markdown=markdown)}")
            if rows:
                show(rows, failed)
            if failed:
                raise StepError(f"{len(failed)} of {len(runs)} runs failed: {'; '.join(failed)}")
            status = "FINISHED"
        except (Interrupted, KeyboardInterrupt):
            status = "KILLED"
            raise
        finally:
            study.event("study ended", status=status)
            if trouble := end_study(
                study, first.tracking, status, keys=frozenset().union(*(one.key_names for one in recipes))
            ):
                say(f"MLflow: not all of the study is mirrored yet: {trouble}")


def _run_each(
    runs: Sequence[tuple[str, Given]], request: "Request"
) -> "tuple[dict[int, RunFolder], list[str]]":
    """Performs each run: folders of those that ended, by place, and labels of the others."""
    done: dict[int, RunFolder] = {}
    failed: list[str] = []
    for number, (label, given) in enumerate(runs):
        say(f"\n{number + 1} of {len(runs)}: {label}")
        try:
            done[number] = run_one(given, lambda _project: request).run
        except Interrupted:
            raise
        except KdpipeError as error:
            print_error(error)
            failed.append(label)
    return done, failed


def table_text(rows: "Sequence[ComparisonRow]", *, markdown: bool) -> str:
    """A comparison as text, or as Markdown."""
    from kdpipe.cli.comparison_table import markdown_lines, text_lines

    lines = markdown_lines(rows) if markdown else text_lines(rows)
    return "\n".join(map(visible, lines))
