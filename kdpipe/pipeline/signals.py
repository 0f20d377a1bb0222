"""Signals while a run goes on: the first asks it to stop at a safe point, the second ends it at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from kdpipe.errors import Interrupted


@dataclass(slots=True)
class Stop:
    """Whether a signal has asked the run to stop, and which; None while none has."""

    number: int | None = None

    def asked(self) -> bool:
        """Whether to stop at the next safe point."""
        return self.number is not None

    def check(self, step_id: str) -> None:
        """Raises Interrupted, which names the step, once a signal has asked for it."""
        if self.number is not None:
            name = signal.Signals(self.number).name
            raise Interrupted(
                self.number,
                f"stopped by {name} at {step_id}; everything finished is kept",
                hint="the same command continues",
            )


@contextlib.contextmanager
def signals() -> Iterator[Stop]:
    """Turns the first SIGINT or SIGTERM into a request to stop, and the second into the end."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        if stop.asked():
            raise Interrupted(number, "stopped at once", hint="the same command continues")
        stop.number = number

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
