"""A recipe in a workspace: its plan, the state of its steps, what the done ones measured."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from kdpipe.data.payload import SUMMARY_FILE
from kdpipe.pipeline.identities import Sources
from kdpipe.pipeline.plan import Identities, Plan, make_plan
from kdpipe.pipeline.runs import RunFolder, named_run, run_folder
from kdpipe.pipeline.status import State, states_of, survey
from kdpipe.recipe.file import LoadedRecipe
from kdpipe.recipe.schema import Recipe
from kdpipe.store.artifacts import FINGERPRINT_KEY, Store
from kdpipe.store.step import Fields, Step


@dataclass(frozen=True, slots=True)
class Project:
    """A recipe in a workspace, with its plan; `is_older`: an older kdpipe made the run and its steps."""

    loaded: LoadedRecipe
    workspace: Path
    identities: Identities
    plan: Plan
    is_older: bool = False
    run: RunFolder = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "run", run_folder(self.workspace, self.recipe))

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    @property
    def store(self) -> Store:
        return Store(self.workspace)

    @property
    def named(self) -> str:
        """What a command takes to mean this run: its name, or the recipe's file before there is a run."""
        return self.run.name if named_run(self.workspace, self.run.name) else str(self.loaded.path)

    def states(self) -> list[State]:
        """The state of every step; of those not done without the reason."""
        return states_of(self.plan, self.store)

    def survey(self) -> list[State]:
        """The state of every step, with the reason where it is not done."""
        return survey(self.plan, self.store, self.recipe)


def open_project(loaded: LoadedRecipe, workspace: Path) -> Project:
    """The plan of `loaded` in `workspace`, without network."""
    identities = Sources(loaded, workspace).identities()
    return Project(loaded, workspace, identities, make_plan(loaded.recipe, identities))


def read_project(loaded: LoadedRecipe, workspace: Path) -> Project:
    """The project for who only reads: a run that an older kdpipe made has its steps as that one made them.

    They are those that the run links: payloads and the names of inputs have not changed since.
    """
    project = open_project(loaded, workspace)
    steps, is_older = list[Step](), False
    for step in project.plan.steps:
        hashed = project.run.linked_document(step)
        if hashed is None:
            steps.append(step)
        elif hashed.get("format") == step.document["format"]:
            return project
        else:
            is_older = True
            fingerprint = str(hashed.pop(FINGERPRINT_KEY))
            steps.append(replace(step, document=hashed, fingerprint=fingerprint))
    return replace(project, plan=Plan(tuple(steps)), is_older=True) if is_older else project


def summary_of(project: Project, step_id: str) -> Fields | None:
    """The summary.json of an evaluation, or None when it is not done (or not in the plan)."""
    for step in project.plan.steps:
        if step.id == step_id and (entry := project.store.entry(step)).manifest() is not None:
            summary: Fields = entry.read_json(SUMMARY_FILE)
            return summary
    return None


def round_metrics(project: Project, number: int) -> dict[str, float]:
    """The per-round metrics of every done step of a round, by name."""
    metrics: dict[str, float] = {}
    for step in project.plan.in_round(number):
        for row in project.store.entry(step).metrics():
            if row.optimizer_step is None:
                metrics[row.name] = row.value
    return metrics
