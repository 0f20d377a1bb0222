"""What MLflow does not have yet: the list of items less what is remembered. Asks MLflow nothing."""

from __future__ import annotations

import contextlib
from pathlib import Path

from pydantic import ValidationError

from kdpipe.errors import ArtifactError
from kdpipe.pipeline.runs import all_runs
from kdpipe.recipe.runtime import Tracking
from kdpipe.results.studies import all_studies
from kdpipe.store.locks import is_running
from kdpipe.tracking.items import METRICS, PARAMS, STATUS, Item, run_items
from kdpipe.tracking.memory import (
    Memory,
    MirrorRequest,
    Status,
    Subject,
    memory_of,
    read_memory,
    require_database,
)
from kdpipe.tracking.study import study_items


def unsent(subject: Subject, folder: Path, memory: Memory) -> list[Item]:
    """The items that MLflow does not have as they are now; raises ArtifactError where they cannot be read."""
    items = run_items(folder, memory) if subject == "run" else study_items(folder, memory)
    known: dict[str, str | None] = {**memory.sent, STATUS: memory.status}
    if memory.refused:  # they may be accepted later
        known.pop(PARAMS, None)
    return [item for item in items if known.get(item.name) != item.mark]


def is_finished(request: MirrorRequest) -> bool:
    """Whether MLflow has all of the run or study and shows it as finished, by what is remembered."""
    memory = memory_of(request)
    is_there = memory.run_id is not None and memory.wanted == "FINISHED"
    return is_there and not unsent(request.subject, request.folder, memory)


def pending(run_folder: Path) -> int:
    """How many finished steps of the run MLflow does not have yet."""
    return sum(name.startswith(METRICS) for name in _unsent_names(run_folder))


def waiting(run_folder: Path) -> list[str]:
    """What MLflow does not have yet, in sentences."""
    memory, names = read_memory(run_folder), _unsent_names(run_folder)
    found = []
    try:
        require_database(run_folder.parents[1], None if memory is None else memory.uri)
    except ArtifactError as error:
        return [f"{error.message}; {error.hint}"]
    if count := sum(name.startswith(METRICS) for name in names):
        found.append(f"{count} steps are not in MLflow yet: the next run mirrors them")
    elif memory is not None and memory.status != memory.wanted:
        found.append(
            f"MLflow shows this run as {memory.status}, not as {memory.wanted}: the next run updates it"
        )
    elif memory is not None and (left := [name for name in names if name != PARAMS]):
        found.append(f"MLflow does not have the latest {', '.join(left)}: the next run mirrors it")
    if memory is not None and memory.refused:
        found.append(f"MLflow refused the params {', '.join(memory.refused)}: the next run tries again")
    return found


def _unsent_names(run_folder: Path) -> list[str]:
    memory = read_memory(run_folder) or Memory(key="", uri=None, experiment="", wanted="RUNNING")
    try:
        return [item.name for item in unsent("run", run_folder, memory)]
    except ArtifactError:  # also where the run has not begun
        return []


def unsettled(workspace: Path) -> list[MirrorRequest]:
    """What would correct the runs and studies that nobody runs and that MLflow shows in another state."""
    requests = []
    folders: list[tuple[Subject, Path]] = [("run", run.path) for run in all_runs(workspace)]
    folders += [("study", study.path) for study in all_studies(workspace)]
    for subject, folder in folders:
        memory = read_memory(folder)
        if memory is None or (memory.status == memory.wanted and memory.wanted != "RUNNING"):
            continue
        if not is_running(folder):
            status: Status = "KILLED" if memory.wanted == "RUNNING" else memory.wanted
            with contextlib.suppress(ValidationError):  # an address that recipes may not hold any more
                tracking = Tracking(uri=memory.uri, experiment=memory.experiment)
                requests.append(MirrorRequest(subject, folder, tracking, status))
    return requests
