"""Warm processes: start a role, call it, wait, stop it. Runs whatever it is handed; knows no stage.

Parent and worker exchange JSON lines over the worker's stdin and stdout; whatever the worker's libraries
print goes to its log. A worker ends as soon as its parent does: a thread waits on stdin, whose end closes
with the parent, and Linux is asked to kill it besides. A worker that starts processes itself, which know
nothing of that, leads a group with a guard in it that ends them all when it dies.

    python -m kdpipe.workers.worker package.module:factory PARENT [--guarded]
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from pydantic import JsonValue

import kdpipe.errors
from kdpipe.errors import EngineError, KdpipeError, StepError, as_os_error, is_machine_fault, machine_fault
from kdpipe.workers.pulse import Stopped

Message = dict[str, JsonValue]
STOP_SECONDS = 3.5
"""How long a worker may take to reach a safe point after it was asked to stop."""
CLOSE: Message = {"close": True}
"""A last call, which asks what is served to end what it has started."""
GUARDED = "--guarded"
GUARD_SECONDS = 0.25
"""How often a guard looks whether its worker still lives."""
_PARENTS_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # the parent decides when to stop


class Report:
    """What a call inside a worker tells its parent, and learns from it."""

    def __init__(self, send: Callable[[Message], None]) -> None:
        self._send = send
        self.stopping = threading.Event()

    def event(self, **fields: JsonValue) -> None:
        """Sends a progress event to the parent."""
        self._send({"event": fields})


class Serve(Protocol):
    """What a factory returns: called once for each request."""

    def __call__(self, request: Message, report: Report) -> Message: ...


# ---------------------------------------------------------------------------------------- parent's side


def child_environment(more: Mapping[str, str]) -> dict[str, str]:
    """The environment of a Python that kdpipe starts: it, and what it starts, imports nothing from the working folder.

    A `queue.py` or `random.py` there would run in place of Python's own.
    """
    return {**os.environ, **more, "PYTHONSAFEPATH": "1"}


class Worker:
    """One warm process. Started by the first call.

    With `leads_group` it leads a process group, and what it starts ends with it; signals from a terminal do not
    reach that group.
    """

    def __init__(
        self,
        target: str,
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
        leads_group: bool = False,
    ) -> None:
        self.target = target
        self.log = log
        self._environment = dict(environment or {})
        self._leads_group = leads_group
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = bytearray()

    @property
    def pid(self) -> int | None:
        """The process, or None while there is none."""
        return None if self._process is None else self._process.pid

    def call(
        self,
        request: Message,
        *,
        on_event: Callable[[Message], None],
        stop: Callable[[], bool] = lambda: False,
        tick: Callable[[], None] = lambda: None,
    ) -> Message | None:
        """The result of one call, or None when `stop()` became true and the worker stopped safely.

        `tick` is called a few times a second. Raises the worker's own KdpipeError, or StepError with the
        tail of its log when it died.
        """
        process = self._process or self._start()
        self._write(process, {"call": request})
        asked: float | None = None
        while True:
            try:
                if asked is None and stop():
                    asked = time.monotonic()
                    self._write(process, {"stop": True})
                messages = self._read(process, seconds=0.2)
            except StepError:
                if stop():  # whoever stops the run may have killed the worker too
                    return None
                raise
            for message in messages:
                if "event" in message:
                    on_event(message["event"])  # type: ignore[arg-type]
                elif "result" in message:
                    return message["result"]  # type: ignore[return-value]
                elif "stopped" in message:
                    return None
                elif "error" in message:
                    raise self._error(message["error"])  # type: ignore[arg-type]
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

    def stop(self, last: Message | None = None) -> None:
        """Lets the process end by itself, after a `last` call if one is given, and sees to it that it does."""
        if self._process is None:
            return
        if last is not None:
            deadline = time.monotonic() + STOP_SECONDS
            with contextlib.suppress(KdpipeError):
                self.call(last, on_event=lambda _: None, stop=lambda: time.monotonic() > deadline)
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
        # The child inherits the mask: a signal to the group cannot kill a worker that is still importing.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _PARENTS_SIGNALS)
        guarded = [GUARDED] if self._leads_group else []
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("ab") as log:
                process = subprocess.Popen(  # noqa: S603 (our own interpreter and module)
                    [sys.executable, "-m", "kdpipe.workers.worker", self.target, str(os.getpid()), *guarded],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=child_environment(self._environment),
                    process_group=0 if self._leads_group else None,
                )
        except OSError as error:
            raise machine_fault(error, self.log if error.filename else None) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.set_blocking(process.stdout.fileno(), False)  # type: ignore[union-attr]
        self._process = process
        self._buffer.clear()
        return process

    def _write(self, process: subprocess.Popen[bytes], message: Message) -> None:
        try:
            process.stdin.write(json.dumps(message).encode() + b"\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
        except OSError:
            raise self._death(process) from None

    def _read(self, process: subprocess.Popen[bytes], *, seconds: float) -> list[Message]:
        """The messages that arrived within `seconds`; raises StepError when the process ended."""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)  # type: ignore[arg-type]
            if not selector.select(seconds):
                return []
        data = process.stdout.read()  # type: ignore[union-attr]
        if data == b"":
            raise self._death(process)
        self._buffer += data or b""
        if b"\n" not in (data or b""):  # a long message is searched once, not again with every piece of it
            return []
        *lines, self._buffer = self._buffer.split(b"\n")
        return [json.loads(line) for line in lines]

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

    def _error(self, error: Message) -> KdpipeError:
        kind = getattr(kdpipe.errors, str(error["kind"]), None)
        if isinstance(kind, type) and issubclass(kind, EngineError):
            request: Any = error["request"]
            return kind(str(error["message"]), hint=str(error["hint"]), request=request)
        if isinstance(kind, type) and issubclass(kind, KdpipeError):
            return kind(str(error["message"]), hint=str(error["hint"]))
        return StepError(
            f"{error['kind']}: {error['message']} (the whole story is in {self.log})",
            hint="this is a bug in kdpipe; finished pieces are kept, and repeating the command continues",
        )


# ---------------------------------------------------------------------------------------- worker's side


def main(target: str, parent: int, *, guarded: bool = False) -> None:
    """Serves calls until the parent goes away."""
    _die_with(parent)
    if guarded:
        _start_guard()
    for number in _PARENTS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PARENTS_SIGNALS)  # what this process starts is not born deaf
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is for the log, not for the parent
    lock = threading.Lock()

    def send(message: Message) -> None:
        with lock, contextlib.suppress(BrokenPipeError):
            replies.write(json.dumps(message) + "\n")
            replies.flush()

    report = Report(send)
    calls: queue.Queue[Message] = queue.Queue()
    threading.Thread(target=_listen, args=(sys.stdin, calls, report), daemon=True).start()
    serve: Serve | None = None
    while True:
        request = calls.get()
        try:
            if serve is None:
                serve = _made(target)
            send({"result": serve(request, report)})
        except Stopped:
            send({"stopped": True})
        except KdpipeError as error:
            send({"error": _describe(error)})
        except Exception as error:
            import traceback

            traceback.print_exc()
            send({"error": _describe(_told(error))})


def _made(target: str) -> Serve:
    """What the factory named `module:factory` returns.

    Garbage is not looked for meanwhile: libraries make a million objects that all stay, and looking at them again and
    again is an eighth of the time of their import. Afterwards they are never looked at.
    """
    module, _, name = target.partition(":")
    gc.disable()
    try:
        made: Serve = getattr(importlib.import_module(module), name)()
    finally:
        gc.enable()
    gc.freeze()
    return made


def _told(error: Exception) -> Exception:
    """The error as the user shall hear of it: a fault of the machine is no bug of ours."""
    known = (
        error if isinstance(error, OSError) else as_os_error(error)
    )  # the tokenizers' is a plain Exception
    if is_machine_fault(known):
        return machine_fault(known)
    # torch's own are known by name and text, as this module runs without torch.
    is_torchs = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    if isinstance(error, MemoryError) or is_torchs:
        return StepError(
            f"out of memory: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            hint="free some memory, or lower runtime.train_tokens, sample_tokens or score_tokens, which change no "
            "result; then repeat the command: finished pieces are kept",
        )
    return error


def _describe(error: Exception) -> Message:
    # The parent knows the classes of `errors` only: a subclass from elsewhere travels as the nearest of them.
    known = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == KdpipeError.__module__]
    kind = known[0] if known else type(error).__name__
    hint = error.hint if isinstance(error, KdpipeError) else ""
    if isinstance(error, EngineError):
        return {"kind": kind, "message": error.what, "hint": hint, "request": error.request}
    return {"kind": kind, "message": str(error), "hint": hint}


def _listen(requests: TextIO, calls: queue.Queue[Message], report: Report) -> None:
    """Queues calls; ends the process at once when the parent's end of the pipe closes."""
    for line in requests:
        message: dict[str, Any] = json.loads(line)
        if "call" in message:
            report.stopping.clear()
            calls.put(message["call"])
        else:
            report.stopping.set()
    os._exit(0)


def _start_guard() -> None:
    """Forks the guard: a process that waits for this one to end, however that is, and ends its whole group then.

    It looks for another parent instead of waiting for a pipe to close, as what this process forks may hold the pipe.
    """
    leader = os.getpid()
    if os.getpgrp() != leader:
        raise RuntimeError(f"process {leader} does not lead its group: a guard would end what is not its own")
    if os.fork():
        return
    for number in _PARENTS_SIGNALS:
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
