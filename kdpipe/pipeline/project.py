"""A recipe in a workspace: its plan, the state of every step, and what the done ones measured. Starts nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdpipe.pipeline.identities import Sources
from kdpipe.pipeline.plan import Identities, Plan, make_plan
from kdpipe.pipeline.runs import RunFolder, named_run, run_folder
from kdpipe.pipeline.status import State, survey
from kdpipe.recipe.file import LoadedRecipe
from kdpipe.recipe.schema import Recipe, Teacher
from kdpipe.store.artifacts import Store


@dataclass(frozen=True, slots=True)
class Project:
    """A recipe in a workspace, with its plan."""

    loaded: LoadedRecipe
    workspace: Path
    identities: Identities
    plan: Plan

    @property
    def recipe(self) -> Recipe:
        """The recipe."""
        return self.loaded.recipe

    @property
    def store(self) -> Store:
        """The workspace's store."""
        return Store(self.workspace)

    @property
    def run(self) -> RunFolder:
        """The run's folder."""
        return run_folder(self.workspace, self.recipe)

    @property
    def named(self) -> str:
        """What a command takes to mean this run: its name, or the recipe's file before there is a run."""
        return self.run.name if named_run(self.workspace, self.run.name) else str(self.loaded.path)

    def survey(self) -> list[State]:
        """The state of every step."""
        return survey(self.plan, self.store, self.recipe)


def open_project(loaded: LoadedRecipe, workspace: Path) -> Project:
    """The plan of `loaded` in `workspace`, without network."""
    identities = Sources(loaded, workspace).identities()
    return Project(loaded, workspace, identities, make_plan(loaded.recipe, identities))


def summary_of(project: Project, step_id: str) -> dict[str, Any] | None:
    """The summary.json of an evaluation, or None when it is not done (or not in the plan)."""
    for step in project.plan.steps:
        if step.id == step_id:
            entry = project.store.entry(step)
            if entry.manifest() is not None:
                summary: dict[str, Any] = entry.read_json("summary.json")
                return summary
    return None


@dataclass(frozen=True, slots=True)
class Headroom:
    """How much better a teacher is than student 0 on the same problems: the paired difference of their accuracies.

    `low` and `high` are its 95 % interval, `p_value` McNemar's, None where problems have several samples. `exempt` says
    why the teacher need not be better; None: a run stops before round 1 when it is not.
    """

    teacher: str
    problems: int
    is_routed: bool
    accuracy: float
    change: float
    low: float
    high: float
    p_value: float | None
    exempt: str | None

    @property
    def stops(self) -> bool:
        """Whether the teacher should be better and is not."""
        return self.exempt is None and self.change <= 0

    def sentence(self) -> str:
        """All of it, for people."""
        p = "" if self.p_value is None else f", McNemar p = {self.p_value:.2g}"
        interval = f"paired 95 % interval {100 * self.low:+.1f} to {100 * self.high:+.1f}{p}"
        where = (
            f"the {self.problems} problems that it teaches" if self.is_routed else f"{self.problems} problems"
        )
        exempt = "" if self.exempt is None else f"; it need not be better: {self.exempt}"
        return f"accuracy {self.accuracy:.1%}, headroom {100 * self.change:+.1f} points ({interval}) on {where}{exempt}"


def headroom_of(teacher: Teacher, summary: Mapping[str, Any]) -> Headroom:
    """The headroom that the summary of a teacher's evaluation tells."""
    reasons = ["the student itself"] if teacher.self_ is not None else []
    if teacher.is_privileged:
        reasons.append("privileged (its prompt shows more than the question)")
    return Headroom(
        teacher.name,
        summary["problems"],
        teacher.only is not None,
        summary["accuracy"],
        summary["accuracy_change"],
        summary["accuracy_change_low"],
        summary["accuracy_change_high"],
        summary.get("accuracy_change_p_value"),
        " and ".join(reasons) or None,
    )


def headrooms(project: Project) -> list[Headroom]:
    """Those of the teachers whose evaluation is done, in the order of the recipe."""
    found = [
        (teacher, summary_of(project, f"evaluate:{teacher.name}@0")) for teacher in project.recipe.teachers
    ]
    return [headroom_of(teacher, summary) for teacher, summary in found if summary is not None]


def round_metrics(project: Project, number: int) -> dict[str, float]:
    """The per-round metrics of every done step of a round, by name."""
    metrics: dict[str, float] = {}
    for step in project.plan.steps:
        if step.round == number:
            for row in project.store.entry(step).metrics():
                if row["optimizer_step"] is None:
                    metrics[row["name"]] = row["value"]
    return metrics
