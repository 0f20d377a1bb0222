"""What the recipes of digests.yaml need: tiny random models, problems, and a teacher behind HTTP. Nothing of kdpipe."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

WORDS = ("?", ".", *"0123", "what", "is", "plus", "=", "####")
SPECIAL = {"unk_token": "?", "pad_token": "?", "eos_token": "."}
MODELS = {"student": "llama", "teacher": "qwen3", "other": "mistral"}
SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 8}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96}


def write_world(folder: Path) -> None:
    """Tiny random models of three architectures with one vocabulary of words, and problems for them."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}="
    ids = {"vocab_size": len(WORDS), "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    for seed, (name, family) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        config = CONFIG_MAPPING[family](**SIZES, **HEADS, **ids, initializer_range=0.4)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    sums = [terms for terms in itertools.product(range(4), repeat=4) if sum(terms) <= 3]
    random.Random(0).shuffle(sums)
    for split, chosen in (("train", sums[:25]), ("test", sums[25:])):
        texts = [(" plus ".join(map(str, terms)), sum(terms)) for terms in chosen]
        rows = [{"question": f"what is {text}", "answer": f"{text} = {n}\n#### {n}"} for text, n in texts]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@cache
def logprobs_after(token: int) -> list[float]:
    """What the served model, a bigram, thinks of each id after `token`."""
    logits = [random.Random(f"{token} {following}").gauss(0, 2) for following in range(len(WORDS))]
    total = math.log(sum(map(math.exp, logits)))
    return [logit - total for logit in logits]


def scored(ids: list[int], k: int) -> Iterator[dict[str, Any] | None]:
    """The prompt_logprobs of vLLM: for each position its own id and the k most probable ones."""
    yield None
    for before, own in itertools.pairwise(ids):
        row = logprobs_after(before)
        order = sorted(range(len(row)), key=lambda token: -row[token])
        yield {str(i): {"logprob": row[i], "rank": order.index(i) + 1} for i in {own, *order[:k]}}


def sampled(ids: list[int], body: dict[str, Any]) -> dict[str, Any]:
    """A completion with its log-probs, which the request's seed decides."""
    dice, drawn, logprobs = random.Random(body.get("seed")), [], []
    while len(drawn) < body["max_tokens"] and not set(drawn) & set(body.get("stop_token_ids", ())):
        row = logprobs_after((ids + drawn)[-1])
        token = max(range(len(row)), key=row.__getitem__)
        if body["temperature"] > 0:
            [token] = dice.choices(range(len(row)), weights=map(math.exp, row))
        drawn.append(token)
        logprobs.append(row[token])
    ended = drawn[-1] in body.get("stop_token_ids", ())
    said = {"tokens": [f"token_id:{token}" for token in drawn], "token_logprobs": logprobs}
    return {"finish_reason": "stop" if ended else "length", "token_ids": drawn, "logprobs": said}


class BigramServer(BaseHTTPRequestHandler):
    """Answers as vLLM's completions server does."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer({"object": "list", "data": [{"id": "served", "max_model_len": 96}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        ids = body["prompt"]
        choice = {"index": 0, "text": "", "prompt_token_ids": ids, **sampled(ids, body)}
        if body.get("prompt_logprobs") is not None:
            choice["prompt_logprobs"] = list(scored(ids, body["prompt_logprobs"]))
        self._answer({"object": "text_completion", "model": body["model"], "choices": [choice]})

    def _answer(self, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        """Nothing is printed of requests."""
