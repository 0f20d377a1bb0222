"""What a worker is asked for, both ends of it, and the worker that is asked. Never imports torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from kdpipe.pipeline.project import Project
from kdpipe.recipe.roles import Role
from kdpipe.recipe.schema import resolved
from kdpipe.store.step import Input, Stage, Step, canonical
from kdpipe.workers.worker import Worker

PERFORMER = "kdpipe.execution.executor:Performer"


def open_worker(project: Project, performer: str, *, log: Path) -> Worker:
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
    return Worker(performer, log=log, environment=environment)


def request_for(project: Project, folders: Mapping[str, Path], step: Step) -> dict[str, JsonValue]:
    """The part that every request has: the recipe, the step with its inputs, and where models are."""
    return {
        "workspace": str(project.workspace),
        "recipe": resolved(project.recipe),
        "folder": str(project.loaded.folder),
        "run": str(project.run.path),
        "step": _write_step(step),
        "inputs": {str(role): _write_step(project.plan.step(s.step_id)) for role, s in step.inputs.items()},
        "folders": {name: str(folder) for name, folder in folders.items()},
        # One string for each model, for engines that keep models loaded.
        "digests": {
            name: hashlib.sha256(canonical(fields)).hexdigest()
            for name, fields in project.identities.models.items()
        },
    }


def _write_step(step: Step) -> dict[str, JsonValue]:
    return {
        "id": step.id,
        "stage": step.stage,
        "round": step.round,
        "subject": step.subject,
        "seed": step.seed,
        "inputs": {
            str(role): {"step_id": s.step_id, "opens": list(s.opens)} for role, s in step.inputs.items()
        },
        "document": step.document,
        "fingerprint": step.fingerprint,
    }


def read_step(value: Mapping[str, Any]) -> Step:
    """The step in a request, as the worker reads it."""
    inputs = {
        Role.parse(role): Input(found["step_id"], tuple(found["opens"]))
        for role, found in value["inputs"].items()
    }
    return Step(
        value["id"],
        Stage(value["stage"]),
        value["round"],
        value["subject"],
        value["seed"],
        inputs,
        value["document"],
        value["fingerprint"],
    )
