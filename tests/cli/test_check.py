"""`check` on local data and model folders, and `run` before it opens a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import kdpipe.pipeline.runner
from kdpipe.cli.app import app
from kdpipe.recipe.file import load_recipe
from tests.worlds import Watcher, run_near

TRAIN = [{"question": f"What is {row}\x1b[31m plus 1?", "answer": row + 1} for row in range(8)]
TEST = [{"question": f"what  is {row}\x1b[31m PLUS 1?", "answer": row + 1} for row in (6, 7, 8, 9)]


def write(folder: Path, train: list[Any], test: list[Any], **changes: Any) -> Path:
    for name, rows in (("train", train), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("student", "teacher"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text('{"model_type": "llama"}')
    document = {
        "name": "own",
        "rounds": 3,
        "task": {"kind": "jsonl", "train": "train.jsonl", "test": "test.jsonl", "instruction": "Add."},
        "student": {"model": "./student"},
        "teachers": [{"model": "./teacher"}],
        **changes,
    }
    (folder / "own.yaml").write_text(yaml.safe_dump(document))
    return folder / "own.yaml"


def check(recipe: Path, *words: str, code: int = 0) -> str:
    place = str(recipe.parent / "out")
    result = CliRunner().invoke(app, ["check", str(recipe), "--workspace", place, *words])
    assert result.exit_code == code, result.output
    return result.output


def test_check_says_how_many_problems_there_are_the_first_prompt_and_what_the_models_are(
    tmp_path: Path,
) -> None:
    recipe = write(tmp_path, TRAIN, TEST)
    good, counts, form, overlap, student, teacher = check(recipe).splitlines()
    assert good.endswith("own.yaml: good; 3 rounds")
    assert counts == "8 train, 4 test problems; first prompt: Add. What is 0\\x1b[31m plus 1?"
    assert form == "task: of each record 'question' is asked, and 'answer' is its answer"
    assert overlap.startswith("warning: 2 of 4 test problems also stand in train")
    assert (student, teacher) == (
        f"student: llama in {tmp_path / 'student'}",
        f"teacher: llama in {tmp_path / 'teacher'}",
    )
    found = json.loads(check(recipe, "--json"))
    assert found["data"] == {
        "train": 8,
        "test": 4,
        "overlap": 2,
        "form": form,
        "references": None,
        "first_prompt": "Add.\n\nWhat is 0\x1b[31m plus 1?",
    }
    assert not (tmp_path / "out").exists()


def test_what_is_on_the_hub_is_not_looked_at(tmp_path: Path) -> None:
    task = {"kind": "dataset", "path": "org/data"}
    recipe = write(tmp_path, [], [], task=task, student={"model": "org/student"})
    assert check(recipe).splitlines()[1:3] == [
        "data: org/data on the hub, not looked at",
        "student: org/student on the hub, not looked at",
    ]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "test.jsonl").unlink(), "test.jsonl: no such file"),
        (lambda folder: (folder / "train.jsonl").write_text('{"q": 1}'), "the record has: 'q'"),
        (lambda folder: (folder / "student/config.json").unlink(), "student: not a model folder"),
        (lambda folder: (folder / "teacher/config.json").write_text("[1]"), "config.json: no model_type"),
        (lambda folder: (folder / "teacher").rename(folder / "other"), "teacher: no such model folder"),
    ],
)
def test_check_finds_what_is_missing(tmp_path: Path, spoil: Any, message: str) -> None:
    recipe = write(tmp_path, TRAIN, TEST)
    spoil(tmp_path)
    assert message in check(recipe, code=2)


UNSOLVED = {"kind": "jsonl", "train": "train.jsonl", "test": "test.jsonl", "grader": "none"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"student": {"model": "./student", "sft": {"steps": 1}}},
            "student.sft trains on reference solutions",
        ),
        ({"rollout": {"on_policy_fraction": 0.5}}, "rollout.off_policy_text: reference trains on reference"),
        ({"teachers": [{"self": "initial", "prompt": "{question} {solution}"}]}, "names {solution}"),
        ({"task": {**UNSOLVED, "few_shot": 1}}, "jsonl/train/0 has no answer to show"),
    ],
)
def test_prompts_without_answers_are_refused_where_an_answer_is_needed(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    prompts = [{"prompt": f"Write poem {row}."} for row in range(3)]
    assert "3 train, 3 test problems" in check(write(tmp_path, prompts, prompts, task=UNSOLVED))
    assert message in check(write(tmp_path, prompts, prompts, **{"task": UNSOLVED, **changes}), code=2)


def test_run_reads_the_data_before_it_opens_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Opened(Exception):
        pass

    def opened(*_: Any, **__: Any) -> None:
        raise Opened

    monkeypatch.setattr(kdpipe.pipeline.runner, "StepWorker", opened)
    watcher = Watcher()
    with pytest.raises(Opened):
        run_near(load_recipe(write(tmp_path, TRAIN, TEST)), tmp_path / "out", watcher=watcher)
    assert [text.partition(":")[0] for text in watcher.warnings] == [
        "2 of 4 test problems also stand in train"
    ]
    assert "'question' is asked" in watcher.notes[0]
    with pytest.raises(kdpipe.errors.DataError, match="has no answer to grade by"):
        run_near(load_recipe(write(tmp_path, [{"prompt": "q"}], TEST)), tmp_path / "out")


@pytest.mark.parametrize("gpus", ["2", "x80", "0x80", "2x0", "2x80x", "99999x8", "-1x80"])
def test_gpus_are_a_number_and_a_size(gpus: str) -> None:
    result = CliRunner().invoke(app, ["plan", "quickstart", "--gpus", gpus])
    assert result.exit_code == 2
    assert "as in 8x80" in result.stderr


@pytest.mark.slow
def test_plan_estimates_what_every_device_must_hold_without_weights(tmp_path: Path) -> None:
    words = ["plan", "quickstart", "--gpus", "2x24", "--workspace", str(tmp_path), "--json"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    found = json.loads(result.stdout)
    assert found["fits"]
    [device] = found["devices"]
    assert (device["device"], device["total_bytes"], device["fits"]) == ("cuda:0", 24 << 30, True)
    assert 0 < device["peak_bytes"] < 24 << 30
    assert found["estimate"]["parameters"]["student"] > 100_000
    told = CliRunner().invoke(app, words[:-1], catch_exceptions=False).stdout
    assert "cuda:0" in told
    assert "fits" in told
