"""Which way of decoding a model gets: the fastest that is exact, tried on the model before it is used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from kdpipe.engines.handle import ModelHandle
from kdpipe.engines.hf import choice
from kdpipe.engines.hf.choice import decoding_of
from kdpipe.engines.hf.decoding import CacheDecoder, LlamaDecoder, WholeDecoder
from kdpipe.engines.hf.engine import HfEngine
from kdpipe.errors import ModelError
from kdpipe.models.cache import ModelCache
from kdpipe.models.config import context_of
from kdpipe.models.source import ModelSource
from kdpipe.recipe.runtime import Runtime
from tests.models.families import tiny_config
from tests.tiny_models import tiny_model

PADDED, EQUAL, WHOLE, FAST = (
    (CacheDecoder, True),
    (CacheDecoder, False),
    (WholeDecoder, True),
    (LlamaDecoder, True),
)


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_known", {})


def family(name: str) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(tiny_config(name), dtype=torch.float32).eval()


def chosen(model: PreTrainedModel) -> tuple[Any, bool]:
    found = decoding_of(model)
    return found.decoder, found.takes_unlike


@pytest.mark.parametrize(("name", "way"), [("lfm2", PADDED), ("mamba", EQUAL), ("rwkv", WHOLE)])
def test_a_state_is_carried_by_the_models_own_cache_or_not_at_all(name: str, way: Any) -> None:
    assert chosen(family(name)) == way


def forget(decoder: Any, *_: Any) -> None:
    """In place of `keep`: the rows stay as they are."""


def shifted(decoder: Any, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return FORWARD(decoder, ids, positions + 1 if decoder._mask is not None else positions)


def seen(decoder: Any, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    if decoder._mask is not None:
        decoder._mask[:] = 1
    return FORWARD(decoder, ids, positions)


def amnesiac(decoder: Any, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    decoder._cache = None
    return FORWARD(decoder, ids, positions)


FORWARD = CacheDecoder._forward
BROKEN: dict[str, tuple[str, type, str, Callable[..., Any], Any]] = {
    "positions that are shifted beside longer prompts": ("gpt2", CacheDecoder, "_forward", shifted, EQUAL),
    "padding that is read": ("gpt2", CacheDecoder, "_forward", seen, EQUAL),
    "a cache that is lost": ("gpt2", CacheDecoder, "_forward", amnesiac, WHOLE),
    "a hole that is read": ("llama", LlamaDecoder, "_hole_mask", lambda *_: None, PADDED),
    "rows that are not dropped": ("llama", LlamaDecoder, "keep", forget, PADDED),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_decoder_that_is_not_exact_is_passed_over(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, decoder, method, wrong, way = BROKEN[case]
    monkeypatch.setattr(decoder, method, wrong)
    assert chosen(tiny_model(name)) == way


def test_a_model_that_looks_ahead_is_refused_when_it_is_loaded() -> None:
    model = tiny_model("gpt2")

    def look_ahead(_module: Any, _inputs: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.mean(1, keepdim=True)
        return output

    model.transformer.register_forward_hook(look_ahead)
    with pytest.raises(
        ModelError, match="GPT2LMHeadModel makes something else of a token where others follow"
    ):
        loaded(model)


def test_windows_are_crossed_while_a_model_is_asked_and_as_wide_as_before_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("mistral-windowed")
    model.config.sliding_window = 40
    widths = []
    decoded = choice._decoded
    monkeypatch.setattr(
        choice, "_decoded", lambda *given: widths.append(model.config.sliding_window) or decoded(*given)
    )
    assert chosen(model) == PADDED
    assert (widths, model.config.sliding_window) == ([4], 40)


def test_models_that_differ_in_weights_only_are_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decoding_of(tiny_model("qwen2"))
    monkeypatch.setattr(choice, "_decoded", None)
    assert chosen(tiny_model("qwen2", seed=1)) == FAST


def loaded(model: PreTrainedModel) -> list[str]:
    """What a user is told when the model is loaded."""
    cache, told = ModelCache(torch.device("cpu")), []
    cache.publish("a", model)
    engine = HfEngine(cache, Runtime(sample_tokens=99, score_tokens=99, head_chunk_tokens=9))
    source = ModelSource(Path("/not/read"), "a", dtype="float32")
    text: Any = None
    ModelHandle("student", source, text, "hf", lambda: engine, warn=told.append).load()
    return told


def test_sampling_without_a_cache_is_said_with_its_price() -> None:
    [told] = loaded(family("rwkv"))
    assert told.startswith("RwkvForCausalLM: no cache carries its state")
    assert "about as many times longer as a prompt and half a completion have tokens" in told
    assert loaded(tiny_model("llama")) == []


def test_the_context_of_longrope_ends_where_its_positions_change() -> None:
    assert context_of(tiny_config("phi3 longrope")) == 32
    assert context_of(tiny_config("llama yarn")) == 64
