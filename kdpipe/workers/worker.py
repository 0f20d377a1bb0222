"""Warm processes: start a role, call it, wait, stop it. Runs whatever it is handed; knows no stage.

Parent and worker exchange typed messages (`message.py`) over the worker's stdin and stdout; whatever the worker's
libraries print goes to its log. A worker ends as soon as its parent does: a thread waits on stdin, whose end closes
with the parent, and Linux is asked to kill it besides. A worker that starts processes itself, which know
nothing of that, leads a group with a guard in it that ends them all when it dies.

    python -m kdpipe.workers.worker package.module:factory PARENT [--guarded]
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import importlib
import os
import queue
import re
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol

from kdpipe.errors import KdpipeError, StepError, as_os_error, is_machine_fault, refusal
from kdpipe.workers.failure import failure_of
from kdpipe.workers.message import (
    Event,
    Frame,
    FrameReader,
    MessageKind,
    Nothing,
    Request,
    Result,
    Talk,
    encode,
    failure,
)
from kdpipe.workers.pulse import Stopped

if TYPE_CHECKING:
    from concurrent.futures import Executor

STOP_SECONDS = 3.5
"""How long a worker may take to reach a safe point after it was asked to stop."""
GUARDED = "--guarded"
GUARD_SECONDS = 0.25
"""How often a guard looks whether its worker still lives."""
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What asks a command to stop: Ctrl-C, a service's manager, a terminal that is closed. Its workers leave it to that."""


class Report(Generic[Event]):
    """What a call inside a worker reports to its parent, and learns from it."""

    def __init__(self, send: Callable[[Event], None]) -> None:
        self.event = send
        self.stopping = threading.Event()


class Serving(Protocol[Request, Event, Result]):
    """What a factory returns: called once for each request of its talk."""

    @property
    def talk(self) -> Talk[Request, Event, Result]:
        """The types of what is asked, reported and answered."""

    def __call__(self, request: Request, report: Report[Event]) -> Result:
        """The answer to one request."""


_SECRET = re.compile(
    r"(^|_)(TOKEN|SECRET|KEY|CREDENTIALS?|PASSPHRASE)(_|$)|PASSWORD|PASSWD|MYSQL_PWD", re.IGNORECASE
)


def is_harmless(name: str) -> bool:
    """Whether an environment variable of this name holds no secret, as secrets are called."""
    return not _SECRET.search(name)


def child_environment(
    more: Mapping[str, str], *, inherits: Callable[[str], bool] = is_harmless
) -> dict[str, str]:
    """The environment of a Python that kdpipe starts, which imports nothing from the working folder.

    That holds for what it starts too. A `queue.py` or `random.py` there would run in place of Python's own. In
    PYTHONPATH an empty entry means that folder, as `.` does: `$PYTHONPATH:/more` where it was not set. It has those
    variables of this process whose name `inherits` accepts.
    """
    inherited = {name: value for name, value in os.environ.items() if inherits(name)}
    environment = {**inherited, **more, "PYTHONSAFEPATH": "1"}
    environment.pop("PYTHONOPTIMIZE", None)  # without docstrings transformers cannot be imported
    places = environment.pop("PYTHONPATH", "").split(os.pathsep)
    if named := [place for place in places if os.path.normpath(place) != "."]:
        environment["PYTHONPATH"] = os.pathsep.join(named)
    return environment


@functools.cache
def _starter(_process: int) -> Executor:
    """The thread of this process that starts all workers: Linux ends them with the thread that did.

    They inherit its mask: a signal to the group cannot kill a worker that is still importing.
    """
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(1, initializer=signal.pthread_sigmask, initargs=(signal.SIG_BLOCK, STOPS))


class Worker(Generic[Request, Event, Result]):
    """One warm process. Started by the first call; `talk` is that of what its target serves.

    With `leads_group` it leads a process group, and what it starts ends with it; signals from a terminal do not
    reach that group.
    """

    def __init__(
        self,
        target: str,
        talk: Talk[Request, Event, Result],
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
        inherits: Callable[[str], bool] = is_harmless,
        leads_group: bool = False,
    ) -> None:
        self.target = target
        self.talk = talk
        self.log = log
        self._environment = dict(environment or {})
        self._inherits = inherits
        self._leads_group = leads_group
        self._process: subprocess.Popen[bytes] | None = None
        self._frames = FrameReader()

    @property
    def pid(self) -> int | None:
        """The process, or None while there is none."""
        return None if self._process is None else self._process.pid

    def call(
        self,
        request: Request,
        *,
        on_event: Callable[[Event], None] = lambda _: None,
        stop: Callable[[], bool] = lambda: False,
        tick: Callable[[], None] = lambda: None,
    ) -> Result | None:
        """The result of one call, or None when `stop()` became true and the worker stopped safely.

        `tick` is called a few times a second. Raises the worker's own KdpipeError, or StepError with the
        tail of its log when it died.
        """
        process = self._process or self._start()
        self._write(process, "call", request)
        asked: float | None = None
        while True:
            try:
                if asked is None and stop():
                    asked = time.monotonic()
                    self._write(process, "stop", Nothing())
                frames = self._read(process, seconds=0.2)
            except StepError:
                if stop():  # whoever stops the run may have killed the worker too
                    return None
                raise
            for frame in frames:
                match frame.kind:
                    case "event":
                        on_event(self.talk.event(frame))
                    case "result":
                        return self.talk.result(frame)
                    case "error":
                        raise failure(frame).error(self.log)
                    case _:
                        return None
            if asked is not None and time.monotonic() - asked > STOP_SECONDS:
                self.kill()
                return None
            tick()

    def kill(self) -> None:
        """Ends the process at once; a later call starts a new one."""
        if self._process is not None:
            if self._leads_group and self._process.poll() is None:  # while it lives the number is its group's
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
            self._process.wait()
            self._close()

    def stop(self, last: Request | None = None) -> None:
        """Lets the process end by itself, after a `last` call if one is given, and sees to it that it does."""
        if self._process is None:
            return
        if last is not None:
            deadline = time.monotonic() + STOP_SECONDS
            with contextlib.suppress(KdpipeError):
                self.call(last, stop=lambda: time.monotonic() > deadline)
        if self._process is None:
            return
        if self._leads_group:  # once it has ended by itself, its group would outlive it for a moment
            self.kill()
            return
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=STOP_SECONDS)
        self.kill()

    def _start(self) -> subprocess.Popen[bytes]:
        guarded = [GUARDED] if self._leads_group else []
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            log = self.log.open("ab")
        except OSError as error:
            raise refusal(error, self.log) from error
        try:
            with log:
                start = _starter(os.getpid()).submit(
                    subprocess.Popen,
                    [sys.executable, "-m", "kdpipe.workers.worker", self.target, str(os.getpid()), *guarded],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=child_environment(self._environment, inherits=self._inherits),
                    process_group=0 if self._leads_group else None,
                )
                process = start.result()
        except OSError as error:
            raise StepError(
                f"{sys.executable}: Python itself cannot be started: {error.strerror}",
                hint="see that this user may run it and start processes, then repeat the command",
            ) from error
        os.set_blocking(process.stdout.fileno(), False)  # type: ignore[union-attr]
        self._process = process
        self._frames = FrameReader()
        return process

    def _write(self, process: subprocess.Popen[bytes], kind: MessageKind, value: object) -> None:
        pieces = encode(kind, value)
        try:
            for piece in pieces:
                process.stdin.write(piece)  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
        except OSError:
            raise self._death(process) from None

    def _read(self, process: subprocess.Popen[bytes], *, seconds: float) -> list[Frame]:
        """The frames that arrived within `seconds`; raises StepError when the process ended."""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)  # type: ignore[arg-type]
            if not selector.select(seconds):
                return []
        data = process.stdout.read()  # type: ignore[union-attr]
        if data == b"":
            raise self._death(process)
        return list(self._frames.feed(data or b""))

    def _death(self, process: subprocess.Popen[bytes]) -> StepError:
        status = process.wait()
        self._close()
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        killed = " (the system may be out of memory)" if status == -signal.SIGKILL else ""
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-12:])
        return StepError(
            f"the worker died: {how}{killed}; the end of {self.log}:\n{tail}",
            hint="repeat the command: it continues where this stopped",
        )

    def _close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]


def main(target: str, parent: int, *, guarded: bool = False) -> None:
    """Serves calls until the parent goes away."""
    _die_with(parent)
    if guarded:
        _start_guard()
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)  # what this process starts is not born deaf
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is for the log, not for the parent
    lock = threading.Lock()

    def send(kind: MessageKind, value: object) -> None:
        pieces = encode(kind, value)
        with lock, contextlib.suppress(BrokenPipeError):
            for piece in pieces:
                replies.write(piece)
            replies.flush()

    report = Report[Any](lambda event: send("event", event))
    calls: queue.Queue[Frame] = queue.Queue()
    threading.Thread(target=_listen, args=(calls, report), daemon=True).start()
    serve: Serving[Any, Any, Any] | None = None
    while True:
        frame = calls.get()
        try:
            if serve is None:
                serve = _made(target)
            send("result", serve(serve.talk.request(frame), report))
        except Stopped:
            send("stopped", Nothing())
        except KdpipeError as error:
            send("error", failure_of(error))
        except BaseException as error:  # a library written in Rust panics with one
            import traceback

            traceback.print_exc()
            send("error", failure_of(explained(error)))


def _made(target: str) -> Serving[Any, Any, Any]:
    """What the factory named `module:factory` returns.

    Garbage is not looked for meanwhile: libraries make a million objects that all stay, and looking at them again and
    again is an eighth of the time of their import. Afterwards they are never looked at.
    """
    module, _, name = target.partition(":")
    gc.disable()
    try:
        made: Serving[Any, Any, Any] = getattr(importlib.import_module(module), name)()
    finally:
        gc.enable()
    gc.freeze()
    return made


def explained(error: BaseException) -> BaseException:
    """The error as it is reported to the user: a fault of the machine is no bug of kdpipe."""
    # A library written in Rust, as tokenizers, raises a plain Exception.
    known = error if isinstance(error, OSError) else as_os_error(error)
    # torch's own are known by name and text, as this module runs without torch.
    is_torchs = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    if isinstance(error, MemoryError) or is_torchs or known.errno == errno.ENOMEM:
        return StepError(
            f"out of memory: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            hint="free some memory, or lower runtime.train_tokens, sample_tokens or score_tokens, which change no "
            "result; then repeat the command: finished pieces are kept",
        )
    return refusal(known) if is_machine_fault(known) else error


def _listen(calls: queue.Queue[Frame], report: Report[Any]) -> None:
    """Queues calls; ends the process at once when the parent's end of the pipe closes."""
    frames = FrameReader()
    while data := os.read(0, 1 << 20):
        for frame in frames.feed(data):
            if frame.kind == "call":
                report.stopping.clear()
                calls.put(frame)
            else:
                report.stopping.set()
    os._exit(0)


def _start_guard() -> None:
    """Forks the guard: a process that waits for this one to end, and then ends its whole group.

    It looks for another parent instead of waiting for a pipe to close, as what this process forks may hold the pipe.
    """
    leader = os.getpid()
    if os.getpgrp() != leader:
        raise RuntimeError(f"process {leader} does not lead its group: a guard would end what is not its own")
    if os.fork():
        return
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    os.closerange(0, 3)  # the worker's pipes end with the worker, not with its guard
    while os.getppid() == leader:
        time.sleep(GUARD_SECONDS)
    os.killpg(leader, signal.SIGKILL)


def _die_with(parent: int) -> None:
    """Asks Linux for SIGKILL when the parent dies; elsewhere the closed pipe has to do."""
    if sys.platform == "linux":
        import ctypes  # a worker's need only: the light commands import this module too

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), guarded=GUARDED in sys.argv[3:])
