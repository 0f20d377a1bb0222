"""A recipe in a workspace: its plan, the state of every step, and what the done ones measured. Starts nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdpipe.data.payload import SUMMARY_FILE
from kdpipe.pipeline.identities import Sources
from kdpipe.pipeline.plan import Identities, Plan, make_plan
from kdpipe.pipeline.runs import RunFolder, named_run, run_folder
from kdpipe.pipeline.status import State, survey
from kdpipe.recipe.file import LoadedRecipe
from kdpipe.recipe.schema import Recipe
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
                summary: dict[str, Any] = entry.read_json(SUMMARY_FILE)
                return summary
    return None


def round_metrics(project: Project, number: int) -> dict[str, float]:
    """The per-round metrics of every done step of a round, by name."""
    metrics: dict[str, float] = {}
    for step in project.plan.steps:
        if step.round == number:
            for row in project.store.entry(step).metrics():
                if row["optimizer_step"] is None:
                    metrics[row["name"]] = row["value"]
    return metrics
