"""Graders in a whole run: what they say is the reward and the accuracy, and their code belongs to the recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from kdpipe.errors import RecipeError, StepError
from kdpipe.pipeline.identities import Sources
from kdpipe.pipeline.plan import Identities, make_plan
from kdpipe.recipe.file import LoadedRecipe
from tests.stages.test_from_files import write_model, write_problems
from tests.worlds import load_tiny, run_near

OWN = "def grade(text, problem):\n    return len(text) % {} / 4 if problem.expected else 1\n"


def world(folder: Path, **task: Any) -> LoadedRecipe:
    files = {"train": "train.jsonl", "test": "test.jsonl"}
    return load_tiny(
        folder,
        rounds=1,
        task={"kind": "jsonl", **files, "prompt": "plain", **task},
        student={"model": "./student", "dtype": "float32"},
        teachers=[{"model": "./teacher", "dtype": "float32"}],
        rollout={"prompts": 4, "samples": 2, "max_new_tokens": 10},
        train={"objective": {"kind": "kdrl"}, "minibatches": 2},
        evaluate={"reverse_kl_problems": 2, "teacher": False, "samples": 2, "temperature": 1.0},
    )


def test_an_edit_of_the_file_that_grades_makes_stale_what_it_graded_and_nothing_else(tmp_path: Path) -> None:
    grader = {"python": "own.py:grade"}
    student = {"model": "far/away", "sft": {"steps": 2, "batch": 4}}
    loaded = load_tiny(
        tmp_path,
        task={"kind": "jsonl", "train": "a", "test": "b", "grader": grader},
        student=student,
        teachers=[{"model": "far/too"}],
    )
    prints = [
        {step.id: step.fingerprint for step in make_plan(loaded.recipe, Identities({}, {}, own)).steps}
        for own in ({"digest": "a"}, {"digest": "b"})
    ]
    changed = {name for name, value in prints[0].items() if prints[1][name] != value}
    assert {"rollout@1", "evaluate:student@0"} <= changed
    assert not [name for name in changed if name.startswith("sft")]
    (tmp_path / "own.py").write_text(OWN.format(5))
    for name in ("a", "b"):
        write_problems(tmp_path / name, 2)
    first = Sources(loaded, tmp_path / "out").identities().grader
    (tmp_path / "own.py").write_text(OWN.format(4))
    assert first != Sources(loaded, tmp_path / "out").identities().grader
    (tmp_path / "own.py").write_text("")
    with pytest.raises(RecipeError, match="no function 'grade'"):
        Sources(loaded, tmp_path / "out").look()


@pytest.mark.slow
def test_what_a_users_function_says_is_reward_and_accuracy(tmp_path: Path) -> None:
    write_model(tmp_path / "student", hidden=16, layers=1, seed=1)
    write_model(tmp_path / "teacher", hidden=24, layers=2, seed=2)
    for name in ("train", "test"):
        write_problems(tmp_path / f"{name}.jsonl", 6)
    (tmp_path / "own.py").write_text(OWN.format(5))
    run_near(world(tmp_path, grader={"python": "own.py:grade"}), tmp_path / "out")
    [run] = (tmp_path / "out" / "runs").iterdir()
    for table in ("round-001/rollout/rollouts", "round-001/evaluate-student/grades"):
        rows = pd.read_parquet(run / f"{table}.parquet")
        assert rows["reward"].tolist() == [len(text) % 5 / 4 for text in rows["text"]]
        assert rows["correct"].tolist() == [len(text) % 5 == 4 for text in rows["text"]]
        assert rows[["answer", "answer_strict", "answer_flexible"]].isna().all().all()
    assert rows["reward"].nunique() > 2
    summary = json.loads((run / "round-001/evaluate-student/summary.json").read_text())
    assert summary["accuracy"] == pytest.approx(rows["correct"].mean())
    assert summary["reward_mean"] == pytest.approx(rows["reward"].mean())
    assert not [name for name in summary if name.startswith(("maj_at", "accuracy_strict"))]
    (tmp_path / "own.py").write_text("def grade(*_):\n    open(__file__, 'a').write('#')\n    return 1\n")
    with pytest.raises(StepError, match=r"own\.py is not the file that it was when the run started"):
        run_near(world(tmp_path, grader={"python": "own.py:grade"}), tmp_path / "out")
    (tmp_path / "own.py").write_text("def grade(text, problem):\n    raise ValueError('boo')\n")
    with pytest.raises(StepError, match=r"own\.py:grade: problem jsonl/test/\d: ValueError: boo"):
        run_near(world(tmp_path, grader={"python": "own.py:grade"}), tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("grader", ["exact", "choice", "math"])
def test_a_run_is_graded_by_another_grader(grader: str, tmp_path: Path) -> None:
    write_model(tmp_path / "student", hidden=16, layers=1, seed=1)
    write_model(tmp_path / "teacher", hidden=24, layers=2, seed=2)
    for name in ("train", "test"):
        lines = [json.dumps({"question": f"Tom has {n}", "answer": "ABCD"[n % 4]}) for n in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    run_near(world(tmp_path, grader=grader), tmp_path / "out")
    [run] = (tmp_path / "out" / "runs").iterdir()
    rows = pd.read_parquet(run / "round-001/evaluate-student/grades.parquet")
    assert rows["reward"].tolist() == rows["correct"].astype(float).tolist()
    summary = json.loads((run / "round-001/evaluate-student/summary.json").read_text())
    assert "maj_at_2" in summary
    assert "accuracy_strict" not in summary
