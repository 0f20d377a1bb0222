"""What no engine is asked for, because no model could: checked before anything is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kdpipe.engines.protocol import SampleRequest, Sampling, ScoreRequest, Scoring, TokenScores, about
from kdpipe.errors import EngineError, ModelError

NOT_FINITE_HINT = "the weights hold nan, inf or values too large for the dtype; try dtype: float32"


@dataclass(frozen=True, slots=True)
class Limits:
    """How many tokens a model holds, None where that has no end, and how many ids it has rows for."""

    context: int | None
    rows: int


def require_sampling(requests: Sequence[SampleRequest], sampling: Sampling, limits: Limits) -> None:
    """Raises ModelError on what is longer than the context, EngineError on ids without a row in the model."""
    _require_head(sampling.num_ids, limits.rows)
    for index, request in enumerate(requests):
        with about(index):
            _require_fit(request.prompt_token_ids, sampling.max_new_tokens, limits)


def require_scoring(requests: Sequence[ScoreRequest], scoring: Scoring, limits: Limits) -> None:
    """Raises as `require_sampling`, and EngineError on supports that are not of the completion's tokens."""
    _require_head(scoring.num_ids, limits.rows)
    if not 0 <= scoring.top_k <= scoring.num_ids:
        raise EngineError(f"top_k is {scoring.top_k}, but there are {scoring.num_ids} ids in use")
    for index, request in enumerate(requests):
        completion, support = request.completion_token_ids, request.support_ids
        with about(index):
            _require_fit(request.prompt_token_ids, len(completion), limits)
            _require_known(completion, limits.rows)
            _require_known(request.scored_ids, scoring.num_ids)
            if support is not None:
                if len(support) != len(completion):
                    raise EngineError(f"support_ids for {len(support)} of {len(completion)} tokens")
                _require_known(support.ravel().tolist(), scoring.num_ids)


def _require_fit(prompt: Sequence[int], new_tokens: int, limits: Limits) -> None:
    if not prompt:
        raise EngineError("its prompt is empty, so nothing predicts the first token")
    if limits.context is not None and len(prompt) + new_tokens > limits.context:
        raise ModelError(
            f"{len(prompt)} prompt tokens and {new_tokens} completion tokens do not fit a context of "
            f"{limits.context}",
            hint="lower max_new_tokens, drop long prompts, or take a model with a longer context (of engine vllm "
            "it may be cut by runtime.vllm.max_model_len)",
        )
    _require_known(prompt, limits.rows)


def _require_known(ids: Sequence[int], count: int) -> None:
    if ids and (max(ids) >= count or min(ids) < 0):
        raise EngineError(f"token ids reach from {min(ids)} to {max(ids)}, expected 0 to {count - 1}")


def _require_head(num_ids: int, rows: int) -> None:
    if not 0 < num_ids <= rows:
        raise EngineError(f"{num_ids} ids in use, but the model's output head has {rows} rows")


def no_scores(top_k: int) -> TokenScores:
    """The scores of an empty completion."""
    none = np.zeros(0, np.float32)
    if not top_k:
        return TokenScores(none)
    return TokenScores(none, np.zeros((0, top_k), np.int32), np.zeros((0, top_k), np.float32), none)
