"""What a probe of the doctor says: its verdict, the numbers behind it, and which mistake it is there to catch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kdpipe.errors import KdpipeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic import JsonValue

Verdict = Literal["ok", "FAILED", "warning", "skipped"]
Probe = Literal[
    "vocabulary",
    "special tokens",
    "template",
    "end of sequence",
    "context",
    "load",
    "null test",
    "own prompt",
    "sampler",
    "shift",
    "not constant",
    "same twice",
    "own weights",
    "reload",
    "top-k",
    "hidden states",
    "knows the task",
]
CATCHES: dict[Probe, str] = {
    "vocabulary": "a teacher whose ids stand for other strings, so that it scores another text",
    "special tokens": "a beginning-of-sequence token that stands twice, or that only one of the two knows",
    "template": "a teacher that reads turns in a form that it was not trained on",
    "end of sequence": "a teacher that ends its turns with another id, and so teaches never to stop",
    "context": "prompts that do not fit beside max_new_tokens, found hours later",
    "load": "a folder that does not open, a server that does not answer or serves another model",
    "null test": "wrong or stale weights, a temperature applied twice or not at all, scores shifted by one",
    "own prompt": "what the null test catches, where the teacher reads a prompt of its own",
    "sampler": "behaviour log-probs at another temperature or of other weights than the trainer's",
    "shift": "scores that belong to the token before or after, also at the last token",
    "not constant": "weights lost after sleep, or an output head of zeros: -ln V everywhere",
    "same twice": "scores that depend on what was asked before, or on what is asked beside",
    "own weights": "an engine that runs other weights, or other arithmetic, than the teacher's folder holds",
    "reload": "weights, or the output head alone, that stay the old ones when a new student is loaded",
    "top-k": "a top-k that is missing, short, unsorted, or of another token than the score beside it",
    "hidden states": "states that the output head read by train does not turn into the engine's scores",
    "knows the task": "random or untrained weights in the teacher's folder",
}
"""What each probe is there for, in the order in which they are told."""

_BROKEN = (KdpipeError, OSError, RuntimeError, ValueError, LookupError, ArithmeticError)
"""What may come out of an engine or a model's folder: it is the probe's failure, not the doctor's."""


@dataclass(frozen=True, slots=True)
class Measure:
    """A number with its limit: at most that, or with `must_exceed` more than that."""

    name: str
    value: float
    limit: float
    must_exceed: bool = False

    @property
    def is_ok(self) -> bool:
        """Whether the value is a number on the right side of its limit."""
        return self.value > self.limit if self.must_exceed else self.value <= self.limit

    def to_json(self) -> dict[str, JsonValue]:
        """The measure as JSON, which has no nan and no infinity: null."""
        value = self.value if math.isfinite(self.value) else None
        return {"name": self.name, "value": value, "limit": self.limit, "must_exceed": self.must_exceed}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a probe found, in a sentence, with its numbers. Without a `verdict` the numbers give it."""

    said: str
    measures: tuple[Measure, ...] = ()
    verdict: Verdict | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """The verdict of one probe on the student or on one teacher (`about`)."""

    probe: Probe
    about: str
    verdict: Verdict
    said: str
    measures: tuple[Measure, ...] = ()

    @property
    def sentence(self) -> str:
        """The finding in one sentence, for an error message or a log."""
        return f"{self.probe} ({self.about}): {self.said}"

    def to_json(self) -> dict[str, JsonValue]:
        """The finding as JSON, with what its probe catches."""
        return {
            "probe": self.probe,
            "about": self.about,
            "verdict": self.verdict,
            "said": self.said,
            "measures": [measure.to_json() for measure in self.measures],
            "catches": CATCHES[self.probe],
        }


def skipped(why: str) -> Outcome:
    """A probe that was not made, and why."""
    return Outcome(why, verdict="skipped")


def failed(said: str, *measures: Measure) -> Outcome:
    """A probe that failed for what is said, whatever the numbers."""
    return Outcome(said, measures, verdict="FAILED")


def found(probe: Probe, about: str, make: Callable[[], Outcome]) -> Finding:
    """The finding of one probe; what it raises is its failure."""
    try:
        outcome = make()
    except KdpipeError as error:
        hint = f"; {error.hint}" if error.hint else ""
        return Finding(probe, about, "FAILED", f"{error.message}{hint}")
    except _BROKEN as error:
        return Finding(probe, about, "FAILED", f"{type(error).__name__}: {error}")
    good: Verdict = "ok" if all(measure.is_ok for measure in outcome.measures) else "FAILED"
    return Finding(probe, about, outcome.verdict or good, outcome.said, outcome.measures)
