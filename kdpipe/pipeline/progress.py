"""How far the running step is, for whoever looks from another terminal: `progress.json` in the run's folder.

Written at most once a second by the process that holds the run, replaced whole and never flushed: nothing is read back
from it for results, and a disk that refuses it stops no run. A kill leaves it behind; only a held run has progress.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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


class ProgressFile:
    """Notes the progress events of one run; its pace is counted from the first event of each unit."""

    def __init__(self, run_folder: Path) -> None:
        self._path = run_folder / PROGRESS
        self._draft = run_folder / f".tmp-{PROGRESS}"
        self._place = ("", "")
        self._first: tuple[float, int, int] = (0.0, 0, 0)
        self._written = -math.inf

    def note(self, step_id: str, event: Mapping[str, Any]) -> None:
        """Notes a progress event, unless one was noted within the last second; ignores all other events."""
        if event.get("kind") != "progress":
            return
        now = time.monotonic()
        if (step_id, event["unit"]) != self._place:
            self._place, self._first = (step_id, event["unit"]), (now, event["done"], event["tokens"])
        elif now - self._written < INTERVAL_SECONDS:
            return
        self._written = now
        began, first_done, first_tokens = self._first
        seconds, finished = max(now - began, 1e-3), event["done"] - first_done
        left = seconds * (event["total"] - event["done"]) / finished if finished > 0 else None
        rate = (event["tokens"] - first_tokens) / seconds if event["tokens"] > first_tokens else None
        found = Progress(step_id, event["unit"], event["done"], event["total"], rate, left, time.time())
        with contextlib.suppress(OSError):  # it is only shown: nothing depends on it
            self._draft.write_text(json.dumps(asdict(found)), encoding="utf-8")
            self._draft.replace(self._path)

    def clear(self) -> None:
        """Removes the file, also what a kill left of one: no step is running."""
        self._place, self._written = ("", ""), -math.inf
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
            self._draft.unlink(missing_ok=True)


def read_progress(run_folder: Path) -> Progress | None:
    """What was noted last, or None where there is nothing that can be read."""
    try:
        return Progress(**json.loads((run_folder / PROGRESS).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
