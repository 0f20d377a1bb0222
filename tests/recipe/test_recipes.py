"""Every shipped recipe parses and says what it is; the GPU recipes run, with only models and sizes replaced."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM as AutoModel
from transformers import PreTrainedConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

from kdpipe.data.tables import read_rollouts, read_scores
from kdpipe.recipe.file import load_recipe
from kdpipe.recipe.schema import Recipe, resolved
from tests.worlds import run_near

RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
CHAT = (
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (
    "{%- if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}"
)
COMMON_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN3_TOKENS = ["<tool_response>", "</tool_response>", "<think>", "</think>"]
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def recipe_of(name: str) -> Recipe:
    return load_recipe(RECIPES / f"{name}.yaml").recipe


# ------------------------------------------------------------------------------------------- as they are


def test_the_recipes_that_should_be_here_are() -> None:
    assert NAMES == ["gsm8k-qwen3-kdrl", "gsm8k-qwen3-opd", "gsm8k-smollm2-cpu", "quickstart"]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_loads_and_is_called_like_its_file(name: str) -> None:
    assert recipe_of(name).name == name


@pytest.mark.parametrize("name", NAMES)
def test_the_head_of_a_recipe_says_what_it_shows_needs_and_whether_it_was_run(name: str) -> None:
    lines = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    head = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    assert re.fullmatch(r"# \S.*\.", head[0]), "the first line is a title, a sentence"
    assert len(head[0]) <= 120
    for word in ("# Shows: ", "# Needs: ", "# Run: "):
        assert any(line.startswith(word) for line in head), word


def test_kdrl_has_the_values_of_areals_example() -> None:
    recipe = recipe_of("gsm8k-qwen3-kdrl")
    objective, optimizer = recipe.train.objective, recipe.train.optimizer
    assert (recipe.student.model, recipe.teacher.model) == ("Qwen/Qwen3-0.6B", "Qwen/Qwen2.5-14B-Instruct")
    assert (recipe.student.dtype, recipe.teacher.dtype) == ("bfloat16", "bfloat16")
    assert recipe.student.template == {"enable_thinking": False}
    rollout = recipe.rollout
    assert (rollout.prompts, rollout.samples) == (256, 4)
    assert (rollout.temperature, rollout.top_p, rollout.top_k) == (1.0, 1.0, 0)
    assert rollout.max_new_tokens == 2048
    assert (recipe.rounds, recipe.evaluate.every) == (10 * (7473 // 256), 7473 // 256)
    assert (optimizer.learning_rate, optimizer.weight_decay) == (1.7e-5, 0.017)
    assert (optimizer.betas, optimizer.eps) == ((0.9, 0.999), 1e-8)
    assert (optimizer.schedule, optimizer.warmup_steps) == ("constant", int(0.001 * 290))
    assert optimizer.max_grad_norm == 1.0
    assert (recipe.train.minibatches, recipe.train.epochs) == (1, 1)
    assert (objective.kind, objective.kd.term) == ("kdrl", "rkl")
    assert (objective.rl_weight, objective.distill_weight) == (1.0, 0.005)
    assert (objective.reward_scaling, objective.reward_bias, objective.reward_clip) == (10.0, -0.5, 20.0)
    assert (objective.group_normalization, objective.batch_normalization) == ("mean_std", True)
    assert (objective.clip_low, objective.clip_high, objective.dual_clip) == (0.4, 0.4, None)
    assert (objective.behaviour.control, objective.behaviour.cap) == ("mask", 5.0)
    assert recipe.runtime.gradient_checkpointing
    assert recipe.runtime.train_tokens == 10240


# ------------------------------------------------------------------------------------------ GPU recipes


def tiny_tokenizer(*, thinks: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE as Qwen's; one that thinks has four more ids and `enable_thinking` in its template."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(400)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(words)] * 2, trainer)
    tokenizer.add_special_tokens(COMMON_TOKENS)
    if thinks:
        tokenizer.add_tokens(QWEN3_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT + (THINKING if thinks else ""),
    )


def write_tiny_model(folder: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with a random model as a hub repository holds one; more rows than ids, as Qwen's have."""
    config.vocab_size = 1024
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModel.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_gsm8k(folder: Path) -> Path:
    """A folder in the format of GSM8K's authors."""
    folder.mkdir()
    for split, number in (("train", 24), ("test", 8)):
        rows = [
            {"question": f"Ann has {n} eggs and gets 2.", "answer": f"{n} + 2 = {n + 2}\n#### {n + 2}"}
            for n in range(number)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of a JSON document by its dotted path."""
    match value:
        case dict() if value:
            return {
                key: leaf for name in value for key, leaf in leaves(value[name], f"{path}.{name}").items()
            }
        case list() if value:
            return {
                key: leaf for i, item in enumerate(value) for key, leaf in leaves(item, f"{path}.{i}").items()
            }
    return {path.removeprefix("."): value}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gsm8k-qwen3-kdrl", "gsm8k-qwen3-opd"])
def test_a_gpu_recipe_runs_two_rounds_with_only_models_data_engines_and_counts_replaced(
    tmp_path: Path, name: str
) -> None:
    joint = name == "gsm8k-qwen3-kdrl"
    qwen3 = tiny_tokenizer(thinks=True)
    student = write_tiny_model(
        tmp_path / "student", Qwen3Config(**SHAPE, head_dim=8, tie_word_embeddings=True), qwen3
    )
    teacher = (
        write_tiny_model(tmp_path / "teacher", Qwen2Config(**SHAPE), tiny_tokenizer(thinks=False))
        if joint
        else write_tiny_model(tmp_path / "teacher", Qwen3Config(**SHAPE, head_dim=16), qwen3)
    )
    replaced = {
        "student.model": str(student),
        "teachers.0.model": str(teacher),
        "task.data": str(write_gsm8k(tmp_path / "gsm8k")),
        "rollout.engine": "hf",
        "teacher_score.engine": "hf",
        "rounds": 2,
        "rollout.prompts": 4,
        "rollout.max_new_tokens": 8,
        "evaluate.problems": 4,
        "evaluate.reverse_kl_problems": 2,
        "runtime.threads": 1,
        "runtime.device": "cpu",
        "runtime.allow_weak_teacher": True,
        "tracking.enabled": False,
    }
    sets = (f"{key}={json.dumps(value)}" for key, value in replaced.items())
    run_near(load_recipe(RECIPES / f"{name}.yaml", tuple(sets)), tmp_path / "out")

    [run] = (tmp_path / "out" / "runs").iterdir()
    before = leaves(resolved(recipe_of(name)))
    after = leaves(json.loads((run / "resolved.json").read_text(encoding="utf-8"))["recipe"])
    assert {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)} == set(replaced)

    samples = 4 if joint else 1
    for number in ("round-001", "round-002"):
        rollouts = read_rollouts(run / number / "rollout" / "rollouts.parquet")
        scores = read_scores(run / number / "teacher-score" / "scores.parquet")
        assert len(rollouts) == len(scores) == 4 * samples
        assert (run / number / "train" / "model" / "config.json").is_file()
        for row, score in zip(rollouts, scores, strict=True):
            thinks = {qwen3.convert_tokens_to_ids(token) for token in QWEN3_TOKENS}
            assert thinks & set(row.prompt_token_ids), "thinking is switched off by ids of the prompt"
            # A teacher that lacks those ids reads the question in its own template.
            assert (row.prompt_token_ids == list(score.teacher_prompt_token_ids)) is not joint
            assert not (joint and thinks & set(score.teacher_prompt_token_ids))
            assert (score.topk_ids is None) is joint
    summary = run / "round-002" / "evaluate-student" / "summary.json"
    assert json.loads(summary.read_text(encoding="utf-8"))["round"] == 2
