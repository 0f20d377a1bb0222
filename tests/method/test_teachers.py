"""A teacher that is the student itself, shown the solution: what it reads, and that its scores are its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdpipe.pipeline.headroom import headroom_of
from kdpipe.recipe.schema import ModelTeacher, Recipe
from tests.worlds import load_tiny, run_near

PROMPT = "{question}\n{solution}\n{question}\n"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("privileged")
    teacher = {"name": "shown", "self": "initial", "prompt": PROMPT}
    loaded = load_tiny(folder, teachers=[teacher], rounds=2)
    return run_near(loaded, folder / "out").run.path


def rows(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return found


def test_the_teacher_reads_the_solution_and_the_student_does_not(run_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run_folder / "round-000/sft-student/model")
    rollouts = rows(run_folder / "round-001/rollout/rollouts.parquet")
    for rollout, score in zip(
        rollouts, rows(run_folder / "round-001/teacher-score/scores.parquet"), strict=True
    ):
        prompt = tokenizer.decode(score["teacher_prompt_token_ids"])
        assert f"#### {rollout['expected']}" in prompt
        assert "####" not in tokenizer.decode(rollout["prompt_token_ids"])


def test_its_scores_are_student_0s_even_after_the_student_moved_on(run_folder: Path) -> None:
    student_0 = AutoModelForCausalLM.from_pretrained(
        run_folder / "round-000/sft-student/model", dtype=torch.float64
    )
    rollouts = rows(run_folder / "round-002/rollout/rollouts.parquet")
    scores = rows(run_folder / "round-002/teacher-score/scores.parquet")
    for rollout, score in zip(rollouts, scores, strict=True):
        completion = rollout["completion_token_ids"]
        ids = torch.tensor([score["teacher_prompt_token_ids"] + completion])
        with torch.no_grad():
            logprobs = student_0(input_ids=ids).logits[0].log_softmax(-1)
        start = len(score["teacher_prompt_token_ids"]) - 1
        expected = [float(logprobs[start + t, token]) for t, token in enumerate(completion)]
        assert score["teacher_logprobs"] == pytest.approx(expected, abs=1e-4)


def test_it_does_not_gate_the_run_and_its_evaluation_says_whose_it_is(run_folder: Path) -> None:
    summary = json.loads((run_folder / "round-000/evaluate-shown/summary.json").read_text())
    assert summary["model"] == "shown"
    assert "accuracy_change" in summary
    teacher = Recipe.model_validate_json(
        json.dumps(json.loads((run_folder / "resolved.json").read_text())["recipe"]), strict=True
    ).teacher
    worse = {"accuracy_change": -0.5, "accuracy_change_low": -0.7, "accuracy_change_high": -0.3}
    headroom = headroom_of(teacher, {**summary, **worse})
    assert not headroom.stops
    assert headroom.sentence().endswith(
        "on 8 problems; it need not be better: the student itself and privileged "
        "(its prompt shows more than the question)"
    )
    plain, privileged = (ModelTeacher(model="m", prompt=prompt) for prompt in (None, teacher.prompt))
    assert headroom_of(plain, {**summary, **worse}).stops
    shown = headroom_of(privileged, {**summary, **worse})
    assert not shown.stops
    assert "need not be better: privileged" in shown.sentence()
