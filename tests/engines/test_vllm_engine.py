"""The vLLM engine, really run: against plain float64 forwards, over reloads, and when processes die."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kdpipe.engines.protocol import SampleRequest, Sampling, ScoreRequest, Scoring
from kdpipe.engines.vllm.engine import VllmEngine
from kdpipe.engines.vllm.process import VllmProcess
from kdpipe.errors import EngineError, ModelError
from kdpipe.models.folder import write_model
from kdpipe.models.source import AdapterSource, ModelSource
from kdpipe.recipe.runtime import Runtime, Vllm
from tests.tiny_models import ROWS, in_float64, plain_logprobs, tiny_model
from tests.worlds import write_recipe

pytestmark = pytest.mark.vllm

NUM_IDS = 13
PROMPTS = [[2], [3, 4, 5], [6] * 17, [5, 4, 3, 2, 11, 10, 9, 8, 7, 6, 5, 4]]
SETTINGS = Vllm(kv_cache_gib=0.25, max_num_seqs=32, batch_tokens=64)
CPU = torch.device("cpu")
# The last one is what the tests after those of both use: each change of architecture starts vLLM again.
MODELS = {"untied": ("wide", (0, 1)), "tied": ("wide-tied", (0, 1))}


def joining_tokenizer() -> PreTrainedTokenizerFast:
    """Ids 4 and 5 are `a` and `b`, id 6 is `ab`: text cannot tell 4, 5 from 6."""
    words = {f"<{token}>": token for token in range(ROWS) if token not in (4, 5, 6)}
    tokenizer = Tokenizer(models.WordLevel({**words, "a": 4, "b": 5, "ab": 6}, unk_token="<0>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<1>", pad_token="<0>")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], ModelSource]:
    """Two models of each architecture, by its name and the seed of their weights."""
    found = {}
    for kind, (name, seeds) in MODELS.items():
        for seed in seeds:
            folder = tmp_path_factory.mktemp(f"{kind}-{seed}")
            write_model(tiny_model(name, seed=seed), joining_tokenizer(), folder)
            found[kind, seed] = ModelSource(folder, f"{kind}-{seed}", dtype="float32")
    return found


@pytest.fixture(scope="module")
def engine() -> Iterator[VllmEngine]:
    """One for all tests; the first test of each architecture has it start a vLLM."""
    engine = VllmEngine(Runtime(vllm=SETTINGS, score_tokens=60, threads=1), device=CPU)
    yield engine
    engine.close()


def process_of(engine: VllmEngine) -> VllmProcess:
    assert engine._started is not None
    return engine._started.process


def engine_process(engine: VllmEngine) -> int:
    """The id of vLLM's engine process."""
    [child] = process_of(engine).children
    assert child.pid is not None
    return int(child.pid)


def sampling(**changes: Any) -> Sampling:
    settings = {"temperature": 0.7, "max_new_tokens": 12, "end_ids": (1, 7), "num_ids": NUM_IDS}
    return Sampling(**settings | changes)


def requests(*, samples: int = 3) -> list[SampleRequest]:
    return [SampleRequest(prompt, tuple(range(10 * i, 10 * i + samples))) for i, prompt in enumerate(PROMPTS)]


def score(
    engine: VllmEngine, pairs: Sequence[tuple[list[int], list[int]]], *, temperature: float = 1.0
) -> list[np.ndarray]:
    found = engine.score(
        [ScoreRequest(*pair) for pair in pairs],
        Scoring(temperature=temperature, num_ids=NUM_IDS),
        progress=lambda _: None,
    )
    return [scores.logprobs for scores in found]


def plain(model: Any, prompt: list[int], completion: list[int], temperature: float) -> np.ndarray:
    """Log-probs of the completion by one float64 forward, over the ids in use."""
    rows = plain_logprobs(model, prompt, completion, temperature=temperature, num_ids=NUM_IDS)
    return rows[torch.arange(len(completion)), torch.tensor(completion, dtype=torch.long)].numpy()


def model_of(kind: str, seed: int) -> Any:
    return in_float64(tiny_model(MODELS[kind][0], seed=seed))


PAIRS = [
    ([2], [3]),
    ([3, 4, 5], []),
    ([6] * 17, [7, 1, 1, 0, 12]),
    ([2, 9, 2, 9], [8] * 30),
    ([11, 10], [4, 5, 4, 5, 6, 6, 5]),
]


@pytest.mark.parametrize("kind", MODELS)
def test_a_reloaded_engine_scores_as_transformers_does_the_new_weights(
    engine: VllmEngine, sources: dict[tuple[str, int], ModelSource], kind: str
) -> None:
    processes = set()
    for seed in (0, 1, 0):
        engine.load(sources[kind, seed])
        processes.add(engine_process(engine))
        for temperature in (1.0, 0.7, 3.0):
            found = score(engine, PAIRS, temperature=temperature)
            for logprobs, pair in zip(found, PAIRS, strict=True):
                expected = plain(model_of(kind, seed), *pair, temperature)
                np.testing.assert_allclose(logprobs, expected, atol=1e-4)
    assert len(processes) == 1  # in place


def test_sampled_logprobs_are_those_of_a_plain_float64_forward(
    engine: VllmEngine, sources: dict[tuple[str, int], ModelSource]
) -> None:
    engine.load(sources["tied", 0])
    settings = sampling()
    drawn = engine.sample(requests(), settings, progress=lambda _: None)
    model = model_of("tied", 0)
    lengths = set()
    for prompt, row in zip(PROMPTS, drawn, strict=True):
        for completion in row:
            expected = plain(model, prompt, completion.token_ids, 0.7)
            np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
            lengths.add(len(completion.token_ids))
    assert len(lengths) > 3
    assert engine.sample(requests(), settings, progress=lambda _: None) == drawn


def test_a_completion_of_one_token_and_one_whose_text_is_another_survive(
    engine: VllmEngine, sources: dict[tuple[str, int], ModelSource]
) -> None:
    engine.load(sources["tied", 0])
    drawn = engine.sample(
        requests(samples=8), sampling(max_new_tokens=1, end_ids=()), progress=lambda _: None
    )
    assert {len(completion.token_ids) for row in drawn for completion in row} == {1}
    tokenizer, ids = joining_tokenizer(), [4, 5, 4, 5, 6, 6, 5]
    assert tokenizer.encode(tokenizer.decode(ids)) != ids
    [found] = score(engine, [([2], ids)])
    np.testing.assert_allclose(found, plain(model_of("tied", 0), [2], ids, 1.0), atol=1e-4)


def test_seeds_that_differ_beyond_32_bits_are_taken(
    engine: VllmEngine, sources: dict[tuple[str, int], ModelSource]
) -> None:
    engine.load(sources["tied", 0])
    asked = [SampleRequest([2, 3], (0, 1, 2**40 + 7, 2**63 - 1))]
    drawn = engine.sample(asked, sampling(end_ids=()), progress=lambda _: None)
    assert len({tuple(completion.token_ids) for completion in drawn[0]}) == 4


class Spoiled:
    """Stands between the engine and vLLM's workers, and spoils what is asked of them."""

    def __init__(self, engine: VllmEngine, spoil: Callable[..., list[Any] | None]) -> None:
        self._call, self._spoil = process_of(engine).call, spoil

    def __call__(self, method: str, *args: Any) -> list[Any]:
        found = self._spoil(self._call, method, *args)
        return self._call(method, *args) if found is None else found


def nothing_loaded(_call: Any, method: str, *_args: Any) -> list[Any] | None:
    return [""] if method == "kdpipe_load" else None


def nothing_loaded_nor_compared(_call: Any, method: str, *_args: Any) -> list[Any] | None:
    return {"kdpipe_load": [""], "kdpipe_differing": [[]]}.get(method)


def head_left_as_it_was(call: Any, method: str, *args: Any) -> list[Any] | None:
    """What vLLM does by itself with a tied model: nothing of the file goes by the head's name."""
    return call(method, args[0], []) if method == "kdpipe_load" else None


def head_left_and_nothing_compared(call: Any, method: str, *args: Any) -> list[Any] | None:
    return [[]] if method == "kdpipe_differing" else head_left_as_it_was(call, method, *args)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (nothing_loaded, "other numbers in [0-9]+ weights"),
        (nothing_loaded_nor_compared, "nats off"),
        (head_left_as_it_was, "other numbers in 1 weights, the first is lm_head.weight"),
        (head_left_and_nothing_compared, "nats off"),
    ],
)
def test_weights_that_are_stale_in_part_or_whole_are_noticed_and_named(
    engine: VllmEngine,
    sources: dict[tuple[str, int], ModelSource],
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[..., list[Any] | None],
    told: str,
) -> None:
    engine.load(sources["tied", 0])
    with monkeypatch.context() as patched:
        patched.setattr(process_of(engine), "call", Spoiled(engine, spoil))
        with pytest.raises(EngineError, match=told) as caught:
            engine.load(sources["tied", 1])
    assert str(sources["tied", 1].folder) in caught.value.message
    with pytest.raises(EngineError, match="no model is loaded"):
        score(engine, PAIRS)
    engine.load(sources["tied", 1])  # and this time nothing is in the way


def test_without_its_own_head_a_tied_model_scores_by_the_old_one(
    engine: VllmEngine, sources: dict[tuple[str, int], ModelSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The reason for all of this: were vLLM to load tied heads by itself, this test would say that it does.
    engine.load(sources["tied", 0])
    with monkeypatch.context() as patched:
        patched.setattr(process_of(engine), "call", Spoiled(engine, head_left_as_it_was))
        patched.setattr(engine, "_settings", SETTINGS.model_copy(update={"check_weights": False}))
        engine.load(sources["tied", 1])
    [found] = score(engine, PAIRS[3:4])
    expected = plain(model_of("tied", 1), *PAIRS[3], 1.0)
    assert np.abs(found - expected).max() > 0.1
    engine.load(sources["tied", 0])


def test_what_does_not_fit_is_refused_before_vllm_sees_it(
    engine: VllmEngine, sources: dict[tuple[str, int], ModelSource], tmp_path: Path
) -> None:
    source = sources["tied", 0]
    engine.load(source)
    with pytest.raises(ModelError, match="request 0: 60 prompt tokens and 5 completion tokens"):
        score(engine, [([2] * 60, [3] * 5)])
    for pair, told in (
        (([], [3]), "empty"),
        (([2, ROWS], [3]), "from 2 to 16"),
        (([2], [NUM_IDS]), "13, expected 0 to 12"),
    ):
        with pytest.raises(EngineError, match=told):
            score(engine, [pair])
    adapter = AdapterSource(tmp_path, "b")
    with pytest.raises(EngineError, match="takes no adapter"):
        engine.load(ModelSource(source.folder, "a", adapter=adapter))
    assert len(score(engine, PAIRS)) == len(PAIRS)


def test_a_call_that_is_stopped_half_way_leaves_nothing_for_the_next(
    engine: VllmEngine, sources: dict[tuple[str, int], ModelSource]
) -> None:
    class Halt(Exception):
        pass

    def halt(_count: int) -> None:
        raise Halt

    engine.load(sources["tied", 0])
    with pytest.raises(Halt):
        engine.sample(requests(samples=8), sampling(end_ids=(), max_new_tokens=40), progress=halt)
    [found] = score(engine, PAIRS[:1])
    np.testing.assert_allclose(found, plain(model_of("tied", 0), *PAIRS[0], 1.0), atol=1e-4)


def test_an_engine_process_that_dies_is_an_error_and_the_next_load_starts_another(
    engine: VllmEngine, sources: dict[tuple[str, int], ModelSource]
) -> None:
    engine.load(sources["tied", 0])
    victim = engine_process(engine)

    def kill(_count: int) -> None:
        os.kill(victim, signal.SIGKILL)

    started = os.times().elapsed
    with pytest.raises(EngineError, match="died") as caught:
        engine.sample(requests(samples=8), sampling(end_ids=(), max_new_tokens=40), progress=kill)
    assert os.times().elapsed - started < 20
    assert "-9" in caught.value.message
    with pytest.raises(EngineError, match="no model is loaded"):
        score(engine, PAIRS)
    engine.load(sources["tied", 0])
    assert len(score(engine, PAIRS)) == len(PAIRS)


OWNER = """
import multiprocessing, sys, threading, time
from pathlib import Path
import torch
from kdpipe.models.source import ModelSource
from kdpipe.engines.vllm.engine import VllmEngine
from kdpipe.recipe.runtime import Runtime, Vllm

def tell():
    while not multiprocessing.active_children():
        time.sleep(0.05)
    print(multiprocessing.active_children()[0].pid, flush=True)

if __name__ == "__main__":
    threading.Thread(target=tell, daemon=True).start()
    settings = Vllm(kv_cache_gib=0.25, max_num_seqs=32, batch_tokens=64)
    engine = VllmEngine(Runtime(vllm=settings, score_tokens=60), device=torch.device("cpu"))
    engine.load(ModelSource(Path(sys.argv[1]), "a", dtype="float32"))
    print("loaded", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("moment", ["while it starts", "when it is loaded"])
def test_vllm_ends_with_the_process_that_started_it(
    sources: dict[tuple[str, int], ModelSource], tmp_path: Path, moment: str
) -> None:
    script = tmp_path / "owner.py"
    script.write_text(OWNER, encoding="utf-8")
    with (tmp_path / "log").open("wb") as log:
        owner = subprocess.Popen(
            [sys.executable, str(script), str(sources["untied", 0].folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )
    assert owner.stdout is not None
    lines = iter(lambda: owner.stdout.readline().decode().strip(), "")  # type: ignore[union-attr]
    pid = int(next(line for line in lines if line.isdigit()))
    if moment == "when it is loaded":
        assert "loaded" in lines
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    else:
        children = []
    watched = [os.pidfd_open(int(process)) for process in (pid, *children)]
    owner.kill()
    owner.wait()
    for descriptor in watched:
        ended, _, _ = select.select([descriptor], [], [], 30)
        assert ended, "it lives on without its owner"
        os.close(descriptor)


def test_two_rounds_run_from_end_to_end(tmp_path: Path) -> None:
    from kdpipe.models.folder import scratch_model
    from kdpipe.models.tokenizer import arithmetic_tokenizer, num_ids_in_use
    from kdpipe.recipe.models import Scratch

    tokenizer = arithmetic_tokenizer([*"0123456789", "+", "####", "\n", "Tom", "has", "apples"])
    for name, seed, tied in (("student", 1, True), ("teacher", 2, False)):
        shape = Scratch(init_std=0.2, tie_embeddings=tied)
        model = scratch_model(shape, num_ids=num_ids_in_use(tokenizer), eos_id=1, pad_id=0, seed=seed)
        write_model(model, tokenizer, tmp_path / name)
    for split, count in (("train", 12), ("test", 4)):
        problems = [
            {"question": f"Tom has {n} + {n} apples", "answer": f"#### {2 * n}"} for n in range(count)
        ]
        text = "".join(json.dumps(problem) + "\n" for problem in problems)
        (tmp_path / f"{split}.jsonl").write_text(text, encoding="utf-8")
    changes = {
        "rounds": 2,
        "task": {
            "kind": "jsonl",
            "train": "train.jsonl",
            "test": "test.jsonl",
            "prompt": "plain",
            "instruction": "",
        },
        "student": {"model": "student", "dtype": "float32"},
        "teachers": [{"model": "teacher", "dtype": "float32"}],
        "rollout__temperature": 0.8,
        "train__objective": {"kd": {"term": "jsd", "support": {"teacher_top_k": 5}}},
        "evaluate": {"reverse_kl_problems": 2},
        "runtime__vllm": SETTINGS.model_dump(),
    }
    recipe = write_recipe(tmp_path, **changes)
    engines = ["--set", "rollout.engine=vllm", "--set", "teacher_score.engine=vllm"]
    command = [sys.executable, "-c", "from kdpipe.cli.app import main; main()", "run", str(recipe), *engines]
    done = subprocess.run(
        [*command, "--workspace", str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    metrics = [
        json.loads(line)
        for path in (tmp_path / "out").glob("store/*/*/metrics.jsonl")
        for line in path.read_text().splitlines()
    ]
    found = {
        (metric["round"], metric["name"]): metric["value"]
        for metric in metrics
        if metric["optimizer_step"] is None
    }
    for number in (1, 2):
        # The trainer's own forward of what vLLM sampled: the second round is of weights that were loaded in place.
        assert found[number, "train/mismatch_nats_max"] < 1e-3
        assert found[number, "score/reverse_kl_nats"] > 0
