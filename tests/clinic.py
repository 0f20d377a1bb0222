"""Patients for the doctor: small models that learned a little, and engines with a fault of their own.

A fault sits where faults sit: in weights, tokenizer files, templates, or in what passes between an engine and its
caller. What the probes are handed is never touched.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import kdpipe.execution.roles
from kdpipe.engines.handle import ModelHandle
from kdpipe.engines.protocol import Completion, Engine, ScoreRequest, Scoring, TokenScores
from kdpipe.execution.executor import Performer
from kdpipe.models.source import ModelSource
from kdpipe.models.tokenizer import arithmetic_tokenizer
from kdpipe.pipeline.identities import Sources
from kdpipe.pipeline.preflight import examination
from kdpipe.pipeline.project import open_project
from kdpipe.pipeline.request import STEPS
from kdpipe.recipe.file import LoadedRecipe
from kdpipe.recipe.section import Ability
from kdpipe.workers.worker import Report
from tests.wire import answered, asked
from tests.worlds import load_tiny

WORDS = [*"0123456789", "+", "####", "\n", "Tom", "has", "apples", "pens"]
NUM_IDS = len(WORDS) + 3
CONTEXT = 96
TEMPERATURE = 1.3
Findings = dict[tuple[str, str], dict[str, Any]]
_SHARED = {"vocab_size": NUM_IDS + 5, "bos_token_id": None, "eos_token_id": 1, "initializer_range": 0.1}
_LLAMA = {
    **_SHARED,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
}


def new_model(kind: str, *, seed: int) -> Any:
    """An untrained model: `gpt2` has learned positions and biases; the others are Llamas, and `wide` is tied too.

    Its heads are as wide as vLLM wants them on a CPU.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "gpt2":
            sizes = {"n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT}
            return GPT2LMHeadModel(GPT2Config(**_SHARED, **sizes))
        sizes = {"tied": 24, "untied": 32, "wide": 64}
        config = LlamaConfig(**_LLAMA, hidden_size=sizes[kind], tie_word_embeddings=kind != "untied")
        return LlamaForCausalLM(config)


def records(count: int) -> list[dict[str, Any]]:
    """Questions of different lengths, a kind and a hint, and solutions of seven tokens with the end."""
    return [
        {
            "question": "Tom has" + " 7 + Tom" * (number % 5) + f" {number % 10} pens",
            "answer": f"Tom has {number % 10} apples\n#### {number % 10}",
            "kind": number % 2,
        }
        for number in range(count)
    ]


def write_patient(folder: Path, kind: str, *, seed: int, steps: int) -> None:
    """A model folder, after so many optimizer steps on the records' texts."""
    tokenizer = arithmetic_tokenizer(WORDS)
    texts = [f"{row['question']}\n{row['answer']}" for row in records(20)]
    ids = [[*tokenizer.encode(text, add_special_tokens=False), 1] for text in texts]
    width = max(map(len, ids))
    batch = torch.tensor([[*row, *[0] * (width - len(row))] for row in ids])
    labels = torch.where(torch.arange(width) < torch.tensor([[len(row)] for row in ids]), batch, -100)
    model = new_model(kind, seed=seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        model(input_ids=batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_world(folder: Path, *, student: str = "tied", teacher: str = "untied") -> Path:
    """A folder with `student`, `teacher` and two files of problems."""
    write_patient(folder / "student", student, seed=1, steps=12)
    write_patient(folder / "teacher", teacher, seed=2, steps=40)
    for split, count in (("train", 24), ("test", 8)):
        lines = "".join(json.dumps(row) + "\n" for row in records(count))
        (folder / f"{split}.jsonl").write_text(lines)
    return folder


def load_world(folder: Path, **changes: Any) -> LoadedRecipe:
    """A recipe over the models of `write_world`."""
    files = {"train": "train.jsonl", "test": "test.jsonl", "prompt": "plain", "instruction": ""}
    settings: dict[str, Any] = {
        "rounds": 1,
        "task": {"kind": "jsonl", **files},
        "student": {"model": "./student", "dtype": "float32"},
        "teachers": [{"model": "./teacher", "dtype": "float32"}],
        "rollout": {"prompts": 8, "max_new_tokens": 16, "temperature": TEMPERATURE},
        "evaluate__teacher": False,
        "evaluate__reverse_kl_problems": 0,
    }
    return load_tiny(folder, **{**settings, **changes})


def examined(
    loaded: LoadedRecipe, wire: Callable[[Engine], Engine] | None = None, *, depth: str = "full"
) -> Findings:
    """The doctor's findings by probe and patient, made in this process by the request that a command sends.

    With a `wire`, every engine of the recipe is behind one of its own.
    """
    workspace = loaded.folder / "out"
    folders = Sources(loaded, workspace).fetch(print)
    request = examination(open_project(loaded, workspace), folders, 1, depth=depth)  # type: ignore[arg-type]
    with one_thread(), pytest.MonkeyPatch.context() as patch:
        if wire is not None:
            patch.setattr(kdpipe.execution.roles.Roles, "open", _behind(wire))
        answer = answered(STEPS, Performer()(asked(STEPS, request), Report(lambda _event: None)))
    findings = json.loads(json.dumps(answer.findings))
    return {(one["probe"], one["about"]): one for one in findings}


def _behind(wire: Callable[[Engine], Engine]) -> Callable[..., ModelHandle]:
    """What a step opens its models by, each engine behind a wire of its own that stays."""
    opened = kdpipe.execution.roles.Roles.open
    wires: dict[int, Engine] = {}

    def open_wired(roles: Any, *role: Any, **place: Any) -> ModelHandle:
        handle = opened(roles, *role, **place)

        def open_engine() -> Engine:
            real = handle.open_engine()
            return wires.setdefault(id(real), wire(real))

        return replace(handle, open_engine=open_engine)

    return open_wired


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread, and torch's settings as they were after."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(mode=deterministic)


def verdicts(findings: Findings, *, about: str = "teacher") -> dict[str, str]:
    """The verdict of each probe on one patient."""
    return {probe: one["verdict"] for (probe, who), one in findings.items() if who == about}


def rewrite(path: Path, changes: Mapping[str, Any]) -> None:
    """Sets fields of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --------------------------------------------------------------------------------------------- faults


class Wire:
    """An engine behind a wire that may spoil what passes: here it does not."""

    def __init__(self, inner: Engine) -> None:
        self.inner = inner

    @property
    def abilities(self) -> frozenset[Ability]:
        return self.inner.abilities

    def load(self, source: ModelSource) -> None:
        self.inner.load(source)

    def sample(self, requests: Any, sampling: Any, *, progress: Any) -> list[list[Completion]]:
        return self.inner.sample(requests, sampling, progress=progress)

    def score(
        self, requests: Sequence[ScoreRequest], scoring: Scoring, *, progress: Any
    ) -> list[TokenScores]:
        return [self.spoil(score) for score in self.inner.score(requests, scoring, progress=progress)]

    def spoil(self, score: TokenScores) -> TokenScores:
        return score

    def sleep(self) -> None:
        self.inner.sleep()

    def close(self) -> None:
        self.inner.close()


class Late(Wire):
    """Scores come one position late: the first is of the prompt's last token, as where an empty first entry is cut."""

    def score(
        self, requests: Sequence[ScoreRequest], scoring: Scoring, *, progress: Any
    ) -> list[TokenScores]:
        moved = []
        for request in requests:
            ids = [*request.prompt_token_ids, *request.completion_token_ids]
            start = len(request.prompt_token_ids) - 1
            moved.append(ScoreRequest(ids[:start], ids[start:-1]))
        return super().score(moved, scoring, progress=progress)


class Early(Wire):
    """Scores come one position early: the last is of a token that was generated after the completion."""

    def score(
        self, requests: Sequence[ScoreRequest], scoring: Scoring, *, progress: Any
    ) -> list[TokenScores]:
        longer = [ScoreRequest(r.prompt_token_ids, [*r.completion_token_ids, 1]) for r in requests]
        return [
            replace(score, logprobs=score.logprobs[1:])
            for score in super().score(longer, scoring, progress=progress)
        ]


class Hot(Wire):
    """The temperature is applied twice."""

    def score(
        self, requests: Sequence[ScoreRequest], scoring: Scoring, *, progress: Any
    ) -> list[TokenScores]:
        return super().score(
            requests, replace(scoring, temperature=scoring.temperature**2), progress=progress
        )


class Cold(Wire):
    """The temperature is not applied to scores."""

    def score(
        self, requests: Sequence[ScoreRequest], scoring: Scoring, *, progress: Any
    ) -> list[TokenScores]:
        return super().score(requests, replace(scoring, temperature=1.0), progress=progress)


class RawSamples(Wire):
    """Log-probs of samples are those at temperature 1, as vLLM's default gives them."""

    def sample(self, requests: Any, sampling: Any, *, progress: Any) -> list[list[Completion]]:
        drawn = super().sample(requests, sampling, progress=progress)
        asked = [
            ScoreRequest(r.prompt_token_ids, one.token_ids) for r, [one] in zip(requests, drawn, strict=True)
        ]
        raw = self.inner.score(asked, Scoring(temperature=1.0, num_ids=sampling.num_ids), progress=progress)
        return [
            [replace(one, logprobs=score.logprobs.tolist())] for [one], score in zip(drawn, raw, strict=True)
        ]


class Drifting(Wire):
    """Scores depend on how often it was asked."""

    calls = 0

    def score(
        self, requests: Sequence[ScoreRequest], scoring: Scoring, *, progress: Any
    ) -> list[TokenScores]:
        self.calls += 1
        found = super().score(requests, scoring, progress=progress)
        return [replace(score, logprobs=score.logprobs + np.float32(0.01 * self.calls)) for score in found]


class Crowded(Wire):
    """Scores depend on how many requests come together."""

    def score(
        self, requests: Sequence[ScoreRequest], scoring: Scoring, *, progress: Any
    ) -> list[TokenScores]:
        found = super().score(requests, scoring, progress=progress)
        more = np.float32(0.01 * len(requests))
        return [replace(score, logprobs=score.logprobs + more) for score in found]


class OldHead(Wire):
    """Loading other weights of the same sizes leaves the output head as it was, as vLLM does to tied ones."""

    def __init__(self, inner: Engine) -> None:
        super().__init__(inner)
        self.heads: dict[tuple[int, ...], torch.Tensor] = {}

    def load(self, source: ModelSource) -> None:
        self.inner.load(source)
        model = self.inner._model  # type: ignore[attr-defined]
        head = model.get_output_embeddings()
        old = self.heads.setdefault(tuple(head.weight.shape), head.weight.detach().clone())
        stale = copy.copy(head)
        stale._parameters = {"weight": torch.nn.Parameter(old, requires_grad=False), "bias": None}
        model.set_output_embeddings(stale)


class Deaf(Wire):
    """Whatever is loaded, the first model stays."""

    loaded = False

    def load(self, source: ModelSource) -> None:
        if not self.loaded:
            self.inner.load(source)
            self.loaded = True


class OtherModel(Wire):
    """A server that serves another model under the name asked for says so when it is asked for its models."""

    def load(self, source: ModelSource) -> None:
        from kdpipe.errors import EngineError

        if source.folder.name == "teacher":
            raise EngineError(
                "http://127.0.0.1:1/v1: serves other-14b, not 'teacher-14b'", hint="start it anew"
            )
        self.inner.load(source)


class Breaking(Wire):
    """What runs the model raises an error that is nobody's own."""

    def score(
        self, requests: Sequence[ScoreRequest], scoring: Scoring, *, progress: Any
    ) -> list[TokenScores]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


class Swapped(Wire):
    """Runs the weights of another folder than it was told."""

    def load(self, source: ModelSource) -> None:
        other = source.folder.with_name("other")
        is_teacher = source.folder.name == "teacher"
        self.inner.load(replace(source, folder=other, digest="other") if is_teacher else source)


def without_top_k(score: TokenScores) -> TokenScores:
    return replace(score, topk_ids=None, topk_logprobs=None, tail_logprobs=None)


def short_top_k(score: TokenScores) -> TokenScores:
    assert score.topk_ids is not None
    assert score.topk_logprobs is not None
    return replace(score, topk_ids=score.topk_ids[:, :-1], topk_logprobs=score.topk_logprobs[:, :-1])


def unsorted_top_k(score: TokenScores) -> TokenScores:
    assert score.topk_ids is not None
    assert score.topk_logprobs is not None
    return replace(score, topk_ids=score.topk_ids[:, ::-1], topk_logprobs=score.topk_logprobs[:, ::-1])


def doubled_top_k(score: TokenScores) -> TokenScores:
    assert score.topk_ids is not None
    return replace(score, topk_ids=np.repeat(score.topk_ids[:, :1], score.topk_ids.shape[1], axis=1))


def moved_top_k(score: TokenScores) -> TokenScores:
    assert score.topk_ids is not None
    assert score.topk_logprobs is not None
    return replace(
        score,
        topk_ids=np.roll(score.topk_ids, 1, axis=0),
        topk_logprobs=np.roll(score.topk_logprobs, 1, axis=0),
    )


def rounded_hidden(score: TokenScores) -> TokenScores:
    return score if score.hidden is None else replace(score, hidden=score.hidden * np.float32(1.05))


def spoiling(spoil: Callable[[TokenScores], TokenScores]) -> Callable[[Engine], Engine]:
    """A wire that does this to every score that has what it is about."""

    class Spoiling(Wire):
        def spoil(self, score: TokenScores) -> TokenScores:
            return spoil(score) if score.topk_ids is not None or score.hidden is not None else score

    return Spoiling


def swap_words(folder: Path, first: str, second: str) -> None:
    """Lets two ids of the tokenizer in a folder trade their words."""
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    words = document["model"]["vocab"]
    words[first], words[second] = words[second], words[first]
    path.write_text(json.dumps(document))


def set_template(folder: Path, template: str) -> None:
    """Gives the tokenizer in a folder a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def begin_with(folder: Path, word: str) -> None:
    """Lets the tokenizer in a folder put a word before every text, as its beginning of a sequence."""
    rewrite(folder / "tokenizer_config.json", {"bos_token": word})
    piece = {"SpecialToken": {"id": word, "type_id": 0}}
    number = WORDS.index(word) + 3
    whole = {"Sequence": {"id": "A", "type_id": 0}}
    processor = {
        "type": "TemplateProcessing",
        "single": [piece, whole],
        "pair": [piece, whole],
        "special_tokens": {word: {"id": word, "ids": [number], "tokens": [word]}},
    }
    rewrite(folder / "tokenizer.json", {"post_processor": processor})
