"""Factories for `kdpipe.workers.worker` that do what a test asks, in a process that starts quickly."""

from __future__ import annotations

import ctypes
import errno
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kdpipe.errors import ArtifactError, StepError
from kdpipe.workers.message import Talk, message
from kdpipe.workers.pulse import Stopped
from kdpipe.workers.worker import Report as AnyReport
from kdpipe.workers.worker import Worker as AnyWorker

if TYPE_CHECKING:
    from kdpipe.engines.remote import Host


Message = dict[str, Any]


@message
class Ask:
    fields: Message


@message
class Tell:
    fields: Message


@message
class Reply:
    fields: Message


ECHO = Talk[Ask, Tell, Reply]((Ask,), (Tell,), (Reply,))


class Report:
    """The report of a call, whose events are fields."""

    def __init__(self, report: AnyReport[Tell]) -> None:
        self._report = report
        self.stopping = report.stopping

    def event(self, **fields: Any) -> None:
        self._report.event(Tell(fields))


class Worker(AnyWorker[Ask, Tell, Reply]):
    """Asks an Echo, in fields."""

    def __init__(self, target: str, **settings: Any) -> None:
        super().__init__(target, ECHO, **settings)

    def ask(
        self, request: Message, *, on_event: Callable[[Message], None] = lambda _: None, **settings: Any
    ) -> Message | None:
        reply = self.call(Ask(request), on_event=lambda event: on_event(event.fields), **settings)
        return None if reply is None else reply.fields


class Echo:
    """Counts its calls, and does what the request's `do` says."""

    talk = ECHO

    def __init__(self) -> None:
        self._calls = 0

    def __call__(self, asked: Ask, told: AnyReport[Tell]) -> Reply:
        request, report = asked.fields, Report(told)
        self._calls += 1
        actions: dict[str, Callable[[Message, Report], None]] = {
            "nothing": lambda _request, _report: None,
            "events": _events,
            "artifact error": _artifact_error,
            "step error": _step_error,
            "bug": _bug,
            "panic": _panic,
            "run out of memory": lambda _request, _report: bytearray(1 << 60).clear(),
            "fill the disk": _fill_the_disk,
            "unserializable": lambda request, _report: request.update(out=object()),
            "die": _die,
            "exit": lambda _request, _report: os._exit(7),
            "noise": _noise,
            "wait": _wait,
            "start a child": _start_a_child,
            "hang": _hang,
            "hold": _hold,
            "import queue and random in grandchildren": _import_in_grandchildren,
            "tell the environment": lambda request, _report: request.update(out=dict(os.environ)),
        }
        actions[str(request.get("do", "nothing"))](request, report)
        return Reply({"calls": self._calls, "pid": os.getpid(), "out": request.get("out")})


def fake_host() -> Host:
    """Serves the engine without a model; it has hidden states, as the engine that it stands for."""
    from dataclasses import replace

    import numpy as np

    from kdpipe.engines.remote import Host
    from tests.fakes import FakeEngine

    class WithHidden(FakeEngine):
        def score(self, requests: Any, scoring: Any, *, progress: Any) -> list[Any]:
            found = super().score(requests, replace(scoring, hidden=False), progress=progress)
            if not scoring.hidden:
                return list(found)
            return [replace(one, hidden=np.ones((len(one.logprobs), 3), np.float32)) for one in found]

    return Host(lambda _hosting: WithHidden())


def failing() -> Echo:
    raise ArtifactError("cannot be made", hint="do this")


def _origins(_number: int) -> list[str]:
    return [str(importlib.import_module(name).__file__) for name in ("queue", "random")]


def _import_in_grandchildren(request: Message, _report: Report) -> None:
    """In one that multiprocessing spawns, as vLLM does, and in a plain one."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        [spawned] = pool.map(_origins, [0])
        pool.close()  # what a worker starts ignores SIGTERM, by which a pool is ended else
        pool.join()
    script = "import queue, random; print(queue.__file__, random.__file__)"
    started = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    request["out"] = [*spawned, *started.stdout.split()]


def _fill_the_disk(_request: Message, _report: Report) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk/cache")


def _events(request: Message, report: Report) -> None:
    for number in range(int(str(request["count"]))):
        report.event(number=number, padding="x" * 1000)


def _artifact_error(_request: Message, _report: Report) -> None:
    raise ArtifactError("scores.parquet: damaged", hint="repeat the run with --force teacher-score@1")


def _step_error(_request: Message, _report: Report) -> None:
    class OutOfPaperError(StepError):
        """A subclass that the parent has never heard of."""

    raise OutOfPaperError("no paper", hint="buy some")


def _bug(_request: Message, _report: Report) -> None:
    raise ZeroDivisionError("a bug")


def _panic(_request: Message, _report: Report) -> None:
    raise type("PanicException", (BaseException,), {})("as a library written in Rust does")


def _die(_request: Message, _report: Report) -> None:
    print("CUDA error: unspecified launch failure", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def _noise(_request: Message, _report: Report) -> None:
    print('{"result": {"calls": -1}}')
    print("a progress bar without end", end="", flush=True)
    os.write(1, b'\n{"error": 1}\n')
    subprocess.run(["echo", "from a child process"], check=True)


def _wait(_request: Message, report: Report) -> None:
    report.event(waiting=True)
    if report.stopping.wait(timeout=60):
        raise Stopped


def _start_a_child(_request: Message, report: Report) -> None:
    """Starts what knows nothing of its parent, tells its number, and goes on working."""
    child = subprocess.Popen(["sleep", "600"])
    report.event(child=child.pid)
    signal.pause()


def _hold(_request: Message, report: Report) -> None:
    """Sleeps with the interpreter's lock held, as a long call into a library may: no other thread runs."""
    library = ctypes.PyDLL(None)
    sys.setswitchinterval(1000)  # nor does one on the way there
    report.event(waiting=True)
    library.sleep(60)


def _hang(_request: Message, report: Report) -> None:
    report.event(waiting=True)
    signal.pause()
