"""What a mirror is asked for, and its note `mlflow.json` of what MLflow has already."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from kdpipe.errors import ArtifactError
from kdpipe.recipe.schema import Tracking
from kdpipe.results.studies import read_study
from kdpipe.store.durable import write_json

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
Kind = Literal["run", "study"]

RECORD = "mlflow.json"
DATABASE = "mlflow.db"
ARTIFACTS = "mlartifacts"

ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",  # a slow server is waited for: by a process of its own, not by the run
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}
"""Of every process that imports MLflow."""


class Request(BaseModel):
    """What a `Synchronizer` is asked: make MLflow equal to the run or study in the folder `run`, with this status."""

    kind: Kind = "run"
    workspace: Path
    run: Path
    tracking: Tracking
    status: Status


class Record(BaseModel):
    """`mlflow.json`: which MLflow run mirrors this run, and what of it is there already.

    Of a study: which MLflow run is the parent of its runs' ones. `key` is a tag of the MLflow run: it finds that run
    again after a kill between its creation and this note. `status` is the one MLflow has, `wanted` the one it should
    have, `refused` the params that it would not take.
    """

    key: str
    uri: str | None
    experiment: str
    wanted: Status
    status: Status | None = None
    run_id: str | None = None
    mirrored: dict[str, str] = {}
    refused: list[str] = []
    datasets: list[str] = []
    artifacts: dict[str, str] = {}


def read_record(run_folder: Path) -> Record | None:
    """The run's `mlflow.json`, or None when there is none that can be read."""
    try:
        return Record.model_validate_json((run_folder / RECORD).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def write_record(run_folder: Path, record: Record) -> None:
    """Keeps the record durably."""
    write_json(run_folder / RECORD, record.model_dump(mode="json"))


def record_of(request: Request) -> Record:
    """The record of what `request` is about, or a new one for a new place."""
    experiment = request.tracking.experiment or _recipe_name(request)
    old = read_record(request.run)
    if old is not None and (old.uri, old.experiment) == (request.tracking.uri, experiment):
        return old
    key = old.key if old is not None else uuid.uuid4().hex
    return Record(key=key, uri=request.tracking.uri, experiment=experiment, wanted=request.status)


def _recipe_name(request: Request) -> str:
    if request.kind == "run":
        return str(recipe_of(request.run)["name"])
    if (study := read_study(request.run)) is None:
        raise ArtifactError(f"{request.run}: no study can be read here")
    return study.recipe


def recipe_of(run_folder: Path) -> dict[str, Any]:
    """The resolved recipe of a run."""
    recipe: dict[str, Any] = json.loads((run_folder / "resolved.json").read_bytes())["recipe"]
    return recipe


def database_uri(workspace: Path) -> str:
    """Where MLflow lives unless the recipe says otherwise."""
    return f"sqlite:///{workspace.resolve() / DATABASE}"
