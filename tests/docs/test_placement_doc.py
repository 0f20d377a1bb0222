"""docs/placement.md says what the code has: its fields, its example, its metrics."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import numpy as np
import yaml

from kdpipe.method.mismatch import ledger
from kdpipe.recipe.objective import Objective
from kdpipe.recipe.runtime import Placement
from kdpipe.recipe.schema import Recipe
from kdpipe.tracking.steps import metric_name
from tests.worlds import load_tiny

DOC = (Path(__file__).parents[2] / "docs" / "placement.md").read_text(encoding="utf-8")


def test_its_example_is_a_placement_with_every_field(tmp_path: Path) -> None:
    [example] = re.findall(r"```yaml\n(.*?)```", DOC, re.DOTALL)
    document = yaml.safe_load(example)
    teachers = [{"name": name, "model": "org/model"} for name in ("large", "small")]
    settings = {f"{key}__{name}": value for key in document for name, value in document[key].items()}
    recipe: Recipe = load_tiny(tmp_path, teachers=teachers, **settings).recipe
    placement = recipe.runtime.placement
    assert set(document["runtime"]["placement"]) == set(Placement.model_fields)
    assert [placement.of_teacher(name) for name in ("large", "small", "other")] == ["cuda:2", "cuda:1", None]
    [roles] = get_args(Placement.model_fields["own_process"].annotation)
    assert f"# {', '.join(get_args(roles))}\n" in example


def test_its_metrics_are_those_that_are_logged() -> None:
    logged = {f"train/{name}" for name in ledger(Objective(), np.zeros(3))}
    assert set(re.findall(r"`(train/mismatch_\w+)`", DOC)) == logged
    for several in (False, True):
        name = metric_name(
            "evaluate/accuracy_change", stage="evaluate", subject="NAME", per_step=False, several=several
        )
        assert f"`{name}`" in DOC or (several and f"`{name.rpartition('/')[0]}/...`" in DOC)
