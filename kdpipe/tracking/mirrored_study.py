"""A study in MLflow: one run that is the parent of the study's runs, and shows their comparison."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kdpipe.errors import ArtifactError
from kdpipe.pipeline.runs import run_at
from kdpipe.recipe.schema import Tracking
from kdpipe.results.studies import COMPARISON, TABLE, Study, all_studies, read_study
from kdpipe.tracking.contents import (
    MAX_NAME,
    MetricRow,
    authorship,
    event_times,
    shortened,
    study_artifacts,
    text_digest,
)
from kdpipe.tracking.mlflow_run import Card, MlflowRun, held
from kdpipe.tracking.record import Record, Request, read_record, record_of, write_record


def mirror_study(order: Request, answered: Callable[[], None]) -> str:
    """Makes MLflow equal to a study, as it is now; returns the id of its MLflow run."""
    study = read_study(order.run)
    if study is None:
        raise ArtifactError(f"{order.run}: no study can be read here", hint="repeat the command that made it")
    with held(study.path):  # the study's own mirror and those of its runs may come at once
        record = record_of(order)
        record.wanted = order.status
        write_record(study.path, record)  # the key is durable before the MLflow run exists
        times = list(event_times(study.path)) or [time.time()]
        card = Card(study.name, "kdpipe.study", round(1000 * times[0]), _tags(study, record))
        run = MlflowRun(order.workspace.resolve(), record, card, answered=answered)
        record = run.record
        write_record(study.path, record)
        run.set_status(order.status, lambda: round(1000 * times[-1]))
        run.set_tags(_tags(study, record))
        _adopt(study, run, order.workspace)
        _log_comparison(study, run)
        write_record(study.path, record)
    return run.id


def parent_of(
    run_folder: Path, workspace: Path, tracking: Tracking, answered: Callable[[], None]
) -> str | None:
    """The MLflow run of the study to which a run belongs, of several the one begun last; None for a run on its own."""
    for study in all_studies(workspace):
        record = read_record(study.path)
        if run_folder.name not in study.runs or record is None:
            continue
        if (record.uri, record.experiment) == (tracking.uri, tracking.experiment or study.recipe):
            place = Tracking(uri=record.uri, experiment=record.experiment)
            order = Request(
                kind="study", workspace=workspace, run=study.path, tracking=place, status=record.wanted
            )
            return mirror_study(order, answered)
    return None


def _tags(study: Study, record: Record) -> dict[str, str]:
    tags = {
        "kdpipe.study": study.name,
        "kdpipe.key": record.key,
        "study": study.kind,
        "study.runs": f"{len(study.runs)}",
        **authorship(),
    }
    if (found := study.comparison()) is not None:
        failed = found["failed"]
        tags["study.failed"] = "; ".join(failed) or "none"
        tags |= {
            f"study.{_name(row['label'])}": shortened(_sentence(row))
            for row in found["rows"]
            if row["accuracy"] is not None
        }
    return tags


def _sentence(row: dict[str, Any]) -> str:
    """A row of the comparison in a line."""
    accuracy, change = row["accuracy"], row["difference"]
    text = f"{accuracy['estimate']:.1%} ({accuracy['low']:.1%} to {accuracy['high']:.1%})"
    if change is None:
        return text
    points = [f"{100 * change[name]:+.1f}" for name in ("estimate", "low", "high")]
    return f"{text}, {points[0]} points ({points[1]} to {points[2]}) against the first"


def _adopt(study: Study, run: MlflowRun, workspace: Path) -> None:
    """Tells the study's runs whose children they are, those that are mirrored already."""
    known = run.record.mirrored
    for name in study.runs:
        child = read_record(run_at(workspace, name).path)
        if child is None or child.run_id is None or known.get(name) == child.run_id:
            continue
        if (child.uri, child.experiment) == (run.record.uri, run.record.experiment) and run.adopt(
            child.run_id
        ):
            known[name] = child.run_id


def _log_comparison(study: Study, run: MlflowRun) -> None:
    record, found = run.record, study.comparison()
    if found is None:
        return
    digest = text_digest(json.dumps(found, sort_keys=True))
    if record.mirrored.get(COMPARISON) != digest:
        run.log_metrics(list(_metrics(found)))
        record.mirrored[COMPARISON] = digest
    if not run.takes_artifacts:
        return
    for name, path in study_artifacts(study.path):
        text = path.read_text(encoding="utf-8")
        if record.artifacts.get(name) != text_digest(text):
            run.log_text(name, text)
            record.artifacts[name] = text_digest(text)
    run.set_note((study.path / TABLE).read_text(encoding="utf-8"))


def _metrics(found: dict[str, Any]) -> Iterator[MetricRow]:
    """Accuracies and differences of the comparison's rows, each with its interval."""
    at = round(1000 * found["time"])
    for row in found["rows"]:
        for name in ("accuracy", "difference"):
            interval = row[name] or {}
            for bound, value in interval.items():
                suffix = "" if bound == "estimate" else f"_{bound}"
                yield MetricRow(f"study/{_name(row['label'])}/{name}{suffix}", value, at, 0)


def _name(label: str) -> str:
    """What a row is called in names of metrics and tags."""
    return re.sub(r"[^\w. :-]", "_", label)[: MAX_NAME - 40]
