"""An engine without a model: bigrams drawn from the digest. An implementation of the seam, not a mock."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kdpipe.engines.protocol import (
    Completion,
    Progress,
    SampleRequest,
    Sampling,
    ScoreRequest,
    Scoring,
    TokenScores,
)
from kdpipe.errors import EngineError
from kdpipe.models.source import ModelSource
from kdpipe.recipe.section import Ability


def fake_text(ids: Sequence[int]) -> str:
    """The text of token ids, for stop strings."""
    return " ".join(f"w{token}." for token in ids)


class FakeEngine:
    """The next token depends on the last one only, by a table of logits drawn from the model's digest."""

    abilities: frozenset[Ability] = frozenset({"support"})

    def __init__(self, *, num_rows: int = 16, max_positions: int = 64) -> None:
        self.max_positions = max_positions
        self._num_rows = num_rows
        self._logits: np.ndarray | None = None
        self.loaded: list[str] = []

    def load(self, source: ModelSource) -> None:
        if not Path(source.folder).is_dir():
            raise EngineError(f"{source.folder}: no such folder")
        digest = source.digest if source.adapter is None else f"{source.digest} {source.adapter.digest}"
        seed = int.from_bytes(hashlib.sha256(digest.encode()).digest()[:8], "big")
        self._logits = np.random.default_rng(seed).normal(size=(self._num_rows, self._num_rows))
        self.loaded.append(digest)

    def sample(
        self, requests: Sequence[SampleRequest], sampling: Sampling, *, progress: Progress
    ) -> list[list[Completion]]:
        for index, request in enumerate(requests):
            self._require_fit(index, len(request.prompt_token_ids) + sampling.max_new_tokens)
        results = [
            [self._complete(request.prompt_token_ids, seed, sampling) for seed in request.seeds]
            for request in requests
        ]
        progress(sum(len(completion.token_ids) for row in results for completion in row))
        return results

    def score(
        self, requests: Sequence[ScoreRequest], scoring: Scoring, *, progress: Progress
    ) -> list[TokenScores]:
        temperature, num_ids, top_k = scoring.temperature, scoring.num_ids, scoring.top_k
        if scoring.hidden:
            raise EngineError("a table has no hidden states")
        results = []
        for index, request in enumerate(requests):
            ids = [*request.prompt_token_ids, *request.completion_token_ids]
            self._require_fit(index, len(ids))
            n = len(request.completion_token_ids)
            before = ids[len(ids) - n - 1 : -1] if n else []
            logprobs = np.array([self._logprobs(i, temperature, num_ids) for i in before]).reshape(n, num_ids)
            token = logprobs[np.arange(n), list(request.scored_ids)].astype(np.float32)
            progress(n)
            given = request.support_ids
            width = min(top_k + (0 if given is None else given.shape[1]), num_ids)
            if width == 0:
                results.append(TokenScores(token))
                continue
            found = np.full((n, width), -1, np.int32)
            values = np.full((n, width), -np.inf, np.float32)
            tail = np.full(n, -np.inf, np.float32)
            for row, at in enumerate(logprobs):
                order = np.argsort(-at, kind="stable").tolist()
                wanted = set(order[:top_k]) | (set() if given is None else set(given[row].tolist()))
                chosen = [token for token in order if token in wanted]
                found[row, : len(chosen)], values[row, : len(chosen)] = chosen, at[chosen]
                with np.errstate(divide="ignore"):
                    tail[row] = np.log(np.exp(np.delete(at, chosen)).sum())
            results.append(TokenScores(token, found, values, tail))
        return results

    def sleep(self) -> None:
        self._logits = None

    def close(self) -> None:
        self._logits = None

    def _complete(self, prompt: Sequence[int], seed: int, sampling: Sampling) -> Completion:
        uniforms = np.random.default_rng(seed).random(sampling.max_new_tokens)
        last, ids, logprobs = prompt[-1], [], []
        for uniform in uniforms:
            row = self._truncate(
                self._logprobs(last, sampling.temperature or 1.0, sampling.num_ids), sampling
            )
            cdf = np.exp(row).cumsum()
            last = int(np.argmax(row) if sampling.temperature == 0 else (cdf > uniform * cdf[-1]).argmax())
            ids.append(last)
            logprobs.append(float(row[last]))
            if last in sampling.end_ids or any(text in fake_text(ids) for text in sampling.stop):
                return Completion(ids, logprobs, "stop")
        return Completion(ids, logprobs, "length")

    def _truncate(self, row: np.ndarray, sampling: Sampling) -> np.ndarray:
        if sampling.temperature == 0:
            return row
        order = np.argsort(-row, kind="stable")
        kept = order[: sampling.top_k or len(row)]
        mass = np.exp(row[kept]) / np.exp(row[kept]).sum()
        kept = kept[(mass.cumsum() - mass < sampling.top_p) | (np.arange(len(kept)) == 0)]
        result = np.full_like(row, -np.inf)
        result[kept] = row[kept] - np.log(np.exp(row[kept]).sum())
        return result

    def _logprobs(self, last: int, temperature: float, num_ids: int) -> np.ndarray:
        assert self._logits is not None, "load comes first"
        row = self._logits[last, :num_ids] / temperature
        shifted = row - row.max()
        return shifted - np.log(np.exp(shifted).sum())

    def _require_fit(self, index: int, tokens: int) -> None:
        if tokens > self.max_positions:
            raise EngineError(f"{tokens} tokens, the context holds {self.max_positions}", request=index)
