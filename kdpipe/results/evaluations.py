"""The evaluations of a project as their summaries have them, read without numpy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kdpipe.method.interval import Interval
from kdpipe.pipeline.headline import REVERSE_KL, Headline, headline_of
from kdpipe.pipeline.project import Project, summary_of
from kdpipe.recipe.roles import STUDENT
from kdpipe.results.effect import Effect, effect_of
from kdpipe.store.stage import Stage
from kdpipe.store.step import Fields, Step


@dataclass(frozen=True, slots=True)
class Evaluation:
    """An evaluation's summary.json."""

    summary: Mapping[str, Any]

    @property
    def headline(self) -> Headline:
        """What it is judged by."""
        return headline_of(self.summary)

    @property
    def level(self) -> Interval:
        """The headline's value."""
        found = self.headline.level(self.summary)
        assert found is not None
        return found

    @property
    def change(self) -> Interval | None:
        """The headline's paired difference to student 0."""
        return self.headline.change(self.summary)

    @property
    def reverse_kl(self) -> Interval | None:
        """The held-out reverse KL in nats a token."""
        return REVERSE_KL.level(self.summary)

    @property
    def reverse_kl_change(self) -> Interval | None:
        """Its paired difference to student 0."""
        return REVERSE_KL.change(self.summary)

    def interval(self, name: str) -> Interval | None:
        """What it has under this name."""
        found = self.summary
        return Interval(found[name], found[f"{name}_low"], found[f"{name}_high"]) if name in found else None

    @property
    def is_sampled(self) -> bool:
        """Whether its reverse KL is of sampled tokens alone, not of whole distributions."""
        return "reverse_kl_nats" in self.summary and "reverse_kl_exact_nats" not in self.summary

    @property
    def problems(self) -> int:
        """On how many problems the headline was measured."""
        return int(self.summary[self.headline.counted])

    @property
    def p_text(self) -> str:
        """The p-value of the difference to student 0, as the end of a sentence."""
        value = self.summary.get("accuracy_change_p_value")
        return "" if value is None else f", p = {value:.2g}"

    def effect(self, rounds: int, *, then: str = "") -> Effect | None:
        """What the student gained, of a run of so many rounds; None without student 0.

        `then` says what became of the run after it, where it got no further.
        """
        found = effect_of(self.summary)
        return None if found is None else found.by_round(self.round, of=rounds, then=then)

    @property
    def model(self) -> str:
        return str(self.summary["model"])

    @property
    def round(self) -> int:
        return int(self.summary["round"])

    @property
    def is_student(self) -> bool:
        return self.model == STUDENT

    @property
    def label(self) -> str:
        """What to call the model."""
        if not self.is_student:
            return self.model
        return f"student after round {self.round}" if self.round else "student before"


def summaries_of(project: Project, steps: Iterable[Step]) -> list[Fields]:
    """Those of the evaluations among these steps that are done, in their order."""
    found = [summary_of(project, step.id) for step in steps if step.stage == Stage.EVALUATE]
    return [summary for summary in found if summary is not None]


class Evaluations:
    """The evaluations of a run in the order of the plan."""

    def __init__(self, summaries: Iterable[Mapping[str, Any]]) -> None:
        self.evaluations = [Evaluation(one) for one in summaries]

    @property
    def before(self) -> Evaluation | None:
        """That of student 0."""
        return next((one for one in self.evaluations if one.is_student and one.round == 0), None)

    @property
    def after(self) -> Evaluation | None:
        """The last one of a trained student."""
        trained = (one for one in self.evaluations if one.is_student and one.round)
        return max(trained, key=lambda one: one.round, default=None)

    def result(self, rounds: int, *, then: str = "") -> str | None:
        """The headline of the last trained student, as far as it can be told; `then` as in `effect`."""
        effect = None if self.after is None else self.after.effect(rounds, then=then)
        return None if effect is None else effect.headline

    @property
    def teachers(self) -> list[Evaluation]:
        return [one for one in self.evaluations if not one.is_student]

    @property
    def shown(self) -> list[Evaluation]:
        """Those that a table shows: student 0, the last student, the teachers."""
        return [one for one in (self.before, self.after) if one is not None] + self.teachers
