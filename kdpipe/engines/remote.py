"""An engine in a process of its own, and what that process runs.

`WorkerEngine` is an engine whose every call is made in another process, where `Host` holds the real one. Numbers
cross unchanged: arrays as their bytes in base64, ids as lists, a completion's log-probs as float64.

A call is not broken off when the run is to stop: it ends in time, so that its part is kept, or the process that made
it is killed and this one goes with it.

Importing this module is cheap: an engine's libraries are imported where it is opened.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from pydantic import JsonValue, TypeAdapter

from kdpipe.engines.protocol import (
    Ability,
    Completion,
    Engine,
    Progress,
    SampleRequest,
    Sampling,
    ScoreRequest,
    Scoring,
    TokenScores,
)
from kdpipe.errors import EngineError, KdpipeError
from kdpipe.models.source import ModelSource
from kdpipe.recipe.schema import EngineName, Runtime
from kdpipe.workers.worker import Message, Report, Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from kdpipe.models.cache import ModelCache

HOST = "kdpipe.engines.remote:Host"
ARRAY_TYPES = ("<f4", "<f8", "<i4")
_SOURCE = TypeAdapter(ModelSource)
_SAMPLING = TypeAdapter(Sampling)
_SCORING = TypeAdapter(Scoring)
_SAMPLE_REQUESTS = TypeAdapter(list[SampleRequest])


@dataclass(frozen=True, slots=True)
class Hosting:
    """What a role's process runs: an engine, on a device as that process sees it, with settings.

    `num_models` is how many models it keeps, where the engine can keep several.
    """

    engine: EngineName
    device: str
    runtime: Runtime
    num_models: int = 1


_HOSTING = TypeAdapter(Hosting)
OpenEngine: TypeAlias = "Callable[[Hosting], Engine]"


def open_engine(hosting: Hosting) -> Engine:
    """The engine of a role's process, opened in it."""
    import torch

    runtime, device = hosting.runtime, torch.device(hosting.device)
    match hosting.engine:
        case "hf":
            from kdpipe.models.cache import ModelCache

            if runtime.threads is not None:
                torch.set_num_threads(runtime.threads)
            torch.use_deterministic_algorithms(mode=True, warn_only=True)
            return hf_engine(ModelCache(device, limit=hosting.num_models), runtime)
        case "vllm":
            from kdpipe.engines.vllm.engine import VllmEngine

            return VllmEngine(
                runtime.vllm, device=device, score_tokens=runtime.score_tokens, threads=runtime.threads
            )


def hf_engine(cache: ModelCache, runtime: Runtime) -> Engine:
    """The engine that runs the models of `cache` in this process."""
    from kdpipe.engines.hf.engine import HfEngine

    return HfEngine(
        cache,
        sample_tokens=runtime.sample_tokens,
        score_tokens=runtime.score_tokens,
        head_chunk_tokens=runtime.head_chunk_tokens,
    )


# --------------------------------------------------------------------------------------- the caller's side


class WorkerEngine:
    """Runs another engine in a process of its own, which the first call starts.

    When that process dies, the call raises StepError with the end of `log`.
    """

    def __init__(
        self,
        hosting: Hosting,
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
        target: str = HOST,
    ) -> None:
        self._hosting: Message = _HOSTING.dump_python(hosting, mode="json")
        self._worker = Worker(target, log=log, environment=environment, leads_group=True)
        self._abilities: frozenset[Ability] | None = None
        self._source: ModelSource | None = None

    @property
    def pid(self) -> int | None:
        """The process, or None while there is none."""
        return self._worker.pid

    @property
    def abilities(self) -> frozenset[Ability]:
        """See Engine: those of the engine in the other process."""
        if self._abilities is None:
            self._abilities = frozenset(self._call("abilities")["abilities"])
        return self._abilities

    def holds(self, source: ModelSource) -> bool:
        """Whether `load` would open nothing: this is what was loaded last."""
        return self._source == source

    def load(self, source: ModelSource) -> None:
        """See Engine."""
        self._call("load", source=_SOURCE.dump_python(source, mode="json"))
        self._source = source

    def sample(
        self, requests: Sequence[SampleRequest], sampling: Sampling, *, progress: Progress
    ) -> list[list[Completion]]:
        """See Engine."""
        answer = self._call(
            "sample",
            progress=progress,
            requests=_SAMPLE_REQUESTS.dump_python(list(requests), mode="json"),
            sampling=_SAMPLING.dump_python(sampling, mode="json"),
        )
        return [[_completion(packed) for packed in row] for row in answer["completions"]]

    def score(
        self, requests: Sequence[ScoreRequest], scoring: Scoring, *, progress: Progress
    ) -> list[TokenScores]:
        """See Engine."""
        answer = self._call(
            "score",
            progress=progress,
            requests=[_packed_request(request) for request in requests],
            scoring=_SCORING.dump_python(scoring, mode="json"),
        )
        return [_scores(packed) for packed in answer["scores"]]

    def sleep(self) -> None:
        """See Engine; nothing where no process was started."""
        if self._worker.pid is not None:
            self._call("sleep")
            self._source = None

    def close(self) -> None:
        """See Engine: lets the engine clean up, for seconds at most, and ends its process."""
        self._worker.stop({"do": "close", "hosting": self._hosting})
        self._source = None

    def _call(self, do: str, *, progress: Progress = lambda _: None, **request: Any) -> dict[str, Any]:
        """The answer of the other process; `hosting` goes along, as a call may start that process."""

        def told(event: Message) -> None:
            progress(int(str(event["tokens"])))

        try:
            answer = self._worker.call({"do": do, "hosting": self._hosting, **request}, on_event=told)
        except KdpipeError as error:
            self._source = None  # what it holds now is not known
            if isinstance(error, EngineError):
                what = f"{error.what} (in the process that logs to {self._worker.log})"
                raise type(error)(what, hint=error.hint, request=error.request) from error
            raise
        assert answer is not None  # it was not asked to stop
        return answer


# ------------------------------------------------------------------------------------------ the host's side


class Host:
    """Serves one engine to the process that started this one (see workers.py)."""

    def __init__(self, open_engine: OpenEngine = open_engine) -> None:
        self._open_engine = open_engine
        self._engine: Engine | None = None

    def __call__(self, request: Message, report: Report) -> Message:
        """The answer to one call of a `WorkerEngine`."""
        asked: dict[str, Any] = request
        engine = self._opened(asked["hosting"])
        match asked["do"]:
            case "abilities":
                return {"abilities": list[JsonValue](sorted(engine.abilities))}
            case "load":
                engine.load(_SOURCE.validate_python(asked["source"]))
                return {}
            case "sample":
                return _sample(engine, asked, report)
            case "score":
                return _score(engine, asked, report)
            case "sleep":
                engine.sleep()
                return {}
            case "close":
                self._engine = None
                engine.close()
                return {}
            case other:
                raise ValueError(f"an engine is not asked to {other!r}")

    def _opened(self, hosting: dict[str, Any]) -> Engine:
        if self._engine is None:
            self._engine = self._open_engine(_HOSTING.validate_python(hosting))
        return self._engine


def _sample(engine: Engine, asked: dict[str, Any], report: Report) -> Message:
    drawn = engine.sample(
        _SAMPLE_REQUESTS.validate_python(asked["requests"]),
        _SAMPLING.validate_python(asked["sampling"]),
        progress=lambda count: report.event(tokens=count),
    )
    return {"completions": [[_packed_completion(completion) for completion in row] for row in drawn]}


def _score(engine: Engine, asked: dict[str, Any], report: Report) -> Message:
    scores = engine.score(
        [_request(packed) for packed in asked["requests"]],
        _SCORING.validate_python(asked["scoring"]),
        progress=lambda count: report.event(tokens=count),
    )
    return {"scores": [_packed_scores(score) for score in scores]}


# -------------------------------------------------------------------------------------------- what crosses


def pack(array: npt.NDArray[Any]) -> Message:
    """An array as JSON, its numbers as they lie in memory (little-endian)."""
    plain = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    name = plain.dtype.newbyteorder("<").str
    if name not in ARRAY_TYPES:
        raise TypeError(f"an array of {array.dtype} does not cross, only {', '.join(ARRAY_TYPES)}")
    return {"type": name, "shape": list(array.shape), "base64": base64.b64encode(plain.tobytes()).decode()}


def unpack(packed: Mapping[str, Any]) -> npt.NDArray[Any]:
    """The array that was packed, bit for bit."""
    if packed["type"] not in ARRAY_TYPES:
        raise TypeError(f"an array of {packed['type']!r} does not cross, only {', '.join(ARRAY_TYPES)}")
    data = bytearray(
        base64.b64decode(packed["base64"], validate=True)
    )  # a bytearray, so that it can be written to
    return np.frombuffer(data, packed["type"]).reshape(packed["shape"])


def _packed_completion(completion: Completion) -> Message:
    return {
        "token_ids": list(completion.token_ids),
        "logprobs": pack(np.array(completion.logprobs, np.float64)),
        "finish_reason": completion.finish_reason,
    }


def _completion(packed: dict[str, Any]) -> Completion:
    return Completion(packed["token_ids"], unpack(packed["logprobs"]).tolist(), packed["finish_reason"])


def _packed_request(request: ScoreRequest) -> Message:
    return {
        "prompt": list(request.prompt_token_ids),
        "completion": list(request.completion_token_ids),
        "support": None if request.support_ids is None else pack(request.support_ids),
        "targets": None if request.target_ids is None else list(request.target_ids),
    }


def _request(packed: dict[str, Any]) -> ScoreRequest:
    support = None if packed["support"] is None else unpack(packed["support"])
    return ScoreRequest(packed["prompt"], packed["completion"], support, packed["targets"])


def _packed_scores(scores: TokenScores) -> Message:
    columns = {field.name: getattr(scores, field.name) for field in fields(scores)}
    return {name: None if column is None else pack(column) for name, column in columns.items()}


def _scores(packed: dict[str, Any]) -> TokenScores:
    columns: dict[str, Any] = {
        name: None if array is None else unpack(array) for name, array in packed.items()
    }
    return TokenScores(**columns)
