"""The engine that asks a server: a model behind vLLM's completions endpoint, by token ids.

Scores are at temperature 1 and over all rows of the server's output head: ids that the student lacks and rows of
padding keep their mass, which lies in the tail. What a server cannot do is refused here, and by the recipe before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TypeVar

from pydantic import JsonValue

from kdpipe.engines.limits import no_scores
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
from kdpipe.engines.server.http import Halted, HttpClient
from kdpipe.engines.server.replies import (
    MoreIdsNeeded,
    ServedModel,
    read_completion,
    read_scores,
    served_model,
)
from kdpipe.engines.server.signature import SAME_NATS, distance
from kdpipe.errors import EngineError, ModelError
from kdpipe.models.source import ModelSource
from kdpipe.recipe.runtime import ServerRuntime
from kdpipe.recipe.section import Ability
from kdpipe.recipe.teacher import Server

SEQUENCE = (5, 3, 7, 2, 6, 4, 7, 3, 5, 2, 4, 6)
"""Ids that every vocabulary has, of no meaning: what a model makes of them tells it from others."""
_BYTES_OF_A_REPLY = 1 << 20
_BYTES_OF_AN_ENTRY = 512
Result = TypeVar("Result")


class ServerEngine:
    """Samples and scores with one model behind the URLs of `server`, several requests at a time.

    `signature` are its log-probs of `SEQUENCE`, once it is loaded.
    """

    abilities: frozenset[Ability] = frozenset()

    def __init__(
        self,
        server: Server,
        settings: ServerRuntime,
        *,
        ca_bundle: Path | None = None,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        self._model = server.model
        self._concurrency = settings.concurrency
        self._client = HttpClient(
            server.urls, settings, key_name=server.api_key_env, ca_bundle=ca_bundle, sleep=sleep
        )
        self._digest: str | None = None
        self._context: int | None = None
        self._names = frozenset({server.model})
        self.signature: list[float] = []

    def load(self, source: ModelSource) -> None:
        """See Engine. The model is where it is: asks each server that answers whether it serves it."""
        if not source.folder.is_dir():
            raise EngineError(f"{source.folder}: no such folder, expected the tokenizer of {self._model!r}")
        if self._digest == source.digest:
            return

        def read(answer: dict[str, JsonValue], url: str) -> ServedModel:
            return served_model(answer, self._model, where=url)

        found = self._client.each("/models", None, read, max_bytes=_BYTES_OF_A_REPLY).values()
        self._names = frozenset[str]().union(*(served.names for served in found))
        self._context = min((served.context for served in found if served.context is not None), default=None)
        self.signature = self._agreed_signature()
        self._digest = source.digest

    def sample(
        self, requests: Sequence[SampleRequest], sampling: Sampling, *, progress: Progress
    ) -> list[list[Completion]]:
        """See Engine. At temperatures 0 and 1 only, and from the whole distribution."""
        self._require_loaded()
        if sampling.temperature not in (0, 1) or sampling.top_p < 1 or sampling.top_k:
            raise ModelError(
                f"a server's log-probs are at temperature 1 and of the whole distribution, asked for was temperature "
                f"{sampling.temperature:g}, top_p {sampling.top_p:g}, top_k {sampling.top_k}",
                hint="sample at temperature 0 or 1, without top_p and top_k",
            )
        for index, request in enumerate(requests):
            with about(index):
                self._require_fit(request.prompt_token_ids, new_tokens=sampling.max_new_tokens)
        places = [(index, seed) for index, request in enumerate(requests) for seed in request.seeds]

        def work(number: int, halt: threading.Event) -> Completion:
            index, seed = places[number]
            prompt = list(requests[index].prompt_token_ids)

            def read(answer: dict[str, JsonValue], url: str) -> Completion:
                with about(index):
                    return read_completion(answer, prompt, sampling, names=self._names, where=url)

            body = self._sampling_body(prompt, sampling, seed)
            tokens = len(prompt) + sampling.max_new_tokens
            max_bytes = _BYTES_OF_A_REPLY + _BYTES_OF_AN_ENTRY * tokens
            return self._client.post("/completions", body, read, max_bytes=max_bytes, halt=halt)

        drawn = iter(self._each(len(places), work, lambda done: progress(len(done.token_ids))))
        return [[next(drawn) for _ in request.seeds] for request in requests]

    def score(
        self, requests: Sequence[ScoreRequest], scoring: Scoring, *, progress: Progress
    ) -> list[TokenScores]:
        """See Engine. At temperature 1 only."""
        self._require_loaded()
        if scoring.temperature != 1:
            raise ModelError(
                f"a server's scores are at temperature 1, asked for was {scoring.temperature:g}",
                hint="write temperature: 1 for this teacher; equal weights then do not mean a KL of 0",
            )
        if scoring.hidden:
            raise EngineError("a server gives no hidden states")
        if not 0 <= scoring.top_k <= scoring.num_ids:
            raise EngineError(f"top_k is {scoring.top_k}, but there are {scoring.num_ids} ids in use")
        for index, request in enumerate(requests):
            completion = request.completion_token_ids
            with about(index):
                if request.support_ids is not None or request.target_ids is not None:
                    raise EngineError("a server scores no other ids than its own top k")
                self._require_fit([*request.prompt_token_ids, *completion], new_tokens=int(bool(completion)))

        def work(index: int, halt: threading.Event) -> TokenScores:
            return self._score(index, requests[index], scoring, halt=halt)

        return self._each(len(requests), work, lambda done: progress(len(done.logprobs)))

    def sleep(self) -> None:
        """See Engine. The server's memory is the server's."""
        self._digest = None

    def close(self) -> None:
        self._digest = None
        self._client.close()

    def _score(
        self, index: int, request: ScoreRequest, scoring: Scoring, *, halt: threading.Event
    ) -> TokenScores:
        prompt, completion = list(request.prompt_token_ids), list(request.completion_token_ids)
        if not completion:
            return no_scores(scoring.top_k)
        ids, asked = [*prompt, *completion], scoring.top_k

        def read(answer: dict[str, JsonValue], url: str) -> TokenScores:
            with about(index):
                start = len(prompt)
                return read_scores(
                    answer, ids, scoring, start=start, asked=asked, names=self._names, where=url
                )

        while True:
            max_bytes = _BYTES_OF_A_REPLY + _BYTES_OF_AN_ENTRY * len(ids) * (asked + 2)
            try:
                body = self._scoring_body(ids, asked)
                return self._client.post("/completions", body, read, max_bytes=max_bytes, halt=halt)
            except MoreIdsNeeded as more:
                asked += more.count

    def _agreed_signature(self) -> list[float]:
        """Log-probs of a fixed sequence; raises EngineError where the servers hold different weights."""
        ids = list(SEQUENCE if self._context is None else SEQUENCE[: self._context - 1])
        alone = Scoring(temperature=1.0, num_ids=0)  # without a top k

        def read(answer: dict[str, JsonValue], url: str) -> list[float]:
            scores = read_scores(answer, ids, alone, start=1, asked=0, names=self._names, where=url)
            return [float(score) for score in scores.logprobs]

        body = self._scoring_body(ids, 0)
        found = self._client.each("/completions", body, read, max_bytes=_BYTES_OF_A_REPLY)
        (first, scores), *others = found.items()
        for url, values in others:
            if (apart := distance(scores, values)) > SAME_NATS:
                raise EngineError(
                    f"{first} and {url} serve other weights as {self._model!r}: log-probs of the same ids differ by "
                    f"{apart:.2f} nats a token",
                    hint="the servers of one teacher hold the same weights: see which of them is the right one",
                )
        return scores

    def _scoring_body(self, ids: list[int], top_k: int) -> dict[str, JsonValue]:
        # One token is the least that a server generates; it is not read.
        return {**self._body(ids), "max_tokens": 1, "temperature": 0, "prompt_logprobs": top_k}

    def _sampling_body(self, ids: list[int], sampling: Sampling, seed: int) -> dict[str, JsonValue]:
        return {
            **self._body(ids),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "seed": seed,
            "logprobs": 0,
            "return_tokens_as_token_ids": True,
            "stop": list(sampling.stop),
            "stop_token_ids": list(sampling.end_ids),
        }

    def _body(self, ids: list[int]) -> dict[str, JsonValue]:
        """The part of both kinds of request, written out: a server has its own defaults for each model."""
        return {
            "model": self._model,
            "prompt": list[JsonValue](ids),
            "n": 1,
            "stream": False,
            "echo": False,
            "return_token_ids": True,
            "ignore_eos": True,  # ends are those of stop_token_ids
            "skip_special_tokens": False,  # stop strings may be special tokens
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }

    def _each(
        self, count: int, work: Callable[[int, threading.Event], Result], report: Callable[[Result], None]
    ) -> list[Result]:
        """What `work` gives for each number below `count`, in their order; `report` is called in this thread.

        The first failure ends all: what waits is not begun, and what is under way is not tried again.
        """
        halt = self._client.begin()

        def halting(number: int) -> Result:
            try:
                return work(number, halt)
            except BaseException:
                halt.set()  # here, before this thread takes another number
                raise

        results: dict[int, Result] = {}
        pool = ThreadPoolExecutor(min(self._concurrency, max(count, 1)), thread_name_prefix="kdpipe-server")
        try:
            futures = {pool.submit(halting, number): number for number in range(count)}
            for future in as_completed(futures):
                if isinstance(future.exception(), Halted):
                    continue  # the failure that halted it is still to come
                results[futures[future]] = future.result()
                report(results[futures[future]])
        finally:
            halt.set()
            pool.shutdown(wait=False, cancel_futures=True)
        if len(results) < count:
            raise Halted("given up: the engine was closed meanwhile")
        return [results[number] for number in range(count)]

    def _require_loaded(self) -> None:
        if self._digest is None:
            raise EngineError("no model is loaded: call load first, also after sleep")

    def _require_fit(self, ids: Sequence[int], *, new_tokens: int) -> None:
        if not ids:
            raise EngineError("its prompt is empty, so nothing predicts the first token")
        if self._context is not None and len(ids) + new_tokens > self._context:
            raise ModelError(
                f"{len(ids)} tokens and {new_tokens} new do not fit the server's context of {self._context}",
                hint="start it with a larger --max-model-len (scoring takes one token more than the completion ends "
                "with), or lower max_new_tokens",
            )
