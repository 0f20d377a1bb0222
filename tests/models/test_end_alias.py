"""`end_token: alias`: the teacher's and the student's end ids trade places in every distribution of the teacher."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from kdpipe.errors import PreflightError
from kdpipe.models.tokenizer import arithmetic_tokenizer
from kdpipe.recipe.file import LoadedRecipe
from tests.worlds import load_tiny, run_near

WORDS = [*"0123456789", "+", "####", "\n", "Tom", "<turn>"]
NUM_IDS = len(WORDS) + 3
STUDENT_END, TEACHER_END = 1, NUM_IDS - 1
OBJECTIVES: dict[str, Any] = {
    "token": {"kd": "k2"},
    "top5": {"kd": {"term": "jsd", "beta": 1.0, "support": {"teacher_top_k": 5}}},
    "union4": {"kd": {"term": "jsd", "beta": 1.0, "support": {"union_top_k": 4}}},
    "vocabulary": {"kd": {"term": "jsd", "beta": 1.0, "support": "vocabulary"}},
}


def write_model(folder: Path, *, end: str, seed: int, words: list[str] = WORDS) -> None:
    tokenizer = arithmetic_tokenizer(words)
    tokenizer.eos_token = end
    end_id = tokenizer.convert_tokens_to_ids(end)
    config = LlamaConfig(
        vocab_size=len(words) + 3,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=end_id,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def recipe(folder: Path, objective: dict[str, Any], **changes: Any) -> LoadedRecipe:
    for split in ("train", "test"):
        rows = [{"question": f"Tom {number} +", "answer": "#### 1"} for number in range(16)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"train": "train.jsonl", "test": "test.jsonl", "prompt": "plain", "instruction": ""}
    settings: dict[str, Any] = {
        "rounds": 1,
        "task": {"kind": "jsonl", **files},
        "student": {"model": "./student", "dtype": "float32"},
        "teachers": [{"model": "./teacher", "dtype": "float32"}],
        "rollout": {"prompts": 16, "samples": 3, "max_new_tokens": 10},
        "train": {"objective": {**objective, "end_token": "alias"}, "minibatches": 1},
        "evaluate": {"reverse_kl_problems": 16, "teacher": False},
    }
    return load_tiny(folder, **{**settings, **changes})


@pytest.fixture(
    scope="module",
    params=[
        # A whole vocabulary holds every token.
        pytest.param(name, marks=pytest.mark.slow if name in ("top5", "token", "union4") else ())
        for name in OBJECTIVES
    ],
)
def finished(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path]:
    """(objective, folder of the models, folder of the run)."""
    folder = tmp_path_factory.mktemp(request.param)
    write_model(folder / "student", end="<eos>", seed=1)
    write_model(folder / "teacher", end="<turn>", seed=2)
    return request.param, folder, run_near(recipe(folder, OBJECTIVES[request.param]), folder / "out").run.path


def forward(folder: Path, *, swap: bool) -> Callable[[Any, Any], np.ndarray]:
    """(prompt, completion) -> log-probs [n, NUM_IDS], by the sampled ids as they are; `swap` swaps the two columns."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    columns = np.arange(NUM_IDS)
    if swap:
        columns[[STUDENT_END, TEACHER_END]] = columns[[TEACHER_END, STUDENT_END]]

    def logprobs(prompt: Any, completion: Any) -> np.ndarray:
        ids = [*map(int, prompt), *map(int, completion)]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0]
        return logits[len(prompt) - 1 : len(ids) - 1].log_softmax(-1).numpy()[:, columns]

    return logprobs


def of_tokens(logprobs: np.ndarray, completion: Any) -> np.ndarray:
    return logprobs[np.arange(len(completion)), np.asarray(completion, int)]


def test_scores_are_those_of_the_teacher_with_two_columns_swapped(finished: tuple[str, Path, Path]) -> None:
    objective, folder, run = finished
    teacher, plain = (forward(folder / "teacher", swap=swap) for swap in (True, False))
    student = forward(folder / "student", swap=False)
    rollouts = pd.read_parquet(run / "round-001/rollout/rollouts.parquet")
    scores = pd.read_parquet(run / "round-001/teacher-score/scores.parquet")
    inside, ends, moved = 0, 0, 0.0
    for row in rollouts.merge(scores, on=["prompt_id", "sample"], validate="one_to_one").itertuples():
        ids = row.completion_token_ids
        full = teacher(row.prompt_token_ids, ids)
        inside += TEACHER_END in ids[:-1]
        ends += ids[-1] == STUDENT_END
        np.testing.assert_allclose(row.teacher_logprobs, of_tokens(full, ids), atol=1e-4, rtol=0)
        moved = max(moved, abs(of_tokens(full, ids) - of_tokens(plain(row.prompt_token_ids, ids), ids)).max())
        if objective in ("top5", "union4"):
            for t, (found, values) in enumerate(zip(row.topk_ids, row.topk_logprobs, strict=True)):
                known = found[found >= 0]
                if objective == "top5":
                    assert set(known) == set(np.argsort(-full[t])[:5])
                if objective == "union4":
                    sampled = student(row.prompt_token_ids, ids)[t]
                    assert set(known) == {*np.argsort(-full[t])[:4], *np.argsort(-sampled)[:4]}
                np.testing.assert_allclose(values[: len(known)], full[t, known], atol=1e-4)
                rest = np.log(np.exp(np.delete(full[t], known)).sum())
                np.testing.assert_allclose(row.tail_logprobs[t], rest, atol=1e-4)
    assert inside, "no completion holds the teacher's end id but at its end"
    assert ends
    assert moved > 0.1, "a teacher to whom both ids are equal would prove nothing"


def test_the_loss_and_reverse_kl_are_those_of_the_swapped_distributions(
    finished: tuple[str, Path, Path],
) -> None:
    objective, folder, run = finished
    student, teacher = forward(folder / "student", swap=False), forward(folder / "teacher", swap=True)
    rollouts = pd.read_parquet(run / "round-001/rollout/rollouts.parquet")
    scores = pd.read_parquet(run / "round-001/teacher-score/scores.parquet")
    losses = []
    for row in rollouts.merge(scores, on=["prompt_id", "sample"]).itertuples():
        prompt, ids = row.prompt_token_ids, row.completion_token_ids
        S, P = student(prompt, ids), teacher(prompt, ids)
        if objective == "token":
            losses.append(0.5 * (of_tokens(S, ids) - of_tokens(P, ids)) ** 2)
        elif objective == "vocabulary":
            losses.append((np.exp(S) * (S - P)).sum(1))
        else:
            losses.append(with_tail(row.topk_ids, S, P))
    metrics = [json.loads(line) for line in (run / "round-001/train/metrics.jsonl").read_text().splitlines()]
    [loss] = [row["value"] for row in metrics if row["name"] == "train/loss"]
    assert loss == pytest.approx(np.concatenate(losses).mean(), abs=1e-4)
    for row in pd.read_parquet(run / "round-000/evaluate-student/reverse_kl.parquet").itertuples():
        S, P = (side(row.prompt_token_ids, row.completion_token_ids) for side in (student, teacher))
        np.testing.assert_allclose(row.teacher_logprobs, of_tokens(P, row.completion_token_ids), atol=1e-4)
        np.testing.assert_allclose(row.reverse_kl_nats, (np.exp(S) * (S - P)).sum(1), atol=1e-4)


def with_tail(ids_NK: Any, S: np.ndarray, P: np.ndarray) -> np.ndarray:
    values = []
    for t, found in enumerate(ids_NK):
        known = found[found >= 0]
        s, p = (np.exp([*side[t, known], np.log(np.exp(np.delete(side[t], known)).sum())]) for side in (S, P))
        values.append((s * np.log(s / p)).sum())
    return np.array(values)


def test_nothing_is_swapped_where_both_end_alike(tmp_path: Path) -> None:
    for name, seed in (("student", 1), ("teacher", 2)):
        write_model(tmp_path / name, end="<eos>", seed=seed)
    run = run_near(recipe(tmp_path, OBJECTIVES["token"]), tmp_path / "out").run.path
    plain = forward(tmp_path / "teacher", swap=False)
    rollouts = pd.read_parquet(run / "round-001/rollout/rollouts.parquet")
    scores = pd.read_parquet(run / "round-001/teacher-score/scores.parquet")
    for row in rollouts.merge(scores, on=["prompt_id", "sample"]).itertuples():
        expected = of_tokens(plain(row.prompt_token_ids, row.completion_token_ids), row.completion_token_ids)
        np.testing.assert_allclose(row.teacher_logprobs, expected, atol=1e-4)


def test_an_end_id_that_one_of_them_lacks_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "student", end="<eos>", seed=1, words=WORDS[:-1])
    write_model(tmp_path / "teacher", end="<turn>", seed=2)
    with pytest.raises(PreflightError) as caught:
        run_near(recipe(tmp_path, OBJECTIVES["token"]), tmp_path / "out")
    assert (
        f"id {TEACHER_END}, with which teacher 'teacher' ends a turn, is not one of both"
        in caught.value.message
    )
    assert caught.value.hint == "set train.objective.end_token to mask"
