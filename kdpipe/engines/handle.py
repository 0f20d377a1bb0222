"""A model in its role, as stages use it: one handle that samples, scores and loads by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

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
from kdpipe.models.prompting import Text
from kdpipe.models.source import ModelSource
from kdpipe.recipe.section import EngineName

Runs: TypeAlias = EngineName | Literal["server"]


class Turns:
    """Of the engines on one device, at most one is awake."""

    def __init__(self) -> None:
        self._awake: Engine | None = None

    def take(self, engine: Engine) -> None:
        """Makes it the turn of `engine`: whose turn it was goes to sleep before."""
        if self._awake is not None and self._awake is not engine:
            self._awake.sleep()
        self._awake = engine


@dataclass(frozen=True, slots=True)
class ModelHandle:
    """The student or a teacher: its weights, its text, and the engine that runs it.

    Handles may share an engine, and engines a device: before each call a handle takes its turn on its devices and
    makes its own weights the loaded ones, which is free where they are. `open_engine` opens the engine at the
    first call and gives the same one after. `warn` takes what a user should know of how the engine runs it.
    """

    name: str
    source: ModelSource
    text: Text
    engine_name: Runs
    open_engine: Callable[[], Engine]
    turns: Sequence[Turns] = ()
    warn: Callable[[str], None] = lambda _: None

    @property
    def is_served(self) -> bool:
        """Whether a server has its weights: its folder then holds a tokenizer and nothing else."""
        return self.engine_name == "server"

    def sample(
        self, requests: Sequence[SampleRequest], sampling: Sampling, *, progress: Progress
    ) -> list[list[Completion]]:
        return self.load().sample(requests, sampling, progress=progress)

    def score(
        self, requests: Sequence[ScoreRequest], scoring: Scoring, *, progress: Progress
    ) -> list[TokenScores]:
        return self.load().score(requests, scoring, progress=progress)

    def load(self) -> Engine:
        """The engine with this model loaded; raises EngineError where it cannot run it."""
        engine = self.open_engine()
        for turns in self.turns:
            turns.take(engine)
        if said := engine.load(self.source):
            self.warn(said)
        return engine
