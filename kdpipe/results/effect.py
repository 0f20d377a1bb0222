"""What the change of a student is called: one headline for every sign of accuracy and of reverse KL."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from kdpipe.pipeline.headline import ACCURACY, REVERSE_KL, Headline, headline_of
from kdpipe.pipeline.runs import RunFolder, unended
from kdpipe.pipeline.status import State
from kdpipe.store.locks import is_running

Tone = Literal["good", "bad", "open"]


class Way(StrEnum):
    """Which way a measure went: BETTER is more right answers, or nearer to the teacher."""

    BETTER = "better"
    UNCLEAR = "unclear"
    WORSE = "worse"
    FEW = "too few problems to tell"
    UNKNOWN = "not measured"


SILENT = (Way.UNCLEAR, Way.FEW, Way.UNKNOWN)
"""Of reverse KL: what a headline about accuracy does not mention."""
WORKED = "It worked: the student gained {points} points"
HARMED = "It did harm: the student lost {points} points"
BY_ACCURACY: Mapping[tuple[Way, Way], tuple[Tone, str]] = {
    (Way.BETTER, Way.BETTER): ("good", f"{WORKED} and came closer to the teacher"),
    **{(Way.BETTER, kl): ("good", WORKED) for kl in SILENT},
    (Way.BETTER, Way.WORSE): (
        "open",
        "Mixed: the student gained {points} points, but went {nats} nats a token away from the teacher",
    ),
    (Way.UNCLEAR, Way.BETTER): ("open", "Closer to the teacher, but no clear change in accuracy"),
    (Way.UNCLEAR, Way.UNCLEAR): ("open", "No clear effect"),
    **{(Way.UNCLEAR, kl): ("open", "No clear change in accuracy") for kl in (Way.FEW, Way.UNKNOWN)},
    (Way.UNCLEAR, Way.WORSE): (
        "bad",
        "Further from the teacher by {nats} nats a token, and no clear change in accuracy",
    ),
    (Way.WORSE, Way.BETTER): ("bad", f"{HARMED}, though it came closer to the teacher"),
    **{(Way.WORSE, kl): ("bad", HARMED) for kl in SILENT},
    (Way.WORSE, Way.WORSE): ("bad", f"{HARMED} and went {{nats}} nats a token away from the teacher"),
    (Way.FEW, Way.BETTER): ("open", "Closer to the teacher, but too few problems to tell about accuracy"),
    **{(Way.FEW, kl): ("open", "Too few problems to tell") for kl in SILENT},
    (Way.FEW, Way.WORSE): (
        "bad",
        "Further from the teacher by {nats} nats a token, and too few problems to tell about accuracy",
    ),
}
"""By the ways of accuracy and of held-out reverse KL."""
BY_REVERSE_KL: Mapping[Way, tuple[Tone, str]] = {
    Way.BETTER: ("good", "It worked: the student came {nats} nats a token closer to the teacher"),
    Way.UNCLEAR: ("open", "No clear effect"),
    Way.WORSE: ("bad", "It did harm: the student went {nats} nats a token away from the teacher"),
    Way.FEW: ("open", "Too few problems to tell"),
}
"""By its way alone, where nothing is graded."""


@dataclass(frozen=True, slots=True)
class Effect:
    """What the student's change is called, and whether that is good."""

    tone: Tone
    headline: str

    def by_round(self, number: int, *, of: int, then: str = "") -> Effect:
        """The same, said of a run that got no further; `then` is what became of it after."""
        if number == of and not then:
            return self
        so_far = re.sub(r"(?=[:,.](?: |$))", " so far", self.headline, count=1)
        return Effect(self.tone, f"{so_far.removesuffix('.')}; round {number} of {of}{then}.")


def ending(run: RunFolder, states: Iterable[State]) -> str:
    """Where a run broke off that nobody runs now, as the end of a headline."""
    last, left = unended(run.events()), {state.step.id for state in states if not state.done}
    if last is None or last.step not in left or is_running(run.path):
        return ""
    return f", then it {'was stopped' if last.kind == 'step stopped' else 'broke off'} in {last.step}"


def way_of(measure: Headline, summary: Mapping[str, Any]) -> Way:
    """Which way a measure went between student 0 and the student of this summary."""
    change = measure.change(summary)
    if change is None:
        return Way.UNKNOWN
    if summary[measure.counted] < measure.fewest:
        return Way.FEW
    gain = measure.gain(change)
    if gain.low > 0 and gain.estimate > measure.least:
        return Way.BETTER
    if gain.high < 0 and -gain.estimate > measure.least:
        return Way.WORSE
    return Way.UNCLEAR


def effect_of(summary: Mapping[str, Any]) -> Effect | None:
    """The effect in an evaluation's summary; None where it is not compared with student 0."""
    headline, closer = headline_of(summary), way_of(REVERSE_KL, summary)
    if headline.change(summary) is None:
        return None
    if headline is ACCURACY:
        tone, words = BY_ACCURACY[way_of(ACCURACY, summary), closer]
    else:
        tone, words = BY_REVERSE_KL[closer]
    sizes = {
        name: measure.show_size(abs(change.estimate))
        for name, measure in (("points", ACCURACY), ("nats", REVERSE_KL))
        if (change := measure.change(summary)) is not None
    }
    return Effect(tone, f"{words.format_map(sizes)}.")
