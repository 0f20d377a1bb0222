"""What a handle promises on every engine: each call is answered by its own model, whoever asked before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kdpipe.engines.handle import ModelHandle, Turns
from kdpipe.engines.hf.engine import HfEngine
from kdpipe.engines.protocol import Completion, Engine, SampleRequest, Sampling, ScoreRequest, Scoring
from kdpipe.engines.remote import Hosting, WorkerEngine
from kdpipe.errors import EngineError
from kdpipe.models.cache import ModelCache
from kdpipe.models.folder import write_model
from kdpipe.models.source import ModelSource
from kdpipe.recipe.runtime import Runtime
from tests.fakes import FakeEngine
from tests.tiny_models import tiny_model, tiny_tokenizer

NUM_IDS = 12
NO_TEXT: Any = None
SAMPLING = Sampling(temperature=1.0, max_new_tokens=12, end_ids=(1,), num_ids=NUM_IDS)
REQUESTS = [SampleRequest([2, 3], (1, 2, 3)), SampleRequest([7, 4, 9], (4, 5))]
Open = Callable[[], Engine]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerEngine]:
    """An engine in a process of its own, which all tests share: it takes seconds to start."""
    engine = WorkerEngine(
        Hosting("hf", "cpu", Runtime(threads=1)),
        log=tmp_path_factory.mktemp("worker") / "log",
        environment={"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        target="tests.worker_targets:fake_host",
    )
    yield engine
    engine.close()


def hf_engine(num_models: int) -> Open:
    def make() -> Engine:
        cache = ModelCache(torch.device("cpu"), limit=num_models)
        return HfEngine(cache, Runtime(sample_tokens=400, score_tokens=100, head_chunk_tokens=7))

    return make


@pytest.fixture(params=["fake", "hf", "hf that holds one model", "worker"])
def new_engine(request: pytest.FixtureRequest) -> Open:
    """Opens engines of one kind: a fresh one at every call, where that takes no process."""
    if request.param == "worker":
        worker: WorkerEngine = request.getfixturevalue("worker")
        return lambda: worker
    return {"fake": FakeEngine, "hf": hf_engine(3), "hf that holds one model": hf_engine(1)}[request.param]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[ModelSource]:
    """Three models of the same sizes with other weights."""
    found = []
    for seed, name in enumerate(("student", "teacher", "next round")):
        folder = tmp_path_factory.mktemp("model")
        write_model(tiny_model("llama", seed=seed), tiny_tokenizer(), folder)
        found.append(ModelSource(folder, name, dtype="float32"))
    return found


def handle(source: ModelSource, open_engine: Open, *turns: Turns) -> ModelHandle:
    return ModelHandle(source.digest, source, NO_TEXT, "hf", open_engine, turns)


def drawn(model: ModelHandle) -> list[list[Completion]]:
    return model.sample(REQUESTS, SAMPLING, progress=lambda _: None)


def scored(model: ModelHandle) -> list[float]:
    scoring = Scoring(temperature=1.0, num_ids=NUM_IDS)
    [found] = model.score([ScoreRequest([2, 3], [4, 5, 6])], scoring, progress=lambda _: None)
    return found.logprobs.tolist()


def test_each_of_two_roles_of_one_engine_is_answered_by_its_own_model(
    new_engine: Open, sources: list[ModelSource]
) -> None:
    fresh = [drawn(handle(source, new_engine)) for source in sources[:2]]
    assert fresh[0] != fresh[1]
    engine = new_engine()
    student, teacher = (handle(source, lambda: engine) for source in sources[:2])
    assert [drawn(student), drawn(teacher), drawn(student), drawn(teacher)] == [*fresh, *fresh]
    alone = scored(student)
    assert scored(teacher) != alone
    assert scored(student) == alone


def test_weights_of_a_new_round_are_loaded_and_sample_as_a_fresh_engine_does(
    new_engine: Open, sources: list[ModelSource]
) -> None:
    engine = new_engine()
    student = handle(sources[0], lambda: engine)
    before = drawn(student)
    after = drawn(replace(student, source=sources[2]))
    assert after == drawn(handle(sources[2], new_engine))
    assert after != before
    assert drawn(student) == before


def test_a_model_that_was_put_to_sleep_is_loaded_again_when_it_is_asked(
    new_engine: Open, sources: list[ModelSource]
) -> None:
    engine = new_engine()
    student = handle(sources[0], lambda: engine)
    before = drawn(student), scored(student)
    student.open_engine().sleep()
    assert (drawn(student), scored(student)) == before


def test_engines_of_one_device_sleep_in_turn_and_answer_as_if_they_had_not(
    sources: list[ModelSource],
) -> None:
    turns, engines = Turns(), [hf_engine(1)(), hf_engine(1)()]
    student = handle(sources[0], lambda: engines[0], turns)
    teacher = handle(sources[1], lambda: engines[1], turns)
    first = scored(student), scored(teacher)
    teacher.open_engine().sleep()
    for engine in engines:
        with pytest.raises(EngineError, match="no model is loaded"):
            engine.score([], Scoring(temperature=1.0, num_ids=NUM_IDS), progress=lambda _: None)
    assert (scored(student), scored(teacher)) == first
    assert drawn(student) == drawn(handle(sources[0], hf_engine(1)))


def test_no_engine_is_opened_before_its_model_is_asked(sources: list[ModelSource]) -> None:
    opened: list[str] = []
    engine = FakeEngine()

    def open_engine() -> Engine:
        opened.append("engine")
        return engine

    student = handle(sources[0], open_engine)
    assert opened == []
    scored(student)
    assert opened == ["engine"]
    assert engine.loaded == ["student"]
