"""How far MLflow is behind the files, told without asking it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from pydantic import ValidationError

from kdpipe.pipeline.runs import all_runs, run_at
from kdpipe.recipe.schema import Tracking
from kdpipe.results.studies import COMPARISON, all_studies, read_study
from kdpipe.store.locks import is_running
from kdpipe.tracking.contents import artifacts, done_steps, newest_model, study_artifacts, tables, text_digest
from kdpipe.tracking.record import DATABASE, Kind, Record, Request, Status, read_record, record_of


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
    is_elsewhere = record != record_of(request)
    if is_elsewhere or record.refused:  # params that are refused once may be taken later
        return False
    if record.uri is None and not (request.workspace / DATABASE).exists():
        return False
    if request.kind == "study":
        return _has_study(record, request)
    return _has_everything(record, request.run, log_model=request.tracking.log_model)


def _has_everything(record: Record, run_folder: Path, *, log_model: bool) -> bool:
    """Whether all steps, tables and artifacts, and the model if it is to be logged, are noted as mirrored."""
    steps = list(done_steps(run_folder))
    if any(record.mirrored.get(step.name) != step.mark for step in steps):
        return False
    if any(record.artifacts.get(name) != mark for name, _step, mark in tables(steps)):
        return False
    if (
        log_model
        and (model := newest_model(steps)) is not None
        and record.artifacts.get(model[0]) != model[2]
    ):
        return False
    for name, path, _entry in artifacts(run_folder, steps):
        with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
            if record.artifacts.get(name) != text_digest(path.read_text(encoding="utf-8")):
                return False
    return True


def _has_study(record: Record, request: Request) -> bool:
    """Whether the study's comparison is noted as mirrored, and its runs as told of their parent."""
    study = read_study(request.run)
    if study is None:
        return False
    found = study.comparison()
    if found is not None and record.mirrored.get(COMPARISON) != text_digest(
        json.dumps(found, sort_keys=True)
    ):
        return False
    for name in study.runs:
        child = read_record(run_at(request.workspace, name).path)
        if child is None or child.run_id is None or record.mirrored.get(name) != child.run_id:
            return False
    return all(
        record.artifacts.get(name) == text_digest(path.read_text(encoding="utf-8"))
        for name, path in study_artifacts(study.path)
    )


def unsettled(workspace: Path) -> list[Request]:
    """What would make MLflow true for the runs and studies that nobody runs and that it shows in another state."""
    requests = []
    folders: list[tuple[Kind, Path]] = [("run", run.path) for run in all_runs(workspace)]
    folders += [("study", study.path) for study in all_studies(workspace)]
    for kind, folder in folders:
        record = read_record(folder)
        if record is None or (record.status == record.wanted and record.wanted != "RUNNING"):
            continue
        if not is_running(folder):
            status: Status = "KILLED" if record.wanted == "RUNNING" else record.wanted
            with contextlib.suppress(ValidationError):  # an address that recipes may not hold any more
                tracking = Tracking(uri=record.uri, experiment=record.experiment)
                requests.append(
                    Request(kind=kind, workspace=workspace, run=folder, tracking=tracking, status=status)
                )
    return requests
