"""The recipes whose runs are replayed, the world that they run in, and one fault for each.

The only module here that may use kdpipe: it makes the runs. A fault is a change of the recipe that only the replay
reads, so that it computes something else than the run did.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from kdpipe.models.tokenizer import arithmetic_tokenizer
from tests.replay.reading import Run
from tests.worlds import load_tiny, run_near

WORDS = [*"0123456789", "+", "####", "\n", "Tom", "has", "apples", "pens"]
TEMPLATE = (
    "{% for turn in messages %}{{ 'pens' if turn.role == 'user' else 'Tom' }}\n{{ turn.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}####\n{% endif %}"
)
HINTED = "{question} {hint} + {question}"
MODELS = {"student": (16, 1), "first": (24, 2), "second": (20, 3), "other-end": (24, 4), "qwen2": (16, 5)}
"""Width and seed."""


def write_world(folder: Path) -> None:
    """Five sharp random models with padding rows and three end ids, and problems with a kind and a hint."""
    for name, (width, seed) in MODELS.items():
        write_model(folder / name, width=width, seed=seed, end="pens" if name == "other-end" else "<eos>")
    for split, count in (("train", 24), ("test", 4)):
        rows = [
            {
                "question": "Tom has" + " 7 + Tom" * ((number * 5) % 6) + f" {number}",
                "answer": f"{number} + #### {number % 4}",
                "kind": number % 3,
                "hint": " ".join(f"{number:03d}"),
            }
            for number in range(count)
        ]
        write_lines(folder / f"{split}.jsonl", rows)
        write_lines(folder / f"{split}-asked.jsonl", [{"prompt": row["question"]} for row in rows])


def write_model(folder: Path, *, width: int, seed: int, end: str) -> None:
    tokenizer = arithmetic_tokenizer(WORDS)
    tokenizer.eos_token, tokenizer.chat_template = end, TEMPLATE
    is_qwen = folder.name == "qwen2"
    config = (Qwen2Config if is_qwen else LlamaConfig)(
        vocab_size=32,  # 20 are in use
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=96,
        initializer_range=0.35,
        tie_word_embeddings=is_qwen,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(end),
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if end == "<eos>":
        model.generation_config.eos_token_id = [1, tokenizer.convert_tokens_to_ids("apples"), 16]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def first(**changes: Any) -> list[dict[str, Any]]:
    return [{"name": "first", "model": "./first", "dtype": "float32", **changes}]


DATA = {"train": "train.jsonl", "test": "test.jsonl", "prompt": "chat", "instruction": "Tom has"}
DEFAULTS: dict[str, Any] = {
    "rounds": 2,
    "task": {"kind": "jsonl", **DATA, "reward": "flexible"},
    "student": {"model": "./student", "dtype": "float32"},
    "teachers": first(),
    "rollout": {"prompts": 8, "samples": 3, "max_new_tokens": 8, "temperature": 1.3},
    "train": {"minibatches": 2},
    "train__optimizer": {"learning_rate": 2e-3, "betas": [0.9, 0.99], "max_grad_norm": 0.5},
    "evaluate": {"reverse_kl_problems": 0, "teacher": False, "every": 9},
    "runtime__train_tokens": 300,  # an optimizer step is several micro-batches
    "runtime__keep": {"weights": 9, "optimizer": 9},
}


@dataclass(frozen=True)
class Case:
    """A recipe, as changes of the world's, and the fault that its replay has to notice."""

    objective: Mapping[str, Any]
    fault: Mapping[str, Any]
    changes: Mapping[str, Any] = field(default_factory=dict)

    def run(self, folder: Path) -> Run:
        """Writes the world to `folder`, runs the recipe there, and returns the finished run."""
        write_world(folder)
        settings = copy.deepcopy({**DEFAULTS, "train__objective": self.objective, **self.changes})
        project = run_near(load_tiny(folder, **settings), folder / "out")
        return Run(project.run.path)


def kd(term: str, **parameters: Any) -> dict[str, Any]:
    return {"term": term, **parameters}


STUDENT = {"model": "./student", "dtype": "float32"}
FAST = {"learning_rate": 2e-2, "betas": [0.9, 0.99], "max_grad_norm": 0.5}
"""Steps that take ratios to where their controls act."""
OFTEN = {"train__epochs": 2, "train__optimizer": FAST}
GROUPS = {"rollout": {"prompts": 8, "samples": 6, "max_new_tokens": 10, "temperature": 1.3}}
ROUTED = [
    *first(only={"kind": 0}, prompt=HINTED, temperature=0.8),
    {"name": "second", "model": "./second", "dtype": "float32", "only": {"kind": [1, "2"]}},
]
MIXED = [
    *first(prompt=HINTED, temperature=0.8, weight=3.0),
    {"name": "second", "model": "./second", "dtype": "float32"},
]
AVERAGE = {"name": "average", "self": "ema", "decay": 0.75}
HALF = {"prompts": 8, "samples": 3, "max_new_tokens": 8, "temperature": 1.3, "on_policy_fraction": 0.5}
JSD = kd("jsd", beta=0.5, support="vocabulary")

CASES: dict[str, Case] = {
    "rkl": Case({"kd": "rkl", "distill_weight": 0.7}, {"train.objective.distill_weight": 0.71}, OFTEN),
    "rkl, gamma 1, baseline of the step, truncated ratio": Case(
        {
            "kd": kd("rkl", gamma=1.0, baseline="step", ratio={"control": "truncate", "cap": 1.05}),
            "normalization": "sequence",
        },
        {"train.objective.kd.gamma": 0.99},
        OFTEN,
    ),
    "rkl, exact baseline, masked ratio": Case(
        {
            "kd": kd(
                "rkl",
                baseline="exact",
                support={"teacher_top_k": 6},
                ratio={"control": "mask", "low": 0.9, "high": 1.1},
            ),
            "normalization": "fixed",
        },
        {"train.objective.kd.ratio.high": 1.2},
        OFTEN,
    ),
    "k2, baseline of the group, clipped ratio": Case(
        {"kd": kd("k2", baseline="group", ratio={"control": "clip", "low": 0.05, "high": 0.1})},
        {"train.objective.kd.baseline": "step"},
        OFTEN,
    ),
    "k3, decoupled ratios": Case(
        {
            "kd": kd(
                "k3",
                decoupled={
                    "update": {"control": "clip", "low": 0.05, "high": 0.05},
                    "behaviour": {"control": "truncate", "cap": 1.0},
                },
            ),
            "normalization": "fixed",
            "fixed_length": 5,
        },
        {"train.objective.kd.decoupled.update.low": 0.1},
        OFTEN,
    ),
    "k1_loss, to reproduce it": Case(
        {"kd": "k1_loss", "distill_weight": 0.1},
        {"train.objective.distill_weight": 0.11},
        {"reproduce": True},
    ),
    "jsd, vocabulary": Case(
        {"kd": kd("jsd", beta=0.3, support="vocabulary")}, {"train.objective.kd.beta": 0.31}
    ),
    "jsd, teacher's top 5 in float16": Case(
        {"kd": kd("jsd", beta=0.0, support={"teacher_top_k": 5})},
        {"train.objective.kd.beta": 0.01},
        {"teacher_score": {"logprobs": "float16"}},
    ),
    "jsd, student's top 5": Case(
        {"kd": kd("jsd", beta=1.0, support={"student_top_k": 5})}, {"train.objective.kd.beta": 0.99}
    ),
    "jsd, top 4 of either": Case(
        {"kd": kd("jsd", beta=0.3, support={"union_top_k": 4})}, {"train.objective.kd.support.union_top_k": 3}
    ),
    "skew_kl": Case(
        {"kd": kd("skew_kl", alpha=0.2, support={"teacher_top_k": 6})}, {"train.objective.kd.alpha": 0.21}
    ),
    "skew_rkl": Case(
        {"kd": kd("skew_rkl", alpha=0.2, support={"union_top_k": 4})},
        {"train.objective.kd.term": "skew_kl"},
        {"teachers": first(temperature=0.9)},
    ),
    "rkl, hidden states kept": Case(
        {"kd": "rkl"}, {"teachers.0.temperature": 1.0}, {"teacher_score": {"keep": "hidden"}}
    ),
    "grpo, less the mean, over the batch": Case(
        {
            "kind": "grpo",
            "group_normalization": "mean",
            "batch_normalization": True,
            "reward_scaling": 10.0,
            "reward_bias": -0.5,
            "reward_clip": 4.0,
            "dual_clip": 1.05,
            "clip_low": 0.05,
            "clip_high": 0.1,
        },
        {"train.objective.dual_clip": None},
        {**GROUPS, **OFTEN},
    ),
    "grpo, over the group": Case(
        {"kind": "grpo", "truncated": "no_reward"},
        {"train.objective.group_normalization": "mean"},
        {"rollout": {"prompts": 12, "samples": 8, "max_new_tokens": 16, "temperature": 1.3}},
    ),
    "kdrl, linear schedule, wrong ones": Case(
        {
            "kind": "kdrl",
            "kd": "k2",
            "rl_weight": 1.5,
            "distill_weight": 0.4,
            "distill_schedule": {"kind": "linear", "end": 0.1},
            "mask": "wrong",
        },
        {"train.objective.distill_schedule.end": 0.11},
        {
            **GROUPS,
            "train__optimizer": {
                "learning_rate": 2e-3,
                "schedule": "cosine",
                "warmup_steps": 1,
                "weight_decay": 0.1,
            },
        },
    ),
    "kdrl, cosine schedule, groups without a right one": Case(
        {
            "kind": "kdrl",
            "kd": JSD,
            "distill_schedule": {"kind": "cosine", "end": 0.2},
            "mask": "all_wrong_groups",
            "behaviour": {"control": "truncate", "cap": 1.0},
        },
        {"train.objective.mask": "wrong"},
        {**GROUPS, "train__optimizer": {"learning_rate": 2e-3, "schedule": "linear", "weight_decay": 0.1}},
    ),
    "srpo": Case(
        {"kind": "srpo", "rl_weight": 1.2, "distill_weight": 0.6, "clip_high": 0.05},
        {"train.objective.clip_high": 0.2},
        {**GROUPS, **OFTEN},
    ),
    "then, both phases": Case(
        {"kind": "then", "kd_rounds": 1, "kd": "rkl", "distill_schedule": {"kind": "linear", "end": 0.5}},
        {"train.objective.distill_schedule.end": 0.51},
        GROUPS,
    ),
    "LoRA": Case(
        {"kd": JSD},
        {"train.objective.kd.beta": 0.51},
        {"student": {**STUDENT, "lora": {"rank": 2, "alpha": 6}}},
    ),
    "LoRA after a cold start of all weights": Case(
        {"kd": "k2"},
        {"student.sft.optimizer.schedule": "cosine"},
        {"student": {**STUDENT, "lora": {"rank": 3, "alpha": 3}, "sft": {"steps": 5, "batch": 7}}},
    ),
    "routed teachers": Case({"kd": "k2"}, {"teachers.0.temperature": 0.81}, {"teachers": ROUTED}),
    "routed teachers, top 5": Case(
        {"kd": kd("skew_kl", alpha=0.3, support={"teacher_top_k": 5})},
        {"teachers.0.prompt": "{question} {hint} {question}"},
        {"teachers": ROUTED},
    ),
    "mixed teachers, vocabulary": Case({"kd": JSD}, {"teachers.0.weight": 2.9}, {"teachers": MIXED}),
    "mixed teachers, top 5": Case(
        {"kd": kd("jsd", beta=0.5, support={"teacher_top_k": 5})},
        {"train.objective.kd.support.teacher_top_k": 4},
        {"teachers": MIXED},
    ),
    "average of the student, cooler": Case(
        {"kd": "rkl"},
        {"teachers.0.decay": 0.76},
        {"teachers": [{**AVERAGE, "temperature": 0.9}], "rounds": 3},
    ),
    "average that is the student": Case(  # every step is skipped
        {"kd": "rkl"}, {"train.objective.kd.term": "k1_loss"}, {"teachers": [AVERAGE]}
    ),
    "present student that sees the solution": Case(
        {"kd": "k2"},
        {"teachers.0.prompt": "{question} {hint}"},
        {"teachers": [{"name": "shown", "self": "current", "prompt": "{question} {solution}"}]},
    ),
    "student 0, cooler": Case(
        {"kd": JSD},
        {"teachers.0.self": "current"},
        {"teachers": [{"name": "cool", "self": "initial", "temperature": 0.7}]},
    ),
    "reference text, cross-entropy": Case(
        {"kd": kd("k2", baseline="step"), "distill_weight": 0.5},
        {"rollout.on_policy_fraction": 0.625},
        {"rollout": HALF},
    ),
    "reference text, kd": Case(
        {"kd": JSD}, {"train.objective.off_policy_term": "cross_entropy"}, {"rollout": HALF}
    ),
    "teacher's text, cross-entropy": Case(
        {"kd": "k2"},
        {"seed": 2},
        {"rollout": {**HALF, "off_policy_text": "teacher"}},
    ),
    "shuffled teacher": Case({"kd": "k2"}, {"train.control": "none"}, {"train__control": "shuffled_teacher"}),
    "shuffled teacher, top 4 of either": Case(
        {"kd": kd("jsd", beta=0.3, support={"union_top_k": 4})},
        {"train.control": "none"},
        {"train__control": "shuffled_teacher"},
    ),
    "constant advantage": Case(
        {"kd": "rkl"}, {"train.control": "none"}, {"train__control": "constant_advantage"}
    ),
    "Qwen2, tied embeddings": Case(
        {"kd": JSD}, {"train.objective.kd.beta": 0.51}, {"student": {**STUDENT, "model": "./qwen2"}}
    ),
    "end token masked, cut ones dropped": Case(
        {"kd": "k2", "end_token": "mask", "truncated": "drop"}, {"train.objective.end_token": "keep"}
    ),
    "end tokens swapped": Case(
        {"kd": JSD, "end_token": "alias"},
        {"train.objective.end_token": "keep"},
        {"teachers": [{"name": "other", "model": "./other-end", "dtype": "float32"}]},
    ),
    "end tokens swapped, top 5": Case(
        {"kd": kd("jsd", beta=0.5, support={"union_top_k": 4}), "end_token": "alias"},
        {"train.objective.end_token": "keep"},
        {"teachers": [{"name": "other", "model": "./other-end", "dtype": "float32"}]},
    ),
    "top_p and top_k": Case(
        {"kd": "rkl"},
        {"rollout.top_p": 0.85},
        {"rollout": {"prompts": 8, "samples": 3, "max_new_tokens": 8, "top_p": 0.8, "top_k": 12}},
    ),
    "grpo in bfloat16, masked behaviour": Case(
        {"kind": "grpo", "behaviour": {"control": "mask", "cap": 1.01}, "group_normalization": "mean"},
        {"train.objective.behaviour.cap": 1.1},
        {**GROUPS, "student": {**STUDENT, "dtype": "bfloat16"}},
    ),
    "bfloat16": Case(
        {"kd": JSD},
        {"train.objective.kd.beta": 0.9},
        {"student": {**STUDENT, "dtype": "bfloat16"}},
    ),
    "cold start": Case(
        {"kd": "rkl"},
        {"student.sft.batch": 8},
        {"student": {**STUDENT, "sft": {"steps": 6, "batch": 7, "problems": 20}}},
    ),
    "prompts without answers, plain": Case(
        {"kd": JSD},
        {"task.prompt": "chat"},
        {
            "task": {
                "kind": "jsonl",
                "train": "train-asked.jsonl",
                "test": "test-asked.jsonl",
                "prompt": "plain",
                "grader": "none",
            },
            "evaluate": {"reverse_kl_problems": 4},
        },
    ),
}
