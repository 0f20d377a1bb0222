"""The engine that runs vLLM.

One vLLM serves all models of one architecture, one after another: it starts with random weights, and every
model, the first too, is loaded into it in the same way (`worker.py`), with an output head of its own
even where the file's is tied to the input embeddings. A model that was loaded is compared with its files, and
its scores with those of transformers, before anything else is asked of it.

Temperature and padding rows are taken care of where vLLM's logits are made: it has prompts scored at temperature 1
only, over all rows.

What is sampled depends, through rounding, on what else is in the batch, so a seed gives the same completion
again only where its log-probs round the same way: stored rows are the truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kdpipe.engines.limits import NOT_FINITE_HINT, Limits, no_scores, require_sampling, require_scoring
from kdpipe.engines.protocol import (
    Completion,
    Progress,
    SampleRequest,
    Sampling,
    ScoreRequest,
    Scoring,
    TokenScores,
    about,
)
from kdpipe.engines.vllm.process import VllmProcess, sampling_params, scoring_params
from kdpipe.errors import EngineError
from kdpipe.models.batching import batches_by_tokens
from kdpipe.models.devices import dtype_name, resolve_dtype
from kdpipe.models.folder import Architecture, read_architecture
from kdpipe.models.reference import plain_logprobs
from kdpipe.models.source import ModelSource
from kdpipe.recipe.runtime import WHOLE_SHARE, Runtime
from kdpipe.recipe.section import ENGINE_ABILITIES

CPU = torch.device("cpu")
_CPU_KV_CACHE_GIB = 2.0
_PROBE_TOKENS = 12
_PROBE_TOLERANCE = {torch.float32: 2e-3, torch.float16: 0.05, torch.bfloat16: 0.4}
"""Nats by which a log-prob may differ from that of transformers' float32 forward, by dtype."""
_TAIL_FLOOR = 1e-7
"""The least tail mass: what float32 log-probs leave undecided when their sum is taken from 1."""


@dataclass(frozen=True, slots=True)
class _Started:
    """A vLLM and what it was started for; models of the same architecture can follow one another."""

    process: VllmProcess
    source: ModelSource
    architecture: Architecture

    @property
    def is_quantized(self) -> bool:
        """Whether weights are stored in fewer bits: such a model is started with, never loaded in place."""
        return self.architecture.is_quantized

    def takes(self, source: ModelSource, architecture: Architecture) -> bool:
        """Whether that model's weights can take the place of those that vLLM holds."""
        like = replace(self.source, folder=source.folder, digest=source.digest)
        return like == source and self.architecture == architecture and not self.is_quantized


class VllmEngine:
    """Samples and scores with one vLLM, started for the first model and for each new architecture."""

    abilities = ENGINE_ABILITIES["vllm"]

    def __init__(self, runtime: Runtime, *, device: torch.device) -> None:
        if device.index:
            raise EngineError(
                f"engine vllm takes the first device that it sees, not {device}",
                hint="set runtime.device to cuda, and CUDA_VISIBLE_DEVICES to the devices for vLLM to use",
            )
        self._runtime = runtime
        self._settings = runtime.vllm
        self._device = device
        self._started: _Started | None = None
        self._source: ModelSource | None = None
        self._sleeps = runtime.vllm.sleep is True and device.type == "cuda"
        self._shape: tuple[int, float] | None = None

    def load(self, source: ModelSource) -> None:
        """See Engine. Weights of another model of the same architecture are loaded in place."""
        if source.adapter is not None:
            raise EngineError(
                f"{source.adapter.folder}: engine vllm takes no adapter",
                hint="set the engine of this stage to hf, or train without student.lora",
            )
        started = self._alive()
        if started is not None and self._source and replace(self._source, folder=source.folder) == source:
            started.process.wake()
            return
        architecture = read_architecture(
            source.folder,
            trust_remote_code=source.trust_remote_code,
            is_quantized=source.quantization is not None,
        )
        self._source = None
        if started is None or not started.takes(source, architecture):
            self.close()
            started = self._started = self._start(source, architecture)
        started.process.wake()
        if not started.is_quantized:
            self._load_weights(started, source)
        self._source = source

    def sleep(self) -> None:
        """See Engine. Only where `runtime.vllm.sleep` asks for it, and vLLM can: on CUDA."""
        if self._sleeps and (started := self._alive()) is not None:
            started.process.sleep()

    def close(self) -> None:
        started, self._started = self._started, None
        self._source, self._shape = None, None
        if started is not None:
            started.process.close()

    def options(self, source: ModelSource, architecture: Architecture) -> dict[str, object]:
        """The arguments of `vllm.LLM` for a model."""
        settings, on_cpu = self._settings, self._device.type == "cpu"
        dtype, _ = resolve_dtype(source.dtype, self._device)
        gib = settings.kv_cache_gib or (_CPU_KV_CACHE_GIB if on_cpu else None)
        context = self._limits(architecture).context
        max_tokens = None if context is None else context + 1
        options: dict[str, object] = {
            "model": str(source.folder),
            "tokenizer": str(source.folder),
            "trust_remote_code": source.trust_remote_code,
            "dtype": dtype_name(dtype),
            "seed": 0,
            "generation_config": "vllm",  # the folder's own defaults would change sampling unseen
            "logprobs_mode": "processed_logprobs",
            "max_logprobs": -1,
            "worker_extension_cls": "kdpipe.engines.vllm.worker.WorkerExtension",
            "tensor_parallel_size": settings.tensor_parallel_size,
            "gpu_memory_utilization": settings.gpu_memory_utilization or WHOLE_SHARE,
            "enforce_eager": on_cpu if settings.enforce_eager is None else settings.enforce_eager,
            "enable_prefix_caching": settings.prefix_caching,
            "max_model_len": max_tokens,
            "max_num_seqs": settings.max_num_seqs,
            # On a CPU, vLLM 0.32 dies of a prompt that has a seed and is cut in two.
            "enable_chunked_prefill": not on_cpu,
            "max_num_batched_tokens": max(settings.batch_tokens, (max_tokens or 0) * on_cpu),
            "kv_cache_memory_bytes": None if gib is None else round(gib * 2**30),
            "enable_sleep_mode": self._sleeps,
        }
        if architecture.is_quantized:
            return {**options, "quantization": source.quantization}
        return {**options, "load_format": "dummy", "hf_overrides": {"tie_word_embeddings": False}}

    def _alive(self) -> _Started | None:
        return None if self._started is None or self._started.process.is_closed else self._started

    def _start(self, source: ModelSource, architecture: Architecture) -> _Started:
        environment = {}
        if self._device.type == "cpu" and (threads := self._runtime.threads) is not None:
            # Bound by itself, vLLM takes a thread for each core, however many kdpipe may use.
            environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
        return _Started(VllmProcess(self.options(source, architecture), environment), source, architecture)

    def _load_weights(self, started: _Started, source: ModelSource) -> None:
        names = list(started.architecture.head_names)
        if problem := started.process.call("kdpipe_load", str(source.folder), names)[0]:
            self.close()  # some of its weights are those of before
            raise EngineError(
                f"{source.folder}: vLLM cannot load its weights: {problem}",
                hint="set the engine of this stage to hf",
            )
        started.process.forget_prefixes()
        if self._settings.check_weights:
            self._check_weights(started, source, names)

    def _check_weights(self, started: _Started, source: ModelSource, names: list[str]) -> None:
        """Raises EngineError unless vLLM holds the weights of the folder, and computes with them."""
        hint = "vLLM may not load this architecture in place; set the engine of this stage to hf"
        if differing := started.process.call("kdpipe_differing", str(source.folder), names)[0]:
            raise EngineError(
                f"{source.folder}: after loading it, vLLM holds other numbers in {len(differing)} weights, "
                f"the first is {differing[0]}",
                hint=hint,
            )
        rows = started.architecture.rows
        ids = [(7919 * place + 1) % rows for place in range(_PROBE_TOKENS)]  # spread over the vocabulary
        self._shape_logits(started, rows, 1.0)
        [found] = self._score(started, [(ids, len(ids) - 1)], top_k=0, progress=lambda _: None)
        [expected] = plain_logprobs(
            source, [(ids[:1], ids[1:])], temperature=1.0, num_ids=rows, dtype=torch.float32, device=CPU
        )
        off = np.abs(found.logprobs - expected).max()
        dtype, _ = resolve_dtype(source.dtype, self._device)
        if not off <= (tolerance := _PROBE_TOLERANCE[dtype]):
            raise EngineError(
                f"{source.folder}: vLLM scores {len(ids)} tokens up to {off:.3g} nats off what transformers "
                f"computes from the same files, expected at most {tolerance:g} in {dtype}",
                hint=hint,
            )

    def sample(
        self, requests: Sequence[SampleRequest], sampling: Sampling, *, progress: Progress
    ) -> list[list[Completion]]:
        started = self._loaded()
        require_sampling(requests, sampling, self._limits(started.architecture))
        rows = [(index, seed) for index, request in enumerate(requests) for seed in request.seeds]
        completions: dict[int, Completion] = {}

        def finish(row: int, output: Any) -> None:
            with about(rows[row][0]):
                completions[row] = completion_of(output)
            progress(len(completions[row].token_ids))

        # A greedy completion's log-probs are those at temperature 1.
        self._shape_logits(started, sampling.num_ids, sampling.temperature or 1.0)
        asked = {
            row: (requests[index].prompt_token_ids, sampling_params(sampling, seed))
            for row, (index, seed) in enumerate(rows)
        }
        started.process.run(asked, finish)
        drawn = (completions[row] for row in range(len(rows)))
        return [[next(drawn) for _ in request.seeds] for request in requests]

    def score(
        self, requests: Sequence[ScoreRequest], scoring: Scoring, *, progress: Progress
    ) -> list[TokenScores]:
        started = self._loaded()
        if scoring.hidden:
            raise EngineError("engine vllm gives no hidden states", hint="set teacher_score.engine to hf")
        for index, request in enumerate(requests):
            if request.support_ids is not None or request.target_ids is not None:
                raise EngineError(
                    "engine vllm scores the ids that it reads and the most probable ones, no others",
                    hint="set teacher_score.engine to hf",
                    request=index,
                )
        require_scoring(requests, scoring, self._limits(started.architecture))
        jobs = [
            ([*request.prompt_token_ids, *request.completion_token_ids], len(request.completion_token_ids))
            for request in requests
        ]
        self._shape_logits(started, scoring.num_ids, scoring.temperature)
        scores = self._score(started, jobs, top_k=scoring.top_k, progress=progress)
        if 0 < scoring.top_k == scoring.num_ids:  # nothing is outside a support that holds all ids
            return [replace(one, tail_logprobs=np.full_like(one.logprobs, -np.inf)) for one in scores]
        return scores

    def _score(
        self, started: _Started, jobs: Sequence[tuple[list[int], int]], *, top_k: int, progress: Progress
    ) -> list[TokenScores]:
        """Scores of the last tokens, as many as each job says; an empty completion is not asked for."""
        results = [no_scores(top_k)] * len(jobs)

        def finish(index: int, output: Any) -> None:
            ids, count = jobs[index]
            with about(index):
                results[index] = scores_of(output, ids, count=count, top_k=top_k)
            progress(count)

        wanted = [index for index, (_, count) in enumerate(jobs) if count]
        lengths = [len(jobs[index][0]) for index in wanted]
        for batch in batches_by_tokens(lengths, self._runtime.score_tokens):
            indexes = [wanted[place] for place in batch]
            started.process.run({index: (jobs[index][0], scoring_params(top_k)) for index in indexes}, finish)
        return results

    def _loaded(self) -> _Started:
        started = self._alive()
        if started is None or self._source is None or started.process.is_asleep:
            raise EngineError("no model is loaded: call load first, also after sleep")
        return started

    def _shape_logits(self, started: _Started, num_ids: int, temperature: float) -> None:
        if self._shape != (num_ids, temperature):
            self._shape = None
            started.process.call("kdpipe_shape_logits", num_ids, temperature)
            self._shape = (num_ids, temperature)

    def _limits(self, architecture: Architecture) -> Limits:
        bounds = (self._settings.max_model_len, architecture.context)
        context = min((bound for bound in bounds if bound is not None), default=None)
        return Limits(context, architecture.rows)


def completion_of(output: Any) -> Completion:
    """The completion in a request's output, with the log-prob that stands at each token's own id."""
    [found] = output.outputs
    ids = list(found.token_ids)
    logprobs = _at_tokens(found.logprobs, ids, width=1)[:, 0]
    if found.finish_reason not in ("stop", "length"):
        raise EngineError(f"vLLM ended it for the reason {found.finish_reason!r}")
    return Completion(ids, logprobs.tolist(), found.finish_reason)


def scores_of(output: Any, ids: Sequence[int], *, count: int, top_k: int) -> TokenScores:
    """Scores of the last `count` of the `ids` that a request read; the tail is 1 less its support."""
    flat = output.prompt_logprobs[1:]  # nothing predicts the first token
    logprobs = _at_tokens(flat, ids[1:], width=1 + top_k)[-count:]
    token = logprobs[:, 0].astype(np.float32)
    if not top_k:
        return TokenScores(token)
    found = np.array(flat.token_ids, np.int32).reshape(-1, 1 + top_k)[-count:, 1:]
    order = np.lexsort((found, -logprobs[:, 1:]))  # by falling log-prob, then by id
    support = np.take_along_axis(logprobs[:, 1:], order, axis=1)
    tail = np.log(np.maximum(1 - np.exp(support).sum(axis=1), _TAIL_FLOOR))
    return TokenScores(
        token, np.take_along_axis(found, order, axis=1), support.astype(np.float32), tail.astype(np.float32)
    )


def _at_tokens(flat: Any, ids: Sequence[int], *, width: int) -> npt.NDArray[np.float64]:
    """Log-probs [n, width] at n tokens, the token's own first; raises EngineError unless finite."""
    if flat.token_ids[::width] != list(ids):
        raise EngineError("vLLM gives log-probs of other tokens than those that were read or drawn")
    logprobs = np.array(flat.logprobs, np.float64).reshape(len(ids), width)
    bad = ~np.isfinite(logprobs).all(axis=1)
    if bad.any():
        raise EngineError(f"log-probs at token {int(bad.argmax())} are not finite", hint=NOT_FINITE_HINT)
    return logprobs
