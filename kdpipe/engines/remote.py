"""An engine in a process of its own, and what that process runs.

`WorkerEngine` is an engine whose every call is made in another process, where `Host` holds the real one. Numbers
cross unchanged: arrays as their bytes, ids and log-probs of completions as JSON, which keeps a float64 as it is.

A call is not broken off when the run is to stop: it ends in time, so that its part is kept, or the process that made
it is killed and this one goes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from kdpipe.engines.protocol import (
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
from kdpipe.recipe.runtime import Runtime
from kdpipe.recipe.section import ENGINE_ABILITIES, EngineName
from kdpipe.workers.message import Nothing, Talk, message
from kdpipe.workers.worker import Report, Worker, is_harmless

HOST = "kdpipe.engines.remote:Host"


@message
class Hosting:
    """What a role's process runs: an engine, on a device as that process sees it, with settings.

    `num_models` is how many models it keeps, where the engine can keep several.
    """

    engine: EngineName
    device: str
    runtime: Runtime
    num_models: int = 1


@message
class Load:
    """Make this the model of the next calls."""

    hosting: Hosting
    source: ModelSource


@message
class SampleCall:
    """Sample completions."""

    hosting: Hosting
    requests: Sequence[SampleRequest]
    sampling: Sampling


@message
class ScoreCall:
    """Score completions."""

    hosting: Hosting
    requests: Sequence[ScoreRequest]
    scoring: Scoring


@message
class Sleep:
    """Free the device's memory."""

    hosting: Hosting


@message
class End:
    """Clean up."""

    hosting: Hosting


@message
class Tokens:
    """So many more tokens were sampled or scored."""

    count: int


@message
class Loaded:
    """What a user should know of how the model runs."""

    said: str | None


@message
class Sampled:
    """Completions, in the order of the requests."""

    completions: list[list[Completion]]


@message
class Scored:
    """Scores, in the order of the requests."""

    scores: list[TokenScores]


Question: TypeAlias = Load | SampleCall | ScoreCall | Sleep | End
Answer: TypeAlias = Loaded | Sampled | Scored | Nothing
TALK = Talk[Question, Tokens, Answer](
    (Load, SampleCall, ScoreCall, Sleep, End), (Tokens,), (Loaded, Sampled, Scored, Nothing)
)


def open_engine(hosting: Hosting) -> Engine:
    """The engine of a role's process, opened in it."""
    import torch

    runtime, device = hosting.runtime, torch.device(hosting.device)
    match hosting.engine:
        case "hf":
            from kdpipe.engines.hf.engine import HfEngine
            from kdpipe.models.cache import ModelCache

            if runtime.threads is not None:
                torch.set_num_threads(runtime.threads)
            torch.use_deterministic_algorithms(mode=True, warn_only=True)
            return HfEngine(ModelCache(device, limit=hosting.num_models), runtime)
        case "vllm":
            from kdpipe.engines.vllm.engine import VllmEngine

            return VllmEngine(runtime, device=device)


class WorkerEngine:
    """Runs another engine in a process of its own, which the first call starts.

    When that process dies, the call raises StepError with the end of `log`. It does not see the variables `keys`.
    """

    def __init__(
        self,
        hosting: Hosting,
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
        keys: Collection[str] = (),
        target: str = HOST,
    ) -> None:
        self._hosting = hosting
        self._worker = Worker(
            target,
            TALK,
            log=log,
            environment=environment,
            inherits=lambda name: name not in keys and is_harmless(name),
            leads_group=True,
        )
        self._source: ModelSource | None = None
        self.abilities = ENGINE_ABILITIES[hosting.engine]

    def holds(self, source: ModelSource) -> bool:
        """Whether `load` would open nothing: this is what was loaded last."""
        return self._source == source

    def load(self, source: ModelSource) -> str | None:
        answer = self._call(Load(self._hosting, source))
        assert isinstance(answer, Loaded)
        self._source = source
        return answer.said

    def sample(
        self, requests: Sequence[SampleRequest], sampling: Sampling, *, progress: Progress
    ) -> list[list[Completion]]:
        answer = self._call(SampleCall(self._hosting, requests, sampling), progress)
        assert isinstance(answer, Sampled)
        return answer.completions

    def score(
        self, requests: Sequence[ScoreRequest], scoring: Scoring, *, progress: Progress
    ) -> list[TokenScores]:
        answer = self._call(ScoreCall(self._hosting, requests, scoring), progress)
        assert isinstance(answer, Scored)
        return answer.scores

    def sleep(self) -> None:
        """See Engine; nothing where no process was started."""
        if self._worker.pid is not None:
            self._call(Sleep(self._hosting))
            self._source = None

    def close(self) -> None:
        """See Engine: lets the engine clean up, for seconds at most, and ends its process."""
        self._worker.stop(End(self._hosting))
        self._source = None

    def _call(self, question: Question, progress: Progress = lambda _: None) -> Answer:
        """The answer of the other process. Each question has the hosting, as it may start that process."""
        try:
            answer = self._worker.call(question, on_event=lambda event: progress(event.count))
        except KdpipeError as error:
            self._source = None  # what it holds now is not known
            if isinstance(error, EngineError):
                what = f"{error.what} (in the process that logs to {self._worker.log})"
                raise type(error)(what, hint=error.hint, request=error.request) from error
            raise
        assert answer is not None  # it was not asked to stop
        return answer


class Host:
    """Serves one engine to the process that started this one (see workers.worker)."""

    talk = TALK

    def __init__(self, open_engine: Callable[[Hosting], Engine] = open_engine) -> None:
        self._open_engine = open_engine
        self._engine: Engine | None = None

    def __call__(self, request: Question, report: Report[Tokens]) -> Answer:
        if self._engine is None:
            self._engine = self._open_engine(request.hosting)
        engine = self._engine

        def progress(count: int) -> None:
            report.event(Tokens(count))

        match request:
            case Load(source=source):
                return Loaded(engine.load(source))
            case SampleCall(requests=requests, sampling=sampling):
                return Sampled(engine.sample(requests, sampling, progress=progress))
            case ScoreCall(requests=asked, scoring=scoring):
                return Scored(engine.score(asked, scoring, progress=progress))
            case Sleep():
                engine.sleep()
            case End():
                self._engine = None
                engine.close()
        return Nothing()
