"""How kdpipe drives vLLM, asked of a stand-in for it: arguments, order of calls, and what is made of the answers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdpipe.engines.protocol import SampleRequest, Sampling, ScoreRequest, Scoring
from kdpipe.engines.vllm import guard as vllm_guard
from kdpipe.engines.vllm import process as vllm_process
from kdpipe.engines.vllm import worker as vllm_worker
from kdpipe.engines.vllm.engine import VllmEngine, scores_of
from kdpipe.errors import EngineError, RecipeError
from kdpipe.models.folder import open_model, read_architecture, write_model
from kdpipe.models.source import ModelSource
from kdpipe.recipe.file import load_recipe
from kdpipe.recipe.runtime import Runtime, Vllm
from tests.tiny_models import FLOAT32_NATS, ROWS, in_float64, plain_logprobs, tiny_model, tiny_tokenizer
from tests.worlds import write_recipe

CPU = torch.device("cpu")
DEFAULTS = Vllm()


@dataclass
class Flat:
    """Log-probs as vLLM flattens them; a slice leaves out positions in front, which hold nothing or one entry."""

    token_ids: list[int]
    logprobs: list[float]

    def __getitem__(self, part: slice) -> Flat:
        assert (part.start, part.stop, part.step) == (1, None, None)  # the first position has no entry
        return self


@dataclass
class Parameters:
    """What SamplingParams was called with."""

    given: dict[str, Any]


@dataclass
class Core:
    """The engine core of a vLLM that starts no process."""

    was_shut_down: bool = False

    def shutdown(self, *, timeout: float) -> None:
        self.was_shut_down = timeout > 0


class StandIn:
    """A vLLM of one transformers model, in this process. Answers in the order opposite to the requests."""

    def __init__(self, **options: Any) -> None:
        STARTED.append(self)
        self.options = options
        self.environment = dict(os.environ)
        self.calls: list[tuple[str, Any]] = []
        self.model: Any = None
        self.num_ids, self.temperature = ROWS, 1.0
        self.waiting: list[tuple[str, list[int], dict[str, Any]]] = []
        self.llm_engine = self
        self.engine_core = Core()

    def collective_rpc(self, method: str, *, args: tuple[Any, ...]) -> list[Any]:
        self.calls.append((method, args))
        match method:
            case "kdpipe_load":
                self.model = in_float64(open_model(Path(args[0]), dtype=torch.float32, device=CPU))
                return [""]
            case "kdpipe_differing":
                return [[]]
            case _:
                self.num_ids, self.temperature = args
                return [None]

    def reset_prefix_cache(self) -> None:
        self.calls.append(("reset_prefix_cache", ()))

    def sleep(self, *, level: int) -> None:
        self.calls.append(("sleep", level))

    def wake_up(self) -> None:
        self.calls.append(("wake_up", ()))

    def add_request(self, name: str, prompt: dict[str, list[int]], parameters: Parameters) -> None:
        self.waiting.append((name, prompt["prompt_token_ids"], parameters.given))

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def step(self) -> list[Any]:
        name, ids, given = self.waiting.pop()
        output = types.SimpleNamespace(request_id=name, finished=True, prompt_logprobs=None, outputs=[])
        if given.get("prompt_logprobs") is not None:
            output.prompt_logprobs = self.flat(ids, given["prompt_logprobs"])
        else:
            drawn = [given["seed"] % self.num_ids] * given["max_tokens"]
            flat = self.flat([*ids, *drawn], 0)
            flat = Flat(flat.token_ids[-len(drawn) :], flat.logprobs[-len(drawn) :])
            output.outputs = [
                types.SimpleNamespace(token_ids=drawn, logprobs=flat, finish_reason="length", given=given)
            ]
        SEEN.append(given)
        return [output]

    def flat(self, ids: list[int], k: int) -> Flat:
        rows = plain_logprobs(
            self.model, ids[:1], ids[1:], temperature=self.temperature, num_ids=self.num_ids
        )
        found = Flat([], [])
        for token, row in zip(ids[1:], rows.tolist(), strict=True):
            order = sorted(range(len(row)), key=lambda i: (-row[i], -i))[:k]  # ties the other way round
            found.token_ids += [token, *order]
            found.logprobs += [row[token], *(row[i] for i in order)]
        return found


STARTED: list[StandIn] = []
SEEN: list[dict[str, Any]] = []


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module named vllm with the few names that kdpipe takes from it."""
    STARTED.clear()
    SEEN.clear()
    modules = {
        name: types.ModuleType(name)
        for name in (
            "vllm",
            "vllm.sampling_params",
            "vllm.v1",
            "vllm.v1.engine",
            "vllm.v1.engine.exceptions",
        )
    }
    modules["vllm"].LLM = StandIn  # type: ignore[attr-defined]
    modules["vllm"].SamplingParams = lambda **given: Parameters(given)  # type: ignore[attr-defined]
    kinds = types.SimpleNamespace(FINAL_ONLY="final only")
    modules["vllm.sampling_params"].RequestOutputKind = kinds  # type: ignore[attr-defined]
    dead = type("EngineDeadError", (Exception,), {})
    modules["vllm.v1.engine.exceptions"].EngineDeadError = dead  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield
    while ENGINES:
        ENGINES.pop().close()


def source_of(folder: Path, *, name: str = "llama", seed: int = 0) -> ModelSource:
    target = folder / f"{name}-{seed}"
    write_model(tiny_model(name, seed=seed), tiny_tokenizer(), target)
    return ModelSource(target, target.name, dtype="float32")


ENGINES: list[VllmEngine] = []


def engine_of(
    settings: Vllm = DEFAULTS, *, device: torch.device = CPU, threads: int | None = None
) -> VllmEngine:
    ENGINES.append(VllmEngine(Runtime(vllm=settings, score_tokens=40, threads=threads), device=device))
    return ENGINES[-1]


def options_of(tmp_path: Path, settings: Vllm = DEFAULTS, **changes: Any) -> dict[str, Any]:
    source = source_of(tmp_path)
    architecture = read_architecture(source.folder, is_quantized="quantization" in changes)
    device = changes.pop("device", CPU)
    return engine_of(settings, device=device).options(replace(source, **changes), architecture)


def test_every_setting_reaches_vllm_under_its_name(tmp_path: Path) -> None:
    cuda = torch.device("cuda")
    settings = Vllm(
        tensor_parallel_size=4,
        gpu_memory_utilization=0.55,
        kv_cache_gib=1.5,
        enforce_eager=True,
        max_model_len=48,
        max_num_seqs=7,
        batch_tokens=99,
        prefix_caching=False,
        sleep=True,
    )
    given = options_of(tmp_path, settings, device=cuda)
    expected = {
        "tensor_parallel_size": 4,
        "gpu_memory_utilization": 0.55,
        "kv_cache_memory_bytes": 3 * 2**29,
        "enforce_eager": True,
        "max_model_len": 49,  # room for the one token that vLLM adds to what is scored
        "max_num_seqs": 7,
        "max_num_batched_tokens": 99,
        "enable_prefix_caching": False,
        "enable_sleep_mode": True,
    }
    plain = options_of(tmp_path, device=cuda)
    for name, value in expected.items():
        assert given[name] == value
        assert plain[name] != value, f"{name}: the default already"


def test_an_engine_by_itself_takes_a_gpu_for_itself_and_does_not_sleep(tmp_path: Path) -> None:
    given = options_of(tmp_path, Vllm(), device=torch.device("cuda"))
    assert (given["enable_sleep_mode"], given["gpu_memory_utilization"]) == (False, 0.9)


def test_what_decides_results_is_fixed_whatever_the_settings(tmp_path: Path) -> None:
    given = options_of(tmp_path)
    assert given["generation_config"] == "vllm"
    assert given["logprobs_mode"] == "processed_logprobs"
    assert given["dtype"] == "float32"
    assert given["trust_remote_code"] is False
    assert given["load_format"] == "dummy"
    assert given["hf_overrides"] == {"tie_word_embeddings": False}


def test_a_cpu_gets_two_gib_no_compilation_and_prompts_in_one_piece(tmp_path: Path) -> None:
    given = options_of(tmp_path, Vllm(max_num_seqs=8, batch_tokens=8))
    assert given["kv_cache_memory_bytes"] == 2 * 2**30
    assert given["enforce_eager"] is True
    assert given["enable_chunked_prefill"] is False
    assert given["max_num_batched_tokens"] == given["max_model_len"] == 65
    on_cuda = options_of(tmp_path, device=torch.device("cuda"))
    assert on_cuda["kv_cache_memory_bytes"] is None
    assert on_cuda["enforce_eager"] is False
    assert on_cuda["enable_chunked_prefill"] is True


def test_quantized_weights_are_what_vllm_starts_with(tmp_path: Path) -> None:
    given = options_of(tmp_path, quantization="fp8")
    assert given["quantization"] == "fp8"
    assert "load_format" not in given
    assert "hf_overrides" not in given
    first, second = source_of(tmp_path), source_of(tmp_path, seed=1)
    engine = engine_of()
    for source in (first, second):
        engine.load(replace(source, quantization="fp8"))
    assert [stand_in.options["model"] for stand_in in STARTED] == [str(first.folder), str(second.folder)]
    assert [stand_in.calls for stand_in in STARTED] == [[], []]


def test_only_the_first_device_is_vllms_to_take() -> None:
    with pytest.raises(EngineError, match="cuda:1"):
        engine_of(device=torch.device("cuda:1"))


def test_new_weights_are_loaded_in_place_and_another_architecture_starts_anew(tmp_path: Path) -> None:
    engine = engine_of(threads=3)
    first, second = source_of(tmp_path), source_of(tmp_path, seed=1)
    for source in (first, first, second):
        engine.load(source)
    [vllm] = STARTED
    assert [call for call in vllm.calls if call[0] == "kdpipe_load"] == [
        ("kdpipe_load", (str(source.folder), ["lm_head.weight"])) for source in (first, second)
    ]
    for index, (method, _) in enumerate(vllm.calls):
        if method == "kdpipe_load":
            assert vllm.calls[index + 1][0] == "reset_prefix_cache"
    assert vllm.environment["OMP_NUM_THREADS"] == "1"  # what the user has set stays
    assert vllm.environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert vllm.environment["VLLM_NO_USAGE_STATS"] == "1"
    assert vllm_guard.VARIABLE in vllm.environment
    assert vllm_guard.VARIABLE not in os.environ
    engine.load(source_of(tmp_path, name="qwen2"))
    assert len(STARTED) == 2
    assert vllm.engine_core.was_shut_down
    assert STARTED[1].calls[0][1][1] == ["model.embed_tokens.weight", "lm_head.weight"]  # it is tied


def test_a_load_that_fails_ends_vllm_and_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of()
    engine.load(source_of(tmp_path))
    [vllm] = STARTED
    monkeypatch.setattr(vllm, "collective_rpc", lambda *_, **__: ["KeyError: 'nothing'"])
    with pytest.raises(EngineError, match="cannot load its weights: KeyError: 'nothing'"):
        engine.load(source_of(tmp_path, seed=1))
    assert vllm.engine_core.was_shut_down
    with pytest.raises(EngineError, match="no model is loaded"):
        engine.score([], Scoring(temperature=1.0, num_ids=4), progress=lambda _: None)


def test_it_sleeps_where_it_is_asked_to_and_can(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    for device, asked, slept in (("cpu", True, False), ("cuda", False, False), ("cuda", True, True)):
        engine = engine_of(Vllm(sleep=asked), device=torch.device(device))
        engine.load(source)
        STARTED[-1].calls.clear()
        engine.sleep()
        engine.sleep()
        engine.load(source)
        assert STARTED[-1].calls == ([("sleep", 1), ("wake_up", ())] if slept else [])


def test_parameters_of_sampling_say_all_that_ends_a_completion_and_nothing_hidden(tmp_path: Path) -> None:
    engine = engine_of()
    engine.load(source_of(tmp_path))
    SEEN.clear()
    sampling = Sampling(0.7, 4, (1, 5, 14), 12, top_p=0.9, top_k=3, stop=("w4.",))
    asked = [SampleRequest([2], (5, 6)), SampleRequest([3, 4], (2**63 - 1,))]
    drawn = engine.sample(asked, sampling, progress=lambda _: None)
    assert [[completion.token_ids[0] for completion in row] for row in drawn] == [[5, 6], [(2**63 - 1) % 12]]
    assert [given.pop("seed") for given in SEEN] == [2**63 - 1, 6, 5]
    assert all(given == SEEN[0] for given in SEEN)
    assert SEEN[0] == {
        "temperature": 1.0,  # the logits are divided by 0.7 where they are made
        "top_p": 0.9,
        "top_k": 3,
        "max_tokens": 4,
        "ignore_eos": True,
        "stop_token_ids": [1, 5],
        "stop": ["w4."],
        "detokenize": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "logprobs": 0,
        "flat_logprobs": True,
        "output_kind": "final only",
    }
    assert STARTED[0].calls[-1] == ("kdpipe_shape_logits", (12, 0.7))
    engine.sample(asked, replace(sampling, temperature=0.0, stop=()), progress=lambda _: None)
    assert SEEN[-1]["temperature"] == 0.0
    assert SEEN[-1]["detokenize"] is False
    assert STARTED[0].calls[-1] == ("kdpipe_shape_logits", (12, 1.0))


@pytest.mark.parametrize("top_k", [0, 3, 12])
def test_scores_are_found_by_token_id_and_ties_go_to_the_lower_one(tmp_path: Path, top_k: int) -> None:
    engine = engine_of()
    source = source_of(tmp_path)
    engine.load(source)
    SEEN.clear()
    pairs = [([2], [3]), ([3, 4], []), ([5] * 20, [4, 4, 1]), ([6] * 20, [7] * 5)]
    scores = engine.score(
        [ScoreRequest(*pair) for pair in pairs],
        Scoring(temperature=0.8, num_ids=12, top_k=top_k),
        progress=lambda _: None,
    )
    assert len(SEEN) == 3  # an empty completion asks for nothing
    model = in_float64(tiny_model("llama"))
    for (prompt, completion), score in zip(pairs, scores, strict=True):
        rows = plain_logprobs(model, prompt, completion, temperature=0.8, num_ids=12).numpy()
        np.testing.assert_allclose(
            score.logprobs, rows[np.arange(len(completion)), completion], atol=FLOAT32_NATS
        )
        if not top_k:
            assert score.topk_ids is None
            continue
        order = np.argsort(-rows, axis=1, kind="stable")[:, :top_k]
        assert score.topk_ids.tolist() == order.tolist()
        rest = 1 - np.exp(np.take_along_axis(rows, order, axis=1)).sum(axis=1)
        expected = np.full(len(completion), -np.inf) if top_k == 12 else np.log(np.maximum(rest, 1e-7))
        np.testing.assert_allclose(score.tail_logprobs, expected, atol=1e-4)


def test_equal_log_probs_are_sorted_by_id_and_an_overfull_support_has_the_least_tail() -> None:
    flat = Flat([4, 9, 4, 7], [np.log(0.5), np.log(0.5), np.log(0.5), np.log(0.1)])
    output = types.SimpleNamespace(prompt_logprobs=flat)
    found = scores_of(output, [3, 4], count=1, top_k=3)
    assert found.topk_ids.tolist() == [[4, 9, 7]]
    assert found.tail_logprobs[0] == pytest.approx(np.log(1e-7))


@pytest.mark.parametrize(
    ("flat", "told"),
    [
        (Flat([5], [-1.0]), "other tokens"),
        (Flat([4], [float("nan")]), "token 0 are not finite"),
        (Flat([4], [float("-inf")]), "token 0 are not finite"),
    ],
)
def test_answers_of_other_tokens_or_that_are_not_numbers_are_errors(flat: Flat, told: str) -> None:
    with pytest.raises(EngineError, match=told):
        scores_of(types.SimpleNamespace(prompt_logprobs=flat), [3, 4], count=1, top_k=0)


def test_scores_that_are_not_those_of_the_folder_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = in_float64(tiny_model("llama", seed=5))

    def stale(self: StandIn, method: str, *, args: tuple[Any, ...]) -> list[Any]:
        if method == "kdpipe_load":
            self.model = other
            return [""]
        return [[]] if method == "kdpipe_differing" else [None]

    monkeypatch.setattr(StandIn, "collective_rpc", stale)
    engine = engine_of()
    with pytest.raises(EngineError, match="nats off what transformers computes"):
        engine.load(source_of(tmp_path))
    engine = engine_of(Vllm(check_weights=False))
    engine.load(source_of(tmp_path))


# ------------------------------------------------------------------------------------------- the guard


def test_the_guard_kills_what_bears_its_mark_and_nothing_else_when_its_pipe_ends() -> None:
    def start(mark: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, vllm_guard.VARIABLE: mark}
        code = "import sys; print(1, flush=True); sys.stdin.read()"
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        return process

    mark = f"test-{os.getpid()}"
    marked, other = start(mark), start(f"{mark}0")
    guard = subprocess.Popen([sys.executable, "-I", "-S", vllm_guard.__file__, mark], stdin=subprocess.PIPE)
    assert guard.poll() is None
    assert marked.poll() is None
    guard.communicate()
    assert guard.returncode == 0
    assert marked.wait() == -signal.SIGKILL
    assert other.poll() is None
    other.communicate()


def test_a_vllm_that_does_not_start_leaves_no_guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guards: list[subprocess.Popen[bytes]] = []
    start_guard = vllm_process._start_guard

    def remember() -> tuple[subprocess.Popen[bytes], str]:
        guard, mark = start_guard()
        guards.append(guard)
        return guard, mark

    def refuse(**_options: Any) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(vllm_process, "_start_guard", remember)
    monkeypatch.setattr(sys.modules["vllm"], "LLM", refuse)
    with pytest.raises(EngineError, match="cannot start with it: no room"):
        engine_of().load(source_of(tmp_path))
    [guard] = guards
    assert guard.returncode == 0


# --------------------------------------------------------------------------------- inside vLLM's worker


@dataclass
class Runner:
    """A model runner whose model gives one row of logits."""

    logits: torch.Tensor
    seen: list[Any] = field(default_factory=list)

    def get_model(self) -> Runner:
        return self

    def compute_logits(self, _hidden: Any) -> torch.Tensor:
        return self.logits.clone()


def test_logits_are_shaped_anew_each_time_and_not_on_top_of_each_other() -> None:
    worker = vllm_worker.WorkerExtension()
    worker.model_runner = Runner(torch.tensor([[1.0, 2.0, 4.0]]))
    for num_ids, temperature in ((2, 0.5), (3, 1.0), (3, 2.0)):
        worker.kdpipe_shape_logits(num_ids, temperature)
        shaped = worker.model_runner.compute_logits(None)[0]
        expected = torch.tensor([1.0, 2.0, 4.0]) / temperature
        assert shaped[:num_ids].tolist() == expected[:num_ids].tolist()
        assert (shaped[num_ids:] == -torch.inf).all()


def test_a_tied_head_is_read_under_both_of_its_names_and_any_other_once(tmp_path: Path) -> None:
    tied, untied = source_of(tmp_path, name="qwen2"), source_of(tmp_path)
    names = read_architecture(tied.folder).head_names
    read = dict(vllm_worker.read_weights(tied.folder, names))
    assert set(names) == {"lm_head.weight", "model.embed_tokens.weight"}
    assert torch.equal(read["lm_head.weight"], read["model.embed_tokens.weight"])
    read = list(vllm_worker.read_weights(untied.folder, read_architecture(untied.folder).head_names))
    assert [name for name, _ in read].count("lm_head.weight") == 1
    assert len({name for name, _ in read}) == len(read)


def test_weights_are_compared_in_the_model_s_dtype_where_their_shapes_allow_it() -> None:
    file = {"a": torch.tensor([[1.0], [2.0]]), "b": torch.ones(3), "fused": torch.ones(2, 2)}
    held = {"a": torch.tensor([[1.0], [2.0], [9.0]]), "b": torch.ones(3).bfloat16(), "fused": torch.ones(4)}
    assert vllm_worker.differing_weights(held, iter(file.items())) == []
    held["a"] = held["a"] + 1
    assert vllm_worker.differing_weights(held, iter(file.items())) == ["a"]
    assert vllm_worker.differing_weights({}, iter(file.items())) == ["(none is kept as the file has it)"]


# -------------------------------------------------------------------------------------------- the recipe


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"teachers": [{"scratch": {}, "sft": {"steps": 1}, "quantization": "fp8"}]},
            "goes with engine vllm",
        ),
        (
            {"teachers": [{"self": "initial", "prompt": "{question}!", "quantization": "fp8"}]},
            "this teacher is the student itself: remove it",
        ),
        ({"student__lora": {}, "rollout__engine": "vllm"}, "takes no adapter"),
        ({"student__lora": {}, "evaluate": {"engine": "vllm"}}, "takes no adapter"),
        ({"student__quantization": "fp8"}, "unknown key"),
        ({"runtime__vllm": {"batch_tokens": 10}}, "at least max_num_seqs"),
    ],
)
def test_a_recipe_that_vllm_cannot_run_is_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        load_recipe(write_recipe(tmp_path, **changes))


def test_a_quantized_teacher_is_taken_where_vllm_alone_runs_it(tmp_path: Path) -> None:
    teachers = [{"scratch": {}, "sft": {"steps": 1}, "quantization": "fp8"}]
    for evaluate in ({"engine": "vllm"}, {"teacher": False}):
        changes = {"teachers": teachers, "teacher_score": {"engine": "vllm"}, "evaluate": evaluate}
        loaded = load_recipe(write_recipe(tmp_path, **changes))
        assert loaded.recipe.teacher.quantization == "fp8"
