"""Signals while a run goes on: the first asks it to stop at a safe point, the second ends it at once."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

from kdpipe.errors import Interrupted
from kdpipe.workers.worker import STOPS

PATIENCE_SECONDS = 2.0
"""After a signal, when the command has to be gone within seconds."""


@dataclass(slots=True)
class Stop:
    """Whether a signal has asked the run to stop, and which; None while none has."""

    number: int | None = None
    is_urgent: bool = False

    def asked(self) -> bool:
        """Whether to stop at the next safe point."""
        return self.number is not None

    def patience(self) -> float:
        """Seconds that may be waited for what is no step of the run: none after a second signal."""
        return 0.0 if self.is_urgent else PATIENCE_SECONDS if self.asked() else math.inf

    def check(self, step_id: str) -> None:
        """Raises Interrupted, which names the step, once a signal has asked for it."""
        if self.number is not None:
            name = signal.Signals(self.number).name
            raise Interrupted(self.number, f"by {name} at {step_id}")


@contextlib.contextmanager
def signals() -> Iterator[Stop]:
    """Turns the first signal of `STOPS` into a request to stop, and the second into the end."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        if stop.asked():
            stop.is_urgent = True
            raise Interrupted(number, f"at once, by a second {signal.Signals(number).name}")
        stop.number = number

    with handled(handle):
        yield stop


@contextlib.contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Has `handler` called on the signals of `STOPS`."""
    # One that is ignored stays so: nohup and a shell's background mean that.
    heard = [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
