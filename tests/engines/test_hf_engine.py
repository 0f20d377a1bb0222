"""The hf engine against unbatched float64 forwards of the same models, architecture by architecture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kdpipe.engines.hf import engine as hf
from kdpipe.engines.hf.choice import decoding_of
from kdpipe.engines.hf.decoding import CacheDecoder, LlamaDecoder, is_llama_like
from kdpipe.engines.hf.sampling import uniforms
from kdpipe.engines.protocol import SampleRequest, Sampling, ScoreRequest, Scoring
from kdpipe.errors import EngineError
from kdpipe.models.cache import ModelCache
from kdpipe.models.folder import write_model
from kdpipe.models.source import ModelSource
from kdpipe.recipe.runtime import Runtime
from tests.tiny_models import (
    CONFIGS,
    FAST,
    FLOAT32_NATS,
    ROWS,
    in_float64,
    plain_logprobs,
    tiny_model,
    tiny_tokenizer,
)

NUM_IDS = 13
PROMPTS = [[2], [3, 4, 5], [6] * 17, [2, 9, 2, 9, 2, 9, 2], [5, 4, 3, 2, 11, 10, 9, 8, 7, 6, 5, 4], [8, 8, 8]]
SAMPLING = Sampling(temperature=1.0, max_new_tokens=12, end_ids=(1, 7), num_ids=NUM_IDS)


def engine_of(model, *, sample_tokens=10_000, score_tokens=120, digest="a"):
    cache = ModelCache(torch.device("cpu"))
    cache.publish(digest, model)
    engine = hf.HfEngine(
        cache, Runtime(sample_tokens=sample_tokens, score_tokens=score_tokens, head_chunk_tokens=5)
    )
    engine.load(ModelSource(Path("/not/read"), digest, dtype="float32"))
    return engine


def requests(*, samples=3):
    return [SampleRequest(prompt, tuple(range(10 * i, 10 * i + samples))) for i, prompt in enumerate(PROMPTS)]


def sample(engine, settings=SAMPLING, asked=None):
    return engine.sample(requests() if asked is None else asked, settings, progress=lambda _: None)


def check_against_plain(model, drawn, settings):
    """Every sampled log-prob is that of a plain forward, truncated by the plain definition."""
    lengths = []
    wide = in_float64(model)
    for prompt, row in zip(PROMPTS, drawn, strict=True):
        for completion in row:
            plain_NV = plain_logprobs(
                wide, prompt, completion.token_ids, temperature=settings.temperature, num_ids=NUM_IDS
            )
            for t, token in enumerate(completion.token_ids):
                order = plain_NV[t].argsort(descending=True)[: settings.top_k or NUM_IDS]
                probs = plain_NV[t, order].softmax(0)
                left = order[: int((probs.cumsum(0) < settings.top_p).sum()) + 1]
                assert token in left
                expected = plain_NV[t, token] - plain_NV[t, left].logsumexp(0)
                assert completion.logprobs[t] == pytest.approx(expected.item(), abs=1e-4)
            lengths.append(len(completion.token_ids))
    return lengths


@pytest.mark.parametrize("name", CONFIGS)
def test_sampled_logprobs_are_those_of_a_plain_float64_forward(name):
    model = tiny_model(name)
    settings = replace(SAMPLING, temperature=0.7)
    lengths = check_against_plain(model, sample(engine_of(model), settings), settings)
    assert len(set(lengths)) > 3


@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": 4},
        {"top_p": 0.7},
        {"top_k": 5, "top_p": 0.6},
        {"max_new_tokens": 1},
        {"temperature": 1.5, "end_ids": (), "max_new_tokens": 40},
    ],
)
def test_so_are_truncated_and_single_token_and_long_completions(changes):
    model = tiny_model("llama")
    settings = replace(SAMPLING, **changes)
    check_against_plain(model, sample(engine_of(model), settings), settings)


def test_the_fast_decoder_takes_the_models_it_computes_and_no_others():
    assert {name for name in CONFIGS if is_llama_like(tiny_model(name))} == set(FAST)
    adapted = tiny_model("llama")
    adapted.model.layers[0].self_attn.q_proj = torch.nn.Sequential(adapted.model.layers[0].self_attn.q_proj)
    assert not is_llama_like(adapted)
    assert decoding_of(tiny_model("llama")).decoder is LlamaDecoder
    assert decoding_of(tiny_model("gpt2")).decoder is CacheDecoder


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("sample_tokens", [30, 100])
def test_batch_limits_do_not_change_what_is_drawn(name, sample_tokens):
    model = tiny_model(name)
    wide, narrow = sample(engine_of(model)), sample(engine_of(model, sample_tokens=sample_tokens))
    for one, other in zip((c for row in wide for c in row), (c for row in narrow for c in row), strict=True):
        assert one.token_ids == other.token_ids
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=FLOAT32_NATS)


def test_batches_stay_within_the_token_budget():
    engine = engine_of(tiny_model("llama"), sample_tokens=60)
    rows = [hf._Draw(index, 0, 0, prompt) for index, prompt in enumerate(PROMPTS) for _ in range(3)]
    batches = engine._sample_batches(decoding_of(tiny_model("llama")), rows, new_tokens=12)
    assert sorted(place for places in batches for place in places) == list(range(3 * len(PROMPTS)))
    for places in batches:
        widest = max(len(rows[place].prompt) for place in places)
        assert len(places) == 1 or len(places) * (widest + 12) <= 60


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_compaction_does_not_change_what_is_drawn(name, monkeypatch):
    model = tiny_model(name)
    compactions = []
    compact = hf._Ledger.compact
    monkeypatch.setattr(hf._Ledger, "compact", lambda self: compactions.append(1) or compact(self))
    drawn = {}
    for below in (0.0, 0.75, 1.0):
        monkeypatch.setattr(hf, "_COMPACT_BELOW", below)
        drawn[below] = sample(engine_of(model), replace(SAMPLING, max_new_tokens=30))
        compactions.append(0)
    counts = "".join(map(str, compactions)).split("0")
    assert len(counts[0]) == 0 < len(counts[1]) < len(counts[2])
    for below in (0.75, 1.0):
        for one, other in zip(
            (c for row in drawn[0.0] for c in row), (c for row in drawn[below] for c in row), strict=True
        ):
            assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=FLOAT32_NATS)


def test_each_token_is_drawn_by_the_uniform_of_its_own_place_and_seed():
    model = tiny_model("llama")
    torch.nn.init.zeros_(model.lm_head.weight)  # all ids are equally likely, whatever stands before
    settings = replace(SAMPLING, end_ids=(1,))
    drawn = sample(engine_of(model), settings)
    lengths = set()
    for request, row in zip(requests(), drawn, strict=True):
        wanted = (uniforms(request.seeds, settings.max_new_tokens) * NUM_IDS).astype(int).tolist()
        for completion, ids in zip(row, wanted, strict=True):
            end = ids.index(1) + 1 if 1 in ids else len(ids)
            assert completion.token_ids == ids[:end]
            lengths.add(end)
    assert len(lengths) > 2


def test_equal_calls_give_equal_bits():
    engine = engine_of(tiny_model("qwen2"))
    assert sample(engine) == sample(engine)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("top_k", [0, 4, NUM_IDS])
def test_scores_are_those_of_a_plain_float64_forward(name, top_k):
    model = tiny_model(name)
    pairs = [(PROMPTS[0], [3, 12, 1]), (PROMPTS[2], [5]), (PROMPTS[4], [2] * 20), (PROMPTS[1], [])]
    scores = engine_of(model, score_tokens=50).score(
        [ScoreRequest(*pair) for pair in pairs],
        Scoring(temperature=0.7, num_ids=NUM_IDS, top_k=top_k),
        progress=lambda _: None,
    )
    wide = in_float64(model)
    for (prompt, completion), scored in zip(pairs, scores, strict=True):
        plain_NV = plain_logprobs(wide, prompt, completion, temperature=0.7, num_ids=NUM_IDS)
        expected = [row[token].item() for row, token in zip(plain_NV, completion, strict=True)]
        np.testing.assert_allclose(scored.logprobs, expected, atol=1e-4)
        if top_k and completion:
            values, ids = plain_NV.sort(dim=-1, descending=True)
            assert scored.topk_ids.tolist() == ids[:, :top_k].tolist()
            np.testing.assert_allclose(scored.topk_logprobs, values[:, :top_k], atol=1e-4)
            np.testing.assert_allclose(scored.tail_logprobs, values[:, top_k:].logsumexp(-1), atol=1e-4)


def test_a_model_trained_in_memory_is_what_its_new_digest_samples_from(tmp_path):
    model = tiny_model("llama")
    write_model(model, tiny_tokenizer(), tmp_path)
    cache = ModelCache(torch.device("cpu"))
    cache.publish("before", model)
    engine = hf.HfEngine(cache, Runtime(sample_tokens=500, score_tokens=500, head_chunk_tokens=50))
    engine.load(ModelSource(tmp_path, "before", dtype="float32"))
    before = sample(engine)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.1)
        model.lm_head.weight.add_(torch.linspace(-1, 1, 24))
    cache.publish("after", model)
    engine.load(ModelSource(Path("/not/read"), "after", dtype="float32"))
    after = sample(engine)
    check_against_plain(model, after, SAMPLING)
    assert after != before
    engine.load(ModelSource(tmp_path, "before", dtype="float32"))
    assert sample(engine) == before


def test_sampling_leaves_the_model_able_to_learn():
    model = tiny_model("llama")
    sample(engine_of(model))
    model(input_ids=torch.tensor([[2, 3]])).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_scores_that_are_not_finite_are_refused_by_request_and_token(monkeypatch):
    def poisoned(model, batch):
        hidden_NH = hidden_states(model, batch)
        # Of two sequences, the longer first: token 1 of request 1.
        hidden_NH[3 + 1, 0] = torch.inf
        return hidden_NH

    hidden_states = hf.hidden_states
    monkeypatch.setattr(hf, "hidden_states", poisoned)
    with pytest.raises(EngineError, match=r"request 1: .* token 1 "):
        engine_of(tiny_model("llama")).score(
            [ScoreRequest([2], [4, 6]), ScoreRequest([2, 2], [3, 5, 4])][::-1],
            Scoring(temperature=1.0, num_ids=NUM_IDS),
            progress=lambda _: None,
        )


def test_draws_that_are_not_finite_are_refused_by_request_sample_and_token(monkeypatch):
    def poisoned(hidden_HB, head):
        steps.append(1)
        logits_BV = logits(hidden_HB, head)
        if len(steps) == 3:
            logits_BV[4, 11] = -torch.inf
        return logits_BV

    steps: list[int] = []
    logits = hf._logits
    monkeypatch.setattr(hf, "_logits", poisoned)
    asked = [SampleRequest([2], (1, 2, 3)), SampleRequest([3], (1, 2, 3))]
    with pytest.raises(EngineError, match=r"^request 1: sample 1: .* token 2 "):
        sample(engine_of(tiny_model("llama")), replace(SAMPLING, end_ids=()), asked)


def test_weights_of_nan_are_refused_and_not_drawn_from():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(EngineError, match="token 0 are not finite"):
            sample(engine_of(model), replace(SAMPLING, temperature=temperature))


def test_what_follows_the_end_of_a_completion_is_not_held_against_it(monkeypatch):
    model = tiny_model("llama")
    asked = [SampleRequest([2, 3], tuple(range(12)))]
    plain = sample(engine_of(model), asked=asked)[0]
    shortest = min(range(12), key=lambda row: len(plain[row].token_ids))
    steps: list[int] = []
    logits = hf._logits

    def poisoned(hidden_HB, head):
        steps.append(1)
        logits_BV = logits(hidden_HB, head)
        if len(steps) > len(plain[shortest].token_ids):
            logits_BV[shortest] = torch.nan
        return logits_BV

    monkeypatch.setattr(hf, "_logits", poisoned)
    monkeypatch.setattr(hf, "_COMPACT_BELOW", 0.0)
    drawn = sample(engine_of(model), asked=asked)[0]
    assert [completion.token_ids for completion in drawn] == [completion.token_ids for completion in plain]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (SampleRequest([], (1,)), "request 0.*empty"),
        (SampleRequest([2, ROWS], (1,)), "request 0.*from 2 to 16, expected 0 to 15"),
        (SampleRequest([2] * 60, (1,)), "request 0: 60 prompt tokens and 12 .* 64"),
    ],
)
def test_prompts_that_a_model_cannot_take_are_refused(asked, message):
    with pytest.raises(EngineError, match=message):
        sample(engine_of(tiny_model("llama")), asked=[asked])


def test_more_ids_than_the_head_has_are_refused():
    with pytest.raises(EngineError, match="16 rows"):
        sample(engine_of(tiny_model("llama")), replace(SAMPLING, num_ids=17))


def test_without_a_model_nothing_is_sampled():
    engine = engine_of(tiny_model("llama"))
    engine.sleep()
    with pytest.raises(EngineError, match="load"):
        sample(engine)


def test_stop_strings_that_cross_tokens_of_a_long_completion_are_found(tmp_path):
    model = tiny_model("llama")
    write_model(model, tiny_tokenizer(), tmp_path)
    engine = hf.HfEngine(
        ModelCache(torch.device("cpu")), Runtime(sample_tokens=9999, score_tokens=99, head_chunk_tokens=9)
    )
    engine.load(ModelSource(tmp_path, "a", dtype="float32"))
    free = sample(engine, replace(SAMPLING, end_ids=(), max_new_tokens=40))
    ids = free[1][0].token_ids
    stop = f"{ids[20]}. w{ids[21]}. w{ids[22]}. w{ids[23]}"
    stopped = sample(engine, replace(SAMPLING, end_ids=(), max_new_tokens=40, stop=(stop,)))[1][0]
    text = " ".join(f"w{token}." for token in ids)
    place = text.index(stop) + len(stop)
    tokens = next(n for n in range(1, 41) if len(" ".join(f"w{token}." for token in ids[:n])) >= place)
    assert stopped.token_ids == ids[:tokens]
    assert stopped.finish_reason == "stop"
