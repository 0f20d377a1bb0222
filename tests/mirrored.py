"""Runs whose steps a test finishes by hand, mirrored into a real SQLite store."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdpipe.data.rows import Rollout
from kdpipe.data.tables import GRADES, ROLLOUTS, write_rows
from kdpipe.pipeline.plan import Identities, make_plan
from kdpipe.pipeline.runs import RunFolder, run_folder
from kdpipe.recipe.file import LoadedRecipe, load_recipe
from kdpipe.recipe.runtime import Tracking
from kdpipe.store.artifacts import Draft, Store
from kdpipe.store.step import Step
from kdpipe.tracking.memory import MIRROR, Alive, MirrorRequest, MirrorResult, Status
from kdpipe.tracking.synchronizer import Synchronizer
from kdpipe.workers.worker import Report
from tests.wire import answered, asked

RECIPE = """
name: {name}
rounds: {rounds}
task: {{kind: arithmetic}}
student: {{scratch: {{}}, sft: {{steps: 2}}}}
teachers: [{{scratch: {{}}, sft: {{steps: 2}}}}]
rollout: {{prompts: 8, samples: 1, max_new_tokens: 16}}
"""
T0 = 1_700_000_000.25
"""When the first made-up step finished."""


SUMMARY = {
    "accuracy": 0.5,
    "accuracy_low": 0.43,
    "accuracy_high": 0.57,
    "truncated_fraction": 0.0,
    "samples": 1,
    "problems": 200,
    "accuracy_change": 0.125,
    "accuracy_change_low": 0.03,
    "accuracy_change_high": 0.22,
    "accuracy_change_p_value": 0.004,
}


@dataclass(frozen=True)
class Grade:
    """A row of grades.parquet."""

    prompt_id: str = "p/0"
    sample: int = 0
    question: str = "1 + 1?"
    expected: str = "2"
    text: str = "#### 2"
    answer_strict: str | None = "2"
    answer_flexible: str | None = "2"
    answer: str | None = "2"
    correct: bool = True
    reward: float = 1.0
    prompt_token_ids: Sequence[int] = (1,)
    completion_token_ids: Sequence[int] = (2,)
    sampler_logprobs: Sequence[float] = (-0.5,)
    finish_reason: str = "stop"


def sample(text: str = "#### 2", prompt_id: str = "p/0") -> Rollout:
    """A row of rollouts.parquet."""
    ids, logprobs = [2], [-0.5]
    return Rollout(
        prompt_id, 0, "1 + 1?", "2", [1], ids, logprobs, "student", "stop", text, "2", "2", "2", True, 1.0
    )


@dataclass(frozen=True)
class World:
    """A workspace with one run, whose steps a test finishes by hand."""

    workspace: Path
    loaded: LoadedRecipe
    uri: str | None = None

    @property
    def run(self) -> RunFolder:
        return run_folder(self.workspace, self.loaded.recipe)

    @property
    def steps(self) -> dict[str, Step]:
        return {step.id: step for step in make_plan(self.loaded.recipe, Identities({}, {})).steps}

    def finish(
        self,
        step_id: str,
        *rows: tuple[str, float, int | None],
        after: float = 0.0,
        texts: Sequence[Grade | Rollout] = (),
        **summary: Any,
    ) -> None:
        """Commits and links `step_id` with these metrics, `after` seconds from T0; `summary` is an evaluation's.

        `texts` are the rows of its grades or rollouts, one where none are given.
        """
        step = self.steps[step_id]
        entry = Store(self.workspace).entry(step)
        draft = Draft(entry, step, note=lambda _kind, _fields: None)
        for name, value, optimizer_step in rows:
            draft.metric(name, value, optimizer_step=optimizer_step)
        if step.stage == "evaluate":
            draft.write("grades.parquet", lambda path: write_rows(path, texts or [Grade()], GRADES))
            whose = {"model": step.subject, "round": step.round}
            draft.write_json("summary.json", {**SUMMARY, **whose, **summary})
        if step.stage == "rollout":
            draft.write("rollouts.parquet", lambda path: write_rows(path, texts or [sample()], ROLLOUTS))
        draft.commit(inputs={}, provenance={"finished": T0 + after})
        self.run.link(step, entry)

    def finish_everything(self) -> None:
        for index, step_id in enumerate(self.steps):
            stage = step_id.partition("@")[0].partition(":")[0]
            rows = [(f"time/{stage.replace('-', '_')}_seconds", 1.0 + index, None)]
            if stage == "evaluate":
                rows.append(("evaluate/accuracy", 0.01 * index, None))
            if stage in ("sft", "train"):
                rows += [
                    (f"{stage}/loss", 0.5 + index, 2 * index + 1),
                    (f"{stage}/loss", 0.25, 2 * index + 2),
                ]
            self.finish(step_id, *rows, after=float(index))

    def request(self, status: Status = "RUNNING") -> MirrorRequest:
        return MirrorRequest("run", self.run.path, Tracking(uri=self.uri), status)

    def sync(self, status: Status = "RUNNING", synchronizer: Synchronizer | None = None) -> int:
        """Mirrors as a fresh process would, unless a synchronizer is given; returns the metrics logged."""
        return mirror(self.request(status), synchronizer).metrics

    def query(self, sql: str) -> list[tuple]:
        with closing(sqlite3.connect(self.workspace / "mlflow.db")) as connection:
            return connection.execute(sql).fetchall()

    def tags(self) -> dict[str, str]:
        return dict(self.query("select key, value from tags"))

    def metrics(self) -> list[tuple[str, int, float]]:
        return sorted(self.query("select key, step, value from metrics"))

    def statuses(self) -> list[str]:
        return [row[0] for row in self.query("select status from runs order by start_time")]


def mirror(request: MirrorRequest, synchronizer: Synchronizer | None = None) -> MirrorResult:
    """Mirrors as a fresh process would, unless a synchronizer is given."""
    report = Report[Alive](lambda _alive: None)
    result: MirrorResult = answered(MIRROR, (synchronizer or Synchronizer())(asked(MIRROR, request), report))
    return result


def make_world(
    workspace: Path, name: str = "tiny", *, rounds: int = 2, overrides: tuple[str, ...] = ()
) -> World:
    path = workspace / f"{name}.yaml"
    path.write_text(RECIPE.format(name=name, rounds=rounds))
    world = World(workspace, load_recipe(path, overrides))
    world.run.write_recipe(world.loaded)
    return world
