"""How a stage tells how far it is, and where it may be stopped. No clock and no terminal of its own."""

from __future__ import annotations

from collections.abc import Callable

from kdpipe.workers.message import message


class Stopped(Exception):
    """Raised at a safe point after a request to stop; everything finished so far is on disk."""


@message
class Progressed:
    """How far a step is: `done` of `total` units, and tokens so far."""

    unit: str
    total: int
    done: int
    tokens: int


class Pulse:
    """Progress of one step: `done` of `total` units, and tokens so far."""

    def __init__(self, send: Callable[[Progressed], None], stopping: Callable[[], bool]) -> None:
        self._send = send
        self._stopping = stopping
        self._unit, self._total, self._done, self._tokens = "", 0, 0, 0

    def start(self, unit: str, total: int) -> None:
        """Begins a piece of `total` units (completions, optimizer steps)."""
        self._unit, self._total, self._done = unit, total, 0
        self._tell()

    def advance(self, units: int = 1) -> None:
        """`units` more are finished."""
        self._done += units
        self._tell()

    def tokens(self, count: int) -> None:
        """`count` more tokens were sampled, scored or trained on."""
        self._tokens += count
        self._tell()

    @property
    def all_tokens(self) -> int:
        """Tokens so far, of this attempt."""
        return self._tokens

    @property
    def stopping(self) -> bool:
        """Whether a stop was asked for: the next safe point will raise."""
        return self._stopping()

    def safe_point(self) -> None:
        """Raises Stopped if a stop was asked for; call where a kill would lose nothing."""
        if self._stopping():
            raise Stopped

    def _tell(self) -> None:
        self._send(Progressed(self._unit, self._total, self._done, self._tokens))
