"""What a run measured: evaluations and their differences, curves over rounds, costs, provenance."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

from kdpipe.data.payload import GRADES_FILE
from kdpipe.data.tables import GRADES, read_rows
from kdpipe.method import statistics
from kdpipe.method.statistics import Interval
from kdpipe.pipeline.project import Project, summary_of
from kdpipe.pipeline.requirements import Headroom, headroom_of
from kdpipe.pipeline.status import State
from kdpipe.recipe.roles import STUDENT
from kdpipe.store.manifest import Manifest
from kdpipe.store.metric import METRICS, Metric, read_metrics
from kdpipe.store.stage import Stage
from kdpipe.store.step import Step

Values: TypeAlias = "dict[int, float]"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation's summary.json, and what to call the model."""

    label: str
    step: Step
    summary: Mapping[str, Any]

    @property
    def is_student(self) -> bool:
        """Whether it is one of the student."""
        return self.step.subject == STUDENT

    @property
    def accuracy(self) -> Interval:
        """The accuracy with Wilson's interval."""
        return accuracy_of(self.summary)

    @property
    def reverse_kl(self) -> Interval | None:
        """The held-out reverse KL in nats a token, from whole distributions where they were at hand."""
        return reverse_kl_of(self.summary)

    @property
    def accuracy_change(self) -> Interval | None:
        """The paired difference to student 0."""
        return interval_of(self.summary, "accuracy_change")

    @property
    def reverse_kl_change(self) -> Interval | None:
        """The paired difference to student 0."""
        return reverse_kl_change_of(self.summary)

    def interval(self, name: str) -> Interval | None:
        """What the summary says of this, if it does."""
        return interval_of(self.summary, name)


def accuracy_of(summary: Mapping[str, Any]) -> Interval:
    """The accuracy in an evaluation's summary.json, with Wilson's interval."""
    return Interval(summary["accuracy"], summary["accuracy_low"], summary["accuracy_high"])


def reverse_kl_of(summary: Mapping[str, Any]) -> Interval | None:
    """The held-out reverse KL in nats a token, from whole distributions where they were at hand."""
    return interval_of(summary, "reverse_kl_exact", "reverse_kl", unit="_nats")


def reverse_kl_change_of(summary: Mapping[str, Any]) -> Interval | None:
    """Its paired difference to student 0."""
    return interval_of(summary, "reverse_kl_exact_change", "reverse_kl_change", unit="_nats")


def interval_of(summary: Mapping[str, Any], *names: str, unit: str = "") -> Interval | None:
    """The first of these that the summary has."""
    for name in names:
        if f"{name}{unit}" in summary:
            return Interval(summary[f"{name}{unit}"], summary[f"{name}_low"], summary[f"{name}_high"])
    return None


@dataclass(frozen=True, slots=True)
class Cost:
    """What one stage took in the steps that are done."""

    stage: Stage
    steps: int
    seconds: float
    tokens: float


@dataclass(frozen=True, slots=True)
class Spread:
    """The mean, least and greatest of a number over a round's optimizer steps."""

    mean: float
    low: float
    high: float


class Measures:
    """What the done steps of a project measured."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.states: list[State] = project.survey()
        self.done = [state.step for state in self.states if state.done]
        self._known_fractions: dict[str, dict[str, float]] = {}

    @cached_property
    def manifests(self) -> dict[str, Manifest]:
        """The manifest of every done step, by its id."""
        found = {step.id: self.project.store.entry(step).manifest() for step in self.done}
        return {name: manifest for name, manifest in found.items() if manifest is not None}

    @cached_property
    def rows(self) -> dict[str, list[Metric]]:
        """The metrics of every done step, by its id."""
        return {step.id: read_metrics(self.project.store.entry(step).folder / METRICS) for step in self.done}

    @property
    def rounds_done(self) -> int:
        """The last round whose training is done."""
        return max((step.round for step in self.done if step.stage == Stage.TRAIN), default=0)

    # evaluations

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """Those that are done, in the order of the plan."""
        names = {0: "student before"}
        return [
            Evaluation(
                names.get(step.round, f"student after round {step.round}")
                if step.subject == STUDENT
                else step.subject,
                step,
                summary,
            )
            for step in self.done
            if step.stage == Stage.EVALUATE and (summary := summary_of(self.project, step.id)) is not None
        ]

    @property
    def before(self) -> Evaluation | None:
        """That of student 0."""
        return next((one for one in self.evaluations if one.is_student and one.step.round == 0), None)

    @property
    def after(self) -> Evaluation | None:
        """The last one of a trained student."""
        return next((one for one in reversed(self.evaluations) if one.is_student and one.step.round), None)

    @property
    def teachers(self) -> list[Evaluation]:
        """Those of the teachers."""
        return [one for one in self.evaluations if not one.is_student]

    @property
    def headrooms(self) -> list[Headroom]:
        """How much better each evaluated teacher is than student 0."""
        teachers = {teacher.name: teacher for teacher in self.project.recipe.teachers}
        return [headroom_of(teachers[one.step.subject], one.summary) for one in self.teachers]

    def difference(self, first: Evaluation, second: Evaluation) -> Interval | None:
        """The first accuracy less the second, over the problems of both; None where there are none."""
        ones, others = self._paired(first, second)
        if not ones:
            return None
        return statistics.paired_bootstrap(ones, others)

    def flips(self, first: Evaluation, second: Evaluation) -> tuple[int, int] | None:
        """How many problems only the first and only the second got right; None unless each was answered once."""
        ones, others = self._paired(first, second)
        if not ones or first.summary["samples"] != 1 or not {*ones, *others} <= {0.0, 1.0}:
            return None
        pairs = list(zip(ones, others, strict=True))
        return sum(x > y for x, y in pairs), sum(x < y for x, y in pairs)

    def _paired(self, first: Evaluation, second: Evaluation) -> tuple[list[float], list[float]]:
        """The fractions of right samples of the problems that both have, index i the same problem in both."""
        a, b = self._fractions(first), self._fractions(second)
        shared = sorted(a.keys() & b.keys())
        return [a[key] for key in shared], [b[key] for key in shared]

    def _fractions(self, evaluation: Evaluation) -> dict[str, float]:
        """The fraction of right samples of each problem."""
        if (known := self._known_fractions.get(evaluation.step.id)) is not None:
            return known
        path = self.project.store.entry(evaluation.step).opened(GRADES_FILE) / GRADES_FILE
        found: dict[str, list[bool]] = defaultdict(list)
        for row in read_rows(path, GRADES, columns=["prompt_id", "correct"]):
            found[row["prompt_id"]].append(row["correct"])
        fractions = {key: sum(values) / len(values) for key, values in found.items()}
        self._known_fractions[evaluation.step.id] = fractions
        return fractions

    # curves

    def by_round(self, name: str, *, subject: str | None = None) -> Values:
        """A per-round metric of every done round; evaluations by the name of their model."""
        return {
            step.round: row.value
            for step in self.done
            if subject is None or step.subject == subject
            for row in self.rows[step.id]
            if row.name == name and row.optimizer_step is None
        }

    def over_optimizer_steps(self, name: str) -> dict[int, Spread]:
        """A metric of the optimizer steps, summarised by round."""
        found: dict[int, list[float]] = defaultdict(list)
        for step in self.done:
            if step.stage == Stage.TRAIN:
                found[step.round] += [row.value for row in self.rows[step.id] if row.name == name]
        return {
            number: Spread(sum(values) / len(values), min(values), max(values))
            for number, values in found.items()
            if values
        }

    def summed_by_round(self, stage: Stage, what: str) -> Values:
        """Seconds or tokens of a stage in each round, all of its steps together."""
        found: dict[int, float] = defaultdict(float)
        for step in self.done:
            if step.stage == stage:
                found[step.round] += getattr(self._took(step), what)
        return dict(found)

    # costs

    def costs(self) -> list[Cost]:
        """What each stage took, in the order of the stages; a reused step costs what it took once."""
        return [
            Cost(stage, len(took), sum(one.seconds for one in took), sum(one.tokens for one in took))
            for stage in Stage
            if (took := [self._took(step) for step in self.done if step.stage == stage])
        ]

    def _took(self, step: Step) -> Cost:
        return Cost(step.stage, 1, *cost_of(self.rows[step.id]))

    def seconds_around(self) -> float | None:
        """Seconds of this run's steps that no stage measured: loading, comparing digests, saving."""
        begun: dict[str, float] = {}
        total = 0.0
        for event in self.project.run.events():
            if event.kind == "step started":
                begun[event.step] = event.time
            elif event.kind == "step done" and not event.reused and event.step in begun:
                total += event.time - begun.pop(event.step)
        inside = sum(cost.seconds for cost in self.costs())
        return total - inside if total > inside else None

    # provenance

    def provenance(self) -> dict[str, list[str]]:
        """What the done steps were made with: each field with all the values that it had."""
        found: dict[str, set[str]] = defaultdict(set)
        for manifest in self.manifests.values():
            for name, value in manifest.provenance.items():
                if name not in ("started", "finished", "step", "dtype_reason") and value is not None:
                    found[name].add(str(value))
        return {name: sorted(values) for name, values in sorted(found.items())}

    def finished_at(self) -> float | None:
        """When the last done step was committed, in seconds since the epoch."""
        return max(
            (
                float(at)
                for manifest in self.manifests.values()
                if isinstance(at := manifest.provenance.get("finished"), int | float)
            ),
            default=None,
        )


def last(values: Values) -> float | None:
    """The value of the last round."""
    return values[max(values)] if values else None


def cost_of(rows: Sequence[Metric]) -> tuple[float, float]:
    """Seconds and tokens that a step took, from its metrics."""
    found = {row.name.partition("/")[0]: row.value for row in rows if row.optimizer_step is None}
    seconds = float(found.get("time", 0.0))
    return seconds, float(
        found.get("speed", 0.0)
    ) * seconds  # the rate was made by dividing through these seconds
