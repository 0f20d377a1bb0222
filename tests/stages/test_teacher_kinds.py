"""Teachers with a chat template, arguments and a temperature of their own: computed again from files of whole runs."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kdpipe.errors import Interrupted
from kdpipe.recipe.file import LoadedRecipe
from tests.models.test_prompting import CHAT, byte_tokenizer
from tests.worlds import Watcher, load_tiny, payload_digests, run_near

T, T_TEACHER = 1.4, 0.6
OWN = CHAT + "{% if mood is defined %}({{ mood }}) {% endif %}"
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "another model": (
        {"model": "./teacher", "template": {"mood": "calm"}},
        "<s><|start|>user\nHow many?\n\n{q}<|end|>\n<|start|>assistant\n(calm) ",
    ),
    "another model, shown a hint": (
        {"model": "./teacher", "template": {"mood": "calm"}, "prompt": "{question} ({hint}: {solution})"},
        "<s><|start|>user\n{q} (as is: #### {q})<|end|>\n<|start|>assistant\n(calm) ",
    ),
    "the student before": (
        {"self": "initial", "template": {"mood": "sure"}},
        "<s><|start|>user\nHow many?\n\n{q}<|end|>\n<|start|>assistant\n(sure) ",
    ),
}


def write_model(folder: Path, tokenizer: PreTrainedTokenizerFast, *, seed: int) -> None:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def recipe(folder: Path, teacher: dict[str, Any], **changes: Any) -> LoadedRecipe:
    write_model(folder / "student", byte_tokenizer(chat_template=OWN), seed=1)
    write_model(folder / "teacher", byte_tokenizer(chat_template=OWN), seed=2)
    for split in ("train", "test"):
        rows = [{"question": str(number), "answer": f"#### {number}", "hint": "as is"} for number in range(6)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {
        "rounds": 1,
        "task": {"kind": "jsonl", "train": "train.jsonl", "test": "test.jsonl", "instruction": "How many?"},
        "student": {"model": "./student", "dtype": "float32"},
        "teachers": [{**teacher, "dtype": "float32", "temperature": T_TEACHER}],
        "rollout": {"prompts": 6, "samples": 2, "max_new_tokens": 8, "temperature": T},
        "train__objective": {"kd": {"term": "jsd", "support": {"teacher_top_k": 4}}},
        "evaluate": {"reverse_kl_problems": 4},
    }
    return load_tiny(folder, **{**settings, **changes})


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if "hint" in kind else pytest.mark.slow) for kind in KINDS]
)
def test_scores_are_of_the_prompt_that_its_own_template_renders(tmp_path: Path, kind: str) -> None:
    teacher, rendered = KINDS[kind]
    run = run_near(recipe(tmp_path, teacher), tmp_path / "out").run.path
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "student")
    folder = tmp_path / ("student" if "self" in teacher else "teacher")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    rollouts = pd.read_parquet(run / "round-001/rollout/rollouts.parquet")
    scores = pd.read_parquet(run / "round-001/teacher-score/scores.parquet")
    held_out = pd.read_parquet(run / "round-001/evaluate-student/reverse_kl.parquet")
    held_out = held_out.rename(columns={"teacher_prompt_token_ids": "own_prompt"})
    pairs = rollouts.merge(scores, on=["prompt_id", "sample"], validate="one_to_one")
    pairs = pairs.rename(columns={"teacher_prompt_token_ids": "own_prompt"})
    assert (len(pairs), len(held_out)) == (12, 4)
    for row in (*pairs.itertuples(), *held_out.itertuples()):
        text = rendered.replace("{q}", row.prompt_id.rpartition("/")[2])
        prompt, ids = list(row.own_prompt), list(row.completion_token_ids)
        assert tokenizer.decode(prompt) == text
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0]
        full = (logits[len(prompt) - 1 : -1] / T_TEACHER).log_softmax(-1).numpy()
        np.testing.assert_allclose(row.teacher_logprobs, full[np.arange(len(ids)), ids], atol=1e-4)
    for row in pairs.itertuples():
        assert tokenizer.decode(row.prompt_token_ids).endswith("<|start|>assistant\n"), "the student's own"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_while_it_scores_ends_with_the_same_digests(tmp_path: Path, kind: str) -> None:
    folders = tmp_path / "unbroken", tmp_path / "stopped"
    for folder in folders:
        folder.mkdir()
    unbroken, loaded = (recipe(folder, KINDS[kind][0], runtime__part_rows=4) for folder in folders)
    run_near(unbroken, folders[0] / "out")
    watcher = Watcher()

    def on_event(at: str, event: dict[str, Any]) -> None:
        if (at, event.get("unit"), event.get("done")) == ("teacher-score@1", "completions", 8):
            os.kill(os.getpid(), signal.SIGTERM)

    watcher.on_event = on_event
    with pytest.raises(Interrupted, match="at teacher-score@1"):
        run_near(loaded, folders[1] / "out", watcher=watcher)
    run_near(loaded, folders[1] / "out")
    assert payload_digests(folders[1] / "out") == payload_digests(folders[0] / "out")
