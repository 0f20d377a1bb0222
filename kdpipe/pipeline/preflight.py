"""Preflight: the models of a round, examined before it starts or by `kdpipe doctor`. No torch here."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import JsonValue

from kdpipe.errors import PreflightError
from kdpipe.pipeline.identities import Sources
from kdpipe.pipeline.project import Project, open_project
from kdpipe.pipeline.request import (
    PERFORMER,
    Close,
    Depth,
    Examine,
    Examined,
    Found,
    assignment_of,
    open_worker,
)
from kdpipe.pipeline.task_data import open_data
from kdpipe.recipe.file import LoadedRecipe
from kdpipe.recipe.roles import BASE_ROLE, STUDENT, STUDENT_ROLE, Role, teacher_role
from kdpipe.recipe.schema import ServedTeacher
from kdpipe.store.stage import Stage
from kdpipe.store.step import Fields, Input, Step


@dataclass(frozen=True, slots=True)
class Examination:
    """The doctor's findings on a recipe's models; `missing` are roles with the step that makes each."""

    run: str
    steps: int
    missing: Mapping[str, str]
    findings: list[dict[str, JsonValue]]
    estimate: dict[str, JsonValue] | None
    free_disk_bytes: int


def examine_recipe(
    loaded: LoadedRecipe,
    workspace: Path,
    *,
    tell: Callable[[str], None],
    on_finding: Callable[[dict[str, JsonValue]], None],
) -> Examination:
    """The doctor's findings on a recipe's models, what it takes, and the free disk.

    The models are those that round 1 starts with. One that an sft step has not made yet is stood in for: by its
    weights before that step, or untrained ones. `tell` is told of what is fetched,
    `on_finding` of each finding when it is made. Raises KdpipeError where there is
    nothing to examine.
    """
    folders = Sources(loaded, workspace).fetch(tell)
    for sentence in open_data(loaded.recipe, loaded.folder, folders.get("data")).warnings():
        tell(f"warning: {sentence}")
    project = open_project(loaded, workspace)
    request = examination(project, folders, 1, depth="full")
    worker = open_worker(project, PERFORMER, log=workspace / "logs" / "doctor.log")
    try:
        result = worker.call(
            request, on_event=lambda event: on_finding(event.finding) if isinstance(event, Found) else None
        )
    finally:
        worker.stop(Close())
    assert isinstance(result, Examined)
    workspace.mkdir(parents=True, exist_ok=True)
    return Examination(
        run=project.run.name,
        steps=len(project.plan.steps),
        missing={str(role): step_id for role, step_id in request.missing.items()},
        findings=result.findings,
        estimate=result.estimate,
        free_disk_bytes=shutil.disk_usage(workspace).free,
    )


def server_examination(
    project: Project, folders: Mapping[str, Path], steps: Iterable[Step]
) -> Examine | None:
    """The request to examine the servers that one of `steps` reads; None where none does."""
    recipe = project.recipe
    roles = [teacher_role(recipe, found) for found in recipe.teachers if isinstance(found, ServedTeacher)]
    fields = [cast("Fields", step.document["fields"]) for step in steps]
    asked = [role for role in roles if any(f"{role}.model" in found for found in fields)]
    if not asked:
        return None
    step = Step("preflight@0", Stage.EVALUATE, 0, STUDENT, recipe.seed, {}, {}, "")
    missing = {STUDENT_ROLE: "the student"}  # of which the text is enough
    return Examine(assignment_of(project, folders, step), "servers", (STUDENT_ROLE, *asked), missing)


def require_fit(which: str, findings: Iterable[Mapping[str, Any]], warn: Callable[[str], None]) -> None:
    """Raises PreflightError with the findings that failed, after the warnings were told."""
    said = [(one["verdict"], f"{one['probe']} ({one['about']}): {one['said']}") for one in findings]
    for verdict, text in said:
        if verdict == "warning":
            warn(text)
    if broken := [text for verdict, text in said if verdict == "FAILED"]:
        raise PreflightError(
            f"{which}: " + "\n  ".join(broken),
            hint="kdpipe doctor shows the numbers; done steps are kept; --set runtime.preflight=false goes on",
        )


def examination(project: Project, folders: Mapping[str, Path], number: int, *, depth: Depth) -> Examine:
    """The request to examine the models of round `number`; `missing` has those not made yet, by role."""
    recipe = project.recipe
    teachers = recipe.teachers if recipe.train.objective.in_round(number).has_kd else []
    roles = [STUDENT_ROLE, *(teacher_role(recipe, teacher) for teacher in teachers)]
    models = {*roles, BASE_ROLE}
    found: dict[Role, Input] = {}
    for step in project.plan.in_round(number):
        if step.stage in (Stage.ROLLOUT, Stage.TEACHER_SCORE):
            found |= {role: source for role, source in step.inputs.items() if role in models}
    there = {state.step.id: state for state in project.states() if state.done}
    missing = {
        role: source.step_id
        for role, source in found.items()
        if source.step_id not in there or there[source.step_id].dropped & set(source.opens)
    }
    inputs = {role: source for role, source in found.items() if role not in missing}
    step = Step(f"preflight@{number}", Stage.EVALUATE, number, STUDENT, recipe.seed, inputs, {}, "")
    return Examine(assignment_of(project, folders, step), depth, tuple(roles), missing)
