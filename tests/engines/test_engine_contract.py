"""What every engine promises (kdpipe/engine.py), asked of each engine that runs here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kdpipe.engines.hf.engine import HfEngine
from kdpipe.engines.protocol import (
    Completion,
    Engine,
    SampleRequest,
    Sampling,
    ScoreRequest,
    Scoring,
    TokenScores,
)
from kdpipe.engines.remote import Hosting, WorkerEngine
from kdpipe.engines.server.engine import ServerEngine
from kdpipe.errors import EngineError
from kdpipe.models.cache import ModelCache
from kdpipe.models.folder import write_model
from kdpipe.models.source import ModelSource
from kdpipe.recipe.runtime import Runtime, ServerRuntime, Vllm
from kdpipe.recipe.teacher import Server
from tests.fakes import FakeEngine, fake_text
from tests.serving import MODEL, serve
from tests.tiny_models import FLOAT32_NATS, tiny_model, tiny_tokenizer

NUM_IDS = 12
CONTEXT = 64
PROMPTS = [[2], [3, 4, 5], [6] * 17, [2, 9, 2, 9, 2, 9, 2], [5, 4, 3, 2, 11, 10, 9, 8, 7, 6, 5, 4]]


@dataclass
class Subject:
    """An engine with a model loaded, and what of the contract it says that it does not do.

    `only_plain`: it scores at temperature 1, and samples at 0 and 1 from the whole distribution. `max_scored` is the
    longest sequence that it scores.
    """

    engine: Engine
    source: ModelSource
    text: Callable[[Sequence[int]], str]
    only_plain: bool = False
    max_scored: int = CONTEXT

    def at(self, temperature: float) -> float:
        """The temperature, or 1 where the engine has no other."""
        return 1.0 if self.only_plain else temperature


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerEngine]:
    """An engine in a process of its own, which all tests share: it takes seconds to start."""
    hosting = Hosting("hf", "cpu", Runtime(threads=1))
    engine = WorkerEngine(
        hosting,
        log=tmp_path_factory.mktemp("worker") / "log",
        environment={"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        target="tests.worker_targets:fake_host",
    )
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def vllm_subject(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    """One for all tests: it takes most of a minute to start."""
    from kdpipe.engines.vllm.engine import VllmEngine

    folder = tmp_path_factory.mktemp("model")
    write_model(tiny_model("wide"), tiny_tokenizer(), folder)
    settings = Vllm(kv_cache_gib=0.25, max_num_seqs=64, batch_tokens=64)
    engine = VllmEngine(Runtime(vllm=settings, score_tokens=100), device=torch.device("cpu"))
    yield Subject(engine, ModelSource(folder, "a", dtype="float32"), fake_text)
    engine.close()


@pytest.fixture(params=["fake", "hf", "worker", "server", pytest.param("vllm", marks=pytest.mark.vllm)])
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Subject]:
    engine: Engine
    if request.param == "server":
        yield from _served(tmp_path)
        return
    if request.param == "vllm":
        found: Subject = request.getfixturevalue("vllm_subject")
        found.engine.load(found.source)
        yield found
        return
    if request.param == "worker":
        engine = request.getfixturevalue("worker")
        source = ModelSource(tmp_path, "a", dtype="float32")
        engine.load(source)
        yield Subject(engine, source, fake_text)
        return
    if request.param == "fake":
        engine = FakeEngine(max_positions=CONTEXT)
    else:
        write_model(tiny_model("llama"), tiny_tokenizer(), tmp_path)
        engine = HfEngine(
            ModelCache(torch.device("cpu")), Runtime(sample_tokens=400, score_tokens=100, head_chunk_tokens=7)
        )
    source = ModelSource(tmp_path, "a", dtype="float32")
    engine.load(source)
    yield Subject(engine, source, fake_text)
    engine.close()


def _served(folder: Path) -> Iterator[Subject]:
    """The engine of servers, before one that answers with the scores of the fake engine."""
    behind, source = FakeEngine(max_positions=CONTEXT), ModelSource(folder, "a")
    behind.load(source)
    with serve(behind, rows=NUM_IDS, context=CONTEXT) as served:
        server = Server(urls=[served.url], model=MODEL, tokenizer="unused")
        engine = ServerEngine(server, ServerRuntime(concurrency=4))
        engine.load(source)
        yield Subject(engine, source, fake_text, only_plain=True, max_scored=CONTEXT - 1)
        engine.close()


def sampling(**changes: object) -> Sampling:
    return replace(
        Sampling(temperature=1.0, max_new_tokens=9, end_ids=(1,), num_ids=NUM_IDS),
        **changes,  # type: ignore[arg-type]
    )


def draw(subject: Subject, settings: Sampling, *, seeds: int = 4) -> list[list[Completion]]:
    return subject.engine.sample(
        [SampleRequest(prompt, tuple(range(100 * i, 100 * i + seeds))) for i, prompt in enumerate(PROMPTS)],
        settings,
        progress=lambda _: None,
    )


def score(
    subject: Subject,
    pairs: Sequence[tuple[list[int], list[int]]],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    supports: Sequence[np.ndarray] | None = None,
):
    given = [None] * len(pairs) if supports is None else supports
    return subject.engine.score(
        [ScoreRequest(*pair, support) for pair, support in zip(pairs, given, strict=True)],
        Scoring(temperature=temperature, num_ids=NUM_IDS, top_k=top_k),
        progress=lambda _: None,
    )


def test_one_completion_per_seed_with_a_logprob_per_token(subject):
    drawn = draw(subject, sampling())
    assert [len(row) for row in drawn] == [4] * len(PROMPTS)
    for completion in (completion for row in drawn for completion in row):
        assert 1 <= len(completion.token_ids) == len(completion.logprobs) <= 9
        assert completion.finish_reason == ("stop" if completion.token_ids[-1] == 1 else "length")
        assert 1 not in completion.token_ids[:-1]
    assert {completion.finish_reason for row in drawn for completion in row} == {"stop", "length"}


def test_every_end_id_ends_a_completion(subject):
    drawn = draw(subject, sampling(end_ids=(1, 4, 7), max_new_tokens=30), seeds=16)
    stopped = [completion for row in drawn for completion in row if completion.finish_reason == "stop"]
    assert {completion.token_ids[-1] for completion in stopped} == {1, 4, 7}
    assert not any({1, 4, 7} & set(completion.token_ids[:-1]) for row in drawn for completion in row)


def test_padding_ids_are_never_drawn_and_all_others_are(subject):
    drawn = draw(subject, sampling(end_ids=(), max_new_tokens=40, temperature=subject.at(3.0)), seeds=8)
    assert {token for row in drawn for completion in row for token in completion.token_ids} == set(
        range(NUM_IDS)
    )


def test_a_completion_depends_on_its_prompt_and_seed_only(subject):
    settings = sampling(end_ids=(1, 4))
    together = draw(subject, settings)
    assert len({tuple(completion.token_ids) for row in together for completion in row}) > 10
    requests = [SampleRequest(prompt, (100 * i + j,)) for i, prompt in enumerate(PROMPTS) for j in range(4)]
    alone = [subject.engine.sample([r], settings, progress=lambda _: None)[0][0] for r in requests]
    backwards = subject.engine.sample(requests[::-1], settings, progress=lambda _: None)[::-1]
    for expected, one, (other,) in zip(
        (completion for row in together for completion in row), alone, backwards, strict=True
    ):
        assert expected.token_ids == one.token_ids == other.token_ids
        assert expected.finish_reason == one.finish_reason == other.finish_reason
        np.testing.assert_allclose(expected.logprobs, one.logprobs, atol=FLOAT32_NATS)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_sampler_logprobs_are_those_of_scoring_at_the_same_temperature(subject, temperature):
    temperature = subject.at(temperature)
    drawn = draw(subject, sampling(temperature=temperature))
    pairs = [
        (prompt, completion.token_ids)
        for prompt, row in zip(PROMPTS, drawn, strict=True)
        for completion in row
    ]
    scores = score(subject, pairs, temperature=temperature)
    for completion, scored in zip((c for row in drawn for c in row), scores, strict=True):
        np.testing.assert_allclose(completion.logprobs, scored.logprobs, atol=1e-4)


def test_greedy_takes_the_most_probable_id_with_its_logprob_at_temperature_1(subject):
    drawn = draw(subject, sampling(temperature=0.0), seeds=2)
    for prompt, (first, second) in zip(PROMPTS, drawn, strict=True):
        assert first.token_ids == second.token_ids
        (scored,) = score(subject, [(prompt, first.token_ids)], top_k=1)
        assert scored.topk_ids[:, 0].tolist() == first.token_ids
        np.testing.assert_allclose(first.logprobs, scored.logprobs, atol=1e-4)


@pytest.mark.parametrize("cut", [{"top_k": 3}, {"top_p": 0.6}, {"top_k": 4, "top_p": 0.7}])
def test_truncated_logprobs_are_renormalised_over_the_ids_that_are_left(subject, cut):
    settings = sampling(temperature=0.8, **cut)
    if subject.only_plain:
        with pytest.raises(EngineError, match="of the whole distribution"):
            draw(subject, settings)
        return
    for prompt, row in zip(PROMPTS, draw(subject, settings), strict=True):
        for completion in row:
            (full,) = score(subject, [(prompt, completion.token_ids)], temperature=0.8, top_k=NUM_IDS)
            for t, token in enumerate(completion.token_ids):
                left = _left(full.topk_logprobs[t], settings)
                place = full.topk_ids[t].tolist().index(token)
                assert place < left
                kept = np.logaddexp.reduce(full.topk_logprobs[t, :left])
                assert completion.logprobs[t] == pytest.approx(full.topk_logprobs[t, place] - kept, abs=1e-4)


def _left(sorted_logprobs: np.ndarray, settings: Sampling) -> int:
    probs = np.exp(sorted_logprobs[: settings.top_k or NUM_IDS].astype(np.float64))
    probs /= probs.sum()
    return next((n for n in range(1, len(probs)) if probs[:n].sum() >= settings.top_p), len(probs))


def test_what_is_drawn_has_the_distribution_that_is_scored(subject):
    seeds = tuple(range(1000 if subject.only_plain else 4000))
    settings = sampling(max_new_tokens=1, end_ids=(), temperature=subject.at(0.9))
    (drawn,) = subject.engine.sample([SampleRequest([3, 4], seeds)], settings, progress=lambda _: None)
    (scored,) = score(subject, [([3, 4], [0])], temperature=subject.at(0.9), top_k=NUM_IDS)
    counts = np.bincount([c.token_ids[0] for c in drawn], minlength=NUM_IDS)[scored.topk_ids[0]]
    expected = len(seeds) * np.exp(scored.topk_logprobs[0].astype(np.float64))
    common = expected >= 5
    counts = np.append(counts[common], counts[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    statistic = ((counts - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
    assert statistic < 31.3  # the 99.9 % quantile of chi-square with 11 degrees of freedom
    assert common.sum() >= 4


def test_stop_strings_end_a_completion_with_the_token_that_completes_them(subject):
    drawn = draw(subject, sampling(stop=("w4.", "w2. w3."), end_ids=(), max_new_tokens=30), seeds=8)
    reasons = set()
    for completion in (completion for row in drawn for completion in row):
        text, before = subject.text(completion.token_ids), subject.text(completion.token_ids[:-1])
        assert not any(stop in before for stop in ("w4.", "w2. w3."))
        reasons.add(completion.finish_reason)
        assert (completion.finish_reason == "stop") == any(stop in text for stop in ("w4.", "w2. w3."))
    assert "stop" in reasons


def test_the_first_score_that_moves_is_the_changed_tokens_own(subject):
    base = [7, 3, 9, 2, 5]
    (before,) = score(subject, [([2, 6, 4], base)])
    for t in range(5):
        changed = [*base[:t], (base[t] + 1) % NUM_IDS, *base[t + 1 :]]
        (after,) = score(subject, [([2, 6, 4], changed)])
        moved = np.abs(after.logprobs - before.logprobs) > 1e-4
        assert moved.argmax() == t
        assert moved[t]


def test_top_k_is_sorted_and_its_mass_and_the_tails_are_one(subject):
    pairs = [(prompt, [7, 3, 9]) for prompt in PROMPTS]
    temperature = subject.at(0.7)
    full = score(subject, pairs, temperature=temperature, top_k=NUM_IDS)
    for k in (1, 5, NUM_IDS):
        for scored, whole in zip(score(subject, pairs, temperature=temperature, top_k=k), full, strict=True):
            assert scored.topk_ids.shape == scored.topk_logprobs.shape == (3, k)
            assert scored.topk_ids.dtype == np.int32
            assert scored.logprobs.dtype == scored.topk_logprobs.dtype == np.float32
            assert (np.diff(scored.topk_logprobs, axis=1) <= 0).all()
            assert (scored.topk_ids == whole.topk_ids[:, :k]).all()
            mass = np.exp(scored.topk_logprobs).sum(axis=1) + np.exp(scored.tail_logprobs)
            np.testing.assert_allclose(mass, 1, atol=1e-5)
            assert (k < NUM_IDS) or (scored.tail_logprobs == -np.inf).all()


@pytest.mark.parametrize("top_k", [0, 3, NUM_IDS])
def test_given_ids_are_scored_alone_and_together_with_the_top_k(subject, top_k):
    pairs = [([2, 3], [4, 5, 6]), ([7], [8]), ([9, 10], [])]
    given = [np.array([[11, 0], [4, 3], [5, 6]], np.int32), np.array([[1, 2]], np.int32)]
    given.append(np.zeros((0, 2), np.int32))
    if "support" not in subject.engine.abilities:
        with pytest.raises(EngineError, match="request 0"):
            score(subject, pairs, temperature=subject.at(0.7), top_k=top_k, supports=given)
        return
    full = score(subject, pairs, temperature=0.7, top_k=NUM_IDS)
    scored = score(subject, pairs, temperature=0.7, top_k=top_k, supports=given)
    for row, whole, support, (_, completion) in zip(scored, full, given, pairs, strict=True):
        width = min(top_k + 2, NUM_IDS)
        assert row.topk_ids.shape == row.topk_logprobs.shape == (len(completion), width)
        np.testing.assert_array_equal(row.logprobs, whole.logprobs)
        for t in range(len(completion)):
            logprob_of = dict(zip(whole.topk_ids[t].tolist(), whole.topk_logprobs[t].tolist(), strict=True))
            wanted = {*whole.topk_ids[t, :top_k].tolist(), *support[t].tolist()}
            expected = [token for token in whole.topk_ids[t].tolist() if token in wanted]
            padding = [-1] * (width - len(expected))
            assert row.topk_ids[t].tolist() == [*expected, *padding]
            values = [logprob_of[token] for token in expected] + [-np.inf] * len(padding)
            np.testing.assert_allclose(row.topk_logprobs[t], values, atol=1e-6)
            rest = sum(np.exp(value) for token, value in logprob_of.items() if token not in wanted)
            np.testing.assert_allclose(np.exp(row.tail_logprobs[t]), rest, atol=1e-6)


def test_nothing_asked_is_nothing_answered(subject):
    assert subject.engine.sample([], sampling(), progress=lambda _: None) == []
    assert subject.engine.sample([SampleRequest([2], ())], sampling(), progress=lambda _: None) == [[]]
    assert score(subject, []) == []
    empty, full = score(subject, [([2, 3], []), ([2, 3], [4])], top_k=3)
    assert empty.logprobs.shape == (0,)
    assert empty.topk_ids.shape == empty.topk_logprobs.shape == (0, 3)
    assert full.logprobs.shape == (1,)
    (only,) = score(subject, [([2, 3], [])])
    assert only.logprobs.shape == (0,)
    assert only.topk_ids is None


def test_progress_counts_every_completion_token(subject):
    counts: list[int] = []
    requests = [SampleRequest(prompt, (1, 2, 3)) for prompt in PROMPTS]
    drawn = subject.engine.sample(requests, sampling(max_new_tokens=40), progress=counts.append)
    assert sum(counts) == sum(len(completion.token_ids) for row in drawn for completion in row)
    counts.clear()
    subject.engine.score(
        [ScoreRequest([2], [3, 4]), ScoreRequest([2], [3])],
        Scoring(temperature=1.0, num_ids=NUM_IDS),
        progress=counts.append,
    )
    assert sum(counts) == 3


def test_what_exceeds_the_context_is_refused_by_its_index(subject):
    requests = [SampleRequest([2], (1,)), SampleRequest([2] * 56, (1,))]
    with pytest.raises(EngineError, match="request 1"):
        subject.engine.sample(requests, sampling(max_new_tokens=9), progress=lambda _: None)
    subject.engine.sample(requests, sampling(max_new_tokens=8), progress=lambda _: None)
    with pytest.raises(EngineError, match="request 1"):
        score(subject, [([2], [3]), ([2] * 60, [3] * (subject.max_scored - 59))])
    rest = subject.max_scored - 60
    assert len(score(subject, [([2] * 60, [3] * rest)])[0].logprobs) == rest


def test_a_folder_that_is_not_there_is_refused_by_its_name(subject, tmp_path):
    with pytest.raises(EngineError, match="nowhere"):
        subject.engine.load(ModelSource(tmp_path / "nowhere", "b"))


def test_a_model_sleeps_until_the_next_load(subject):
    (before,) = score(subject, [([2, 3], [4, 5])])
    subject.engine.sleep()
    subject.engine.load(subject.source)
    (after,) = score(subject, [([2, 3], [4, 5])])
    assert (before.logprobs == after.logprobs).all()


def test_other_ids_than_those_read_can_be_scored(subject: Subject) -> None:
    completion, targets = [3, 1, 5, 1], [2, 7, 5, 0]

    def score(request: ScoreRequest, top_k: int) -> TokenScores:
        [found] = subject.engine.score(
            [request],
            Scoring(temperature=subject.at(0.7), num_ids=NUM_IDS, top_k=top_k),
            progress=lambda _: None,
        )
        return found

    if "support" not in subject.engine.abilities:
        with pytest.raises(EngineError, match="request 0"):
            score(ScoreRequest([4, 6], completion, target_ids=targets), 0)
        return
    every = score(ScoreRequest([4, 6], completion), NUM_IDS)
    found = score(ScoreRequest([4, 6], completion, target_ids=targets), 0)
    assert every.topk_ids is not None
    assert every.topk_logprobs is not None
    for t, target in enumerate(targets):
        [at] = (every.topk_ids[t] == target).nonzero()[0]
        assert found.logprobs[t] == pytest.approx(every.topk_logprobs[t, at], abs=1e-6)


def test_hidden_states_are_given_or_refused_as_the_abilities_say(subject: Subject) -> None:
    def score() -> list[TokenScores]:
        return subject.engine.score(
            [ScoreRequest([4, 6], [3, 1])],
            Scoring(temperature=1.0, num_ids=NUM_IDS, hidden=True),
            progress=lambda _: None,
        )

    if "hidden" in subject.engine.abilities:
        [found] = score()
        assert found.hidden is not None
        assert len(found.hidden) == 2
        return
    with pytest.raises(EngineError, match="hidden states"):
        score()
