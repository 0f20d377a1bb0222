"""The metrics of a done step: the rows of its metrics.jsonl."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kdpipe.store.durable import read_lines

METRICS = "metrics.jsonl"


@dataclass(frozen=True, slots=True)
class Metric:
    """A number that a step measured; `optimizer_step` is None where it is of the whole round."""

    round: int
    name: str
    value: float
    optimizer_step: int | None


def read_metrics(path: Path) -> list[Metric]:
    """The rows of a metrics.jsonl, [] where it is missing; leaves out what is no metric."""
    found = []
    for row in read_lines(path):
        number, name, value, at = (row.get(key) for key in ("round", "name", "value", "optimizer_step"))
        if (
            isinstance(number, int)
            and isinstance(name, str)
            and isinstance(value, int | float)
            and (at is None or isinstance(at, int))
        ):
            found.append(Metric(number, name, float(value), at))
    return found
