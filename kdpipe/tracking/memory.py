"""What the mirror's process is asked, and `mlflow.json`: what is remembered of what MLflow has."""

from __future__ import annotations

import contextlib
import shlex
import uuid
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from kdpipe.errors import ArtifactError
from kdpipe.pipeline.runs import RunFolder
from kdpipe.recipe.runtime import Tracking
from kdpipe.results.studies import read_study
from kdpipe.store.durable import write_json
from kdpipe.workers.message import Talk, message

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
Subject = Literal["run", "study"]

MEMORY = "mlflow.json"
DATABASE = "mlflow.db"
ARTIFACTS = "mlartifacts"
UNSURE = ""
"""The mark of an item that was being sent: MLflow may have a part of it."""

ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",  # a slow server is waited for: by a process of its own, not by the run
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}
"""Of every process that imports MLflow."""


@message
class MirrorRequest:
    """Make MLflow equal to the run or study in `folder`, and show it with this status."""

    subject: Subject
    folder: Path
    tracking: Tracking
    status: Status

    @property
    def workspace(self) -> Path:
        return self.folder.parents[1]


@message
class MirrorResult:
    """Which MLflow run it is, and how many metric values it was sent."""

    run_id: str
    metrics: int


@message
class Alive:
    """MLflow answered, or something was sent: the mirror goes on."""


MIRROR = Talk[MirrorRequest, Alive, MirrorResult]((MirrorRequest,), (Alive,), (MirrorResult,))


class Memory(BaseModel):
    """`mlflow.json`: which MLflow run mirrors this run or study, and which items it has.

    `key` is a tag of the MLflow run, by which it is found again after a kill between its creation and this note.
    `wanted` is the status to show and `status` the one shown, `artifact_uri` where MLflow keeps the run's files,
    `refused` the params that it does not accept, `sent` the mark of each item by its name.
    """

    key: str
    uri: str | None
    experiment: str
    wanted: Status
    status: Status | None = None
    run_id: str | None = None
    artifact_uri: str | None = None
    refused: list[str] = []
    sent: dict[str, str] = {}

    def is_at(self, uri: str | None, experiment: str) -> bool:
        """Whether it is about this place in MLflow."""
        return (self.uri, self.experiment) == (uri, experiment)

    def forget(self) -> None:
        """Leaves only the place, the key and what is wanted: there is no MLflow run."""
        self.status = self.run_id = self.artifact_uri = None
        self.refused, self.sent = [], {}


def read_memory(folder: Path) -> Memory | None:
    """The folder's `mlflow.json`, without what a database had that is gone; None where it cannot be read."""
    try:
        memory = Memory.model_validate_json((folder / MEMORY).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    if memory.uri is None and not (folder.parents[1] / DATABASE).exists():
        memory.forget()
    return memory


def write_memory(folder: Path, memory: Memory) -> None:
    """Keeps the memory durably, unless it is unchanged."""
    if read_memory(folder) != memory:
        write_json(folder / MEMORY, memory.model_dump(mode="json"))


def memory_of(request: MirrorRequest) -> Memory:
    """The memory of what `request` is about, or a new one for a new place; raises ArtifactError on damage."""
    if not (experiment := request.tracking.experiment):
        if request.subject == "run":
            experiment = RunFolder(request.folder).loaded().recipe.name
        elif (study := read_study(request.folder)) is not None:
            experiment = study.recipe
        else:
            raise ArtifactError(f"{request.folder}: no study can be read here", hint="repeat its command")
    old = read_memory(request.folder)
    if old is not None and old.is_at(request.tracking.uri, experiment):
        return old
    key = old.key if old is not None else uuid.uuid4().hex
    return Memory(key=key, uri=request.tracking.uri, experiment=experiment, wanted=request.status)


def database_uri(path: Path) -> str:
    """The address of a SQLite file for SQLAlchemy; a `?` or `%` in its path stays one."""
    from sqlalchemy import URL, make_url  # MLflow's; few commands need it

    # MLflow makes the folder of a `sqlite:///`, and for that takes an encoded path for a plain one.
    encoded = URL.create("sqlite+pysqlite", database=str(path)).render_as_string()
    for uri in (f"sqlite:///{path}", encoded):
        if make_url(uri).database == str(path):
            return uri
    raise ArtifactError(f"{path}: MLflow cannot open such a path", hint="name another --workspace")


def artifacts_uri(workspace: Path) -> str:
    """Where MLflow keeps files: a path, or where that could be read as an address, an address."""
    path = workspace.resolve() / ARTIFACTS
    return str(path) if path.as_uri() == f"file://{path}" else path.as_uri()


def require_database(workspace: Path, uri: str | None = None) -> None:
    """Raises ArtifactError where MLflow is to use a database that is damaged or another program's."""
    path = workspace.resolve() / DATABASE
    if uri is None and path.exists() and (trouble := _trouble_with(path)):
        away = shlex.join(["mv", str(path), f"{path}.damaged"])
        raise ArtifactError(
            f"{path}: {trouble}", hint=f"{away} moves it away: the next `run` of each recipe fills a new one"
        )


def _trouble_with(path: Path) -> str | None:
    """What is wrong with MLflow's database; None where nothing is, or it cannot be looked at now."""
    import sqlite3  # few commands look

    if not path.is_file():
        return "is no file"
    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", timeout=1, uri=True)) as database:
            database.execute("SELECT 1 FROM experiments, runs LIMIT 0")
            found = str(database.execute("PRAGMA quick_check(1)").fetchone()[0])
            return None if found == "ok" else f"is damaged: {found}"
    except sqlite3.OperationalError as error:  # also one that is locked
        return "is no database of MLflow" if "no such table" in str(error) else None
    except sqlite3.DatabaseError as error:
        return f"is damaged: {error}"
