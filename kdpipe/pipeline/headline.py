"""What a run is judged by: accuracy, or held-out reverse KL where nothing is graded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kdpipe.method.interval import Interval


@dataclass(frozen=True, slots=True)
class Headline:
    """A number of an evaluation with its interval, and how it is told.

    A summary has it by the first of `keys` that is there, followed by `suffix`. `beside` is shown with it where it is
    the headline. `sign` is 1 where more is better, -1 where less is. What is not above `least` may be rounding. Of
    fewer problems than `fewest` no change can be told (`kdpipe docs statistics` says how each was found).
    """

    name: str
    brief: str
    title: str
    keys: tuple[str, ...]
    suffix: str
    counted: str
    sign: Literal[1, -1]
    least: float
    fewest: int
    unit: str
    change_unit: str
    told: str
    beside: Headline | None = None

    @property
    def metric(self) -> str:
        """Its name in documents for programs."""
        return f"{self.keys[-1]}{self.suffix}"

    def estimate(self, summary: Mapping[str, Any]) -> float | None:
        """Its value in a summary, without an interval; None where it was not measured."""
        return next((summary[name] for key in self.keys if (name := f"{key}{self.suffix}") in summary), None)

    def level(self, summary: Mapping[str, Any]) -> Interval | None:
        """Its value in a summary; None where it was not measured."""
        return self._interval(summary, "")

    def change(self, summary: Mapping[str, Any]) -> Interval | None:
        """Its paired difference to student 0."""
        return self._interval(summary, "_change")

    def _interval(self, summary: Mapping[str, Any], kind: str) -> Interval | None:
        for key in self.keys:
            if (name := f"{key}{kind}{self.suffix}") in summary:
                return Interval(
                    summary[name], *(summary[f"{key}{kind}_{bound}"] for bound in ("low", "high"))
                )
        return None

    def gain(self, change: Interval) -> Interval:
        """A difference as what it is worth: above 0 is better."""
        return change if self.sign > 0 else Interval(-change.estimate, -change.high, -change.low)

    def show(self, value: float) -> str:
        """A level without its unit."""
        return f"{value:.3f}" if self.suffix else f"{value:.1%}"

    def show_size(self, value: float) -> str:
        """The size of a difference without its unit."""
        return f"{value:.3f}" if self.suffix else f"{100 * value:.1f}"

    def show_change(self, value: float) -> str:
        """A difference with its sign and without its unit."""
        return f"{value:+.3f}" if self.suffix else f"{100 * value:+.1f}"


REVERSE_KL = Headline(
    name="held-out reverse KL",
    brief="held out",
    title="held-out reverse KL, nats",
    keys=("reverse_kl_exact", "reverse_kl"),
    suffix="_nats",
    counted="reverse_kl_problems",
    sign=-1,
    least=1e-3,
    fewest=8,
    unit=" nats a token",
    change_unit="nats",
    told="The student is {} nats a token from the teacher.",
)
"""In nats a token, from whole distributions where they were at hand."""
ACCURACY = Headline(
    name="accuracy",
    brief="accuracy",
    title="accuracy",
    keys=("accuracy",),
    suffix="",
    counted="problems",
    sign=1,
    least=0.0,
    fewest=6,
    unit="",
    change_unit="points",
    told="The student answers {} of the held-out problems.",
    beside=REVERSE_KL,
)
"""The share of right answers, with Wilson's interval."""
MEASURES = (ACCURACY, REVERSE_KL)
KEPT_MASS = "rollout/kept_mass_mean"
"""The metric of a round whose sampling top-p or top-k cut."""


def own_reverse_kl(metrics: Mapping[str, float]) -> float | None:
    """The reverse KL on a round's own samples in nats a token, without what top-p and top-k add to it.

    Those make the sampler's log-probs b those of the cut distribution: b - q has a mean above 0 even where the teacher
    is the student. The trainer's log-probs p are of the whole one: b - q less b - p is p - q.
    """
    found = metrics.get("score/reverse_kl_nats")
    if found is None or KEPT_MASS not in metrics:
        return found
    return found - metrics["train/mismatch_nats_mean"]


def headline_of(summary: Mapping[str, Any]) -> Headline:
    """What the evaluation with this summary is judged by."""
    return ACCURACY if "accuracy" in summary else REVERSE_KL
