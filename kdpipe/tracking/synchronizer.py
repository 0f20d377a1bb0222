"""The mirror's own process: makes MLflow equal to a run's or study's files, however often it is asked."""

from __future__ import annotations

import os
from collections.abc import Callable

from kdpipe.errors import ArtifactError
from kdpipe.recipe.runtime import Tracking
from kdpipe.store.locks import locked
from kdpipe.tracking.memory import (
    DATABASE,
    MIRROR,
    UNSURE,
    Alive,
    Memory,
    MirrorRequest,
    MirrorResult,
    memory_of,
    write_memory,
)
from kdpipe.tracking.pending import unsent
from kdpipe.tracking.run import PARENT, MlflowRun, answering, make_database
from kdpipe.tracking.study import study_of
from kdpipe.workers.worker import Report

LOCK = ".mlflow.lock"
BATCH = 16
"""How many items are sent before it is noted that they were: what is sent again after a kill at most."""


def serve() -> Synchronizer:
    """What the mirror's process serves, behind everything else that wants the processor."""
    os.nice(10)
    return Synchronizer()


class Synchronizer:
    """Makes MLflow equal to the files, wherever an earlier call was killed; keeps MLflow runs open."""

    talk = MIRROR

    def __init__(self) -> None:
        self._open: dict[str | None, MlflowRun] = {}

    def __call__(self, request: MirrorRequest, report: Report[Alive]) -> MirrorResult:
        """Makes MLflow equal to the files; raises KdpipeError when it refuses or does not answer."""
        report.event(Alive())
        uri = request.tracking.uri
        with answering(uri or f"{request.workspace / DATABASE}", uri):
            return self._mirror(request, lambda: report.event(Alive()))

    def _mirror(self, order: MirrorRequest, answered: Callable[[], None]) -> MirrorResult:
        with locked(order.folder / LOCK):  # a study's own mirror and those of its runs may come at once
            memory = memory_of(order)
            memory.wanted = order.status
            write_memory(order.folder, memory)  # the key is durable before the MLflow run exists
            run = self._open.pop(memory.run_id, None)  # back in its place only if all goes well
            if run is None:
                run = self._opened(order, memory, answered)
            count, damage = _send(order, run, memory)
            self._open[run.id] = run
        if damage is not None:  # of this item nothing is shown; all others are there
            raise damage
        return MirrorResult(run.id, count)

    def _opened(self, order: MirrorRequest, memory: Memory, answered: Callable[[], None]) -> MlflowRun:
        if memory.uri is None:
            make_database(order.workspace.resolve(), answered)
        run = MlflowRun(order, memory, answered=answered)
        write_memory(order.folder, memory)
        if order.subject == "run" and (found := study_of(order.folder, memory)) is not None:
            study, parent = found
            place = Tracking(uri=parent.uri, experiment=parent.experiment)
            above = self._mirror(MirrorRequest("study", study.path, place, parent.wanted), answered)
            run.set_tags({PARENT: above.run_id})
        return run


def _send(order: MirrorRequest, run: MlflowRun, memory: Memory) -> tuple[int, ArtifactError | None]:
    """Sends what MLflow does not have; returns the number of metrics, and the first damaged file's error."""
    items, count, damage = unsent(order.subject, order.folder, memory), 0, None
    for start in range(0, len(items), BATCH):
        batch = items[start : start + BATCH]
        memory.sent = {item.name: UNSURE for item in batch} | memory.sent
        write_memory(order.folder, memory)
        done = {}
        for item in batch:
            try:
                item.send(run)
                done[item.name] = item.mark
            except ArtifactError as error:
                damage = damage or error
        count += run.flush()
        memory.sent |= done
        write_memory(order.folder, memory)
    return count, damage
