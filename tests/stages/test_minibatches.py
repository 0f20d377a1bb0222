"""How the rows of a round are cut into optimizer steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kdpipe.recipe.stages import TrainSection
from kdpipe.stages.train import minibatches


def plan(rows: int, **changes: Any) -> list[tuple[int, list[int]]]:
    """The optimizer steps of a round with that many rows."""
    given = {"epochs": 2, "minibatches": 4, "seed": 1, "round": 3, **changes}
    section = TrainSection.model_construct(epochs=given["epochs"], minibatches=given["minibatches"])
    job: Any = SimpleNamespace(seed=given["seed"], round=given["round"])
    experiences: Any = [
        SimpleNamespace(rollout=SimpleNamespace(prompt_id=f"p{number // 2}", sample=number % 2))
        for number in range(rows)
    ]
    return minibatches(section, job, experiences)


@pytest.mark.parametrize("rows", [4, 10, 11])
def test_every_row_is_in_one_step_of_each_epoch_and_steps_are_about_as_large(rows: int) -> None:
    steps = plan(rows)
    assert [epoch for epoch, _ in steps] == [0] * 4 + [1] * 4
    for epoch in range(2):
        cut = [indices for at, indices in steps if at == epoch]
        assert sorted(index for indices in cut for index in indices) == list(range(rows))
        assert {len(indices) for indices in cut} <= {rows // 4, -(-rows // 4)}


def test_epochs_rounds_and_seeds_have_orders_of_their_own() -> None:
    steps = plan(10)
    assert steps == plan(10)
    assert [indices for _, indices in steps[:4]] != [indices for _, indices in steps[4:]]
    assert steps != plan(10, round=4)
    assert steps != plan(10, seed=2)
