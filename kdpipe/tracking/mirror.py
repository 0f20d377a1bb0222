"""The parent's side of the mirror: asks a process of its own, from a thread of its own, and waits only at the end."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

from kdpipe.errors import KdpipeError, StepError
from kdpipe.pipeline.project import Project
from kdpipe.recipe.schema import Tracking
from kdpipe.results.studies import Study
from kdpipe.tracking.record import ENVIRONMENT, Request, Status, record_of, write_record
from kdpipe.tracking.standing import is_finished, pending, unsettled
from kdpipe.workers.worker import Message, Worker

if TYPE_CHECKING:
    from kdpipe.pipeline.runner import Mirror

LOG = Path("logs", "tracking.log")
QUIET_SECONDS = 10.0
"""How long the end of a run waits for an MLflow that shows no progress; its import, 2 s or more, is not counted."""
PATIENCE_SECONDS: dict[Status, float] = {"FINISHED": 60.0, "FAILED": 60.0, "KILLED": 2.0}
"""How long it waits at most; after a signal the command has to be gone within seconds."""
SERVER_QUIET_SECONDS = 5.0
SERVER_PATIENCE_SECONDS = 10.0
"""The same for a server, which may be slow or far away, and is not waited for as the workspace's own database is."""
NOTE_SECONDS = 2.0
"""How long it may take to note what could not be delivered: a fraction of a second, unless the disk is slow."""
MODEL_SECONDS = 600.0
"""How much longer where the recipe asks for the model to be copied, which the user then waits for."""
RETRY_SECONDS = 30.0
PAUSE_RATIO = 9.0
"""Rest after a sync, in its own durations: the mirror takes at most a tenth of one core."""


class NoMirror:
    """Mirrors nothing: `tracking.enabled: false`."""

    def nudge(self) -> None:
        """Does nothing."""

    def finish(self, status: str, *, hurry: Callable[[], bool] = lambda: False) -> str | None:
        """Does nothing."""
        return None


class MlflowMirror:
    """Mirrors one run or study from a thread of its own; none of its methods raises, and only `finish` waits.

    `error` is what went wrong last, or None.
    """

    def __init__(self, request: Request) -> None:
        self.error: str | None = None
        self._request = request
        self._log = request.run / LOG
        self._worker = _worker(self._log)
        self._wake = threading.Event()
        self._ending = threading.Event()
        self._final = request.status
        self._deadline = float("inf")
        self._quiet_since = 0.0
        self._finish_since = 0.0
        self._is_over = False
        self._is_loaded = False
        self._is_server = request.tracking.uri is not None
        self._is_nudged = False
        # Not the thread's own end: a `join` that a signal breaks off takes a thread for ended that is not.
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def nudge(self) -> None:
        """Says that there is something new, or about to be."""
        self._is_nudged = True
        self._wake.set()

    def finish(self, status: str, *, hurry: Callable[[], bool] = lambda: False) -> str | None:
        """Mirrors a last time with `status`, in bounded time; returns why what is left waits for a later command.

        Once `hurry()` is true, as a signal makes it, there is no more patience than for a run that was killed. What is
        raised here, as by a second signal, ends it at once: the status is only noted, for a later command to deliver.
        """
        try:
            self._final = cast("Status", status)
            self._quiet_since = time.monotonic()
            self._finish_since = self._quiet_since
            self._deadline = self._quiet_since + PATIENCE_SECONDS[self._final]
            if self._copies_model:
                self._deadline += MODEL_SECONDS
            self._end()
            while not self._has_ended.wait(0.1) and time.monotonic() < self._deadline + 2:
                if hurry() and self._deadline > (soon := time.monotonic() + PATIENCE_SECONDS["KILLED"]):
                    self._deadline = soon
        except BaseException:
            self._deadline = 0.0
            self._end()
            self._has_ended.wait(NOTE_SECONDS)
            raise
        return self.error if self._has_ended.is_set() else "it did not answer in time"

    def _end(self) -> None:
        """Lets the thread mirror a last time and end."""
        self._ending.set()
        self._wake.set()

    def _work(self) -> None:
        """The thread: everything that talks to the worker."""
        try:
            self._work_on()
        finally:
            self._has_ended.set()

    def _work_on(self) -> None:
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
        record = record_of(self._request)
        record.wanted = self._final
        write_record(self._request.run, record)

    def _call(self, request: Request) -> None:
        self._check_time()
        self._worker.call(request.model_dump(mode="json"), on_event=self._progress, tick=self._check_time)

    def _progress(self, _event: Message) -> None:
        self._quiet_since = time.monotonic()
        if not self._is_loaded:
            self._is_loaded, self._finish_since = True, self._quiet_since

    @property
    def _copies_model(self) -> bool:
        return self._request.tracking.log_model and self._final == "FINISHED"

    def _check_time(self) -> None:
        limits = [self._deadline]
        if self._is_loaded:
            limits.append(self._quiet_since + (SERVER_QUIET_SECONDS if self._is_server else QUIET_SECONDS))
        if self._is_loaded and self._is_server and not self._copies_model:
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


def begin_study(study: Study, workspace: Path, tracking: Tracking) -> None:
    """Notes that a study is being run, so that its runs are mirrored as its children. Asks MLflow for nothing."""
    if not tracking.enabled:
        return
    order = Request(kind="study", workspace=workspace, run=study.path, tracking=tracking, status="RUNNING")
    record = record_of(order)
    if record.wanted != "FINISHED":  # a study that is repeated shows nothing new until it ends
        record.wanted = "RUNNING"
    write_record(study.path, record)


def end_study(study: Study, workspace: Path, tracking: Tracking, status: Status) -> str | None:
    """Mirrors a study that has ended, in bounded time; returns why what is left waits for a later command."""
    if not tracking.enabled:
        return None
    order = Request(kind="study", workspace=workspace, run=study.path, tracking=tracking, status=status)
    return MlflowMirror(order).finish(status)


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
    return Worker("kdpipe.tracking.synchronizer:serve", log=log, environment=ENVIRONMENT)
