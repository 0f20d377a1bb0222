"""MLflow's stores and runs; the only module that imports MLflow, in a process of its own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

from mlflow import MlflowClient, MlflowException
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModel,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
    Param,
    Run,
    RunTag,
)
from mlflow.models import Model

from kdpipe.errors import KdpipeError
from kdpipe.store.durable import write_durably
from kdpipe.store.locks import locked
from kdpipe.tracking.memory import DATABASE, Memory, MirrorRequest, Status, artifacts_uri, database_uri
from kdpipe.tracking.steps import MetricRow, event_times

MAX_METRICS = 1000  # in one call, so that each is answered soon
MAX_TAG = 8000  # characters; MLflow cuts what is longer
NOTE, NOTE_DIGEST = "mlflow.note.content", "kdpipe.note"  # the run's description, and which one was ours
PARENT = "mlflow.parentRunId"
WEIGHTS = "model"  # the folder of a logged model that holds them
MARK = "kdpipe.mark"  # of which training a logged model is
TABLES, OWN_TABLES = "mlflow.loggedArtifacts", "tables/"
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # the page is that of training runs
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")


@contextlib.contextmanager
def answering(place: str, uri: str | None) -> Iterator[None]:
    """Raises KdpipeError where MLflow refuses or does not answer."""
    try:
        yield
    except MlflowException as error:
        message = without_secret(f"MLflow at {place}: {error}", uri)
        raise KdpipeError(message, hint="nothing is lost: a later command mirrors it") from error


class MlflowRun:
    """The MLflow run of a run or study, open; it is created where there is none.

    `memory` learns which one it is; what it says of the contents is forgotten where the MLflow run is new. Metrics and
    the list of tables wait for `flush`. `answered` is called whenever MLflow has answered.
    """

    def __init__(
        self, request: MirrorRequest, memory: Memory, *, answered: Callable[[], None] = lambda: None
    ) -> None:
        workspace = request.workspace.resolve()
        self._uri = memory.uri
        self._client = MlflowClient(memory.uri or database_uri(workspace / DATABASE))
        self._answered = answered
        run = self._recorded(memory)
        if run is None:
            memory.forget()
            run = self._made(request, memory)
            memory.run_id = run.info.run_id
        memory.status = run.info.status
        memory.artifact_uri = run.info.artifact_uri
        self.id: str = run.info.run_id
        self._experiment_id: str = run.info.experiment_id
        self._params = run.data.params
        self._tags = dict(run.data.tags)
        self._may_know_all = not memory.sent and bool(run.data.metrics)  # the memory was lost
        self._tables = {name for name, mark in memory.sent.items() if mark and name.startswith(OWN_TABLES)}
        self._rows: list[Metric] = []
        answered()

    def _recorded(self, memory: Memory) -> Run | None:
        if memory.run_id is None:
            return None
        try:
            run = self._client.get_run(memory.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def _made(self, request: MirrorRequest, memory: Memory) -> Run:
        """The run that an earlier attempt made, else a new one."""
        experiment = self._experiment(memory, request.workspace.resolve())
        self._answered()
        subject, name = f"kdpipe.{request.subject}", request.folder.name
        for run in self._client.search_runs([experiment], f"tags.`{subject}` = '{name}'"):
            # On a server of many, only the key tells whose it is.
            if memory.uri is None or run.data.tags.get("kdpipe.key") == memory.key:
                return run
        began, tags = event_times(request.folder)[0], {subject: name, "kdpipe.key": memory.key}
        return self._client.create_run(experiment, start_time=began, tags=tags, run_name=name)

    def _experiment(self, memory: Memory, workspace: Path) -> str:
        name, is_server = memory.experiment, (memory.uri or "").startswith(("http:", "https:"))
        location = None if is_server else artifacts_uri(workspace)
        if (found := self._client.get_experiment_by_name(name)) is None:
            try:
                return str(self._client.create_experiment(name, location, EXPERIMENT_TAGS))
            except MlflowException:
                found = self._client.get_experiment_by_name(name)
                if found is None:  # else another run was faster
                    raise
        return str(found.experiment_id)

    def set_status(self, status: Status, folder: Path) -> None:
        """Makes it show `status`; what is over ended with the last event of its `folder`."""
        if status == "RUNNING":
            self._client.update_run(self.id, status=status)
        else:
            self._client.set_terminated(self.id, status, event_times(folder)[-1])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Sets those that are not so already."""
        changed = {key: value for key, value in tags.items() if self._tags.get(key) != value}
        self._client.log_batch(self.id, tags=[RunTag(key, value) for key, value in changed.items()])
        self._tags |= changed

    def set_note(self, text: str) -> None:
        """Makes `text` the run's description, unless a user has written another one."""
        tags = self._client.get_run(self.id).data.tags
        if tags.get(NOTE) and tags.get(NOTE_DIGEST) != _digest(tags[NOTE]):
            return
        self._client.log_batch(self.id, tags=[RunTag(NOTE, text), RunTag(NOTE_DIGEST, _digest(text))])

    def log_params(self, params: Mapping[str, str]) -> list[str]:
        """Logs params that are not there yet, as a changed one would raise; returns those that are refused."""
        new = {key: value for key, value in params.items() if key not in self._params}
        found = self._refused([Param(key, without_secret(text, self._uri)) for key, text in new.items()])
        return [param.key for param in found]

    def _refused(self, params: Sequence[Param]) -> list[Param]:
        """Logs params together, or where MLflow refuses them by halves; returns those that it refuses alone."""
        try:
            self._client.log_batch(self.id, params=params)
        except MlflowException as error:
            if error.error_code not in REFUSALS:
                raise
            half = len(params) // 2
            return self._refused(params[:half]) + self._refused(params[half:]) if half else [*params]
        finally:
            self._answered()
        return []

    def log_metrics(self, rows: Iterable[MetricRow], *, is_known: bool) -> None:
        """Logs rows at the next `flush`; with `is_known` only those that MLflow does not show already.

        The very same row, with its timestamp, is kept once in any case.
        """
        rows = list(rows)
        shown: dict[tuple[str, int], tuple[int, float]] = {}
        for name in {row.name for row in rows} if is_known or self._may_know_all else ():
            for old in self._client.get_metric_history(self.id, name):
                place, value = (old.key, old.step), (old.timestamp, old.value)
                shown[place] = max(shown.get(place, value), value)
        new = (row for row in rows if shown.get((row.name, row.step), (0, None))[1] != row.value)
        self._rows += [Metric(row.name, row.value, row.timestamp, row.step) for row in new]

    def flush(self) -> int:
        """Sends the metrics and the list of tables that wait; returns the number of metrics."""
        rows, self._rows = self._rows, []
        for start in range(0, len(rows), MAX_METRICS):
            self._client.log_batch(self.id, metrics=rows[start : start + MAX_METRICS])
            self._answered()
        self._list_tables()
        return len(rows)

    def log_data_set(self, name: str, digest: str, source: str, split: str) -> None:
        """Names a data set as an input."""
        data = Dataset(name, digest, "kdpipe", json.dumps({"source": source, "split": split}))
        context = InputTag("mlflow.data.context", "training" if split == "train" else "evaluation")
        self._client.log_inputs(self.id, [DatasetInput(data, [context])])

    def log_text(self, name: str, text: str) -> None:
        """Writes an artifact whole, without what is secret; the page learns of a table with the next `flush`."""
        self._client.log_text(self.id, without_secret(text, self._uri), name)
        self._answered()
        if name.startswith(OWN_TABLES):
            self._tables.add(name)

    def adopt(self, child: str) -> None:
        """Makes the MLflow run `child` one of this one's children, unless it is there no more."""
        try:
            self._client.set_tag(child, PARENT, self.id)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", *REFUSALS):  # gone, or deleted
                raise
        self._answered()

    def log_model(self, folder: Path, name: str, mark: str, *, round_number: int) -> None:
        """Logs a Hugging Face folder as a model for `mlflow.transformers.load_model`, once for a `mark`.

        No weights are loaded for that, and no library that could.
        """
        model = self._logged(name, mark)
        if model is None:
            model = self._client.create_logged_model(
                self._experiment_id, name=name, source_run_id=self.id, tags={MARK: mark}
            )
            with beating(self._answered):
                self._client.log_model_artifacts(model.model_id, str(folder), WEIGHTS)
            with tempfile.TemporaryDirectory() as draft:
                _describe_model(folder, name, Path(draft), Model(model_id=model.model_id, run_id=self.id))
                self._client.log_model_artifacts(model.model_id, draft)
            self._client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        outputs = self._client.get_run(self.id).outputs
        if all(one.model_id != model.model_id for one in (outputs.model_outputs if outputs else ())):
            self._client.log_outputs(self.id, [LoggedModelOutput(model.model_id, round_number)])
        self._answered()

    def _logged(self, name: str, mark: str) -> LoggedModel | None:
        """The model that an earlier attempt logged, if it is whole; one of other weights is deleted too."""
        found = self._client.search_logged_models(
            [self._experiment_id], f"name = '{name}' AND source_run_id = '{self.id}'"
        )
        whole = None
        for model in found:
            if model.status == LoggedModelStatus.READY and model.tags.get(MARK) == mark:
                whole = model
            else:
                self._client.delete_logged_model(model.model_id)
        return whole

    def _list_tables(self) -> None:
        """Tells the page which artifacts are tables, beside those that others have told it of.

        As many as a tag holds: answers before samples, late rounds before early ones.
        """
        listed = [{"path": name, "type": "table"} for name in sorted(self._tables, reverse=True)]
        listed.sort(key=lambda one: "/evaluate-" not in one["path"])
        others = [one for one in _listed(self._tags.get(TABLES)) if not one["path"].startswith(OWN_TABLES)]
        while len(text := json.dumps([*others, *listed])) > MAX_TAG and listed:
            listed.pop()
        if listed:
            self.set_tags({TABLES: text})


def _describe_model(folder: Path, name: str, target: Path, model: Model) -> None:
    """Writes what MLflow's `transformers` flavor wants beside the weights, the tokenizer included.

    `mlflow.transformers.save_model` does so too, but asks a hub about the folder, imports torch, and in MLflow 3.17.2
    fails with transformers 5.24.
    """
    architecture = json.loads((folder / "config.json").read_bytes())["architectures"][0]
    model.add_flavor(
        "transformers",
        transformers_version=version("transformers"),
        code=None,
        task="text-generation",
        instance_type="TextGenerationPipeline",
        pipeline_model_type=architecture,
        source_model_name=name,
        model_binary=WEIGHTS,
        components=["tokenizer"],
        tokenizer_type="AutoTokenizer",
    )
    tokenizer = target / "components" / "tokenizer"
    shutil.copytree(
        folder, tokenizer, ignore=shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json")
    )
    needed = [f"{library}=={version(library)}" for library in ("mlflow", "torch", "transformers")]
    (target / "requirements.txt").write_text("\n".join(needed) + "\n", encoding="utf-8")
    model.save(str(target / "MLmodel"))


def _listed(tag: str | None) -> list[dict[str, str]]:
    """What a run's tag says of its tables, as far as it can be read."""
    with contextlib.suppress(ValueError):
        found = json.loads(tag or "[]")
        if isinstance(found, list):
            return [one for one in found if isinstance(one, dict) and isinstance(one.get("path"), str)]
    return []


def make_database(workspace: Path, beat: Callable[[], None] = lambda: None) -> None:
    """Makes the workspace's database in one piece: a kill in the middle of MLflow's set-up would break it."""
    path = workspace / DATABASE

    def make(draft: Path) -> None:
        with beating(beat):
            MlflowClient(database_uri(draft)).search_experiments()

    if not path.exists():
        with locked(workspace / f".{DATABASE}.lock"):
            if not path.exists():
                write_durably(path, make)


@contextlib.contextmanager
def beating(beat: Callable[[], None]) -> Iterator[None]:
    """Calls `beat` each second: MLflow may be busy in one call for long."""
    is_over = threading.Event()

    def go_on() -> None:
        while not is_over.wait(1.0):
            beat()

    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def without_secret(text: str, uri: str | None) -> str:
    """`text` without the user and password that an address may hold."""
    with contextlib.suppress(ValueError):
        user, at, _ = urlsplit(uri or "").netloc.rpartition("@")
        return text.replace(user, "***") if at and user else text
    return text
