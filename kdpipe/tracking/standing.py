"""How far MLflow is behind the files, told without asking it."""

from __future__ import annotations

import contextlib
from pathlib import Path

from pydantic import ValidationError

from kdpipe.recipe import Tracking
from kdpipe.runs import all_runs
from kdpipe.store import is_running
from kdpipe.tracking.contents import artifacts, done_steps, tables, text_digest
from kdpipe.tracking.record import DATABASE, Record, Request, Status, read_record, recipe_of, record_of


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
    is_elsewhere = record != record_of(request, recipe_of(request.run)["name"])
    if is_elsewhere or record.refused:  # params that are refused once may be taken later
        return False
    if record.uri is None and not (request.workspace / DATABASE).exists():
        return False
    return _has_everything(record, request.run)


def _has_everything(record: Record, run_folder: Path) -> bool:
    """Whether all steps, tables and artifacts are noted as mirrored."""
    steps = list(done_steps(run_folder))
    if any(record.mirrored.get(step.name) != step.mark for step in steps):
        return False
    if any(record.artifacts.get(name) != mark for name, _step, mark in tables(steps)):
        return False
    for name, path, _entry in artifacts(run_folder, steps):
        with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
            if record.artifacts.get(name) != text_digest(path.read_text(encoding="utf-8")):
                return False
    return True


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
