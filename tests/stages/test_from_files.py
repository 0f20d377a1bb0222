"""What kdpipe computed, computed again from its files alone: pandas, plain transformers, the formulas of the method.

Nothing of kdpipe is used but to make the run. Every forward pass is unbatched and in float64.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from kdpipe.models.tokenizer import arithmetic_tokenizer
from tests.worlds import load_tiny, run_near

WORDS = [*"0123456789", "+", "####", "\n", "Tom", "has", "apples", "pens"]
NUM_IDS = len(WORDS) + 3
ROWS = 32  # of the embedding; those from NUM_IDS on are padding
TEMPERATURE = 1.3
PROMPTS = 12
SAMPLES = 4
OBJECTIVES: dict[str, dict[str, Any]] = {
    "rkl": {"kind": "kd", "kd": {"term": "rkl"}, "distill_weight": 0.7},
    "jsd": {"kind": "kd", "kd": {"term": "jsd", "beta": 1.0, "support": "vocabulary"}},
    "jsd-top5": {"kind": "kd", "kd": {"term": "jsd", "beta": 0.3, "support": {"teacher_top_k": 5}}},
    "kdrl": {
        "kind": "kdrl",
        "kd": {"term": "k2"},
        "rl_weight": 1.5,
        "distill_weight": 0.25,
        "reward_scaling": 10.0,
        "reward_bias": -0.5,
        "reward_clip": 4.0,
        "batch_normalization": True,
        "behaviour": {"control": "truncate", "cap": 1.0},
    },
    "skew-union": {"kd": {"term": "skew_rkl", "alpha": 0.2, "support": {"union_top_k": 4}}},
    "masked": {
        "kind": "kdrl",
        "kd": {"term": "k3", "baseline": "group"},
        "distill_weight": 0.5,
        "mask": "wrong",
        "truncated": "drop",
        "end_token": "mask",
        "normalization": "sequence",
    },
}


def write_model(folder: Path, *, hidden: int, layers: int, seed: int) -> None:
    """A random model with sharp distributions, two end ids, and padding rows that would win if they counted."""
    tokenizer = arithmetic_tokenizer(WORDS)
    config = LlamaConfig(
        vocab_size=ROWS,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=160,
        initializer_range=0.35,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [1, tokenizer.convert_tokens_to_ids("apples"), 16]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_problems(path: Path, count: int) -> None:
    """Questions of 2 to 80 words, so that one batch holds prompts of very different lengths."""
    with path.open("w") as file:
        for number in range(count):
            question = "Tom has" + " 7 + Tom" * ((number * 7) % 27) + f" {number}"
            file.write(json.dumps({"question": question, "answer": f"#### {number % 4}"}) + "\n")


@dataclass(frozen=True)
class Files:
    """A finished run, as an outsider sees it: the links of its rounds."""

    folder: Path
    objective: str

    @property
    def run(self) -> Path:
        [path] = (self.folder / "out" / "runs").iterdir()
        return path

    def frame(self, number: int, name: str) -> pd.DataFrame:
        return pd.read_parquet(self.run / f"round-{number:03d}" / name)

    def rollouts(self, number: int) -> pd.DataFrame:
        return self.frame(number, "rollout/rollouts.parquet")

    def scores(self, number: int) -> pd.DataFrame:
        return self.frame(number, "teacher-score/scores.parquet")

    def student(self, number: int) -> Path:
        """The weights that round `number` sampled from, and trained."""
        return (
            self.folder / "student"
            if number == 1
            else self.run / f"round-{number - 1:03d}" / "train" / "model"
        )


@pytest.fixture(
    scope="module",
    params=[
        # Whole distributions, ids of both sides, and the masked one hold what these do.
        pytest.param(name, marks=pytest.mark.slow if name in ("jsd-top5", "kdrl") else ())
        for name in OBJECTIVES
    ],
)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp(request.param)
    write_model(folder / "student", hidden=16, layers=1, seed=1)
    write_model(folder / "teacher", hidden=24, layers=2, seed=2)
    write_problems(folder / "train.jsonl", 40)
    write_problems(folder / "test.jsonl", 2)
    loaded = load_tiny(
        folder,
        rounds=2,
        task={
            "kind": "jsonl",
            "train": "train.jsonl",
            "test": "test.jsonl",
            "prompt": "plain",
            "instruction": "",
        },
        student={"model": "./student", "dtype": "float32"},
        teachers=[{"model": "./teacher", "dtype": "float32"}],
        rollout={"prompts": PROMPTS, "samples": SAMPLES, "max_new_tokens": 10, "temperature": TEMPERATURE},
        train={
            "objective": OBJECTIVES[request.param],
            "optimizer": {"learning_rate": 2e-3},
            "minibatches": 2,
        },
        evaluate={"reverse_kl_problems": 2, "teacher": False, "every": 2},
        runtime__part_rows=64,
        runtime__train_tokens=700,  # an optimizer step is several micro-batches
    )
    run_near(loaded, folder / "out")
    return Files(folder, request.param)


# ------------------------------------------------------------------------------ forward passes, numpy from here


@functools.cache
def forward(folder: Path) -> Callable[[list[int], list[int]], np.ndarray]:
    """(prompt, completion) -> log-probs [n, NUM_IDS] at the sampling temperature, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()

    @functools.cache  # one test after another asks for the same
    def of_ids(prompt: tuple[int, ...], completion: tuple[int, ...]) -> np.ndarray:
        ids = [*prompt, *completion]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].numpy()
        rows = logits[len(prompt) - 1 : len(ids) - 1, :NUM_IDS] / TEMPERATURE
        found: np.ndarray = (
            rows
            - np.log(np.exp(rows - rows.max(1, keepdims=True)).sum(1, keepdims=True))
            - rows.max(1, keepdims=True)
        )
        found.flags.writeable = False
        return found

    return lambda prompt, completion: of_ids((*map(int, prompt),), (*map(int, completion),))


def test_held_out_reverse_kl_is_that_of_the_two_whole_distributions(files: Files) -> None:
    student, teacher = forward(files.student(3)), forward(files.folder / "teacher")
    folder = files.run / "round-002" / "evaluate-student"
    table = pd.read_parquet(folder / "reverse_kl.parquet")
    values = []
    for row in table.itertuples():
        s = student(row.prompt_token_ids, row.completion_token_ids)
        q = teacher(row.teacher_prompt_token_ids, row.completion_token_ids)
        values.append((np.exp(s) * (s - q)).sum(-1))
        np.testing.assert_allclose(row.reverse_kl_nats, values[-1], atol=1e-4)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["reverse_kl_exact_nats"] == pytest.approx(np.concatenate(values).mean(), abs=1e-4)
    assert summary["reverse_kl_exact_change_low"] <= summary["reverse_kl_exact_change_nats"]


def of_tokens(logprobs: np.ndarray, completion: Any) -> np.ndarray:
    return logprobs[np.arange(len(completion)), np.asarray(completion, int)]


def logsumexp(values: np.ndarray) -> np.ndarray:
    return np.log(np.exp(values).sum(-1))


def test_the_run_holds_the_cases_that_go_wrong(files: Files) -> None:
    rollouts = pd.concat([files.rollouts(1), files.rollouts(2)])
    assert (rollouts.completion_token_ids.map(len) == 1).any()
    assert (rollouts.finish_reason == "length").any()
    assert (rollouts.finish_reason == "stop").any()
    lengths = rollouts.prompt_token_ids.map(len)
    assert lengths.min() < 8
    assert lengths.max() > 60
    assert rollouts.reward.nunique() == 2
    assert len(rollouts) == 2 * PROMPTS * SAMPLES


def clean(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of ids; what stands around special tokens is on lines of its own."""
    groups = itertools.groupby(ids, lambda token: token in tokenizer.all_special_ids)
    return "\n".join(tokenizer.decode(list(group)) for is_special, group in groups if not is_special)


def test_rewards_and_answers_follow_from_the_texts(files: Files) -> None:
    tokenizer = AutoTokenizer.from_pretrained(files.folder / "student")
    for row in files.rollouts(1).itertuples():
        ids = list(row.completion_token_ids)
        ends = ids[-1] in (1, 16, 18)
        assert (row.finish_reason == "stop") == ends
        assert ends or len(ids) == 10
        assert clean(tokenizer, ids[:-1] if ends else ids) == row.text
        strict = re.search(r"#### (-?[0-9.,]+)", row.text)
        numbers = [found[0] for found in re.finditer(r"-?[$0-9.,]{2,}|-?[0-9]+", row.text)]
        assert or_none(row.answer_strict) == (strict[1] if strict else None)
        assert or_none(row.answer_flexible) == (numbers[-1] if numbers else None)
        is_right = bool(numbers) and Decimal(numbers[-1]) == Decimal(row.expected)
        assert row.correct == is_right
        assert row.reward == float(is_right)


def or_none(value: Any) -> str | None:
    return None if pd.isna(value) else str(value)


def test_sampler_logprobs_are_those_of_the_student(files: Files) -> None:
    for number in (1, 2):
        logprobs = forward(files.student(number))
        for row in files.rollouts(number).itertuples():
            expected = of_tokens(
                logprobs(row.prompt_token_ids, row.completion_token_ids), row.completion_token_ids
            )
            np.testing.assert_allclose(row.sampler_logprobs, expected, atol=1e-4, rtol=0)


def test_teacher_scores_are_those_of_a_plain_forward_pass(files: Files) -> None:
    logprobs = forward(files.folder / "teacher")
    for number in (1, 2):
        rollouts, scores = files.rollouts(number), files.scores(number)
        assert (scores.teacher == "teacher").all()
        pairs = rollouts.merge(scores, on=["prompt_id", "sample"], validate="one_to_one")
        assert len(pairs) == len(rollouts)
        for row in pairs.itertuples():
            assert list(row.teacher_prompt_token_ids) == list(row.prompt_token_ids)
            assert all(row.scorable)
            full = logprobs(row.prompt_token_ids, row.completion_token_ids)
            expected = of_tokens(full, row.completion_token_ids)
            np.testing.assert_allclose(row.teacher_logprobs, expected, atol=1e-4, rtol=0)
            if files.objective == "jsd-top5":
                assert_top_k(row, full)
            if files.objective == "skew-union":
                student = forward(files.student(number))(row.prompt_token_ids, row.completion_token_ids)
                assert_union(row, full, student)
        if files.objective == "jsd":
            states = hidden_logprobs(files, number)
            for row, found in zip(scores.merge(rollouts).itertuples(), states, strict=True):
                full = logprobs(row.prompt_token_ids, row.completion_token_ids)
                np.testing.assert_allclose(found, full, atol=1e-4, rtol=0)


def hidden_logprobs(files: Files, number: int) -> list[np.ndarray]:
    """The teacher's log-probs [n, NUM_IDS] of each row of scores.parquet, from its kept states and its head."""
    kept = load_file(files.run / f"round-{number:03d}" / "teacher-score" / "hidden.safetensors")
    head = load_file(files.folder / "teacher" / "model.safetensors")["lm_head.weight"][:NUM_IDS]
    offsets = kept["offsets"].tolist()
    assert (len(offsets), kept["hidden"].shape) == (PROMPTS * SAMPLES + 1, (offsets[-1], 24))
    logits = kept["hidden"].double() @ head.double().T / TEMPERATURE
    logprobs = logits.log_softmax(-1).numpy()
    return [logprobs[start:end] for start, end in itertools.pairwise(offsets)]


def assert_union(row: Any, full: np.ndarray, student: np.ndarray) -> None:
    """The ids are the 4 most probable of either model, each once, then -1."""
    ids, values = np.stack(row.topk_ids), np.stack(row.topk_logprobs)
    assert ids.shape[1] == 8
    for t, line in enumerate(ids):
        wanted = {*np.argsort(-full[t])[:4].tolist(), *np.argsort(-student[t])[:4].tolist()}
        found = line[line >= 0].tolist()
        assert set(found) == wanted
        assert len(found) == len(wanted)
        np.testing.assert_allclose(values[t, : len(found)], full[t, found], atol=1e-4)
        assert (values[t, len(found) :] == -np.inf).all()
        rest = np.delete(full[t], found)
        np.testing.assert_allclose(row.tail_logprobs[t], np.log(np.exp(rest).sum()), atol=1e-4)


def assert_top_k(row: Any, full: np.ndarray) -> None:
    ids, values = np.stack(row.topk_ids), np.stack(row.topk_logprobs)
    assert ids.shape[1] == 5
    assert all(len(set(line)) == 5 for line in ids)
    assert (np.diff(values, axis=1) <= 0).all()
    np.testing.assert_allclose(values, np.take_along_axis(full, ids, axis=1), atol=1e-4, rtol=0)
    np.testing.assert_allclose(values, -np.sort(-full, axis=1)[:, :5], atol=1e-4, rtol=0)
    rest = full.copy()
    np.put_along_axis(rest, ids, -np.inf, axis=1)
    np.testing.assert_allclose(row.tail_logprobs, logsumexp(rest), atol=1e-4, rtol=0)


def test_the_mismatch_ledger_follows_from_the_two_files(files: Files) -> None:
    for number in (1, 2):
        completions = files.frame(number, "train/completions.parquet")
        joined = files.rollouts(number).merge(completions, on=["prompt_id", "sample"], validate="one_to_one")
        b, p = (
            np.concatenate(list(joined[name])).astype(np.float64)
            for name in ("sampler_logprobs", "proximal_logprobs")
        )
        acted = np.exp(p - b) > 1.0 if files.objective == "kdrl" else np.zeros(len(b))
        expected = {
            "mean": (b - p).mean(),
            "p99": np.quantile(np.abs(b - p), 0.99),
            "max": np.abs(b - p).max(),
        }
        path = files.run / f"round-{number:03d}" / "train" / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found = {row["name"]: row["value"] for row in rows if row["name"].startswith("train/mismatch")}
        names = {f"train/mismatch_nats_{name}": value for name, value in expected.items()}
        assert found == pytest.approx(
            {**names, "train/mismatch_acted_fraction": acted.mean()}, rel=1e-9, abs=1e-18
        )
        if files.objective == "kdrl":
            assert 0.05 < acted.mean() < 0.95


def test_the_loss_of_a_rounds_first_optimizer_step_follows_from_the_files(files: Files) -> None:
    for number in (1, 2):
        completions = files.frame(number, "train/completions.parquet")
        step = completions.optimizer_step.min()
        assert step == 2 * (number - 1) + 1
        rollouts = files.rollouts(number)
        rollouts["own_advantage"] = 0.0
        if files.objective == "kdrl":
            rollouts["own_advantage"] = advantages(rollouts)
        if files.objective == "masked":
            left = rollouts[rollouts.finish_reason == "stop"]  # truncated ones leave their group, too
            groups = left.reward.astype(float).groupby(left.prompt_id)
            spread = groups.transform("std").fillna(0.0)
            rollouts["own_advantage"] = (left.reward - groups.transform("mean")) / (spread + 1e-5)
            rollouts = rollouts.fillna({"own_advantage": 0.0})
        joined = completions[completions.optimizer_step == step].merge(rollouts, on=["prompt_id", "sample"])
        joined = joined.merge(files.scores(number), on=["prompt_id", "sample"], validate="one_to_one")
        assert len(joined) == PROMPTS * SAMPLES // 2
        np.testing.assert_allclose(joined.advantage, joined.own_advantage, atol=1e-5)

        logprobs = forward(files.student(number))
        losses = []
        for row in joined.itertuples():
            student = logprobs(row.prompt_token_ids, row.completion_token_ids)
            s = of_tokens(student, row.completion_token_ids)
            np.testing.assert_allclose(row.proximal_logprobs, s, atol=1e-4, rtol=0)
            losses.append(token_losses(files, number, row, student, s))
        if files.objective == "masked":  # a mean per completion, then over those with a token left
            means = [values.mean() for values in losses if values.size]
            assert 0 < len(means) < len(losses)
            expected = sum(means) / len(means)
        else:
            expected = np.concatenate(losses).mean()
        assert logged_loss(files, number, int(step)) == pytest.approx(expected, abs=1e-4, rel=1e-4)
        assert abs(expected) > 1e-2, "a loss of nothing would prove nothing"


def token_losses(files: Files, number: int, row: Any, student: np.ndarray, s: np.ndarray) -> np.ndarray:
    """The loss of each token that counts, before the first update, where s = p."""
    settings = OBJECTIVES[files.objective]
    b, q = np.asarray(row.sampler_logprobs, float), np.asarray(row.teacher_logprobs, float)
    ratio = np.exp(s - b)
    match files.objective:
        case "rkl":
            return settings["distill_weight"] * -ratio * (q - s) * s
        case "jsd":
            scores = files.scores(number)
            index = list(zip(scores.prompt_id, scores["sample"], strict=True)).index(
                (row.prompt_id, row.sample)
            )
            teacher = hidden_logprobs(files, number)[index]
            return (np.exp(student) * (student - teacher)).sum(1)
        case "jsd-top5":
            return jsd_with_tail(row, student, beta=0.3)
        case "skew-union":
            return skew_rkl_with_tail(row, student, alpha=0.2)
        case "kdrl":
            clipped = np.clip(1.0, 1 - 0.2, 1 + 0.2)  # u = exp(s - p) = 1
            truncated = np.minimum(ratio, 1.0)
            rl = np.maximum(-row.own_advantage * 1.0, -row.own_advantage * clipped) * truncated
            return settings["rl_weight"] * rl + settings["distill_weight"] * ratio * 0.5 * (s - q) ** 2
        case "masked":
            if row.finish_reason != "stop":
                return np.zeros(0)
            k3 = np.exp(q - s) - 1 - (q - s)  # its baseline changes the gradient, not the value
            losses = -row.own_advantage * ratio + 0.5 * (not row.correct) * ratio * k3
            return losses[:-1]
    raise AssertionError(files.objective)


def skew_rkl_with_tail(row: Any, student: np.ndarray, *, alpha: float) -> np.ndarray:
    values = []
    for t, line in enumerate(np.stack(row.topk_ids)):
        ids = line[line >= 0]
        S = np.exp([*student[t, ids], np.log(np.exp(np.delete(student[t], ids)).sum())])
        P = np.exp([*row.topk_logprobs[t][: len(ids)], row.tail_logprobs[t]])
        values.append((S * np.log(S / (alpha * S + (1 - alpha) * P))).sum())
    return np.array(values)


def jsd_with_tail(row: Any, student: np.ndarray, *, beta: float) -> np.ndarray:
    ids = np.stack(row.topk_ids)
    rest = student.copy()
    np.put_along_axis(rest, ids, -np.inf, axis=1)
    S = np.exp(np.column_stack([np.take_along_axis(student, ids, axis=1), logsumexp(rest)]))
    P = np.exp(np.column_stack([np.stack(row.topk_logprobs), row.tail_logprobs]).astype(float))
    m = beta * P + (1 - beta) * S
    return (beta * P * np.log(P / m) + (1 - beta) * S * np.log(S / m)).sum(1)


def advantages(rollouts: pd.DataFrame) -> pd.Series:
    """GRPO by hand: scale, shift and clip; group mean and sample std; then those of all completions."""
    settings = OBJECTIVES["kdrl"]
    shaped = ((rollouts.reward.astype(float) + settings["reward_bias"]) * settings["reward_scaling"]).clip(
        -4, 4
    )
    groups = shaped.groupby(rollouts.prompt_id)
    values = (shaped - groups.transform("mean")) / (groups.transform("std") + 1e-5)
    return (values - values.mean()) / (values.std() + 1e-5)


def logged_loss(files: Files, number: int, step: int) -> float:
    path = files.run / f"round-{number:03d}" / "train" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    [row] = [row for row in rows if (row["name"], row["optimizer_step"]) == ("train/loss", step)]
    assert row["round"] == number
    return float(row["value"])
