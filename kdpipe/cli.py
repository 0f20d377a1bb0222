"""The command line: parse, call, print. The only place that prints errors, and the only one that knows typer.

Results go to stdout, progress and errors to stderr. Nothing heavy is imported before a command needs it.
"""

import atexit
import functools
import gc as collector
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer

from kdpipe import __version__
from kdpipe.errors import (
    Interrupted,
    KdpipeError,
    PreflightError,
    RecipeError,
    StepError,
    is_machine_fault,
    machine_fault,
)

if TYPE_CHECKING:
    from kdpipe.arms import ArmRun
    from kdpipe.comparison import Row
    from kdpipe.overview import Overview
    from kdpipe.project import Project
    from kdpipe.recipe import Recipe
    from kdpipe.recipe_file import LoadedRecipe
    from kdpipe.runs import RunFolder
    from kdpipe.survey import State
    from kdpipe.terminal import Paint

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: rich would double the time that --help takes
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
    help="On-policy knowledge distillation of language models, one resumable step at a time.\n\n"
    "Example: kdpipe run quickstart",
)

Parameters = ParamSpec("Parameters")


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


def main() -> None:
    """Runs the command line; every expected failure becomes one message and its exit code."""
    # Starting makes many objects and hardly any garbage: looking for it takes a twentieth of `kdpipe plan`.
    collector.set_threshold(100_000, 50, 50)
    atexit.register(collector.freeze)  # nor is it looked for on the way out, another twentieth
    # pydantic would look for plugins in the metadata of every installed distribution.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "true")
    _ensure_home()
    app()


def _ensure_home() -> None:
    """Gives a user id without an account a home, as in a container: MLflow cannot be imported without one."""
    try:
        Path.home()
    except RuntimeError:
        import tempfile

        os.environ["HOME"] = os.environ.get("XDG_CACHE_HOME") or tempfile.gettempdir()


def reported(command: Callable[Parameters, None]) -> Callable[Parameters, None]:
    """Prints a KdpipeError as a message with what to do, and exits with its code."""

    @functools.wraps(command)
    def wrapper(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except KdpipeError as error:
            _print_error(error)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:  # before the run took over the signals
            _print_error(Interrupted(signal.SIGINT, "stopped before anything began"))
            raise typer.Exit(130) from None
        except BrokenPipeError:  # the reader of our output went away, as `| head` does
            raise typer.Exit(0) from None
        except OSError as error:
            if not is_machine_fault(error):
                raise
            _print_error(machine_fault(error))
            raise typer.Exit(1) from None

    return wrapper


def _print_error(error: KdpipeError) -> None:
    from kdpipe.terminal import inert, painter

    paint = painter(sys.stderr)
    stopped = error.exit_code > 128
    label = paint("stopped:", "yellow") if stopped else paint("error:", "red")
    lines = [f"{label} {inert(error.message)}"]
    if error.hint:
        lines.append(f"  {inert(error.hint)}")
    if error.exit_code in (1, 5, 130, 143) and len(sys.argv) > 1:
        program = Path(sys.argv[0]).name
        command = shlex.join(["kdpipe" if program == "__main__.py" else program, *sys.argv[1:]])
        lines.append(f"  everything finished is kept; to continue: {inert(command)}")
    print("\n".join(lines), file=sys.stderr)  # noqa: T201


def _print_json(value: Any) -> None:
    print(json.dumps(value, sort_keys=True, indent=1))  # noqa: T201


def _recipe_path(recipe: str) -> Path:
    path = Path(recipe)
    if path.exists() or path.suffix in (".yaml", ".yml") or "/" in recipe:
        return path
    from kdpipe.recipes_shipped import shipped_path

    return shipped_path(recipe)


def _load(recipe: str, overrides: list[str] | None) -> "LoadedRecipe":
    from kdpipe.recipe_file import load_recipe

    return load_recipe(_recipe_path(recipe), tuple(overrides or ()))


def _open(recipe: str, overrides: list[str] | None, workspace: Path) -> "Project":
    from kdpipe.project import open_project

    return open_project(_load(recipe, overrides), workspace.resolve())


# ------------------------------------------------------------------------------------------------- run


@app.command()
@reported
def run(
    recipe: RecipeArgument,
    rounds: Annotated[int | None, typer.Option(min=0, help="Only the first N rounds of the plan.")] = None,
    force: Annotated[
        list[str] | None,
        typer.Option(metavar="STEP", help="Perform a step again, as in rollout@3; repeatable."),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="A.B=C,D", help="A run for each value; several make a grid."),
    ] = None,
    overrides: SetOption = None,
    workspace: WorkspaceOption = WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Run every step that is not done. Repeating the command resumes.

    With --sweep every combination of the values is a run of its own, which share what does not depend on them; the
    comparison comes at the end, and a run that fails leaves the others to go on.

    Example: kdpipe run recipes/quickstart.yaml --set train.optimizer.learning_rate=1e-3
    """
    from kdpipe.runner import Request

    request = Request(rounds=rounds, force=tuple(force or ()))
    if sweep:
        _sweep(recipe, sweep, overrides, workspace, request, as_json=as_json)
    else:
        _run(recipe, overrides, workspace, lambda _project: request, as_json=as_json)


def _sweep(
    recipe: str,
    sweep: list[str],
    overrides: list[str] | None,
    workspace: Path,
    request: Any,
    *,
    as_json: bool,
) -> None:
    from kdpipe.comparison import compare as rows_of
    from kdpipe.comparison import read_contender
    from kdpipe.sweep import points

    grid = [(" ".join(point), [*(overrides or ()), *point]) for point in points(sweep)]
    done, failed = _run_each(recipe, grid, workspace, request, as_json=as_json)
    rows = rows_of([read_contender(folder) for folder in done.values()]) if done else []
    _print_study(rows, failed, len(grid), markdown=False, as_json=as_json)


def _run_each(
    recipe: str, runs: "Sequence[tuple[str, list[str]]]", workspace: Path, request: Any, *, as_json: bool
) -> "tuple[dict[int, RunFolder], list[str]]":
    """Runs each of (name, overrides): the folders of those that ended, by their place, and the names of the others."""
    for _, changes in runs:
        _load(recipe, changes)  # a mistake in the last one is told before the first one costs anything
    done: dict[int, RunFolder] = {}
    failed: list[str] = []
    for number, (name, changes) in enumerate(runs):
        _say(f"\n{number + 1} of {len(runs)}: {name}")
        try:
            done[number] = _run(recipe, changes, workspace, lambda _project: request, as_json=as_json).run
        except Interrupted:
            raise
        except KdpipeError as error:
            _print_error(error)
            failed.append(name)
    return done, failed


def _say(text: str) -> None:
    from kdpipe.terminal import inert

    print(inert(text), file=sys.stderr)  # noqa: T201


def _print_study(
    rows: "Sequence[Row]", failed: list[str], count: int, *, markdown: bool, as_json: bool
) -> None:
    """The comparison of the runs that ended; raises StepError where some failed."""
    from kdpipe.comparison_lines import comparison_json

    if as_json:
        print(json.dumps({"event": "comparison", "rows": comparison_json(rows)}, sort_keys=True))  # noqa: T201
    elif rows:
        print()  # noqa: T201
        _print_rows(rows, markdown=markdown)
    if failed:
        raise StepError(f"{len(failed)} of {count} runs failed: {'; '.join(failed)}")


def _print_rows(rows: "Sequence[Row]", *, markdown: bool) -> None:
    from kdpipe.comparison_lines import markdown_lines, text_lines
    from kdpipe.terminal import inert

    lines = markdown_lines(rows) if markdown else text_lines(rows)
    print("\n".join(map(inert, lines)))  # noqa: T201


def _run(
    recipe: str, overrides: list[str] | None, workspace: Path, request: Any, *, as_json: bool
) -> "Project":
    from kdpipe.report.writing import renew_report
    from kdpipe.runner import run as run_steps
    from kdpipe.terminal import JsonLines, Terminal
    from kdpipe.tracking import open_mirror

    display = JsonLines() if as_json else Terminal()
    commands = _commands_again(recipe, overrides, workspace)
    try:
        project = run_steps(
            _load(recipe, overrides),
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
        print(json.dumps({"event": "end", **_outcome(project)}, sort_keys=True))  # noqa: T201
    else:
        _print_outcome(project, recipe, workspace)
    return project


def _commands_again(recipe: str, overrides: list[str] | None, workspace: Path) -> list[str]:
    """What makes this run again, and what looks further into it, as it was typed."""
    sets = [word for override in overrides or () for word in ("--set", override)]
    place = [] if workspace == WORKSPACE else ["--workspace", str(workspace)]
    tails = (["run"], ["verify", "--full"], ["samples", "--worst"])
    return [shlex.join(["kdpipe", command, recipe, *sets, *place, *flags]) for command, *flags in tails]


def _evaluations(project: "Project") -> list[tuple[str, dict[str, Any] | None]]:
    from kdpipe.plan import STUDENT
    from kdpipe.project import summary_of

    done = [
        (step, summary)
        for step in project.plan.steps
        if step.stage == "evaluate" and (summary := summary_of(project, step.id)) is not None
    ]
    of_student = [(step, summary) for step, summary in done if step.subject == STUDENT]
    rows: list[tuple[str, dict[str, Any] | None]]
    rows = [("student before", summary) for step, summary in of_student if step.round == 0]
    rows += [
        (f"student after round {step.round}", summary) for step, summary in of_student[-1:] if step.round
    ]
    rows += [(step.subject, summary) for step, summary in done if step.subject != STUDENT]
    return rows


def _outcome(project: "Project") -> dict[str, Any]:
    return {
        "run": project.run.name,
        "folder": str(project.run.path),
        "evaluations": dict(_evaluations(project)),
    }


def _print_outcome(project: "Project", recipe: str, workspace: Path) -> None:
    from kdpipe.report.writing import report_path
    from kdpipe.terminal import change_lines, outcome_lines, painter

    lines = []
    rows = _evaluations(project)
    if rows:
        after = [summary for label, summary in rows if label.startswith("student after")]
        changes = change_lines(after[-1]) if after and after[-1] else []
        lines = [*outcome_lines(rows, painter(sys.stdout)), *changes, ""]
    place = "" if workspace == WORKSPACE else f" --workspace {shlex.quote(str(workspace))}"
    lines += [f"artifacts  {_shown(project.run.path)}"]
    if (page := report_path(project)).exists():
        lines.append(f"report     {_shown(page)}")
    lines += [
        f"next       kdpipe samples {recipe} --wrong{place}",
        f"           kdpipe export {recipe} my-student{place}",
        f"           kdpipe ui{place}",
    ]
    print("\n".join(lines))  # noqa: T201


def _shown(path: Path) -> str:
    """The path as a person would type it from here."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _one_step(
    stage: str,
    recipe: str,
    round_number: int | None,
    overrides: list[str] | None,
    workspace: Path,
    as_json: bool,
) -> None:
    """Runs the first unfinished step of a stage (or that of a round), and what it lacks."""
    from kdpipe.runner import Request

    def request(project: "Project") -> Request:
        states = [
            state
            for state in project.survey()
            if state.step.stage == stage and round_number in (None, state.step.round)
            # A round has one rollout; what teachers write for it is among what that needs.
            if not (stage == "rollout" and state.step.subject)
        ]
        if not states:
            where = f" in round {round_number}" if round_number is not None else ""
            raise RecipeError(
                f"the plan has no {stage} step{where}", hint=f"kdpipe plan {recipe}  lists the steps"
            )
        unfinished = [state.step for state in states if not state.done]
        return Request(only=unfinished[0] if unfinished else states[-1].step)

    _run(recipe, overrides, workspace, request, as_json=as_json)


@app.command()
@reported
def sft(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    workspace: WorkspaceOption = WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Cold-start the student or a teacher: the first one that is not done.

    Example: kdpipe sft recipes/quickstart.yaml
    """
    _one_step("sft", recipe, None, overrides, workspace, as_json)


@app.command()
@reported
def rollout(
    recipe: RecipeArgument,
    round_number: RoundOption = None,
    overrides: SetOption = None,
    workspace: WorkspaceOption = WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Sample the student on a round's prompts, after what that needs.

    Example: kdpipe rollout recipes/quickstart.yaml --round 1
    """
    _one_step("rollout", recipe, round_number, overrides, workspace, as_json)


@app.command("teacher-score")
@reported
def teacher_score(
    recipe: RecipeArgument,
    round_number: RoundOption = None,
    overrides: SetOption = None,
    workspace: WorkspaceOption = WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Score a round's completions with the teacher, of several the first not done, after what that needs.

    Example: kdpipe teacher-score recipes/quickstart.yaml --round 1
    """
    _one_step("teacher-score", recipe, round_number, overrides, workspace, as_json)


@app.command()
@reported
def train(
    recipe: RecipeArgument,
    round_number: RoundOption = None,
    overrides: SetOption = None,
    workspace: WorkspaceOption = WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Train the student on a round, after what that needs.

    Example: kdpipe train recipes/quickstart.yaml --round 1
    """
    _one_step("train", recipe, round_number, overrides, workspace, as_json)


@app.command()
@reported
def evaluate(
    recipe: RecipeArgument,
    round_number: RoundOption = None,
    overrides: SetOption = None,
    workspace: WorkspaceOption = WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Evaluate the student of a round on held-out problems, after what that needs.

    Example: kdpipe evaluate recipes/quickstart.yaml --round 0
    """
    _one_step("evaluate", recipe, round_number, overrides, workspace, as_json)


# ------------------------------------------------------------------------------------- before and while


@app.command()
@reported
def check(recipe: RecipeArgument, overrides: SetOption = None, as_json: JsonOption = False) -> None:
    """Check a recipe against the schema: under a second, no network, no models.

    Example: kdpipe check recipes/quickstart.yaml
    """
    from kdpipe.recipe import resolved

    loaded = _load(recipe, overrides)
    if as_json:
        _print_json({"recipe": str(loaded.path), "resolved": resolved(loaded.recipe)})
    else:
        print(f"{recipe}: good; {loaded.recipe.rounds} rounds")  # noqa: T201


@app.command("check-loss")
@reported
def check_loss(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    workspace: WorkspaceOption = WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Check what a recipe's objective does to a student, on tiny models; exit 4 when it is not what it claims.

    Needs neither models nor network. `run` refuses what fails 1, 2 or 3, unless the recipe says reproduce: true.

    Example: kdpipe check-loss quickstart --set train.objective.kd=k1_loss
    """
    from kdpipe.terminal import check_loss_lines, painter

    loaded = _load(recipe, overrides)
    phases = _checked_phases(loaded.recipe, workspace)
    failed = sorted({f["number"] for p in phases for f in p["findings"] if f["verdict"] == "FAILED"})
    if as_json:
        _print_json({"recipe": str(loaded.path), "failed": failed, "phases": phases})
    else:
        blocks = ["\n".join(check_loss_lines(phase, painter(sys.stdout))) for phase in phases]
        print("\n\n".join(blocks))  # noqa: T201
    if failed:
        which = f"propert{'y' if len(failed) == 1 else 'ies'} {', '.join(map(str, failed))}"
        raise PreflightError(
            f"{recipe}: its objective fails {which}",
            hint="docs/objectives.md says what each objective descends; `reproduce: true` lets `run` use it as it is",
        )


def _checked_phases(recipe: "Recipe", workspace: Path) -> list[dict[str, Any]]:
    """What a worker finds: torch is not for this process."""
    from kdpipe.recipe import resolved
    from kdpipe.workers import Worker

    # Everything is tiny: more threads would only wait for each other.
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    log = workspace.resolve() / "logs" / "check-loss.log"
    worker = Worker("kdpipe.check_loss:serve", log=log, environment=one_thread)
    try:
        found: Any = worker.call({"recipe": resolved(recipe)}, on_event=lambda _event: None)
    finally:
        worker.stop()
    phases: list[dict[str, Any]] = found["phases"]
    return phases


@app.command()
@reported
def plan(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    workspace: WorkspaceOption = WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """List every step: done, stale or to do, and why. Runs nothing.

    Example: kdpipe plan recipes/quickstart.yaml --set train.optimizer.learning_rate=3e-4
    """
    from kdpipe.terminal import inert, painter, plan_lines

    project = _open(recipe, overrides, workspace)
    states = project.survey()
    unresolved = project.identities.unresolved()
    if as_json:
        steps = [_state_json(state) for state in states]
        _print_json({"run": project.run.name, "steps": steps, "unresolved": unresolved})
        return
    lines = plan_lines(project.run.name, states, horizon=_horizon(project.recipe), paint=painter(sys.stdout))
    if project.recipe.train.objective.has_kd:
        lines += _kept_bytes(project.recipe)
    lines += [f"unresolved until the first run fetches and pins it: {inert(name)}" for name in unresolved]
    print("\n".join(lines))  # noqa: T201


def _horizon(recipe: "Recipe") -> str:
    optimizer = recipe.train.optimizer
    if optimizer.schedule == "constant":
        return ""
    rounds = optimizer.schedule_rounds or recipe.rounds
    ends = f"the {optimizer.schedule} schedule ends after round {rounds}"
    return ends + (
        "" if optimizer.schedule_rounds else "; other `rounds` would train anew (set schedule_rounds)"
    )


def _kept_bytes(recipe: "Recipe") -> list[str]:
    """What teacher-score stores for a completion token, and what the other choices would take."""
    keep = recipe.keep
    origins = [recipe.student if teacher.self_ else teacher for teacher in recipe.teachers]
    widths = {origin.scratch.hidden_size if origin.scratch else None for origin in origins}
    width = widths.pop() if len(widths) == 1 else None
    whose = "the teacher" if len(origins) == 1 else "its teacher" if recipe.is_routed else "each teacher"
    ids = keep.teacher_top_k + keep.student_top_k or 64
    support = 8 + ids * (6 if recipe.teacher_score.logprobs == "float16" else 8)
    choices = {
        "the sampled token": "4",
        f"{ids} ids and a tail": str(support),
        "its hidden state": str(4 + 4 * width) if width else "4 + hidden size x 2 or 4",
    }
    names = list(choices)
    chosen = names[2] if keep.hidden else names[1] if keep.teacher_top_k or keep.student_top_k else names[0]
    others = ", ".join(f"{name} {size}" for name, size in choices.items() if name != chosen)
    return [
        f"kept of {whose} for each token: {chosen}, {choices[chosen]} bytes",
        f"  the other choices: {others}",
    ]


def _state_json(state: "State") -> dict[str, Any]:
    return {
        "step": state.step.id,
        "round": state.step.round,
        "state": state.verdict,
        "why": state.why,
        "fingerprint": state.step.fingerprint,
        "dropped": sorted(state.dropped),
    }


@app.command()
@reported
def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Names of runs in the workspace, or recipes.")
    ],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    overrides: SetOption = None,
    workspace: WorkspaceOption = WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Hold runs against the first one: accuracy, paired difference, several seeds as one, and cost.

    Each run counts with its last evaluated student. Runs that differ only in their seed are one row. --set changes
    every recipe given.

    Example: kdpipe compare quickstart-0ca0cb6e quickstart-3f1b2c4d
    """
    from kdpipe.comparison import compare as rows_of
    from kdpipe.comparison import read_contender
    from kdpipe.comparison_lines import comparison_json

    folders = [_run_folder(run, overrides, workspace) for run in dict.fromkeys(runs)]
    rows = rows_of([read_contender(folder) for folder in folders])
    if as_json:
        _print_json(comparison_json(rows))
        return
    _print_rows(rows, markdown=markdown)


@app.command()
@reported
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
    """Tell where a gain comes from: run the control arms of a recipe on several seeds, and hold them against student 0.

    Arms: kd, rl, kdrl (both), shuffled-teacher (the scores of another prompt's completion) and self-teacher (the
    student itself). Each is an ordinary run; they share what does not depend on the arm. Repeating the command resumes.

    Example: kdpipe arms quickstart --seeds 3 --set rollout.samples=4 --set rollout.prompts=32
    """
    from kdpipe.arms import arm_runs, parse_arms

    given = tuple(overrides or ())
    study = arm_runs(_load(recipe, list(given)).recipe, parse_arms(which), seeds=seeds)
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

    from kdpipe.arms import forecast

    projects = [_open(recipe, [*given, *one.overrides], workspace) for one in study]
    found = forecast(projects, rounds=rounds)
    named = list(zip(study, projects, found, strict=True))
    if as_json:
        _print_json(
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
    print("\n".join([*lines, f"{len(study)} runs, {total:,} steps to do in all"]))  # noqa: T201


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
    from kdpipe.arms import arm_rows
    from kdpipe.comparison import read_contender
    from kdpipe.runner import Request

    runs = [(f"{one.arm}, seed {one.seed}", [*given, *one.overrides]) for one in study]
    done, failed = _run_each(recipe, runs, workspace, Request(rounds=rounds), as_json=as_json)
    ended = [(study[number].arm, read_contender(folder)) for number, folder in done.items()]
    order = list(dict.fromkeys(one.arm for one in study))
    ended.sort(key=lambda pair: order.index(pair[0]))
    first = {study[number].seed: folder for number, folder in reversed(done.items())}
    before = [read_contender(folder, last_round=0) for _, folder in sorted(first.items())]
    rows = arm_rows(ended, before) if ended else []
    _print_study(rows, failed, len(runs), markdown=markdown, as_json=as_json)


def _run_folder(run: str, overrides: list[str] | None, workspace: Path) -> "RunFolder":
    """The folder of a run by its name, or of the run that a recipe means."""
    from kdpipe.runs import RunFolder, all_runs

    place = workspace.resolve() / "runs" / run
    if "/" not in run and (place / "resolved.json").exists():
        return RunFolder(place)
    try:
        folder = _open(run, overrides, workspace).run
    except RecipeError as error:
        names = ", ".join(one.name for one in all_runs(workspace.resolve())) or "none"
        raise RecipeError(error.message, hint=f"runs in {workspace}: {names}") from None
    if not folder.path.exists():
        raise RecipeError(f"{folder.name}: nothing was run yet", hint=f"kdpipe run {run}")
    return folder


@app.command()
@reported
def status(
    recipe: RecipeArgument,
    check_only: Annotated[bool, typer.Option("--check", help="Exit 6 when work is left.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew each second while it runs.")] = False,
    overrides: SetOption = None,
    workspace: WorkspaceOption = WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Show how far a run is, stage by round, and how fast the step that is running now.

    Example: kdpipe status recipes/quickstart.yaml --watch
    """
    from kdpipe.overview import overview
    from kdpipe.terminal import painter, watch_lines

    project = _open(recipe, overrides, workspace)
    if watch and as_json:
        raise RecipeError("--watch and --json: one of them", hint="--json prints one document and ends")
    if watch:
        paint = painter(sys.stdout)

        def look() -> tuple[list[str], bool]:
            now = overview(project)
            return _status_lines(project, now, paint), now.running

        watch_lines(look)
    found = overview(project)
    if as_json:
        _print_json(_status_json(project, found))
    elif not watch:
        print("\n".join(_status_lines(project, found, painter(sys.stdout))))  # noqa: T201
    if check_only and any(not state.done for state in found.states):
        raise typer.Exit(6)


def _rounds_done(found: "Overview") -> int:
    return max((s.step.round for s in found.states if s.step.stage == "train" and s.done), default=0)


def _not_mirrored(project: "Project") -> int:
    from kdpipe.tracking import pending

    return pending(project.run.path) if project.recipe.tracking.enabled else 0


def _status_json(project: "Project", found: "Overview") -> dict[str, Any]:
    from dataclasses import asdict

    from kdpipe.project import headrooms

    left = [state for state in found.states if not state.done]
    return {
        "run": project.run.name,
        "running": found.running,
        "rounds_done": _rounds_done(found),
        "rounds": project.recipe.rounds,
        "steps_left": len(left),
        "next": left[0].step.id if left else None,
        "not_mirrored": _not_mirrored(project),
        "headroom": [asdict(headroom) for headroom in headrooms(project)],
        **found.to_json(),
    }


def _status_lines(project: "Project", found: "Overview", paint: "Paint") -> list[str]:
    from kdpipe.overview import grid_lines, progress_line
    from kdpipe.project import headrooms, round_metrics
    from kdpipe.terminal import inert, round_line
    from kdpipe.tracking import waiting

    states, rounds_done = found.states, _rounds_done(found)
    left = [state for state in states if not state.done]
    lines = [
        f"{project.run.name}: {'running' if found.running else 'not running'}",
        f"{len(states) - len(left)} of {len(states)} steps, {rounds_done} of {project.recipe.rounds} rounds done",
        *grid_lines(found, paint),
    ]
    if rounds_done:
        metrics = round_metrics(project, rounds_done)
        lines.append(round_line(rounds_done, project.recipe.rounds, metrics))
    lines += [f"teacher {one.teacher}: {inert(one.sentence())}" for one in headrooms(project)]
    if found.running:
        lines.append(progress_line(found))
    elif left:
        lines.append(f"next: {left[0].step.id}{'; ' + inert(left[0].why) if left[0].why else ''}")
    if not found.running and project.recipe.tracking.enabled:
        lines += map(inert, waiting(project.run.path))
    return lines


@app.command()
@reported
def samples(
    recipe: RecipeArgument,
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
    overrides: SetOption = None,
    workspace: WorkspaceOption = WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Show what the student wrote, each token coloured by where the teacher disagrees.

    Orange: the student is surer than the teacher; blue: the teacher is. Without colours the tokens that they disagree
    about most are listed with their numbers.

    Example: kdpipe samples recipes/quickstart.yaml --wrong --worst --limit 3
    """
    from kdpipe.samples import Choice, choose_samples, samples_json
    from kdpipe.terminal import is_coloured, painter
    from kdpipe.transcript import transcript_lines

    choice = Choice(round_number, wrong, flipped, worst, held_out, limit)
    found = choose_samples(_open(recipe, overrides, workspace), choice)
    if as_json:
        _print_json(samples_json(found))
        return
    coloured = is_coloured(sys.stdout)
    print("\n".join(transcript_lines(found, painter(sys.stdout), coloured=coloured)))  # noqa: T201


@app.command()
@reported
def report(
    recipe: RecipeArgument,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write it; else into the run's folder.")
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="RUN", help="Hold it against this run, as `compare` does; repeatable."),
    ] = None,
    overrides: SetOption = None,
    workspace: WorkspaceOption = WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Write one HTML page about a run: verdict, curves, costs, and its completions token by token.

    `run` writes it too, at its end. The page loads nothing, so it can be sent on: it holds texts of model and data.

    Example: kdpipe report recipes/quickstart.yaml -o report.html
    """
    from kdpipe.report.writing import report_path, write_report

    project = _open(recipe, overrides, workspace)
    path = report_path(project) if output is None else output
    if not project.run.path.exists():
        raise RecipeError(f"{project.run.name}: nothing was run yet", hint=f"kdpipe run {recipe}")
    if path.is_dir():
        raise RecipeError(f"{path}: is a folder", hint=f"name the file: -o {path / 'report.html'}")
    others = [_run_folder(run, None, workspace) for run in dict.fromkeys(against or ())]
    size = write_report(project, path, commands=_commands_again(recipe, overrides, workspace), others=others)
    if as_json:
        _print_json({"report": str(path), "bytes": size})
    else:
        print(f"{_shown(path.resolve())}  {size / 1e6:.2f} MB")  # noqa: T201


# ------------------------------------------------------------------------------------------- artifacts


@app.command()
@reported
def export(
    recipe: RecipeArgument,
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    round_number: RoundOption = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Only the LoRA adapter, as peft loads it, not merged.")
    ] = False,
    overrides: SetOption = None,
    workspace: WorkspaceOption = WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Write the student as a Hugging Face folder that transformers and vLLM load.

    Example: kdpipe export recipes/quickstart.yaml my-student
    """
    from kdpipe.housekeeping import export as export_student

    project = _open(recipe, overrides, workspace)
    number, folder = export_student(project, target, round_number=round_number, adapter=adapter)
    if as_json:
        _print_json({"round": number, "folder": str(folder)})
    else:
        print(f"{folder}: student {number}")  # noqa: T201


@app.command()
@reported
def verify(
    recipe: RecipeArgument,
    full: Annotated[bool, typer.Option("--full", help="Compare sha256, not only sizes.")] = False,
    overrides: SetOption = None,
    workspace: WorkspaceOption = WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Check the artifacts of a run against their manifests; exit 5 when one is damaged.

    Example: kdpipe verify recipes/quickstart.yaml --full
    """
    from kdpipe.errors import ArtifactError
    from kdpipe.housekeeping import verify as verify_steps
    from kdpipe.terminal import inert

    findings = list(verify_steps(_open(recipe, overrides, workspace), full=full))
    damaged = [finding for finding in findings if finding.problem]
    if as_json:
        _print_json(
            {
                "steps": len(findings),
                "files": sum(finding.files for finding in findings),
                "bytes": sum(finding.bytes for finding in findings),
                "damaged": {finding.step: finding.problem for finding in damaged},
            }
        )
    else:
        files, size = sum(f.files for f in findings), sum(f.bytes for f in findings)
        what = "sha256" if full else "sizes"
        print(f"{len(findings)} steps, {files} files, {size / 1e6:,.1f} MB: {what} compared")  # noqa: T201
    if damaged:
        if not as_json:
            for finding in damaged:
                print(inert(f"{finding.step}: {finding.problem}"), file=sys.stderr)  # noqa: T201
        force = " ".join(f"--force {finding.step}" for finding in damaged)
        raise ArtifactError(
            f"{len(damaged)} of {len(findings)} steps are damaged",
            hint=f"rebuild them and what depends on them: kdpipe run {recipe} {force}",
        )


@app.command()
@reported
def gc(
    delete: Annotated[bool, typer.Option("--delete", help="Really remove it.")] = False,
    workspace: WorkspaceOption = WORKSPACE,
    as_json: JsonOption = False,
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", hidden=True)] = None,
) -> None:
    """Say which store entries no run uses; remove them with --delete.

    A run's entries are in use as long as its folder stands under runs/ of the workspace.

    Example: kdpipe gc --delete
    """
    from kdpipe.housekeeping import collect, garbage

    del recipe  # accepted so that the command reads like the others; the store belongs to the workspace
    found = garbage(workspace.resolve())
    for item in found:
        if delete:
            collect(item)
        if not as_json:
            print(f"{_shown(item.folder)}  {item.bytes / 1e6:,.1f} MB  {item.reason}")  # noqa: T201
    total = sum(item.bytes for item in found)
    if as_json:
        folders = [{"folder": str(item.folder), "bytes": item.bytes, "reason": item.reason} for item in found]
        _print_json({"deleted": delete, "bytes": total, "entries": folders})
    elif found:
        done = "removed" if delete else "can go: kdpipe gc --delete"
        print(f"{len(found)} entries, {total / 1e6:,.1f} MB {done}")  # noqa: T201
    else:
        print("nothing to remove")  # noqa: T201


# ----------------------------------------------------------------------------------------------- recipes


@app.command()
@reported
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this one.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the shipped recipes, or print one.

    Example: kdpipe recipes quickstart
    """
    from kdpipe.recipes_shipped import shipped, shipped_path, title

    if name is not None:
        text = shipped_path(name).read_text(encoding="utf-8")
        if as_json:
            _print_json({"name": name, "text": text})
        else:
            print(text, end="")  # noqa: T201
        return
    found = {path.stem: title(path) for path in shipped()}
    if as_json:
        _print_json(found)
        return
    width = max(map(len, found), default=0)
    for stem, line in found.items():
        print(f"{stem:<{width}}  {line}")  # noqa: T201


@app.command()
@reported
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make.")],
    recipe: Annotated[str, typer.Option("--recipe", help="The shipped recipe to start from.")] = "quickstart",
    as_json: JsonOption = False,
) -> None:
    """Start a project: a folder with a recipe of your own.

    Example: kdpipe init my-distillation --recipe gsm8k-qwen3-opd
    """
    from kdpipe.recipes_shipped import shipped_path

    target = folder / "recipe.yaml"
    if target.exists():
        raise RecipeError(f"{target}: exists already", hint="name another folder")
    text = shipped_path(recipe).read_text(encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    if as_json:
        _print_json({"recipe": str(target)})
    else:
        print(f"{target}: edit it, then\n  kdpipe check {target}\n  kdpipe run {target}")  # noqa: T201


@app.command()
@reported
def schema(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the page docs/recipe.md instead.")
    ] = False,
) -> None:
    """Print the JSON Schema of recipes, for editors, with a sentence for each field.

    Example: kdpipe schema > recipe.schema.json
    """
    from kdpipe.recipe_reference import described_schema, reference

    if markdown:
        print(reference(), end="")  # noqa: T201
        return
    _print_json(described_schema())


# ---------------------------------------------------------------------------------------- environment


@app.command()
@reported
def doctor(
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="Examine the models of this recipe.")
    ] = None,
    overrides: SetOption = None,
    workspace: WorkspaceOption = WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Print the environment as a block to paste; with a recipe, examine its teachers; exit 4 when a probe fails.

    docs/doctor.md says what each probe catches. Models that no step has made yet are stood in for.

    Example: kdpipe doctor quickstart
    """
    if recipe is not None:
        _examine(recipe, overrides, workspace, as_json=as_json)
        return
    found = _environment(workspace)
    if as_json:
        _print_json(found)
        return
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {'-' if value is None else value}")  # noqa: T201


def _environment(workspace: Path) -> dict[str, Any]:
    """Versions, machine, and what torch makes of it; torch is asked in a worker."""
    import shutil
    import tempfile

    from kdpipe.environment import cpu_flags, environment
    from kdpipe.workers import Worker

    place = next(folder for folder in (workspace.resolve(), *workspace.resolve().parents) if folder.exists())
    found: dict[str, Any] = {**environment(), "cpu_flags": cpu_flags()}
    found["free_disk_gib"] = shutil.disk_usage(place).free >> 30
    with tempfile.TemporaryDirectory(prefix="kdpipe-doctor-") as folder:
        worker = Worker("kdpipe.doctor_machine:serve", log=Path(folder) / "doctor.log")
        try:
            seen: Any = worker.call({"device": "auto"}, on_event=lambda _event: None)
        finally:
            worker.stop()
    return {**found, **seen}


def _examine(recipe: str, overrides: list[str] | None, workspace: Path, *, as_json: bool) -> None:
    """Examines a recipe's models; raises PreflightError when a probe fails."""
    from kdpipe.examination import examine_recipe
    from kdpipe.terminal import doctor_lines, estimate_lines, painter

    result = {"recipe": recipe, **examine_recipe(_load(recipe, overrides), workspace.resolve())}
    failed = [f"{one['probe']} ({one['about']})" for one in result["findings"] if one["verdict"] == "FAILED"]
    if as_json:
        _print_json({**result, "failed": failed})
    else:
        paint = painter(sys.stdout)
        lines = [*doctor_lines(result, paint), "", *estimate_lines(result, paint)]
        if not failed:
            lines += ["", *_after_doctor(recipe, workspace, result["missing"])]
        print("\n".join(lines))  # noqa: T201
    if failed:
        count = f"{len(failed)} probe{'s'[: len(failed) != 1]}"
        raise PreflightError(
            f"{recipe}: {count} failed: {', '.join(failed)}",
            hint=f"docs/doctor.md says what each catches; mend it and repeat: kdpipe doctor {recipe}",
        )


def _after_doctor(recipe: str, workspace: Path, missing: dict[str, str]) -> list[str]:
    """The next command: what is not made yet comes first, as it could only be stood in for."""
    place = "" if workspace == WORKSPACE else f" --workspace {shlex.quote(str(workspace))}"
    lines = []
    if missing:
        steps = ", ".join(sorted(set(missing.values())))
        lines.append(f"not there yet: {steps}; examine again when they are done")
        lines.append(f"next  kdpipe run {recipe} --rounds 0{place}")
        lines.append(f"      kdpipe doctor {recipe}{place}")
        return lines
    return [f"next  kdpipe run {recipe}{place}"]


@app.command()
@reported
def ui(
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The first port to try.")] = 5000,
    workspace: WorkspaceOption = WORKSPACE,
) -> None:
    """Open MLflow's own page over this workspace's runs.

    Example: kdpipe ui --port 5001
    """
    from kdpipe.tracking import serve_ui, settle

    settle(workspace.resolve())
    code = serve_ui(workspace.resolve(), host, port)
    if code:
        raise PreflightError(f"MLflow's page ended with exit status {code}")


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)
    ] = False,
) -> None:
    """On-policy knowledge distillation of language models, one resumable step at a time.

    Example: kdpipe run recipes/quickstart.yaml
    """
    if show:
        print(f"kdpipe {__version__}")  # noqa: T201
        raise typer.Exit


if __name__ == "__main__":
    main()
