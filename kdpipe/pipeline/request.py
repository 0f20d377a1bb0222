"""What a worker is asked for, both ends of it, and the worker that is asked. Never imports torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeAlias

from pydantic import JsonValue

from kdpipe.pipeline.project import Project
from kdpipe.recipe.roles import Role
from kdpipe.recipe.schema import Recipe
from kdpipe.store.step import Step, canonical
from kdpipe.workers.message import Nothing, Talk, message
from kdpipe.workers.pulse import Progressed
from kdpipe.workers.worker import Worker, is_harmless

Depth = Literal["servers", "quick", "full"]
PERFORMER = "kdpipe.execution.executor:Performer"


@message
class Assignment:
    """A step with the steps that it reads, and where everything is.

    `folder` is the recipe's, `run` the run's; `folders` and `identities` those of models that no step made.
    """

    workspace: Path
    recipe: Recipe
    folder: Path
    run: Path
    step: Step
    inputs: Mapping[Role, Step]
    folders: Mapping[str, Path]
    identities: Mapping[str, str]


@message
class Perform:
    """Perform a step; with `anew` from nothing, although it is done."""

    assignment: Assignment
    anew: bool


@message
class Examine:
    """Examine the models of a round; `missing` are the steps that have not made theirs yet, by role."""

    assignment: Assignment
    depth: Depth
    roles: tuple[Role, ...]
    missing: Mapping[Role, str]


@message
class Close:
    """End what this process has started."""


@message
class Noted:
    """Something that the user should read once."""

    text: str


@message
class Warned:
    """Something that does not stop the run but should be known."""

    text: str


@message
class Found:
    """A finding of the doctor, as JSON, as soon as it is made."""

    finding: dict[str, JsonValue]


@message
class Waiting:
    """Another run is making this step."""


@message
class Performed:
    """What became of a step: its payload, and what it took; `reused` where another run had made it."""

    reused: bool
    digest: str
    seconds: float = 0.0
    tokens: int = 0


@message
class Examined:
    """Findings as JSON, and with a full examination the estimate."""

    findings: list[dict[str, JsonValue]]
    estimate: dict[str, JsonValue] | None = None


StepRequest: TypeAlias = Perform | Examine | Close
StepEvent: TypeAlias = Noted | Warned | Found | Waiting | Progressed
StepResult: TypeAlias = Performed | Examined | Nothing
STEPS = Talk[StepRequest, StepEvent, StepResult](
    (Perform, Examine, Close), (Noted, Warned, Found, Waiting, Progressed), (Performed, Examined, Nothing)
)
StepTalker: TypeAlias = Worker[StepRequest, StepEvent, StepResult]


def open_worker(project: Project, performer: str, *, log: Path) -> StepTalker:
    """The worker that performs a project's steps; it starts with its first call."""
    threads = project.recipe.runtime.threads
    environment = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        # Threads that spin while they wait take the cores from whatever else runs: measured 30 times slower there.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    }
    if threads is not None:
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    keys = project.recipe.key_names  # it talks to the servers
    return Worker(
        performer,
        STEPS,
        log=log,
        environment=environment,
        inherits=lambda name: name in keys or is_harmless(name),
    )


def assignment_of(project: Project, folders: Mapping[str, Path], step: Step) -> Assignment:
    """A step as a worker is given it."""
    models = project.identities.models.items()
    return Assignment(
        workspace=project.workspace,
        recipe=project.recipe,
        folder=project.loaded.folder,
        run=project.run.path,
        step=step,
        inputs={role: project.plan.step(source.step_id) for role, source in step.inputs.items()},
        folders=folders,
        # One string for each model, for engines that keep models loaded.
        identities={name: hashlib.sha256(canonical(fields)).hexdigest() for name, fields in models},
    )
