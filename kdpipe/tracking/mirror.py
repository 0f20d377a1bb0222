"""The parent's side of the mirror: a thread that asks a process; the run waits only at its end."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

from kdpipe.errors import KdpipeError, StepError
from kdpipe.pipeline.project import Project
from kdpipe.recipe.runtime import Tracking
from kdpipe.results.studies import Study
from kdpipe.tracking.memory import (
    ENVIRONMENT,
    MIRROR,
    Alive,
    MirrorRequest,
    MirrorResult,
    Status,
    memory_of,
    require_database,
    write_memory,
)
from kdpipe.tracking.pending import is_finished, pending, unsettled
from kdpipe.workers.worker import Worker

if TYPE_CHECKING:
    from kdpipe.pipeline.runner import Mirror

LOG = Path("logs", "tracking.log")
LONGEST_SECONDS = 60.0
"""How long the end of a run waits for MLflow at most, its import included."""
QUIET_SECONDS = 5.0
"""How long it waits without progress once MLflow is imported, which takes 2 s and often more."""
SERVER_SECONDS = 10.0
"""How long it waits for a server at most, as that may be slow or far away."""
STOP_SECONDS = 2.0
"""How long its thread has to note how it ended, once nobody waits for MLflow any more."""
MODEL_SECONDS = 600.0
"""How much longer where the recipe asks for the model to be copied, which the user then waits for."""
RETRY_SECONDS, PAUSE_RATIO = 30.0, 9.0
"""Rest after a sync, in its own durations: the mirror takes at most a tenth of one core."""


class NoMirror:
    """Mirrors nothing: `tracking.enabled: false`."""

    def nudge(self) -> None: ...
    def finish(self, status: str, *, patience: Callable[[], float]) -> str | None: ...


class MlflowMirror:
    """Mirrors one run or study from a thread of its own; no method raises, and only `finish` waits.

    `error` is what went wrong last, or None. Its process does not see the variables `keys`.
    """

    def __init__(self, request: MirrorRequest, *, keys: Collection[str] = ()) -> None:
        self.error: str | None = None
        self._request = request
        self._log = request.folder / LOG
        self._worker = _worker(self._log, keys)
        self._wake = threading.Event()
        self._ending = threading.Event()
        self._is_nudged = False
        self._deadline = float("inf")
        self._ending_at = 0.0
        self._progress_at = 0.0
        self._is_loaded = False
        # Not the thread's own end: a `join` that a signal breaks off takes a thread for ended that is not.
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def nudge(self) -> None:
        """Says that there is something new, or about to be."""
        self._is_nudged = True
        self._wake.set()

    def finish(self, status: str, *, patience: Callable[[], float] = lambda: math.inf) -> str | None:
        """Mirrors a last time, in bounded time; returns why something is left for a later command.

        It waits for `patience()` seconds at most, which a signal shortens. What is raised here, as by a second signal,
        ends it at once: the status is only noted, for a later command to deliver.
        """
        try:
            self._request = replace(self._request, status=cast("Status", status))
            self._ending_at = self._progress_at = time.monotonic()
            seconds = LONGEST_SECONDS + (MODEL_SECONDS if self._copies_model else 0.0)
            self._deadline = self._ending_at + min(seconds, patience())
            self._end()
            while not self._has_ended.wait(0.1) and time.monotonic() < self._deadline + STOP_SECONDS:
                self._deadline = min(self._deadline, time.monotonic() + patience())
        except BaseException:
            self._deadline = 0.0
            self._end()
            self._has_ended.wait(STOP_SECONDS)
            raise
        late = "it did not answer in time; the next command goes on with it"
        return self.error if self._has_ended.is_set() else late

    def _end(self) -> None:
        """Lets the thread mirror a last time and end."""
        self._ending.set()
        self._wake.set()

    def _work(self) -> None:
        """The thread: everything that talks to the worker."""
        try:
            self._follow()
        finally:
            self._has_ended.set()

    def _follow(self) -> None:
        if self._has_nothing_to_do():
            self._wake.wait()
            if not self._is_nudged and self._request.status == "FINISHED":
                return
        if self._attempt(self._mirror) and not self._ending.is_set():
            self._attempt(self._settle_others)
        while not self._ending.is_set():
            self._wake.wait()
            self._wake.clear()
            start = time.monotonic()
            if not self._ending.is_set():
                is_delivered = self._attempt(self._mirror)
                pause = min(RETRY_SECONDS, PAUSE_RATIO * (time.monotonic() - start))
                self._ending.wait(pause if is_delivered else RETRY_SECONDS)
        is_delivered = self._attempt(self._mirror)
        self._worker.kill()
        if not is_delivered:
            self._attempt(self._note_wanted)

    def _has_nothing_to_do(self) -> bool:
        """Whether MLflow, whose import takes seconds, has everything unless a step is performed."""
        try:
            require_database(self._request.workspace, self._request.tracking.uri)
            return is_finished(self._request) and not unsettled(self._request.workspace)
        except (KdpipeError, OSError, ValueError, KeyError):  # its process will say what is wrong
            return False

    def _attempt(self, action: Callable[[], None]) -> bool:
        """Whether `action` went well; nothing that goes wrong in it may stop the run."""
        try:
            action()
        except Exception as error:
            if not isinstance(error, KdpipeError) or isinstance(error, StepError):
                self._worker.kill()  # it hangs, or is gone; one that was refused an answer can be asked again
                self._is_loaded = False
            hint = getattr(error, "hint", "") or "the next command goes on with it"
            self.error = f"{error}; {hint}"
            with contextlib.suppress(OSError), self._log.open("a", encoding="utf-8") as log:
                log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} not mirrored: {error}\n")
            return False
        return True

    def _mirror(self) -> None:
        self._ask(self._request)
        self.error = None

    def _settle_others(self) -> None:
        for request in unsettled(self._request.workspace):
            if not self._ending.is_set():
                self._ask(request)

    def _note_wanted(self) -> None:
        """Notes the status that could not be delivered; the worker is gone, so nobody else writes."""
        memory = memory_of(self._request)
        memory.wanted = self._request.status
        write_memory(self._request.folder, memory)

    def _ask(self, request: MirrorRequest) -> None:
        self._check_time()
        _ask(self._worker, request, on_event=self._progress, tick=self._check_time)

    def _progress(self, _event: Alive) -> None:
        self._progress_at = time.monotonic()
        if not self._is_loaded:
            self._is_loaded, self._ending_at = True, self._progress_at

    @property
    def _copies_model(self) -> bool:
        return self._request.tracking.log_model and self._request.status == "FINISHED"

    def _check_time(self) -> None:
        limit = self._deadline
        if self._is_loaded:
            limit = min(limit, self._progress_at + QUIET_SECONDS)
            if self._request.tracking.uri is not None and not self._copies_model:
                limit = min(limit, self._ending_at + SERVER_SECONDS)
        if self._ending.is_set() and time.monotonic() > limit:
            self._deadline = min(self._deadline, time.monotonic())  # there is no second attempt
            raise TimeoutError(
                f"MLflow did not answer in time; {pending(self._request.folder)} steps are left"
            )


def open_mirror(project: Project) -> Mirror:
    """The mirror of the project's run, as its recipe wants it."""
    tracking = project.recipe.tracking
    if not tracking.enabled:
        return NoMirror()
    return MlflowMirror(
        MirrorRequest("run", project.run.path, tracking, "RUNNING"), keys=project.recipe.key_names
    )


def begin_study(study: Study, tracking: Tracking) -> None:
    """Notes that a study is being run, so that its runs become its children; starts no MLflow."""
    if not tracking.enabled:
        return
    memory = memory_of(MirrorRequest("study", study.path, tracking, "RUNNING"))
    if memory.wanted != "FINISHED":  # a study that is repeated shows nothing new until it ends
        memory.wanted = "RUNNING"
    write_memory(study.path, memory)


def end_study(study: Study, tracking: Tracking, status: Status, *, keys: Collection[str] = ()) -> str | None:
    """Mirrors a study that has ended, in bounded time; returns why what is left waits for a later command."""
    if not tracking.enabled:
        return None
    return MlflowMirror(MirrorRequest("study", study.path, tracking, status), keys=keys).finish(status)


def settle(workspace: Path, *, seconds: float = 30.0) -> list[str]:
    """Tells MLflow the end of runs that were killed or could not be mirrored; returns their names.

    Starts MLflow's process only when there is such a run, and gives up after `seconds`.
    """
    deadline = time.monotonic() + seconds
    worker = _worker(workspace / "mlflow.log", ())
    settled = []

    def check_time() -> None:
        if time.monotonic() > deadline:
            raise KdpipeError("MLflow did not answer in time", hint="a later command tries again")

    try:
        for request in unsettled(workspace):
            with contextlib.suppress(KdpipeError):  # left unsettled, which the next command sees again
                _ask(worker, request, tick=check_time)
                settled.append(request.folder.name)
    finally:
        worker.kill()
    return settled


MirrorWorker: TypeAlias = Worker[MirrorRequest, Alive, MirrorResult]


def _worker(log: Path, keys: Collection[str]) -> MirrorWorker:
    return Worker(
        "kdpipe.tracking.synchronizer:serve",
        MIRROR,
        log=log,
        environment=ENVIRONMENT,
        inherits=lambda name: name not in keys,
    )


def _ask(
    worker: MirrorWorker,
    request: MirrorRequest,
    *,
    on_event: Callable[[Alive], None] = lambda _: None,
    tick: Callable[[], None],
) -> None:
    """Has the mirror's process do what is asked; its first call needs a database that is whole."""
    if worker.pid is None:
        require_database(request.workspace, request.tracking.uri)
    worker.call(request, on_event=on_event, tick=tick)
