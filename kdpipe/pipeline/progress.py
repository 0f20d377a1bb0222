"""Progress of the running step, for other terminals: `progress.json` in the run's folder.

Written at most once a second by the process that holds the run, replaced whole and never flushed: nothing is read back
from it for results, and a disk that refuses it stops no run. A kill leaves it behind; only a held run has progress.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kdpipe.workers.pulse import Progressed

PROGRESS = "progress.json"
INTERVAL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` units of a step, its pace, and how old that is; seconds since the epoch in `at`."""

    step: str
    unit: str
    done: int
    total: int
    tokens_per_second: float | None
    seconds_left: float | None
    at: float


class Pace:
    """How fast a step goes on and how long it will take; counted from the first event of each unit."""

    def __init__(self, step_id: str = "") -> None:
        self.step = step_id
        self._began = 0.0
        self._first: Progressed | None = None

    def note(self, event: Progressed) -> Progress:
        """How far the step is by now; its pace and the time left are None before anything is finished."""
        now = time.monotonic()
        if self._first is None or event.unit != self._first.unit:
            self._began, self._first = now, event
        seconds = max(now - self._began, 1e-3)
        tokens, finished = event.tokens - self._first.tokens, event.done - self._first.done
        return Progress(
            self.step,
            event.unit,
            event.done,
            event.total,
            tokens_per_second=tokens / seconds if tokens > 0 else None,
            seconds_left=seconds * (event.total - event.done) / finished if finished > 0 else None,
            at=time.time(),
        )


class ProgressFile:
    """Notes the progress events of one run."""

    def __init__(self, run_folder: Path) -> None:
        self._path = run_folder / PROGRESS
        self._draft = run_folder / f".tmp-{PROGRESS}"
        self._pace = Pace()
        self._unit, self._written = "", -math.inf

    def note(self, step_id: str, event: Progressed) -> None:
        """Notes how far a step is, unless that was noted within the last second."""
        if step_id != self._pace.step:
            self._pace = Pace(step_id)
        found, now = self._pace.note(event), time.monotonic()
        if found.unit == self._unit and now - self._written < INTERVAL_SECONDS:
            return
        self._unit, self._written = found.unit, now
        with contextlib.suppress(OSError):  # it is only shown: nothing depends on it
            self._draft.write_text(json.dumps(asdict(found)), encoding="utf-8")
            self._draft.replace(self._path)

    def clear(self) -> None:
        """Removes the file, also what a kill left of one: no step is running."""
        self._pace, self._unit = Pace(), ""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
            self._draft.unlink(missing_ok=True)


def read_progress(run_folder: Path) -> Progress | None:
    """What was noted last, or None where there is nothing that can be read."""
    try:
        return Progress(**json.loads((run_folder / PROGRESS).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def pace_words(pace: Progress) -> str:
    """How far a step is, how fast it goes on and how long it will take."""
    pieces = [f"{pace.done}/{pace.total} {pace.unit}"]
    if pace.tokens_per_second is not None:
        pieces.append(f"{pace.tokens_per_second:,.0f} tokens/s")
    if left := pace.seconds_left:
        rough = f"{left:.0f} s" if left < 60 else f"{left / 60:.0f} min"
        pieces.append(f"{rough if left < 3600 else duration(left)} left")
    return ", ".join(pieces)


def duration(seconds: float) -> str:
    """`12.3 s`, `4 min 05 s`, `2 h 07 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
