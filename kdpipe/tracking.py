"""A mirror of every run in MLflow: the only door to it. Made from files, never read back for results.

The run folder and the store are the truth. `Synchronizer`, in a warm process of its own, makes one MLflow run
equal to them; `MlflowMirror` asks it from a thread, so that the command neither imports MLflow nor waits for
it. Whatever could not be delivered is delivered by a later command.

What makes it repeatable: `mlflow.json` in the run folder knows the MLflow run and which steps it has, and a
metric's timestamp is the time its step finished, so that rows logged again after a kill are the same rows,
of which an MLflow store keeps one.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from filelock import FileLock
from pydantic import BaseModel, JsonValue, ValidationError

from kdpipe.errors import ArtifactError, KdpipeError, StepError
from kdpipe.plan import STUDENT, canonical, link_name_of
from kdpipe.project import headroom_of
from kdpipe.recipe import Tracking
from kdpipe.runs import RunFolder, all_runs
from kdpipe.store import METRICS, Entry, is_running, linked_entry, write_durably, write_json
from kdpipe.workers import Message, Report, Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from types import FrameType

    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, Run

    from kdpipe.project import Project
    from kdpipe.runner import Mirror

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]

RECORD = "mlflow.json"
DATABASE = "mlflow.db"
ARTIFACTS = "mlartifacts"
SUMMARY = "summary.json"
LOG = Path("logs", "tracking.log")
MAX_METRICS = 1000  # what a server takes in one batch, and so for the next line
MAX_PARAMS = 100
MAX_NAME = 250
MAX_VALUE = 500
MAX_DIGEST = 36

ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",  # a slow server is waited for: by a process of its own, not by the run
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
QUIET_SECONDS = 10.0
"""How long the end of a run waits for an MLflow that shows no progress; its import, 2 s or more, is not counted."""
PATIENCE_SECONDS: dict[Status, float] = {"FINISHED": 60.0, "FAILED": 60.0, "KILLED": 2.0}
"""How long it waits at most; after a signal the command has to be gone within seconds."""
SERVER_QUIET_SECONDS = 5.0
SERVER_PATIENCE_SECONDS = 10.0
"""The same for a server, which may be slow or far away, and is not waited for as the workspace's own database is."""
RETRY_SECONDS = 30.0
PAUSE_RATIO = 9.0
"""Rest after a sync, in its own durations: the mirror takes at most a tenth of one core."""


class Request(BaseModel):
    """What a `Synchronizer` is asked: make MLflow equal to `run`, with this status."""

    workspace: Path
    run: Path
    tracking: Tracking
    status: Status


class Record(BaseModel):
    """`mlflow.json`: which MLflow run mirrors this run, and what of it is there already.

    `key` is a tag of the MLflow run: it finds that run again after a kill between its creation and this
    note. `status` is the one MLflow has, `wanted` the one it should have, `refused` the params that it would not take.
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


def _times(run_folder: Path) -> Iterator[float]:
    """When each event of the run was noted, in seconds since the epoch."""
    for event in RunFolder(run_folder).events():
        if isinstance(found := event.get("time"), int | float):
            yield found


def _recipe_of(run_folder: Path) -> dict[str, Any]:
    """The resolved recipe of a run."""
    recipe: dict[str, Any] = json.loads((run_folder / "resolved.json").read_bytes())["recipe"]
    return recipe


def _record_of(request: Request, name: str) -> Record:
    """The record of the run that `request` is about, or a new one for a new place; `name` is the recipe's."""
    experiment = request.tracking.experiment or name
    old = read_record(request.run)
    if old is not None and (old.uri, old.experiment) == (request.tracking.uri, experiment):
        return old
    key = old.key if old is not None else uuid.uuid4().hex
    return Record(key=key, uri=request.tracking.uri, experiment=experiment, wanted=request.status)


def _write_record(run_folder: Path, record: Record) -> None:
    write_json(run_folder / RECORD, record.model_dump(mode="json"))


# ----------------------------------------------------------------------------------- what there is to mirror


@dataclass(frozen=True, slots=True)
class DoneStep:
    """A finished step of a run; `finished` is in seconds since the epoch."""

    name: str
    round: int
    entry: Entry
    document: Mapping[str, Any]
    finished: float

    @property
    def mark(self) -> str:
        """What changes when the step is performed again."""
        return f"{self.document['fingerprint'][:16]} {self.finished}"


def done_steps(run_folder: Path) -> Iterator[DoneStep]:
    """The finished steps that the run links, by round."""
    for link in RunFolder(run_folder).links():
        with contextlib.suppress(ArtifactError):  # such a step is not done
            entry, document = linked_entry(link.target)
            manifest = entry.manifest()
            name = link_name_of(f"{document.get('stage')}", document.get("subject"))
            is_own = (name, document.get("round")) == (link.name, link.round)
            if manifest is not None and is_own:
                finished = manifest.provenance["finished"]
                assert isinstance(finished, int | float)
                yield DoneStep(f"round-{link.round:03d}/{link.name}", link.round, entry, document, finished)


def _whole(steps: Iterable[DoneStep]) -> tuple[list[DoneStep], ArtifactError | None]:
    """Those whose metrics and summary are as they were written, and what is wrong with the first other one."""
    whole, damage = list[DoneStep](), None
    for step in steps:
        try:
            step.entry.opened(METRICS, SUMMARY)
        except ArtifactError as error:
            damage = damage or error
        else:
            whole.append(step)
    return whole, damage


def pending(run_folder: Path) -> int:
    """How many finished steps of the run MLflow does not have yet."""
    record = read_record(run_folder)
    is_gone = record is not None and record.uri is None and not (run_folder.parents[1] / DATABASE).exists()
    known = record.mirrored if record is not None and not is_gone else {}
    return sum(known.get(step.name) != step.mark for step in done_steps(run_folder))


def waiting(run_folder: Path) -> list[str]:
    """What MLflow does not have yet, in sentences."""
    record, count = read_record(run_folder), pending(run_folder)
    found = []
    if count:
        found.append(f"{count} steps are not in MLflow yet: the next run mirrors them")
    elif record is not None and record.status != record.wanted:
        found.append(
            f"MLflow shows this run as {record.status}, not as {record.wanted}: the next run tells it"
        )
    if record is not None and record.refused:
        names = ", ".join(record.refused)
        found.append(f"MLflow refused the params {names}: the next run tries again")
    return found


def is_finished(request: Request) -> bool:
    """Whether MLflow has all of the run and shows it as finished, by the notes of when it was told."""
    record = read_record(request.run)
    if record is None or not record.status == record.wanted == "FINISHED" or record.run_id is None:
        return False
    is_elsewhere = record != _record_of(request, _recipe_of(request.run)["name"])
    if is_elsewhere or record.refused:  # params that are refused once may be taken later
        return False
    if record.uri is None and not (request.workspace / DATABASE).exists():
        return False
    steps = list(done_steps(request.run))
    if any(record.mirrored.get(step.name) != step.mark for step in steps):
        return False
    for name, path, _entry in _artifacts(request.run, steps):
        with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
            if record.artifacts.get(name) != _text_digest(path.read_text(encoding="utf-8")):
                return False
    return True


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def unsettled(workspace: Path) -> list[Request]:
    """What would make MLflow true for the runs that nobody runs and that it shows in another state."""
    requests = []
    for run in all_runs(workspace):
        record = read_record(run.path)
        if record is None or (record.status == record.wanted and record.wanted != "RUNNING"):
            continue
        if not is_running(run.path):
            status: Status = "KILLED" if record.wanted == "RUNNING" else record.wanted
            with contextlib.suppress(ValidationError):  # an address that recipes may not hold any more
                tracking = Tracking(uri=record.uri, experiment=record.experiment)
                requests.append(Request(workspace=workspace, run=run.path, tracking=tracking, status=status))
    return requests


def metric_name(name: str, *, stage: str, subject: str, per_step: bool, several: bool = False) -> str:
    """The name in MLflow of a metrics.jsonl row: student and each teacher, steps and rounds stay apart."""
    owner = STUDENT if subject == STUDENT else f"teacher/{subject}" if several else "teacher"
    match stage:
        case "train" if per_step:
            return f"train_step/{name.removeprefix('train/')}"
        case "sft" if name.startswith("sft/"):
            return name.replace("sft/", f"sft/{owner}/", 1)
        case "sft":
            return name.replace("sft", f"sft_{owner}", 1)
        case "evaluate" if owner != STUDENT:
            return name.replace("evaluate", f"evaluate_{owner}", 1)
        case _:
            return name


def flatten(value: JsonValue, name: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of a resolved recipe as MLflow takes them: dotted names, shortened text."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from flatten(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from flatten(item, f"{name}.{index}")
    else:
        text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        yield re.sub(r"[^\w. :-]", "_", name)[:MAX_NAME], _shortened(text)


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_VALUE else text[: MAX_VALUE - 3] + "..."


def _metrics(step: DoneStep, *, several: bool) -> Iterator[Metric]:
    metric = _mlflow().entities.Metric
    stage, subject = step.document["stage"], step.document["subject"]
    for row in step.entry.metrics():
        per_step = row["optimizer_step"] is not None
        name = metric_name(row["name"], stage=stage, subject=subject, per_step=per_step, several=several)
        at = row["optimizer_step"] if per_step else step.round
        yield metric(name, row["value"], round(step.finished * 1000), at)


def _datasets(recipe: Mapping[str, Any], steps: Sequence[DoneStep]) -> dict[str, tuple[str, str]]:
    """Split -> (digest, where it comes from), of the data that finished steps have used."""
    task = recipe["task"]
    found: dict[str, tuple[str, str]] = {}
    for step in steps:
        fields, stage = step.document["fields"], step.document["stage"]
        if stage not in ("rollout", "evaluate"):
            continue
        made = {"train" if stage == "rollout" else "test": {"task": fields["task"]}}  # by the task itself
        for split, identity in (fields["task.data"] or made).items():
            digest = hashlib.sha256(canonical(identity)).hexdigest()
            digest = identity.get("digest", identity.get("revision", digest))
            found[split] = digest[:MAX_DIGEST], str(task.get("data") or task.get(split) or task["kind"])
    return found


def _artifacts(run_folder: Path, steps: Sequence[DoneStep]) -> Iterator[tuple[str, Path, Entry | None]]:
    """(name in MLflow, file, the entry that vouches for it) of everything that is shown there besides numbers."""
    names = ("recipe.yaml", "resolved.json", "environment.json", "report.html")
    yield from ((name, run_folder / name, None) for name in names)
    for step in steps:
        if step.document["stage"] == "evaluate":
            name = f"evaluate/round-{step.round:03d}-{step.document['subject']}.json"
            yield name, step.entry.folder / SUMMARY, step.entry


# ---------------------------------------------------------------------------------------- worker's side


def serve() -> Synchronizer:
    """What the mirror's process serves, behind everything else that wants the processor."""
    os.nice(10)
    return Synchronizer()


class Synchronizer:
    """Makes MLflow equal to a run's files, however often it is called and wherever it was killed."""

    def __init__(self) -> None:
        self._open: dict[Path, _MirroredRun] = {}

    def __call__(self, request: Message, report: Report) -> Message:
        """Mirrors one run (see `Request`); raises KdpipeError when MLflow refuses or does not answer."""
        order = Request.model_validate(request)
        mlflow = _mlflow()
        report.event(mirror="loaded")
        mirrored = self._open.pop(order.run, None)  # back in its place only if all goes well
        try:
            if mirrored is None or not mirrored.is_at(order.tracking):
                if order.tracking.uri is None:
                    with _beating(report):
                        _make_database(order.workspace.resolve())
                mirrored = _MirroredRun(order, lambda: report.event(mirror="answered"))
                report.event(mirror="opened")
            count = mirrored.follow(order.status, report)
        except mlflow.MlflowException as error:
            place = order.tracking.uri or f"{order.workspace / DATABASE}"
            message = _without_secret(f"MLflow at {place}: {error}", order.tracking.uri)
            raise KdpipeError(message, hint="nothing is lost: a later command mirrors it") from error
        self._open[order.run] = mirrored
        return {"run_id": mirrored.record.run_id, "metrics": count}


class _MirroredRun:
    """One run and its MLflow run, open."""

    def __init__(self, order: Request, answered: Callable[[], None]) -> None:
        self._answered = answered
        self.workspace = order.workspace.resolve()
        self.folder = order.run
        self.recipe = _recipe_of(self.folder)
        self.tracking = order.tracking
        self.record = _record_of(order, self.recipe["name"])
        self._save()  # the key is durable before the MLflow run exists
        self.client: MlflowClient = _mlflow().MlflowClient(self.record.uri or database_uri(self.workspace))
        run = self._run()
        self.run_id: str = run.info.run_id
        self.artifact_uri: str = run.info.artifact_uri
        self._describe(run)

    def is_at(self, tracking: Tracking) -> bool:
        """Whether `tracking` still names the place of this mirror."""
        return (self.tracking.uri, self.tracking.experiment) == (tracking.uri, tracking.experiment)

    def follow(self, status: Status, report: Report) -> int:
        """Mirrors what is not there yet; returns how many metrics that was."""
        record = self.record
        record.wanted = status
        if status == "RUNNING" and record.status != status:
            self.client.update_run(self.run_id, status=status)
            record.status = status
            self._save()
        steps = list(done_steps(self.folder))
        new, damage = _whole(step for step in steps if record.mirrored.get(step.name) != step.mark)
        self._tag_headroom(new)
        count = self._log_metrics(new, report)
        self._log_datasets(steps)
        if status != record.status:
            self.client.set_terminated(self.run_id, status, self._ended())
            record.status = status
        self._save()
        self._log_artifacts(steps, report)
        self._save()
        if damage is not None:  # of this step nothing is shown; all others are there
            raise damage
        return count

    # which MLflow run

    def _run(self) -> Run:
        """The MLflow run: by its id, else by its key, else a new one."""
        record = self.record
        run = self._recorded()
        if run is None:
            self.record = record = Record(**record.model_dump(include={"key", "uri", "experiment", "wanted"}))
            experiment = self._experiment()
            self._answered()
            run = self._searched(experiment) or self.client.create_run(
                experiment, start_time=self._began(), tags=self._tags(), run_name=self.folder.name
            )
            record.run_id = run.info.run_id
        record.status = run.info.status
        self._save()
        self._answered()
        return run

    def _recorded(self) -> Run | None:
        if self.record.run_id is None:
            return None
        try:
            run = self.client.get_run(self.record.run_id)
        except _mlflow().MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def _searched(self, experiment: str) -> Run | None:
        """The run that an earlier attempt made. On a server of many, only the key tells whose it is."""
        found = self.client.search_runs([experiment], f"tags.`kdpipe.run` = '{self.folder.name}'")
        own = self.record.uri is None
        return next((run for run in found if own or run.data.tags.get("kdpipe.key") == self.record.key), None)

    def _experiment(self) -> str:
        name, is_server = self.record.experiment, (self.record.uri or "").startswith(("http:", "https:"))
        location = None if is_server else str(self.workspace / ARTIFACTS)
        if (found := self.client.get_experiment_by_name(name)) is None:
            try:
                return str(self.client.create_experiment(name, artifact_location=location))
            except _mlflow().MlflowException as error:
                found = self.client.get_experiment_by_name(name)  # another run may have been faster
                if found is None:
                    raise error from None
        return str(found.experiment_id)

    def _began(self) -> int:
        return round(1000 * next(_times(self.folder), time.time()))

    def _ended(self) -> int:
        """Now, or the last sign of life of a run that nobody runs any more; milliseconds."""
        times = [] if is_running(self.folder) else list(_times(self.folder))
        return round(1000 * (times[-1] if times else time.time()))

    # what it holds

    def _describe(self, run: Run) -> None:
        """Logs params that are not there yet (a changed one would raise), and the tags as they are now."""
        entities = _mlflow().entities
        leaves = {key: self._safe(value) for key, value in flatten(self.recipe)}
        new = [entities.Param(key, value) for key, value in leaves.items() if key not in run.data.params]
        refused = [
            param.key
            for start in range(0, len(new), MAX_PARAMS)
            for param in self._refused(new[start : start + MAX_PARAMS])
        ]
        self.record.refused = refused
        changed = {key: value for key, value in self._tags().items() if run.data.tags.get(key) != value}
        self.client.log_batch(
            self.record.run_id, tags=[entities.RunTag(key, value) for key, value in changed.items()]
        )

    def _refused(self, params: Sequence[Param]) -> list[Param]:
        """Logs params together, or where MLflow refuses them one by one; returns those that it will not take."""
        try:
            self.client.log_batch(self.run_id, params=params)
        except _mlflow().MlflowException as error:
            if error.error_code not in REFUSALS:
                raise
            return [*params] if len(params) == 1 else [p for each in params for p in self._refused([each])]
        finally:
            self._answered()
        return []

    def _tags(self) -> dict[str, str]:
        environment = json.loads((self.folder / "environment.json").read_bytes())
        tags = {
            "kdpipe.run": self.folder.name,
            "kdpipe.key": self.record.key,
            "student": _model(self.recipe["student"]),
            "teacher": _teachers(self.recipe["teachers"]),
            "mlflow.source.name": "kdpipe",
            "mlflow.source.type": "LOCAL",
            **{f"environment.{name}": str(value) for name, value in environment.items() if value is not None},
        }
        if commit := environment.get("git_commit"):
            tags["mlflow.source.git.commit"] = commit
        with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
            tags["mlflow.user"] = getpass.getuser()
        return {key: _shortened(value) for key, value in tags.items()}

    def _tag_headroom(self, steps: Sequence[DoneStep]) -> None:
        """Tags the run with how much better than student 0 each teacher is, as soon as that was measured."""
        for step in steps:
            stage, subject = step.document["stage"], step.document["subject"]
            if stage != "evaluate" or subject == STUDENT:
                continue
            teachers = {teacher.name: teacher for teacher in RunFolder(self.folder).recipe().teachers}
            summary = step.entry.read_json(SUMMARY)
            text = headroom_of(teachers[subject], summary).sentence()
            name = "headroom" if len(teachers) == 1 else f"headroom.{subject}"
            self.client.set_tag(self.run_id, name, _shortened(text))

    def _log_metrics(self, steps: Sequence[DoneStep], report: Report) -> int:
        """Logs the steps' metrics, and marks steps as their last batch is through."""
        batch: list[Metric] = []
        marks: dict[str, str] = {}
        count = 0
        for step in steps:
            rows = list(_metrics(step, several=len(self.recipe["teachers"]) > 1))
            batch += self._changed(rows) if step.name in self.record.mirrored else rows
            marks[step.name] = step.mark
            if len(batch) < MAX_METRICS and step is not steps[-1]:
                continue
            for start in range(0, len(batch), MAX_METRICS):
                self.client.log_batch(self.run_id, metrics=batch[start : start + MAX_METRICS])
                report.event(mirror="metrics")
            count += len(batch)
            self.record.mirrored |= marks
            self._save()
            batch, marks = [], {}
        return count

    def _changed(self, rows: Sequence[Metric]) -> list[Metric]:
        """The rows of a step that was performed again, without those that repeat what MLflow shows."""
        shown: dict[tuple[str, int], tuple[int, float]] = {}
        for name in {row.key for row in rows}:
            for old in self.client.get_metric_history(self.run_id, name):
                place, value = (old.key, old.step), (old.timestamp, old.value)
                shown[place] = max(shown.get(place, value), value)
        return [row for row in rows if shown.get((row.key, row.step), (0, None))[1] != row.value]

    def _log_datasets(self, steps: Sequence[DoneStep]) -> None:
        entities = _mlflow().entities
        for split, (digest, source) in _datasets(self.recipe, steps).items():
            if f"{split} {digest}" not in self.record.datasets:
                name = f"{self.recipe['task']['kind']}/{split}"
                data = entities.Dataset(
                    name, digest, "kdpipe", json.dumps({"source": source, "split": split})
                )
                context = entities.InputTag(
                    "mlflow.data.context", "training" if split == "train" else "evaluation"
                )
                self.client.log_inputs(self.run_id, [entities.DatasetInput(data, [context])])
                self.record.datasets.append(f"{split} {digest}")

    def _log_artifacts(self, steps: Sequence[DoneStep], report: Report) -> None:
        if self.record.uri is None and self.workspace not in Path(self.artifact_uri).parents:
            return  # the workspace was moved: its old place is not ours to write to
        for name, path, entry in _artifacts(self.folder, steps):
            with contextlib.suppress(FileNotFoundError, UnicodeDecodeError, ArtifactError):
                text = path.read_text(encoding="utf-8")
                digest = _text_digest(text)
                if self.record.artifacts.get(name) != digest:
                    if entry is not None:
                        entry.opened(path.name)
                    self.client.log_text(self.run_id, self._safe(text), name)
                    self.record.artifacts[name] = digest
                    report.event(mirror=name)

    def _safe(self, text: str) -> str:
        return _without_secret(text, self.record.uri)

    def _save(self) -> None:
        if read_record(self.folder) != self.record:
            _write_record(self.folder, self.record)


def database_uri(workspace: Path) -> str:
    """Where MLflow lives unless the recipe says otherwise."""
    return f"sqlite:///{workspace.resolve() / DATABASE}"


def _make_database(workspace: Path) -> None:
    """Makes the workspace's database in one piece: a kill in the middle of MLflow's set-up would break it."""
    path = workspace / DATABASE

    def make(draft: Path) -> None:
        _mlflow().MlflowClient(f"sqlite:///{draft}").search_experiments()

    if not path.exists():
        with FileLock(workspace / f".{DATABASE}.lock"):
            if not path.exists():
                write_durably(path, make)


@contextlib.contextmanager
def _beating(report: Report) -> Iterator[None]:
    """Tells the parent each second that work goes on: MLflow sets a database up in one call, long on a busy machine."""
    is_over = threading.Event()

    def beat() -> None:
        while not is_over.wait(1.0):
            report.event(mirror="making the database")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _mlflow() -> Any:
    """The library, which takes seconds to import: only ever in a process of its own."""
    import mlflow

    return mlflow


def _model(model: Mapping[str, Any]) -> str:
    name: str | None = model.get("model") or ("self" if model.get("self") else None)
    return name or "scratch"


def _teachers(teachers: Sequence[Mapping[str, Any]]) -> str:
    """The teacher's model, or those of several by name."""
    if len(teachers) == 1:
        return _model(teachers[0])
    return ", ".join(f"{teacher['name']}: {_model(teacher)}" for teacher in teachers)


def _without_secret(text: str, uri: str | None) -> str:
    """`text` without the user and password that an address may hold."""
    with contextlib.suppress(ValueError):
        user, at, _ = urlsplit(uri or "").netloc.rpartition("@")
        return text.replace(user, "***") if at and user else text
    return text


# ---------------------------------------------------------------------------------------- parent's side


class NoMirror:
    """Mirrors nothing: `tracking.enabled: false`."""

    def nudge(self) -> None:
        """Does nothing."""

    def finish(self, status: str, *, hurry: Callable[[], bool] = lambda: False) -> str | None:
        """Does nothing."""
        return None


class MlflowMirror:
    """Mirrors one run from a thread of its own; none of its methods raises, and only `finish` waits.

    `error` is what went wrong last, or None.
    """

    def __init__(self, request: Request) -> None:
        self.error: str | None = None
        self._request = request
        self._log = request.run / LOG
        self._worker = _worker(self._log)
        self._wake = threading.Event()
        self._ending = threading.Event()
        self._final: Status = "RUNNING"
        self._deadline = float("inf")
        self._quiet_since = 0.0
        self._finish_since = 0.0
        self._is_over = False
        self._is_loaded = False
        self._is_server = request.tracking.uri is not None
        self._is_nudged = False
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def nudge(self) -> None:
        """Says that there is something new, or about to be."""
        self._is_nudged = True
        self._wake.set()

    def finish(self, status: str, *, hurry: Callable[[], bool] = lambda: False) -> str | None:
        """Mirrors a last time with `status`, in bounded time; returns why what is left waits for a later command.

        Once `hurry()` is true, as a signal makes it, there is no more patience than for a run that was killed.
        """
        self._final = Request.model_validate({**self._request.model_dump(), "status": status}).status
        self._quiet_since = time.monotonic()
        self._finish_since = self._quiet_since
        self._deadline = self._quiet_since + PATIENCE_SECONDS[self._final]
        self._ending.set()
        self._wake.set()
        while self._thread.is_alive() and time.monotonic() < self._deadline + 2:
            self._thread.join(0.1)
            if hurry() and self._deadline > (soon := time.monotonic() + PATIENCE_SECONDS["KILLED"]):
                self._deadline = soon
        return "it did not answer in time" if self._thread.is_alive() else self.error

    def _work(self) -> None:
        """The thread: everything that talks to the worker."""
        if self._has_nothing_to_do():
            self._wake.wait()
            if not self._is_nudged and self._final == "FINISHED":
                return
        if self._attempt(self._mirror) and not self._ending.is_set():
            self._attempt(self._settle_others)
        while not self._ending.is_set():
            self._wake.wait()
            self._wake.clear()
            start = time.monotonic()
            if not self._ending.is_set():
                delivered = self._attempt(self._mirror)
                pause = min(RETRY_SECONDS, PAUSE_RATIO * (time.monotonic() - start))
                self._ending.wait(pause if delivered else RETRY_SECONDS)
        delivered = not self._is_over and self._attempt(self._mirror)
        self._worker.kill()
        if not delivered:
            self._attempt(self._note_wanted)

    def _has_nothing_to_do(self) -> bool:
        """Whether MLflow, whose import alone takes seconds, is as it should be as long as no step is performed."""
        try:
            return is_finished(self._request) and not unsettled(self._request.workspace)
        except (KdpipeError, OSError, ValueError, KeyError):  # then what it is told will say what is wrong
            return False

    def _attempt(self, action: Callable[[], None]) -> bool:
        """Whether `action` went well; nothing that goes wrong in it may stop the run."""
        try:
            action()
        except Exception as error:
            if not isinstance(error, KdpipeError) or isinstance(error, StepError):
                self._worker.kill()  # it hangs, or is gone; one that was refused an answer can be asked again
                self._is_loaded = False
            self.error = str(error)
            with contextlib.suppress(OSError), self._log.open("a", encoding="utf-8") as log:
                log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} not mirrored: {error}\n")
            return False
        return True

    def _mirror(self) -> None:
        self._call(self._request.model_copy(update={"status": self._final}))
        self.error = None

    def _settle_others(self) -> None:
        for request in unsettled(self._request.workspace):
            if not self._ending.is_set():
                self._call(request)

    def _note_wanted(self) -> None:
        """Notes the status that could not be delivered; the worker is gone, so nobody else writes."""
        record = _record_of(self._request, _recipe_of(self._request.run)["name"])
        record.wanted = self._final
        _write_record(self._request.run, record)

    def _call(self, request: Request) -> None:
        self._check_time()
        self._worker.call(request.model_dump(mode="json"), on_event=self._progress, tick=self._check_time)

    def _progress(self, _event: Message) -> None:
        self._quiet_since = time.monotonic()
        if not self._is_loaded:
            self._is_loaded, self._finish_since = True, self._quiet_since

    def _check_time(self) -> None:
        limits = [self._deadline]
        if self._is_loaded:
            limits.append(self._quiet_since + (SERVER_QUIET_SECONDS if self._is_server else QUIET_SECONDS))
        if self._is_loaded and self._is_server:
            limits.append(self._finish_since + SERVER_PATIENCE_SECONDS)
        if self._ending.is_set() and time.monotonic() > min(limits):
            self._is_over = True
            raise TimeoutError(f"MLflow did not answer in time; {pending(self._request.run)} steps are left")


def open_mirror(project: Project) -> Mirror:
    """The mirror of the project's run, as its recipe wants it."""
    if not project.recipe.tracking.enabled:
        return NoMirror()
    return MlflowMirror(
        Request(
            workspace=project.workspace,
            run=project.run.path,
            tracking=project.recipe.tracking,
            status="RUNNING",
        )
    )


def settle(workspace: Path, *, seconds: float = 30.0) -> list[str]:
    """Tells MLflow the end of runs that were killed or could not be mirrored; returns their names.

    Starts MLflow's process only when there is such a run, and gives up after `seconds`.
    """
    requests = unsettled(workspace)
    if not requests:
        return []
    deadline = time.monotonic() + seconds
    worker = _worker(workspace / "mlflow.log")
    settled = []

    def check_time() -> None:
        if time.monotonic() > deadline:
            raise KdpipeError("MLflow did not answer in time", hint="a later command tries again")

    try:
        for request in requests:
            with contextlib.suppress(KdpipeError):  # left unsettled, which the next command sees again
                worker.call(request.model_dump(mode="json"), on_event=lambda _: None, tick=check_time)
                settled.append(request.run.name)
    finally:
        worker.kill()
    return settled


def _worker(log: Path) -> Worker:
    return Worker("kdpipe.tracking:serve", log=log, environment=ENVIRONMENT)


# ----------------------------------------------------------------------------------------------- the page


def free_port(host: str, first: int = 5000) -> int:
    """The first port from `first` on that nobody listens on at `host`."""
    for port in range(first, first + 100):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with contextlib.suppress(OSError), socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return port
    raise KdpipeError(f"{host}: ports {first} to {first + 99} are taken", hint="give another with --port")


def ui_command(workspace: Path, host: str, port: int) -> list[str]:
    """The command that serves MLflow's page over the workspace's store."""
    artifacts = str(workspace.resolve() / ARTIFACTS)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database_uri(workspace)]
    command += ["--default-artifact-root", artifacts, "--artifacts-destination", artifacts]
    return [*command, "--host", host, "--port", str(port), "--workers", "1"]


def serve_ui(workspace: Path, host: str = "127.0.0.1", first_port: int = 5000) -> int:
    """Serves MLflow's page until a signal; returns the server's exit status, 0 after SIGINT or SIGTERM."""
    stopped = False
    environment = {**os.environ, **ENVIRONMENT, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = ui_command(workspace, host, free_port(host, first_port))
    process = subprocess.Popen(command, env=environment, start_new_session=True)  # noqa: S603 (our own)

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal stopped
        urgent, stopped = stopped, True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL if urgent else signal.SIGTERM)

    with _handling(stop):
        status = process.wait()
    return 0 if stopped else status


@contextlib.contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
