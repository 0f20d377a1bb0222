"""Numbers that are not finite stop a step and say where; completions of every odd shape have a defined effect."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

import kdpipe.engines.hf.engine
import kdpipe.stages.train
from kdpipe.data.tables import COMPLETIONS, ROLLOUTS, read_rows
from kdpipe.engines.hf.engine import HfEngine
from kdpipe.engines.protocol import Completion
from kdpipe.errors import EngineError, KdpipeError, ModelError, StepError
from kdpipe.pipeline.project import Project, open_project, round_metrics
from kdpipe.stages.job import Job
from kdpipe.store.artifacts import Entry
from kdpipe.training.local import LocalTrainer
from tests.worlds import SMALLEST, Watcher, load_tiny, run_near

SIZES = SMALLEST | {"rounds": 1}
WHOLE = {"kd": {"term": "jsd", "beta": 1.0, "support": "vocabulary"}}
TOP_K = {"kd": {"term": "jsd", "beta": 1.0, "support": {"teacher_top_k": 8}}}
GRPO = {"kind": "grpo"}


@dataclass(frozen=True)
class World:
    """A folder with a workspace in which round 0 is done."""

    folder: Path

    def run(self, objective: dict[str, Any] | None = None, **request: Any) -> list[str]:
        watcher = Watcher()
        loaded = load_tiny(self.folder, **SIZES, train__objective=objective or {})
        run_near(loaded, self.folder / "out", watcher=watcher, **request)
        return watcher.performed

    def project(self, objective: dict[str, Any] | None = None) -> Project:
        loaded = load_tiny(self.folder, **SIZES, train__objective=objective or {})
        return open_project(loaded, self.folder / "out")

    def entry(self, step: str, objective: dict[str, Any] | None = None) -> Entry:
        project = self.project(objective)
        return project.store.entry(project.plan.step(step))


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("begun"))
    world.run(rounds=0)
    return world


@pytest.fixture
def world(begun: World, tmp_path: Path) -> World:
    shutil.copytree(begun.folder, tmp_path / "world", symlinks=True)
    return World(tmp_path / "world")


# ------------------------------------------------------------------------------------------ not finite


@pytest.mark.parametrize(
    ("method", "step", "value"),
    [
        ("sample", "rollout@1", math.nan),
        pytest.param("sample", "rollout@1", math.inf, marks=pytest.mark.slow),
        pytest.param("sample", "rollout@1", -math.inf, marks=pytest.mark.slow),
        pytest.param("score", "teacher-score@1", math.nan, marks=pytest.mark.slow),
        pytest.param("score", "teacher-score@1", math.inf, marks=pytest.mark.slow),
        ("score", "teacher-score@1", -math.inf),
    ],
)
def test_a_log_prob_that_is_not_finite_stops_the_step_with_its_place(
    world: World, monkeypatch: pytest.MonkeyPatch, method: str, step: str, value: float
) -> None:
    """Token 1 of the last completion of a batch that has one; the sampler's or the teacher's."""
    original, prompts = getattr(HfEngine, method), list[list[int]]()

    def wrong(self: HfEngine, requests: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        found = original(self, requests, *args, **kwargs)
        completions = found if method == "score" else [row[-1] for row in found]
        last = max(index for index, each in enumerate(completions) if len(each.logprobs) > 1)
        logprobs = list(completions[last].logprobs)
        logprobs[1] = value
        prompts.append(list(requests[last].prompt_token_ids))
        changed = replace(completions[last], logprobs=np.float32(logprobs) if method == "score" else logprobs)
        if method == "score":
            found[last] = changed
        else:
            found[last][-1] = changed
        return found

    if method == "score":
        world.run(GRPO)  # the rollout is the same
    monkeypatch.setattr(HfEngine, method, wrong)
    with pytest.raises(StepError, match=rf"round 1, prompt \S+, token 1: .* is {value}") as caught:
        world.run()
    require_nothing_published(world, step, caught.value)
    monkeypatch.undo()
    assert step in world.run(), "mended, the same command goes on"
    rows = read_rows(world.entry("rollout@1").folder / "rollouts.parquet", ROLLOUTS)
    [prompt_id] = {row["prompt_id"] for row in rows if row["prompt_token_ids"] == prompts[0]}
    assert f"prompt {prompt_id}, token 1" in caught.value.message


def require_nothing_published(world: World, step: str, error: KdpipeError) -> None:
    assert error.exit_code == 1
    assert "nothing of this step was published, and all steps before it are kept" in error.hint
    assert "the same command continues" in error.hint
    assert world.entry(step).manifest() is None


def test_weights_that_give_nan_stop_the_rollout_with_round_prompt_and_token(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the engine itself finds: it knows requests, and the run is told of prompts."""
    logits = kdpipe.engines.hf.engine._logits

    def wrong(hidden_HB: torch.Tensor, head: Any) -> torch.Tensor:
        logits_BV = logits(hidden_HB, head)
        logits_BV[-1, 0] = torch.nan
        return logits_BV

    monkeypatch.setattr(kdpipe.engines.hf.engine, "_logits", wrong)
    with pytest.raises(
        EngineError, match=r"^round 1, prompt \S+: sample 1: logits at completion token 0"
    ) as caught:
        world.run()
    require_nothing_published(world, "rollout@1", caught.value)


def test_an_error_names_the_prompt_of_the_request_that_it_is_about_whatever_its_text_says() -> None:
    nothing = cast("Any", None)
    job = Job(nothing, 3, 1, [], [], nothing, nothing)
    with (
        pytest.raises(ModelError, match=r"^round 3, prompt b: request 0 of 9 is odd$"),
        job.asking(["a", "b"]),
    ):
        raise ModelError("request 0 of 9 is odd", request=1)
    with pytest.raises(EngineError, match=r"^HTTP 400: request 0 is odd$"), job.asking(["a", "b"]):
        raise EngineError("HTTP 400: request 0 is odd")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_state_that_is_not_finite_stops_the_training_with_round_prompt_sample_and_token(
    world: World, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    real, counts = kdpipe.stages.train.micro_batch_loss, list[list[int]]()

    def wrong(
        objective: Any, batch: Any, ids_N: Any, hidden_NH: torch.Tensor, *rest: Any, **more: Any
    ) -> Any:
        counts.append(batch.lengths)
        hidden_NH = hidden_NH.clone()
        hidden_NH[batch.lengths[0] + 1] = value
        return real(objective, batch, ids_N, hidden_NH, *rest, **more)

    monkeypatch.setattr(kdpipe.stages.train, "micro_batch_loss", wrong)
    where = r"round 1, prompt \S+, sample \d, token 1: the student's log-prob is nan"
    with pytest.raises(StepError, match=where) as caught:
        world.run()
    require_nothing_published(world, "train@1", caught.value)
    assert counts[0][1] > 1, "the second completion of the micro-batch has a token 1"


def test_a_gradient_that_is_not_finite_stops_the_training_with_round_and_prompts(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = LocalTrainer.begin

    def wrong(self: LocalTrainer) -> None:
        begin(self)
        next(self.model.parameters()).register_hook(lambda gradient: gradient * math.nan)

    monkeypatch.setattr(LocalTrainer, "begin", wrong)
    where = r"round 1, prompts arithmetic/train/\S+.*: optimizer step 1: the gradient norm is nan"
    with pytest.raises(StepError, match=where) as caught:
        world.run()
    require_nothing_published(world, "train@1", caught.value)


# -------------------------------------------------------------------------------------------- odd shapes

Change = Callable[[Completion], Completion]


def with_completions(monkeypatch: pytest.MonkeyPatch, change: Change, *, all_of_them: bool = True) -> None:
    """Lets every sampled completion, or the first of each prompt, be what `change` makes of it."""
    original = HfEngine.sample

    def changed(self: HfEngine, *args: Any, **kwargs: Any) -> list[list[Completion]]:
        found = original(self, *args, **kwargs)
        return [
            [change(each) if all_of_them or number == 0 else each for number, each in enumerate(row)]
            for row in found
        ]

    monkeypatch.setattr(HfEngine, "sample", changed)


def empty(_completion: Completion) -> Completion:
    return Completion([], [], "length")


def one_token(completion: Completion) -> Completion:
    return Completion(completion.token_ids[:1], completion.logprobs[:1], "length")


def truncated(completion: Completion) -> Completion:
    return replace(completion, finish_reason="length")


def step_metrics(world: World, objective: dict[str, Any]) -> list[dict[str, float]]:
    """The metrics of each optimizer step of round 1."""
    steps: dict[int, dict[str, float]] = {}
    for row in world.entry("train@1", objective).metrics():
        if row.optimizer_step is not None:
            steps.setdefault(row.optimizer_step, {})[row.name] = row.value
    return list(steps.values())


def weights(world: World, step: str, objective: dict[str, Any]) -> bytes:
    return (world.entry(step, objective).folder / "model" / "model.safetensors").read_bytes()


OBJECTIVES = {"rkl": {}, "whole": WHOLE, "top-k": TOP_K, "grpo": GRPO, "kdrl": {"kind": "kdrl", "kd": "k2"}}
FEW = ["whole", "kdrl"]


def some_in_default(names: Sequence[str]) -> list[Any]:
    return [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", some_in_default(list(OBJECTIVES)))
def test_an_empty_completion_among_others_has_no_part_in_the_loss(
    world: World, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with_completions(monkeypatch, empty, all_of_them=False)
    world.run(OBJECTIVES[name])
    rows = read_rows(world.entry("train@1", OBJECTIVES[name]).folder / "completions.parquet", COMPLETIONS)
    assert {(row["sample"], row["kept"], row["proximal_logprobs"] == []) for row in rows} == {
        (0, False, True),
        (1, True, False),
    }
    found = step_metrics(world, OBJECTIVES[name])
    assert all(math.isfinite(step["train/loss"]) and step["train/tokens"] > 0 for step in found)


@pytest.mark.parametrize("name", some_in_default(list(OBJECTIVES)))
def test_a_round_without_a_token_is_skipped_and_leaves_the_student_as_it_was(
    world: World, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with_completions(monkeypatch, empty)
    world.run(OBJECTIVES[name])
    rows = world.entry("train@1", OBJECTIVES[name]).metrics()
    skipped = [row for row in rows if row.name == "train/skipped"]
    assert [(row.optimizer_step, row.value) for row in skipped] == [(1, 1), (2, 1)]
    assert weights(world, "train@1", OBJECTIVES[name]) == weights(world, "sft:student@0", OBJECTIVES[name])


@pytest.mark.parametrize("name", some_in_default(list(OBJECTIVES)))
def test_completions_of_one_token_are_trained_on(
    world: World, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with_completions(monkeypatch, one_token)
    world.run(OBJECTIVES[name])
    assert [step["train/tokens"] for step in step_metrics(world, OBJECTIVES[name])] == [4, 4]


@pytest.mark.parametrize("policy", ["keep", pytest.param("drop", marks=pytest.mark.slow), "no_reward"])
def test_a_round_whose_completions_are_all_cut(
    world: World, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    """Kept, they count as any other. Dropped, nothing is left. Without reward, RL has nothing to say of them."""
    objective = {"kind": "kdrl", "kd": "rkl", "truncated": policy}
    with_completions(monkeypatch, truncated)
    world.run(objective)
    found = step_metrics(world, objective)
    per_round = round_metrics(world.project(objective), 1)
    assert per_round["rollout/truncated_fraction"] == 1
    assert [("train/skipped" in step) for step in found] == [policy == "drop"] * 2
    if policy == "no_reward":
        assert per_round["train/advantage_abs_mean"] == 0


def test_groups_of_equal_rewards_give_rl_no_gradient(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every advantage is 0, so the gradient is; the step is taken all the same, and decays weights where told to."""
    objective = {"kind": "grpo", "truncated": "no_reward"}
    with_completions(monkeypatch, truncated)
    world.run(objective)
    found = step_metrics(world, objective)
    assert [(step["train/loss"], step["train/grad_norm"]) for step in found] == [(0, 0)] * 2
    assert all("train/skipped" not in step for step in found)
    assert weights(world, "train@1", objective) == weights(world, "sft:student@0", objective)


def test_masking_the_end_of_completions_that_are_nothing_else_leaves_no_token(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = {"end_token": "mask"}
    end = json.loads((world.entry("sft:student@0").folder / "model" / "generation_config.json").read_text())
    with_completions(monkeypatch, lambda each: Completion([end["eos_token_id"]], each.logprobs[:1], "stop"))
    world.run(objective)
    assert [step["train/skipped"] for step in step_metrics(world, objective)] == [1, 1]
