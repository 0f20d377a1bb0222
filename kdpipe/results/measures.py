"""What a run measured: evaluations and their differences, curves over rounds, costs, provenance."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from kdpipe.data.divergence import COLUMNS, exact_totals, sampled_totals, with_tokens
from kdpipe.data.payload import GRADES_FILE, REVERSE_KL_FILE
from kdpipe.data.tables import GRADES, REVERSE_KL, REVERSE_KL_OF_SEVERAL, read_rows
from kdpipe.method import statistics
from kdpipe.method.interval import Interval
from kdpipe.pipeline.headline import KEPT_MASS, own_reverse_kl
from kdpipe.pipeline.headroom import Distance, Headroom, headrooms_of
from kdpipe.pipeline.project import Project
from kdpipe.pipeline.status import State
from kdpipe.results.evaluations import Evaluation, Evaluations, summaries_of
from kdpipe.store.artifacts import Entry, Metric
from kdpipe.store.manifest import Manifest
from kdpipe.store.stage import Stage
from kdpipe.store.step import step_id_of

Values: TypeAlias = "dict[int, float]"
FEW_FOR_A_MEAN = 30
"""Problems of which a mean is not yet as good as normal."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What some steps took that are done, of one stage where it is named after one."""

    name: str
    steps: int = 0
    seconds: float = 0.0
    tokens: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.name, self.steps + other.steps, self.seconds + other.seconds, self.tokens + other.tokens
        )


class Measures(Evaluations):
    """What the done steps of a project measured."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.states: list[State] = project.survey()
        self.done = [state.step for state in self.states if state.done]
        super().__init__(summaries_of(project, self.done))
        self._known_fractions: dict[tuple[str, int], dict[str, float]] = {}

    @cached_property
    def manifests(self) -> dict[str, Manifest]:
        """The manifest of every done step, by its id."""
        found = {step.id: self.project.store.entry(step).manifest() for step in self.done}
        return {name: manifest for name, manifest in found.items() if manifest is not None}

    @cached_property
    def rows(self) -> dict[str, list[Metric]]:
        """The metrics of every done step, by its id."""
        return {step.id: self.project.store.entry(step).metrics() for step in self.done}

    @property
    def rounds_done(self) -> int:
        """The last round whose training is done."""
        return max((step.round for step in self.done if step.stage == Stage.TRAIN), default=0)

    @property
    def headrooms(self) -> list[Headroom | Distance]:
        """What there is to learn from the teachers, as far as it is measured."""
        before = (one.summary for one in self.evaluations if one.round == 0)
        return headrooms_of(self.project.recipe, before)

    def difference(self, first: Evaluation, second: Evaluation) -> Interval | None:
        """The first accuracy less the second, over the problems of both; None where there are none."""
        ones, others = self._paired(first, second)
        return statistics.paired_difference(ones, others) if ones else None

    def closed(self, teacher: Evaluation, before: Evaluation, after: Evaluation) -> Interval | None:
        """The share of a teacher's lead over student 0 that was made up; None where it has no clear lead."""
        lead = self.difference(teacher, before)
        found = [self._fractions(one) for one in (teacher, before, after)]
        shared = sorted(set.intersection(*(set(one) for one in found)))
        if lead is None or lead.low <= 0 or len(shared) < FEW_FOR_A_MEAN:
            return None
        best, first, last = ([one[key] for key in shared] for one in found)
        return statistics.share_of(_less(last, first), _less(best, first))

    def approached(self, before: Evaluation, after: Evaluation) -> Interval | None:
        """The share of student 0's held-out reverse KL that is gone; None of few problems."""
        several = len(self.project.recipe.teachers) > 1
        first, last = (reverse_kl_totals(self._entry(one), several=several) for one in (before, after))
        shared = sorted(key for key in first.keys() & last.keys() if first[key][1] and last[key][1])
        if len(shared) < FEW_FOR_A_MEAN:
            return None
        had, left = (
            statistics.ratio_shares(([one[key][0] for key in shared], [one[key][1] for key in shared]))
            for one in (first, last)
        )
        return statistics.share_of(_less(had, left), had)

    def flips(self, first: Evaluation, second: Evaluation) -> tuple[int, int] | None:
        """How many problems only the first and only the second got right; None unless each was answered once."""
        ones, others = self._paired(first, second)
        return statistics.flips(ones, others) if ones else None

    def _paired(self, first: Evaluation, second: Evaluation) -> tuple[list[float], list[float]]:
        """The fractions of right samples of the problems that both have, index i the same problem in both."""
        a, b = self._fractions(first), self._fractions(second)
        shared = sorted(a.keys() & b.keys())
        return [a[key] for key in shared], [b[key] for key in shared]

    def _fractions(self, evaluation: Evaluation) -> dict[str, float]:
        known, name = self._known_fractions, (evaluation.model, evaluation.round)
        if name not in known:
            known[name], _ = right_fractions(self._entry(evaluation))
        return known[name]

    def _entry(self, evaluation: Evaluation) -> Entry:
        name = step_id_of(Stage.EVALUATE, evaluation.model, evaluation.round)
        return self.project.store.entry(self.project.plan.step(name))

    def by_round(self, name: str) -> Values:
        """A per-round metric of every done round."""
        return {
            step.round: row.value
            for step in self.done
            for row in self.rows[step.id]
            if row.name == name and row.optimizer_step is None
        }

    def own_reverse_kl(self) -> Values:
        """The reverse KL on each round's own samples, without what a cut of the sampling adds."""
        rounds = defaultdict[int, dict[str, float]](dict)
        for step in self.done:
            rounds[step.round] |= {
                row.name: row.value for row in self.rows[step.id] if row.optimizer_step is None
            }
        is_cut = self.project.recipe.rollout.is_cut
        found = {
            number: own_reverse_kl(metrics)
            for number, metrics in rounds.items()
            if KEPT_MASS in metrics or not is_cut
        }
        return {number: value for number, value in found.items() if value is not None}

    def over_optimizer_steps(self, name: str) -> dict[int, list[float]]:
        """A metric of the optimizer steps, by round."""
        found: dict[int, list[float]] = defaultdict(list)
        for step in self.done:
            if step.stage == Stage.TRAIN:
                found[step.round] += [row.value for row in self.rows[step.id] if row.name == name]
        return found

    def costs_by_round(self, stage: Stage) -> dict[int, Cost]:
        """What a stage took in each round, all of its steps together; a reused step costs what it took once."""
        found: dict[int, Cost] = {}
        for step in self.done:
            if step.stage == stage:
                cost = Cost(stage, 1, *cost_of(self.rows[step.id]))
                found[step.round] = found.get(step.round, Cost(stage)) + cost
        return found

    def costs(self) -> list[Cost]:
        """What each stage took, in the order of the stages."""
        by_stage = {stage: self.costs_by_round(stage).values() for stage in Stage}
        return [sum(costs, Cost(stage)) for stage, costs in by_stage.items() if costs]

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
        found = [manifest.provenance.get("finished") for manifest in self.manifests.values()]
        return max((float(at) for at in found if isinstance(at, int | float)), default=None)


def _less(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(first, second, strict=True)]


def last(values: Values) -> float | None:
    """The value of the last round."""
    return values[max(values)] if values else None


def cost_of(rows: Sequence[Metric]) -> tuple[float, float]:
    """Seconds and tokens that a step took, from its metrics."""
    found = {row.name.partition("/")[0]: row.value for row in rows if row.optimizer_step is None}
    seconds = found.get("time", 0.0)
    return seconds, found.get("speed", 0.0) * seconds  # the rate was made by dividing through these seconds


def right_fractions(evaluated: Entry) -> tuple[dict[str, float], int]:
    """The fraction of right samples of each problem of an evaluation, and how many samples one has."""
    path = evaluated.opened(GRADES_FILE) / GRADES_FILE
    found: dict[str, list[bool]] = defaultdict(list)
    for row in read_rows(path, GRADES, columns=["prompt_id", "correct"]):
        found[row["prompt_id"]].append(row["correct"])
    return {key: sum(values) / len(values) for key, values in found.items()}, max(map(len, found.values()))


def reverse_kl_totals(evaluated: Entry, *, several: bool) -> dict[str, tuple[float, float]]:
    """Nats and tokens of each problem of an evaluation's reverse KL; `several`: to several teachers."""
    path = evaluated.opened(REVERSE_KL_FILE) / REVERSE_KL_FILE
    rows = read_rows(path, REVERSE_KL_OF_SEVERAL if several else REVERSE_KL, columns=COLUMNS)
    rows = with_tokens(rows, rows)
    sums, counts = exact_totals(rows) or sampled_totals(rows)
    return {row["prompt_id"]: (total, count) for row, total, count in zip(rows, sums, counts, strict=True)}
