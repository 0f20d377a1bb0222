"""Which runs of a workspace count as other seeds of a recipe, and as its control arms."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kdpipe.recipe.schema import Recipe
from kdpipe.results.attribution import Controls, controls_of
from kdpipe.results.studies import arm_runs, make_study
from kdpipe.results.verdict import verdict
from tests.results.told import UNCLEAR, UP, Told, evaluated_run, graded, loaded_of, recipe_of

GROUPS = ("rollout.samples=2", "teachers=[{name: t, model: t, sft: {steps: 1}}]")


def found(workspace: Path, recipe: Recipe, name: str = "told-1") -> Controls:
    project: Any = SimpleNamespace(recipe=recipe, workspace=workspace, run=SimpleNamespace(name=name))
    return controls_of(project, 4)


def test_a_lone_run_has_one_seed_and_no_arms(tmp_path: Path) -> None:
    own = recipe_of(tmp_path)
    evaluated_run(tmp_path, "told-1", own)
    assert found(tmp_path, own) == Controls((own.seed,), ("told-1",))


def test_other_seeds_count_where_nothing_else_differs_and_they_got_as_far(tmp_path: Path) -> None:
    made = "teachers=[{name: t, model: t, sft: {steps: 1}}]"
    own = recipe_of(tmp_path, made)
    evaluated_run(tmp_path, "told-1", own)
    evaluated_run(
        tmp_path, "told-2", recipe_of(tmp_path, made, "seed=2", "runtime.threads=1", "tracking.enabled=false")
    )
    evaluated_run(
        tmp_path, "held-3", recipe_of(tmp_path, made, "seed=3", "name=held", "teachers.0.sft.seed=0")
    )
    evaluated_run(tmp_path, "told-4", recipe_of(tmp_path, made, "seed=4"), evaluated=3)
    evaluated_run(tmp_path, "told-5", recipe_of(tmp_path, made, "seed=5"), evaluated=None)
    evaluated_run(
        tmp_path, "told-6", recipe_of(tmp_path, made, "seed=6", "train.optimizer.learning_rate=1e-4")
    )
    (tmp_path / "runs" / "told-7").mkdir()
    (tmp_path / "runs" / "told-7" / "resolved.json").write_text("{")
    assert found(tmp_path, own) == Controls((own.seed, 2, 3), ("told-1", "told-2", "held-3"))


def test_control_arms_count_once_one_of_them_was_evaluated(tmp_path: Path) -> None:
    own = recipe_of(tmp_path, *GROUPS)
    arms = arm_runs(loaded_of(tmp_path, *GROUPS), ["kd", "rl", "shuffled-teacher"], seeds=2)
    recipes = {f"r-{number}": recipe_of(tmp_path, *GROUPS, *one.overrides) for number, one in enumerate(arms)}
    labels = {name: f"{one.arm}, seed {one.seed}" for name, one in zip(recipes, arms, strict=True)}
    study = make_study(tmp_path, "arms", recipe="told", runs=labels)
    for name, recipe in recipes.items():
        evaluated_run(tmp_path, name, recipe, evaluated=4 if "kd," in labels[name] else 3)
    before = found(tmp_path, recipes["r-0"], "r-0")
    assert (before.seeds, before.arms, before.study) == ((own.seed, own.seed + 1), (), None)
    for name, recipe in recipes.items():
        evaluated_run(tmp_path, name, recipe)
    after = found(tmp_path, recipes["r-0"], "r-0")
    assert (after.arms, after.study) == (("rl", "shuffled-teacher"), f"studies/{study.name}")
    joint = recipe_of(tmp_path, *GROUPS, "train.objective.kind=kdrl")
    assert found(tmp_path, joint).arms == ("kd", "rl", "shuffled-teacher")
    other = recipe_of(tmp_path, *GROUPS, "rollout.temperature=0.5")
    assert found(tmp_path, other).study is None


def test_a_sweep_is_no_control(tmp_path: Path) -> None:
    own, joint = (recipe_of(tmp_path, *GROUPS, f"train.objective.kind={kind}") for kind in ("kd", "kdrl"))
    evaluated_run(tmp_path, "told-1", own)
    evaluated_run(tmp_path, "told-2", joint)
    make_study(tmp_path, "sweep", recipe="told", runs={"told-1": "kd", "told-2": "kdrl"})
    assert found(tmp_path, own) == Controls((own.seed,), ("told-1",))


def test_the_verdict_names_other_seeds_and_the_study_of_the_arms(tmp_path: Path) -> None:
    own = recipe_of(tmp_path, *GROUPS)
    told: Any = Told(own, [graded(0), graded(4, UP, UNCLEAR)], folder=tmp_path)
    evaluated_run(tmp_path, "told-2", recipe_of(tmp_path, *GROUPS, "seed=9"))
    assert verdict(told).sentences[-1] == (
        "2 seeds (kdpipe compare told-1 told-2); no control arm was run: how much of this is due to the teacher is not "
        "known (kdpipe arms shows it)."
    )
    evaluated_run(tmp_path, "told-3", recipe_of(tmp_path, *GROUPS, "train.objective.kind=grpo"))
    study = make_study(tmp_path, "arms", recipe="told", runs={"told-3": "rl, seed 0"})
    assert verdict(told).sentences[-1] == (
        "2 seeds (kdpipe compare told-1 told-2); control arms were run (rl): how much of this is due to the teacher "
        f"stands in studies/{study.name}/comparison.md."
    )
