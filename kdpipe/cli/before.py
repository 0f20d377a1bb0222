"""What is asked before a run: the recipe, its objective, its steps, its models and the machine."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdpipe.cli.parameters import (
    WORKSPACE,
    JsonOption,
    RecipeArgument,
    SetOption,
    WorkspaceOption,
    load_given,
)
from kdpipe.cli.printing import print_json
from kdpipe.errors import PreflightError

if TYPE_CHECKING:
    from kdpipe.pipeline.status import State
    from kdpipe.recipe.schema import Recipe, Teacher


def check(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    workspace: WorkspaceOption = WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Check a recipe against the schema: under a second, no network, no models.

    Example: kdpipe check recipes/quickstart.yaml
    """
    from kdpipe.recipe.schema import resolved

    loaded = load_given(recipe, overrides, workspace)
    if as_json:
        print_json({"recipe": str(loaded.path), "resolved": resolved(loaded.recipe)})
    else:
        print(f"{recipe}: good; {loaded.recipe.rounds} rounds")


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
    from kdpipe.cli.before_lines import check_loss_lines
    from kdpipe.cli.terminal import painter

    loaded = load_given(recipe, overrides, workspace)
    phases = _checked_phases(loaded.recipe, workspace)
    failed = sorted({f["number"] for p in phases for f in p["findings"] if f["verdict"] == "FAILED"})
    if as_json:
        print_json({"recipe": str(loaded.path), "failed": failed, "phases": phases})
    else:
        blocks = ["\n".join(check_loss_lines(phase, painter(sys.stdout))) for phase in phases]
        print("\n\n".join(blocks))
    if failed:
        which = f"propert{'y' if len(failed) == 1 else 'ies'} {', '.join(map(str, failed))}"
        raise PreflightError(
            f"{recipe}: its objective fails {which}",
            hint="docs/objectives.md says what each objective descends; `reproduce: true` lets `run` use it as it is",
        )


def _checked_phases(recipe: "Recipe", workspace: Path) -> list[dict[str, Any]]:
    """What a worker finds: torch is not for this process."""
    from kdpipe.recipe.schema import resolved
    from kdpipe.workers.worker import Worker

    # Everything is tiny: more threads would only wait for each other.
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    log = workspace.resolve() / "logs" / "check-loss.log"
    worker = Worker("kdpipe.doctor.loss.check:serve", log=log, environment=one_thread)
    try:
        found: Any = worker.call({"recipe": resolved(recipe)}, on_event=lambda _event: None)
    finally:
        worker.stop()
    phases: list[dict[str, Any]] = found["phases"]
    return phases


def plan(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    workspace: WorkspaceOption = WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """List every step: done, stale or to do, and why. Runs nothing.

    Example: kdpipe plan recipes/quickstart.yaml --set train.optimizer.learning_rate=3e-4
    """
    from kdpipe.cli.before_lines import plan_lines
    from kdpipe.cli.terminal import inert, painter
    from kdpipe.pipeline.project import open_project

    project = open_project(load_given(recipe, overrides, workspace), workspace.resolve())
    states = project.survey()
    unresolved = project.identities.unresolved()
    if as_json:
        steps = [_state_json(state) for state in states]
        print_json({"run": project.run.name, "steps": steps, "unresolved": unresolved})
        return
    lines = plan_lines(project.run.name, states, horizon=_horizon(project.recipe), paint=painter(sys.stdout))
    if project.recipe.train.objective.has_kd:
        lines += _kept_bytes(project.recipe)
    lines += [f"unresolved until the first run fetches and pins it: {inert(name)}" for name in unresolved]
    print("\n".join(lines))


def _horizon(recipe: "Recipe") -> str:
    optimizer = recipe.train.optimizer
    if optimizer.schedule == "constant":
        return ""
    rounds = optimizer.schedule_rounds or recipe.rounds
    ends = f"the {optimizer.schedule} schedule ends after round {rounds}"
    return ends + (
        "" if optimizer.schedule_rounds else "; other `rounds` would train anew (set schedule_rounds)"
    )


def _hidden_size(recipe: "Recipe", teacher: "Teacher") -> int | None:
    """The width of a teacher's hidden states, where the recipe says it."""
    from kdpipe.recipe.schema import ScratchTeacher, SelfTeacher

    match teacher:
        case ScratchTeacher(scratch=scratch):
            return scratch.hidden_size
        case SelfTeacher() if recipe.student.scratch is not None:
            return recipe.student.scratch.hidden_size
    return None


def _kept_bytes(recipe: "Recipe") -> list[str]:
    """What teacher-score stores for a completion token, and what the other choices would take."""
    keep = recipe.keep
    widths = {_hidden_size(recipe, teacher) for teacher in recipe.teachers}
    width = widths.pop() if len(widths) == 1 else None
    whose = (
        "the teacher" if len(recipe.teachers) == 1 else "its teacher" if recipe.is_routed else "each teacher"
    )
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
        print_json(found)
        return
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {'-' if value is None else value}")


def _environment(workspace: Path) -> dict[str, Any]:
    """Versions, machine, and what torch makes of it; torch is asked in a worker."""
    import shutil
    import tempfile

    from kdpipe.store.environment import environment
    from kdpipe.workers.worker import Worker

    place = next(folder for folder in (workspace.resolve(), *workspace.resolve().parents) if folder.exists())
    found: dict[str, Any] = dict(environment())
    found["free_disk_gib"] = shutil.disk_usage(place).free >> 30
    with tempfile.TemporaryDirectory(prefix="kdpipe-doctor-") as folder:
        worker = Worker("kdpipe.doctor.machine:serve", log=Path(folder) / "doctor.log")
        try:
            seen: Any = worker.call({"device": "auto"}, on_event=lambda _event: None)
        finally:
            worker.stop()
    return {**found, **seen}


def _examine(recipe: str, overrides: list[str] | None, workspace: Path, *, as_json: bool) -> None:
    """Examines a recipe's models; raises PreflightError when a probe fails."""
    from kdpipe.cli.before_lines import doctor_lines, estimate_lines
    from kdpipe.cli.terminal import painter
    from kdpipe.pipeline.preflight import examine_recipe

    result = {
        "recipe": recipe,
        **examine_recipe(load_given(recipe, overrides, workspace), workspace.resolve()),
    }
    failed = [f"{one['probe']} ({one['about']})" for one in result["findings"] if one["verdict"] == "FAILED"]
    if as_json:
        print_json({**result, "failed": failed})
    else:
        paint = painter(sys.stdout)
        lines = [*doctor_lines(result, paint), "", *estimate_lines(result, paint)]
        if not failed:
            lines += ["", *_after_doctor(recipe, workspace, result["missing"])]
        print("\n".join(lines))
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
