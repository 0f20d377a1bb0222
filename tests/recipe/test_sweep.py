"""run --sweep: the grid, one comparison at the end, and a failing point that costs the others nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kdpipe.pipeline.request
from kdpipe.cli.app import app
from kdpipe.errors import RecipeError
from kdpipe.recipe.sweep import points
from tests.worlds import NearWorker, write_recipe


def test_the_grid_is_every_combination_in_order() -> None:
    assert points(["a.b=1,2", "c=x, y"]) == [
        ("a.b=1", "c=x"),
        ("a.b=1", "c=y"),
        ("a.b=2", "c=x"),
        ("a.b=2", "c=y"),
    ]
    assert points(["kd={term: jsd, beta: 0.5},k2"]) == [("kd={term: jsd, beta: 0.5}",), ("kd=k2",)]
    assert points(["steps=[1, 2],[1]", "stop=['a,b']"]) == [
        ("steps=[1, 2]", "stop=['a,b']"),
        ("steps=[1]", "stop=['a,b']"),
    ]


@pytest.mark.parametrize(
    ("sweeps", "words"),
    [
        (["a"], "expected a field and its values"),
        (["a="], "expected a field and its values"),
        (["=1,2"], "expected a field and its values"),
        (["a=1,,2"], "not valid YAML"),
        (["a=,1"], "not valid YAML"),
        (["a=1,"], "single commas"),
        (["a=1] # 2"], "single commas"),
        (["a=1],[2"], "not valid YAML"),
        (["a=[1,2"], "not valid YAML"),
        (["a=&x 1,*x"], "anchors and aliases are not used"),
        (["a=1,1"], "the same value twice"),
        (["a=1,2", "a=3"], "given twice"),
    ],
)
def test_a_sweep_that_is_no_list_of_different_values_is_refused(sweeps: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=f"--sweep a?.*{words}") as caught:
        points(sweeps)
    assert caught.value.hint or "twice" in words


@pytest.mark.parametrize(
    "value", ["1e-5", "'a,b'", "'it''s'", "x y", "[1, 'b]']", "{term: jsd}", "010", "y: 2", "http://a/v1"]
)
def test_a_value_of_a_sweep_is_what_was_written(value: str) -> None:
    assert points([f"a= {value} ,other"]) == [(f"a={value}",), ("a=other",)]


@pytest.fixture
def near(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kdpipe.pipeline.request, "Worker", NearWorker)
    monkeypatch.setattr(sys, "argv", ["kdpipe", "run", "recipe.yaml"])


def test_a_sweep_runs_each_point_shares_what_it_can_and_compares(near: None, tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, rounds=1))
    args = [
        "run",
        recipe,
        "--workspace",
        str(tmp_path / "out"),
        "--sweep",
        "train.optimizer.learning_rate=1e-3,1e-2",
    ]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "out/runs").iterdir())) == 2
    assert len(list((tmp_path / "out/store/rollout").iterdir())) == 1  # of round 1, shared
    assert len(list((tmp_path / "out/store/train").iterdir())) == 2
    table = result.stdout.rpartition("cost of a run")[2].splitlines()[1:3]
    assert [line.split()[0] for line in table] == [
        "train.optimizer.learning_rate=0.001",
        "train.optimizer.learning_rate=0.01",
    ]
    assert "2 of 2: train.optimizer.learning_rate=1e-2" in result.stderr
    again = CliRunner().invoke(app, [*args, "--json"])
    last = json.loads(again.stdout.splitlines()[-1])
    assert (last["event"], [row["before"] for row in last["rows"]]) == ("comparison", [True, False, False])


def test_a_point_that_fails_leaves_the_others_and_is_named_at_the_end(near: None, tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, rounds=1))
    place = ["--workspace", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["run", recipe, *place, "--sweep", "train.objective.kd=k1_loss,k2"])
    assert result.exit_code == 1
    assert "1 of 2 runs failed: train.objective.kd=k1_loss" in result.stderr
    assert len(list((tmp_path / "out/store/train").iterdir())) == 1


def test_a_mistake_in_the_last_point_is_told_before_the_first_runs(near: None, tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, rounds=1))
    result = CliRunner().invoke(
        app, ["run", recipe, "--workspace", str(tmp_path / "out"), "--sweep", "rollout.samples=2,none"]
    )
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()
