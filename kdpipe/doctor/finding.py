"""Findings of the doctor's probes and of check-loss: verdict, numbers, the mistake that is caught."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BeforeValidator, PlainSerializer, TypeAdapter

from kdpipe.errors import KdpipeError
from kdpipe.recipe.schema import Recipe
from kdpipe.workers.message import Nothing, Talk, message

Verdict = Literal["ok", "FAILED", "warning", "skipped", "not applicable"]
CATCHES = {
    "vocabulary": "a teacher with other strings for the same ids, so that it scores another text",
    "prompt": "a chat template that leaves out what it is given, or ends answers with a token that ends nothing",
    "special tokens": "a beginning-of-sequence token that occurs twice, or that only one of the two knows",
    "template": "a teacher that reads turns in a form that it was not trained on",
    "end of sequence": "a teacher that ends its turns with another id, and so teaches never to stop",
    "context": "prompts that do not fit beside max_new_tokens, found hours later",
    "load": "a folder that does not open, a server that does not answer or serves another model",
    "null test": "wrong or stale weights, a temperature applied twice or not at all, scores shifted by one",
    "own prompt": "what the null test catches, where the teacher reads a prompt of its own",
    "sampler": "behaviour log-probs at another temperature or of other weights than the trainer's",
    "loss": "a loss that reads other log-probs than the student's: without the temperature, or of padding",
    "shift": "scores that belong to the token before or after, also at the last token",
    "not constant": "weights lost after sleep, or an output head of zeros: -ln V everywhere",
    "same twice": "scores that depend on earlier requests, or on others in the batch",
    "own weights": "an engine that runs other weights, or other arithmetic, than the teacher's folder holds",
    "reload": "weights, or the output head alone, that stay the old ones when a new student is loaded",
    "top-k": "a top-k that is missing, short, unsorted, or of another token than the score beside it",
    "hidden states": "states that the output head read by train does not turn into the engine's scores",
    "overlap": "a teacher that finds other tokens likely than the student does, where the student goes",
    "knows the task": "random or untrained weights in the teacher's folder",
}
"""The mistake that each probe is there to catch, in the order in which they are reported."""

_BROKEN = (KdpipeError, OSError, RuntimeError, ValueError, LookupError, ArithmeticError)
"""What may come out of an engine or a model's folder: it is the probe's failure, not the doctor's."""


@dataclass(frozen=True, slots=True)
class Measure:
    """A number that may be `limit` at most, or with `must_exceed` has to be more.

    `of` is the size of the whole, `origin` where the limit comes from. A value that is not finite is never ok, and
    null in JSON.
    """

    name: str
    value: Annotated[
        float,
        BeforeValidator(lambda value: math.nan if value is None else value),
        PlainSerializer(lambda value: value if math.isfinite(value) else None),
    ]
    limit: float
    must_exceed: bool = False
    of: float | None = None
    origin: str = ""

    @property
    def is_ok(self) -> bool:
        """Whether the value is a finite number on the right side of its limit."""
        if not math.isfinite(self.value):
            return False
        return self.value > self.limit if self.must_exceed else self.value <= self.limit

    @property
    def badness(self) -> tuple[bool, float]:
        """Sorts measures: those beyond their limit last, the others by how near they are."""
        if not math.isfinite(self.value):
            return True, math.inf
        ratio = self.value / self.limit if self.limit else self.value
        return not self.is_ok, -ratio if self.must_exceed else ratio


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a probe found, in a sentence, with its numbers, which decide where there is no `verdict`."""

    said: str
    measures: tuple[Measure, ...] = ()
    verdict: Verdict | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """The verdict of one probe, what it is about, its numbers, and the mistake that the probe catches."""

    probe: str
    about: str
    verdict: Verdict
    said: str
    measures: tuple[Measure, ...]
    catches: str


@dataclass(frozen=True, slots=True)
class Phase:
    """An objective as one phase of the recipe has it, in words, and the findings on its five properties."""

    objective: str
    findings: tuple[Finding, ...]


@message
class CheckLoss:
    """Check the objective of a recipe, phase by phase."""

    recipe: Recipe


@message
class CheckedLoss:
    """Each phase with its findings."""

    phases: tuple[Phase, ...]


CHECK_LOSS = Talk[CheckLoss, Nothing, CheckedLoss]((CheckLoss,), (Nothing,), (CheckedLoss,))
FINDINGS = TypeAdapter(tuple[Finding, ...])
PHASES = TypeAdapter(tuple[Phase, ...])
"""From and to what a worker sends."""


def are_ok(measures: Sequence[Measure]) -> bool:
    """Whether every number is on the right side of its limit."""
    return all(measure.is_ok for measure in measures)


def skipped(why: str) -> Outcome:
    """The outcome of a probe that was skipped, and why."""
    return Outcome(why, verdict="skipped")


def failed(said: str) -> Outcome:
    """The outcome of a probe that failed, whatever its numbers."""
    return Outcome(said, verdict="FAILED")


def found(probe: str, about: str, make: Callable[[], Outcome]) -> Finding:
    """The finding of one probe; what it raises is its failure."""
    try:
        outcome = make()
    except KdpipeError as error:
        outcome = failed(f"{error.message}; {error.hint}" if error.hint else error.message)
    except _BROKEN as error:
        outcome = failed(f"{type(error).__name__}: {error}")
    verdict = outcome.verdict or ("ok" if are_ok(outcome.measures) else "FAILED")
    return Finding(probe, about, verdict, outcome.said, outcome.measures, CATCHES[probe])
