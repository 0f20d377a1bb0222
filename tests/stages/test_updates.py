"""What train hands to its trainer, and what it makes of the answers, with a trainer that only listens."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kdpipe.data.rows import Rollout
from kdpipe.models.batching import Batch
from kdpipe.recipe.objective import Objective
from kdpipe.stages import train
from kdpipe.training.protocol import Update
from tests.stages.test_experience import END, made, objective, rollout, scored

RUNTIME = SimpleNamespace(train_tokens=6, score_tokens=8, head_chunk_tokens=4)


class Listener:
    """A trainer after `step` optimizer steps: a token's log-prob is its id, and a loss is not computed."""

    device = torch.device("cpu")

    def __init__(self, step: int = 0, *, signal: float = 1.0) -> None:
        self.step, self.signal = step, signal
        self.losses: list[Any] = []
        self.temperatures: list[float] = []

    def logprobs(self, batch: Batch, *, temperature: float, chunk: int) -> torch.Tensor:
        self.temperatures.append(temperature)
        return batch.target_ids_N.float()

    def accumulate(self, _batch: Batch, loss: Any) -> dict[str, float]:
        self.losses.append(loss)
        return {
            "loss": 0.5,
            "kept_tokens": 2.0,
            "sampled_tokens": 2.0,
            "signal_tokens": self.signal,
            "rounding_tokens": 1.0,
        }

    def apply(self, *, is_rounding: bool = False) -> Update:
        return Update(1.0, 1e-3, is_skipped=is_rounding)


def job(**changes: Any) -> Any:
    told: dict[str, float] = {}
    given: dict[str, Any] = {
        "runtime": RUNTIME,
        "round": 3,
        "seed": 1,
        "pulse": SimpleNamespace(
            tokens=lambda _: None, start=lambda *_: None, advance=lambda *_: None, safe_point=lambda: None
        ),
        "updating": lambda _ids: contextlib.nullcontext(),
        "draft": SimpleNamespace(metric=told.__setitem__),
        "told": told,
    }
    return SimpleNamespace(**{**given, **changes})


def settings(goal: Objective, **rollouts: Any) -> Any:
    given = {"temperature": 0.7, "max_new_tokens": 5, "top_p": 1.0, "top_k": 0, **rollouts}
    return SimpleNamespace(
        train=SimpleNamespace(objective=goal, control="none"),
        rollout=SimpleNamespace(**given),
        distill_horizon=5,
        weights=None,
    )


def rows(*ids: list[int]) -> list[Rollout]:
    return [rollout("a", sample, each) for sample, each in enumerate(ids)]


def test_a_step_is_at_the_rollouts_temperature_with_the_weight_of_its_place_in_the_schedule() -> None:
    goal = objective(
        distill_weight=1.0, distill_schedule={"kind": "linear", "end": 0.2}, normalization="fixed"
    )
    given = rows([5, 6, END], [], [5, END])
    scores = [scored(row, [-1.0] * len(row.completion_token_ids)) for row in given]
    listener: Any = Listener(step=1)
    found = train._RoundUpdates(settings(goal), job(), listener, None).step(made(goal, given, scores))
    assert found["distill_weight"] == pytest.approx(0.8)
    assert len(listener.losses) == 2  # micro-batches of at most 6 tokens, the longest completion first
    for loss, count in zip(listener.losses, (3, 2), strict=True):
        goal_then, batch, ids = loss.args
        assert goal_then.distill_weight == pytest.approx(0.8)
        assert loss.keywords["temperature"] == 0.7
        assert len(ids) == count
        assert batch.share.tolist() == pytest.approx([1 / (3 * 5)] * count)  # an empty completion is one too


def test_a_steps_baseline_is_the_mean_signal_of_its_other_completions_whatever_their_prompt() -> None:
    goal = objective(kind="kd", kd={"term": "k2", "baseline": "step"})
    given = [rollout("a", 0, [5, END]), rollout("b", 0, [6])]
    scores = [scored(given[0], [-1.5, -1.75]), scored(given[1], [-2.5])]  # 1 less than s, and 2 less
    listener: Any = Listener()
    train._RoundUpdates(settings(goal), job(), listener, None).step(made(goal, given, scores))
    found = [value for loss in listener.losses for value in loss.args[1].baseline.tolist()]
    assert sorted(found) == pytest.approx([-2.0, -2.0, -1.0])


@pytest.mark.parametrize("signal", [0.0, 1.0])
def test_a_step_of_which_rounding_alone_is_left_is_skipped(signal: float) -> None:
    goal = objective()
    given = rows([5, END])
    mine = made(goal, given, [scored(given[0], [-1.0, -1.0])])
    listener: Any = Listener(signal=signal)
    found = train._RoundUpdates(settings(goal), job(), listener, None).step(mine)
    assert ("skipped" in found) is (signal == 0)


def test_the_trainers_own_log_probs_stand_at_their_completions() -> None:
    given = rows([3], [4, 5, 6, END], [], [7, 8])
    listener: Any = Listener()
    found = train._proximal(settings(objective()), job(), given, listener)
    assert [row.tolist() for row in found] == [row.completion_token_ids for row in given]
    assert set(listener.temperatures) == {0.7}
    assert len(listener.temperatures) > 1


def test_metrics_are_means_over_the_tokens_that_they_are_about() -> None:
    sums = {
        "kept_tokens": 12.0,
        "sampled_tokens": 8.0,
        "kd_tokens": 4.0,
        "off_policy_tokens": 2.0,
        "loss": 0.5,
    }
    sums |= {"kd_loss": 6.0, "rl_loss": 6.0, "off_policy_loss": 6.0}
    assert train._averages(sums) == {
        "loss": 0.5,
        "tokens": 12.0,
        "kd_loss": 1.5,
        "rl_loss": 0.75,
        "off_policy_loss": 3.0,
    }


def test_the_mass_that_truncation_kept_is_the_trainers_over_the_samplers() -> None:
    mine = job()
    goal = objective()
    given = made(goal, rows([5, END]), shift=float(np.log(0.5)))  # b is of a distribution of half the mass
    train._write_mismatch(settings(goal, top_p=0.9), mine, given)
    assert mine.told["rollout/kept_mass_mean"] == pytest.approx(0.5)
    assert mine.told["train/mismatch_nats_mean"] == pytest.approx(np.log(2))


def test_scores_are_shuffled_in_another_way_in_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, int]] = []
    monkeypatch.setattr(train, "shuffled", lambda scores, _rows, **named: asked.append(named) or scores)
    shuffling = settings(objective())
    shuffling.train.control = "shuffled_teacher"
    for number in (1, 2):
        train._checked(shuffling, job(round=number), [], SimpleNamespace(rows=[]))  # type: ignore[arg-type]
    assert asked == [{"seed": 1, "round_number": 1}, {"seed": 1, "round_number": 2}]
