"""The mismatch ledger acts where the losses' own controls do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kdpipe.method.mismatch import acted, ledger, mismatch
from kdpipe.method.objective import _ratio_weight
from kdpipe.recipe.objective import BehaviourControl, Objective, RatioControl

DIFFERENCES = np.linspace(-1.5, 1.5, 301)
RATIOS = torch.from_numpy(np.exp(-DIFFERENCES))
CONTROLS: list[dict[str, Any]] = [
    {"control": "none"},
    {"control": "truncate", "cap": 1.7},
    {"control": "mask", "low": 0.6, "high": 2.2},
    {"control": "clip", "low": 0.3, "high": 0.4},
]


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: control["control"])
def test_a_token_counts_where_the_kd_terms_control_changes_its_weight(control: dict[str, Any]) -> None:
    objective = Objective.model_validate({"kind": "kd", "kd": {"term": "rkl", "ratio": control}})
    settings = RatioControl.model_validate(control)
    changed = [
        (_ratio_weight(settings, RATIOS, torch.full_like(RATIOS, sign)) != RATIOS).numpy() for sign in (1, -1)
    ]
    found = acted(objective, DIFFERENCES)
    np.testing.assert_array_equal(
        found, changed[0] | changed[1]
    )  # of clip: with the signal that points outwards
    assert found.any() == (control["control"] != "none")
    assert not found.all()


@pytest.mark.parametrize(
    "control", [{"control": "none"}, *({"control": c, "cap": 1.5} for c in ("truncate", "mask"))]
)
def test_a_token_counts_where_the_rl_terms_control_changes_its_weight(control: dict[str, Any]) -> None:
    objective = Objective.model_validate({"kind": "grpo", "behaviour": control})
    weight = _ratio_weight(BehaviourControl.model_validate(control), RATIOS, torch.ones_like(RATIOS))
    np.testing.assert_array_equal(acted(objective, DIFFERENCES), (weight != RATIOS).numpy())


def test_only_terms_that_are_computed_act_and_a_token_counts_once() -> None:
    kd = {"term": "k2", "decoupled": {"behaviour": {"control": "mask", "low": 0.5, "high": 1.2}}}
    settings = {"kind": "kdrl", "kd": kd, "behaviour": {"control": "truncate", "cap": 2.0}}
    both = acted(Objective.model_validate(settings), DIFFERENCES)
    np.testing.assert_array_equal(both, (RATIOS.numpy() < 0.5) | (RATIOS.numpy() > 1.2))
    rl_only = acted(Objective.model_validate({**settings, "distill_weight": 0}), DIFFERENCES)
    np.testing.assert_array_equal(rl_only, RATIOS.numpy() > 2.0)
    kd_only = {"kind": "kd", "behaviour": {"control": "truncate", "cap": 2.0}}
    assert not acted(Objective.model_validate(kd_only), DIFFERENCES).any()
    distribution = {"kind": "kd", "kd": {"term": "jsd"}}  # never weighted by ratios
    assert not acted(Objective.model_validate(distribution), DIFFERENCES).any()


def test_the_ledger_of_known_numbers() -> None:
    objective = Objective.model_validate(
        {"kind": "kd", "kd": {"term": "rkl", "ratio": {"control": "truncate", "cap": 1.5}}}
    )
    differences = mismatch([-1.0, -2.0, -3.0, -0.5], [-1.0, -1.5, -3.25, -0.5])
    assert differences.tolist() == [0.0, -0.5, 0.25, 0.0]
    found = ledger(objective, differences)
    assert found["mismatch_nats_mean"] == -0.0625
    assert found["mismatch_nats_max"] == 0.5
    assert found["mismatch_nats_p99"] == pytest.approx(0.25 + 0.97 * 0.25)
    assert found["mismatch_acted_fraction"] == 0.25  # exp(0.5) is over the cap
    assert ledger(objective, np.zeros(0)) == {}
