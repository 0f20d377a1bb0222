"""The mirror's own process: makes MLflow equal to a run's files, however often it is asked."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdpipe.data.payload import SUMMARY_FILE
from kdpipe.errors import ArtifactError
from kdpipe.pipeline.runs import RunFolder
from kdpipe.recipe.schema import Tracking
from kdpipe.store.step import Stage
from kdpipe.tracking.contents import (
    MAX_METRICS,
    DoneStep,
    MetricRow,
    artifacts,
    authorship,
    data_sets,
    done_steps,
    event_times,
    flatten,
    metrics,
    newest_model,
    shortened,
    tables,
    text_digest,
    whole_steps,
)
from kdpipe.tracking.findings import Findings
from kdpipe.tracking.mirrored_study import mirror_study, parent_of
from kdpipe.tracking.mlflow_run import PARENT, Card, MlflowRun, answering, beating, make_database
from kdpipe.tracking.record import DATABASE, Request, Status, read_record, recipe_of, record_of, write_record
from kdpipe.tracking.sample_tables import table_of
from kdpipe.workers.worker import Message, Report


def serve() -> Synchronizer:
    """What the mirror's process serves, behind everything else that wants the processor."""
    os.nice(10)
    return Synchronizer()


class Synchronizer:
    """Makes MLflow equal to a run's files, however often it is called and wherever it was killed."""

    def __init__(self) -> None:
        self._open: dict[Path, _MirroredRun] = {}

    def __call__(self, request: Message, report: Report) -> Message:
        """Mirrors one run or study (see `Request`); raises KdpipeError when MLflow refuses or does not answer."""
        order = Request.model_validate(request)
        report.event(mirror="loaded")
        uri = order.tracking.uri

        def answered() -> None:
            report.event(mirror="answered")

        mirrored = self._open.pop(order.run, None)  # back in its place only if all goes well
        with answering(uri or f"{order.workspace / DATABASE}", uri):
            if mirrored is None or not mirrored.is_at(order.tracking):
                if uri is None:
                    with beating(report, "making the database"):
                        make_database(order.workspace.resolve())
                if order.kind == "study":
                    return {"run_id": mirror_study(order, answered), "metrics": 0}
                mirrored = _MirroredRun(order, answered)
                report.event(mirror="opened")
            count = mirrored.follow(order.status, report)
        self._open[order.run] = mirrored
        return {"run_id": mirrored.record.run_id, "metrics": count}


class _MirroredRun:
    """One run and its MLflow run, open."""

    def __init__(self, order: Request, answered: Callable[[], None]) -> None:
        self._has_told = False  # an earlier kdpipe may have said less
        self.folder = order.run
        self.recipe = recipe_of(self.folder)
        self.tracking = order.tracking
        self.record = record_of(order)
        self._save()  # the key is durable before the MLflow run exists
        place = order.tracking.model_copy(update={"experiment": self.record.experiment})
        self._parent = parent_of(self.folder, order.workspace, place, answered)
        card = Card(self.folder.name, "kdpipe.run", self._began(), self._tags())
        self.run = MlflowRun(order.workspace.resolve(), self.record, card, answered=answered)
        self.record = self.run.record
        self._save()
        answered()
        self.record.refused = self.run.log_params(dict(flatten(self.recipe)))
        self.run.set_tags(self._tags())

    def is_at(self, tracking: Tracking) -> bool:
        """Whether `tracking` still names the place of this mirror."""
        return (self.tracking.uri, self.tracking.experiment) == (tracking.uri, tracking.experiment)

    def follow(self, status: Status, report: Report) -> int:
        """Mirrors what is not there yet; returns how many metrics that was."""
        record = self.record
        record.wanted = status
        if status == "RUNNING" and record.status != status:
            self.run.set_status(status, self._ended)
            self._save()
        steps = list(done_steps(self.folder))
        new, damage = whole_steps(step for step in steps if record.mirrored.get(step.name) != step.mark)
        if not self._has_told or any(step.document["stage"] == Stage.EVALUATE for step in new):
            self._tell_findings(steps)
            self._has_told = True
        count = self._log_metrics(new)
        self._log_data_sets(steps)
        self.run.set_status(status, self._ended)
        self._save()
        self._log_artifacts(steps)
        self._log_tables(steps)
        self._save()
        if status == "FINISHED" and self.recipe["tracking"].get("log_model"):
            with beating(report, "copying the model"):
                self._log_model(steps)
            self._save()
        if damage is not None:  # of this step nothing is shown; all others are there
            raise damage
        return count

    def _began(self) -> int:
        return round(1000 * next(event_times(self.folder), time.time()))

    def _ended(self) -> int:
        """When the run's last step ended, even where a later command only tells it; milliseconds."""
        times = list(event_times(self.folder))
        return round(1000 * (times[-1] if times else time.time()))

    def _tags(self) -> dict[str, str]:
        environment = json.loads((self.folder / "environment.json").read_bytes())
        tags = {
            "kdpipe.run": self.folder.name,
            "kdpipe.key": self.record.key,
            "task": self.recipe["task"]["kind"],
            "objective": self.recipe["train"]["objective"]["kind"],
            "student": _model(self.recipe["student"]),
            "teacher": _teachers(self.recipe["teachers"]),
            **authorship(),
            **{f"environment.{name}": str(value) for name, value in environment.items() if value is not None},
        }
        if commit := environment.get("git_commit"):
            tags["mlflow.source.git.commit"] = commit
        if self._parent is not None:
            tags[PARENT] = self._parent
        return {key: shortened(value) for key, value in tags.items()}

    def _tell_findings(self, steps: Sequence[DoneStep]) -> None:
        """Tags the run with what its evaluations came to, and says it in its description."""
        summaries = []
        for step in steps:
            if step.document["stage"] == Stage.EVALUATE:
                with contextlib.suppress(ArtifactError):
                    step.entry.opened(SUMMARY_FILE)
                    summaries.append(step.entry.read_json(SUMMARY_FILE))
        if not summaries:
            return
        findings, recipe = Findings.of(summaries), RunFolder(self.folder).recipe()
        self.run.set_tags({name: shortened(text) for name, text in findings.tags(recipe).items()})
        self.run.set_note(findings.note(recipe))

    def _log_metrics(self, steps: Sequence[DoneStep]) -> int:
        """Logs the steps' metrics, and marks steps as their last batch is through."""
        batch: list[MetricRow] = []
        marks: dict[str, str] = {}
        count = 0
        for step in steps:
            rows = list(metrics(step, several=len(self.recipe["teachers"]) > 1))
            batch += self.run.unlike_shown(rows) if step.name in self.record.mirrored else rows
            marks[step.name] = step.mark
            if len(batch) < MAX_METRICS and step is not steps[-1]:
                continue
            self.run.log_metrics(batch)
            count += len(batch)
            self.record.mirrored |= marks
            self._save()
            batch, marks = [], {}
        return count

    def _log_data_sets(self, steps: Sequence[DoneStep]) -> None:
        for split, (digest, source) in data_sets(self.recipe, steps).items():
            if f"{split} {digest}" not in self.record.datasets:
                name = f"{self.recipe['task']['kind']}/{split}"
                self.run.log_data_set(name, digest, source=source, split=split)
                self.record.datasets.append(f"{split} {digest}")

    def _log_artifacts(self, steps: Sequence[DoneStep]) -> None:
        if not self.run.takes_artifacts:
            return
        for name, path, entry in artifacts(self.folder, steps):
            with contextlib.suppress(FileNotFoundError, UnicodeDecodeError, ArtifactError):
                text = path.read_text(encoding="utf-8")
                digest = text_digest(text)
                if self.record.artifacts.get(name) != digest:
                    if entry is not None:
                        entry.opened(path.name)
                    self.run.log_text(name, text)
                    self.record.artifacts[name] = digest

    def _log_tables(self, steps: Sequence[DoneStep]) -> None:
        if not self.run.takes_artifacts:
            return
        known, headline = self.record.artifacts, self.recipe["task"]["headline"]
        for name, step, mark in tables(steps):
            with contextlib.suppress(ArtifactError):
                if known.get(name) != mark:
                    table = table_of(step, headline)
                    self.run.log_text(name, table.text)
                    known[name] = mark
                    if table.rows < table.of:
                        kind = name.removeprefix("tables/").partition("-")[0]
                        told = f"the first {table.rows} of {table.of}, round {step.round}"
                        self.run.set_tags({f"tables.{kind}": told})
        self.run.list_tables([name for name in known if name.startswith("tables/")])

    def _log_model(self, steps: Sequence[DoneStep]) -> None:
        """Logs the last trained student, whose files are checked before they are copied."""
        found = newest_model(steps)
        if found is None or not self.run.takes_artifacts:
            return
        name, step, mark = found
        if self.record.artifacts.get(name) != mark:
            folder = step.entry.opened("model") / "model"
            self.run.log_model(folder, name, mark, round_number=step.round)
            self.record.artifacts[name] = mark

    def _save(self) -> None:
        if read_record(self.folder) != self.record:
            write_record(self.folder, self.record)


def _model(model: Mapping[str, Any]) -> str:
    name: str | None = model.get("model") or ("self" if model.get("self") else None)
    return name or "scratch"


def _teachers(teachers: Sequence[Mapping[str, Any]]) -> str:
    """The teacher's model, or those of several by name."""
    if len(teachers) == 1:
        return _model(teachers[0])
    return ", ".join(f"{teacher['name']}: {_model(teacher)}" for teacher in teachers)
