"""What a teacher writes, as text for the student's cold start and for prompts that it does not sample for.

The teacher ends its turns with another id, has a prompt of its own and words that the student lacks. All numbers are
computed again from the files and plain float64 forward passes.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdpipe.errors import Interrupted, PreflightError
from kdpipe.recipe.file import LoadedRecipe
from tests.models.test_end_alias import NUM_IDS, STUDENT_END, TEACHER_END, WORDS, write_model
from tests.stages.test_from_files import clean
from tests.tiny_models import FLOAT32_NATS
from tests.worlds import Watcher, load_tiny, payload_digests, run_near

PROBLEMS, PROMPTS, SAMPLED = 12, 6, 2
LAST_WORDS = ["<think>", "thus"]  # after all that both have


def recipe(folder: Path, **changes: Any) -> LoadedRecipe:
    if not (folder / "student").exists():
        write_model(folder / "student", end="<eos>", seed=1)
        write_model(folder / "teacher", end="<turn>", seed=29, words=[*WORDS, *LAST_WORDS])
    for split in ("train", "test"):
        rows = [
            {"question": f"Tom {number} +", "answer": f"{number} #### {number}", "kind": "ab"[number % 2]}
            for number in range(PROBLEMS)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"train": "train.jsonl", "test": "test.jsonl", "prompt": "plain", "instruction": ""}
    settings: dict[str, Any] = {
        "rounds": 2,
        "task": {"kind": "jsonl", **files},
        "student": {"model": "./student", "dtype": "float32"},
        "student__sft": {"steps": 1, "batch": 10, "problems": 5, "text": "teacher", "samples": 2},
        "teachers": [
            {
                "model": "./teacher",
                "dtype": "float32",
                "prompt": "{solution} + {question}",
                "temperature": 1e-3,
            }
        ],
        "rollout": {"prompts": PROMPTS, "samples": 2, "max_new_tokens": 8},
        "rollout__on_policy_fraction": SAMPLED / PROMPTS,
        "rollout__off_policy_text": "teacher",
        "train": {"objective": {"kd": {"term": "jsd", "beta": 1.0}, "off_policy_term": "cross_entropy"}},
        "train__objective__kd__support": {"teacher_top_k": 5},
        "train__minibatches": 1,
        "evaluate": {"reverse_kl_problems": 0, "teacher": False, "every": 2},
        "runtime__part_rows": 4,
    }
    return load_tiny(folder, **{**settings, **changes})


@dataclass(frozen=True)
class Files:
    """A finished run with its models."""

    folder: Path
    run: Path

    def frame(self, name: str) -> pd.DataFrame:
        return pd.read_parquet(self.run / name)

    def metrics(self, step: str) -> dict[str, float]:
        lines = map(json.loads, (self.run / step / "metrics.jsonl").read_text().splitlines())
        return {row["name"]: row["value"] for row in lines}

    def prompt_of(self, model: str, prompt_id: str) -> list[int]:
        number = int(prompt_id.rpartition("/")[2])
        text = f"Tom {number} +\n"
        if model == "teacher":
            text = f"{number} #### {number} + {text}"
        tokenizer = AutoTokenizer.from_pretrained(self.folder / model)
        return list(tokenizer.encode(text, add_special_tokens=False))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("text")
    return Files(folder, run_near(recipe(folder, student__sft__temperature=0), folder / "out").run.path)


def greedy(folder: Path, prompt: list[int]) -> tuple[list[int], str]:
    """What the teacher says first at each place among the ids that both have, until its own end."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    ids = list(prompt)
    for _ in range(8):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1, :NUM_IDS]
        ids.append(int(logits.argmax()))
        if ids[-1] == TEACHER_END:
            return [*ids[len(prompt) : -1], STUDENT_END], "stop"
    return ids[len(prompt) :], "length"


def cross_entropies(folder: Path, prompt: list[int], completion: Any) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    ids = [*prompt, *map(int, completion)]
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([ids])).logits[0, :, :NUM_IDS].log_softmax(-1).numpy()
    places = np.arange(len(prompt) - 1, len(ids) - 1)
    return -logprobs[places, np.asarray(completion, int)]


def check_written(files: Files, rows: pd.DataFrame) -> None:
    """The teacher's greedy text after its own prompt, ended as the student ends."""
    student = AutoTokenizer.from_pretrained(files.folder / "student")
    for row in rows.itertuples():
        prompt = files.prompt_of("teacher", row.prompt_id)
        assert list(row.prompt_token_ids) == prompt
        assert (list(row.completion_token_ids), row.finish_reason) == greedy(files.folder / "teacher", prompt)
        assert (row.source, row.sampler_logprobs) == ("teacher", None)
        kept = [token for token in row.completion_token_ids if token != STUDENT_END]
        assert row.text == clean(student, kept)


def test_the_teacher_writes_for_the_cold_start_after_its_own_prompt(files: Files) -> None:
    rows = files.frame("round-000/rollout-teacher/rollouts.parquet")
    assert list(rows.prompt_id) == [f"jsonl/train/{number}" for number in range(5) for _ in range(2)]
    assert list(rows["sample"]) == [0, 1] * 5
    check_written(files, rows)
    assert {*rows.finish_reason} == {"stop", "length"}, "a world in which nothing ends would prove little"
    found = files.metrics("round-000/rollout-teacher")
    assert found["rollout/teacher/truncated_fraction"] == (rows.finish_reason == "length").mean()
    assert found["rollout/teacher/reward_mean"] == pytest.approx(rows.reward.mean())
    assert found["rollout/teacher/completion_tokens_mean"] == rows.completion_token_ids.map(len).mean()


def test_the_cold_start_learns_that_text_after_the_students_prompt(files: Files) -> None:
    rows = files.frame("round-000/rollout-teacher/rollouts.parquet")
    losses = [
        cross_entropies(
            files.folder / "student", files.prompt_of("student", row.prompt_id), row.completion_token_ids
        )
        for row in rows.itertuples()
    ]
    assert files.metrics("round-000/sft-student")["sft/loss"] == pytest.approx(
        np.concatenate(losses).mean(), abs=FLOAT32_NATS
    )


def test_a_round_has_the_teachers_text_where_the_student_does_not_sample(files: Files) -> None:
    for number in (1, 2):
        folder = f"round-{number:03d}"
        written = files.frame(f"{folder}/rollout-teacher/rollouts.parquet")
        rollouts = files.frame(f"{folder}/rollout/rollouts.parquet")
        given, own = (rollouts[rollouts.source == source] for source in ("teacher", "student"))
        assert (given.prompt_id.nunique(), own.prompt_id.nunique()) == (PROMPTS - SAMPLED, SAMPLED)
        assert not {*given.prompt_id} & {*own.prompt_id}
        check_written(files, written)
        pairs = given.merge(written, on=["prompt_id", "sample"], validate="one_to_one")
        assert len(pairs) == len(given) == len(written)
        for row in pairs.itertuples():
            assert list(row.completion_token_ids_x) == list(row.completion_token_ids_y)
            assert list(row.prompt_token_ids_x) == files.prompt_of("student", row.prompt_id)


def test_train_takes_it_by_cross_entropy_after_the_students_prompt(files: Files) -> None:
    rollouts = files.frame("round-001/rollout/rollouts.parquet")
    losses = [
        cross_entropies(
            files.run / "round-000/sft-student/model",
            files.prompt_of("student", row.prompt_id),
            row.completion_token_ids,
        )
        for row in rollouts[rollouts.source == "teacher"].itertuples()
    ]
    expected = np.concatenate(losses).mean()
    assert files.metrics("round-001/train")["train/off_policy_loss"] == pytest.approx(expected, abs=1e-4)
    found = files.metrics("round-001/rollout")
    assert found["rollout/on_policy_fraction"] == pytest.approx(SAMPLED / PROMPTS)
    assert "rollout/teacher/reward_mean" not in found


def test_the_samples_of_a_problem_differ_unless_they_are_greedy(files: Files, tmp_path: Path) -> None:
    def texts(run: Files) -> list[list[tuple[int, ...]]]:
        rows = run.frame("round-000/rollout-teacher/rollouts.parquet")
        return [[tuple(ids) for ids in group.completion_token_ids] for _, group in rows.groupby("prompt_id")]

    assert all(first == second for first, second in texts(files))
    run = run_near(recipe(tmp_path, student__sft__temperature=2.0), tmp_path / "out", rounds=0).run.path
    drawn = texts(Files(tmp_path, run))
    assert sum(first != second for first, second in drawn) >= 4
    assert not any(token >= NUM_IDS for pair in drawn for ids in pair for token in ids)


@pytest.mark.slow
def test_a_run_stopped_in_the_middle_ends_with_the_same_digests(tmp_path: Path) -> None:
    folders = tmp_path / "unbroken", tmp_path / "stopped"
    settings = {"runtime__part_rows": 2, "runtime__checkpoint_steps": 1, "student__sft__steps": 3}
    for folder in folders:
        folder.mkdir()
    run_near(recipe(folders[0], **settings), folders[0] / "out")
    loaded = recipe(folders[1], **settings)
    for step, unit, done in (
        ("rollout:teacher@0", "completions", 4),
        ("sft:student@0", "optimizer steps", 2),
        ("rollout:teacher@2", "completions", 2),
    ):
        watcher = Watcher()
        watcher.on_event = lambda at, event, wanted=(step, unit, done): (  # type: ignore[misc]
            os.kill(os.getpid(), signal.SIGTERM)
            if (at, event.get("unit"), event.get("done")) == wanted
            else None
        )
        with pytest.raises(Interrupted, match=f"at {step}"):
            run_near(loaded, folders[1] / "out", watcher=watcher)
    run_near(loaded, folders[1] / "out")
    assert payload_digests(folders[1] / "out") == payload_digests(folders[0] / "out")


def test_each_of_several_teachers_writes_for_the_problems_that_it_teaches(tmp_path: Path) -> None:
    teachers = [
        {"name": name, "model": "./teacher", "dtype": "float32", "only": {"kind": kind}}
        for name, kind in (("first", "a"), ("second", "b"))
    ]
    loaded = recipe(
        tmp_path, teachers=teachers, rollout__prompts=3, rollout__on_policy_fraction=0.0, rounds=2
    )
    run = Files(tmp_path, run_near(loaded, tmp_path / "out").run.path)
    for number in (0, 1, 2):
        rows = [
            run.frame(f"round-{number:03d}/rollout-{name}/rollouts.parquet") for name in ("first", "second")
        ]
        for parity, found in enumerate(rows):
            assert all(int(name.rpartition("/")[2]) % 2 == parity for name in found.prompt_id)
        assert sum(map(len, rows)) == (10 if number == 0 else 3)
    merged = run.frame("round-002/rollout/rollouts.parquet")
    assert {*merged.source} == {"teacher"}
    assert len(merged) == 3


def test_a_teacher_that_ends_with_an_id_that_the_student_lacks_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "student", end="<eos>", seed=1)
    write_model(tmp_path / "teacher", end="<think>", seed=2, words=[*WORDS, *LAST_WORDS])
    with pytest.raises(PreflightError, match=f"ends its turns with {NUM_IDS}, ids that the student lacks"):
        run_near(recipe(tmp_path), tmp_path / "out", rounds=0)


def test_a_student_made_from_nothing_learns_from_the_text_of_a_teacher_made_from_nothing(
    tmp_path: Path,
) -> None:
    sft = {"steps": 3, "batch": 8, "problems": 6, "text": "teacher"}
    loaded = load_tiny(tmp_path, student__sft=sft)
    watcher = Watcher()
    project = run_near(loaded, tmp_path / "out", watcher=watcher, rounds=0)
    assert watcher.performed[:3] == ["sft:teacher@0", "rollout:teacher@0", "sft:student@0"]
    rows = pd.read_parquet(project.run.path / "round-000/rollout-teacher/rollouts.parquet")
    assert len(rows) == 6


def test_texts_are_written_again_only_for_what_they_depend_on(tmp_path: Path) -> None:
    from kdpipe.pipeline.project import open_project

    def prints(*overrides: str, **changes: Any) -> dict[str, str]:
        loaded = recipe(tmp_path, **changes)
        plan = open_project(loaded, tmp_path / "out").plan
        return {step.id: step.fingerprint for step in plan.steps if step.id.startswith("rollout:")}

    before = prints()
    assert {*before} == {"rollout:teacher@0", "rollout:teacher@1", "rollout:teacher@2"}
    assert prints(train__optimizer__learning_rate=0.5, student__sft__steps=2) == before
    cold = prints(student__sft__temperature=0.5)
    assert cold["rollout:teacher@0"] != before["rollout:teacher@0"]
    assert cold["rollout:teacher@1"] == before["rollout:teacher@1"]
    longer = prints(rollout__max_new_tokens=7)
    assert not {*longer.values()} & {*before.values()}
