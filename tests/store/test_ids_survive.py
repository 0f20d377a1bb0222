"""Token ids travel, never text: completions that another tokenization of their text would change, in a whole run."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kdpipe.engines import protocol as engine
from kdpipe.engines.protocol import Completion, SampleRequest, ScoreRequest, TokenScores
from tests.worlds import load_tiny, run_near


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Letters and pairs of them: every pair of letters that has a token is always encoded as that one."""
    letters = [*"abcdefgh0123456789# ", "<s>", "</s>"]
    pairs = [(x, y) for x in "abcd" for y in "abcd"]
    words = [*letters, *(x + y for x, y in pairs)]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def write_model(folder: Path, *, seed: int) -> None:
    tokenizer = merging_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def logprobs(folder: Path, prompt: Any, completion: Any) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    ids = [*map(int, prompt), *map(int, completion)]
    with torch.no_grad():
        full = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1).numpy()
    return full[np.arange(len(prompt) - 1, len(ids) - 1), np.asarray(completion, int)]


def test_ids_that_no_encoder_would_choose_are_what_is_scored_and_trained(tmp_path: Path) -> None:
    for name, seed in (("student", 1), ("teacher", 2)):
        write_model(tmp_path / name, seed=seed)
    for split in ("train", "test"):
        rows = [{"question": f"ab {number}", "answer": f"#### {number}"} for number in range(8)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"kind": "jsonl", "train": "train.jsonl", "test": "test.jsonl", "prompt": "plain"}
    loaded = load_tiny(
        tmp_path,
        rounds=1,
        task={**task, "instruction": ""},
        student={"model": "./student", "dtype": "float32"},
        teachers=[{"model": "./teacher", "dtype": "float32"}],
        rollout={"prompts": 8, "samples": 4, "max_new_tokens": 12},
        train__minibatches=1,
    )
    run = run_near(loaded, tmp_path / "out").run.path
    rollouts = pd.read_parquet(run / "round-001/rollout/rollouts.parquet")
    scores = pd.read_parquet(run / "round-001/teacher-score/scores.parquet")
    trained = pd.read_parquet(run / "round-001/train/completions.parquet")
    joined = rollouts.merge(scores, on=["prompt_id", "sample"]).merge(trained, on=["prompt_id", "sample"])
    tokenizer = merging_tokenizer()
    others = 0
    for row in joined.itertuples():
        ids = [int(token) for token in row.completion_token_ids]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        kept = ids[:-1] if row.finish_reason == "stop" else ids
        others += tokenizer.encode(text, add_special_tokens=False) != kept
        own = logprobs(tmp_path / "student", row.prompt_token_ids, ids)
        np.testing.assert_allclose(row.sampler_logprobs, own, atol=1e-4)
        np.testing.assert_allclose(row.proximal_logprobs, own, atol=1e-4)
        taught = logprobs(tmp_path / "teacher", row.teacher_prompt_token_ids, ids)
        np.testing.assert_allclose(row.teacher_logprobs, taught, atol=1e-4)
    assert len(joined) == 32
    assert others > 16, "most of the completions have to be of ids that their text would not give back"


def test_what_engines_are_asked_and_answer_has_no_text_in_it() -> None:
    for kind in (SampleRequest, ScoreRequest, Completion, TokenScores):
        hints = get_type_hints(kind, {**vars(engine), "np": np, "npt": np.typing})
        texts = {field.name for field in fields(kind) if "str" in str(hints[field.name])}
        assert texts == set(), kind
