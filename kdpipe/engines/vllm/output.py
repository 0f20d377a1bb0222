"""What vLLM answers, as the seam wants it: log-probs looked up by token id, supports sorted, tails. Without vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kdpipe.engines.protocol import Completion, TokenScores
from kdpipe.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

_TAIL_FLOOR = 1e-7
"""The least tail mass: what float32 log-probs leave undecided when their sum is taken from 1."""


def completion_of(output: Any) -> Completion:
    """The completion in a request's output, with the log-prob that stands at each token's own id."""
    [found] = output.outputs
    ids = list(found.token_ids)
    logprobs = _at_tokens(found.logprobs, ids, width=1)[:, 0]
    if found.finish_reason not in ("stop", "length"):
        raise EngineError(f"vLLM ended it for the reason {found.finish_reason!r}")
    return Completion(ids, logprobs.tolist(), found.finish_reason)


def scores_of(output: Any, ids: Sequence[int], *, count: int, top_k: int) -> TokenScores:
    """The scores of the last `count` of the `ids` that a request read; the tail is what its support leaves of 1."""
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
        token,
        np.take_along_axis(found, order, axis=1),
        support.astype(np.float32),
        tail.astype(np.float32),
    )


def no_scores(top_k: int) -> TokenScores:
    """The scores of an empty completion."""
    none = np.zeros(0, np.float32)
    if not top_k:
        return TokenScores(none)
    return TokenScores(none, np.zeros((0, top_k), np.int32), np.zeros((0, top_k), np.float32), none)


def without_tail(score: TokenScores) -> TokenScores:
    """The scores of a support that holds all ids: nothing is outside it."""
    tail = np.full(len(score.logprobs), -np.inf, np.float32)
    return TokenScores(score.logprobs, score.topk_ids, score.topk_logprobs, tail)


def _at_tokens(flat: Any, ids: Sequence[int], *, width: int) -> npt.NDArray[np.float64]:
    """Log-probs [n, width] at n tokens, the token's own first; raises EngineError where it is not, or not finite."""
    if flat.token_ids[::width] != list(ids):
        raise EngineError("vLLM gives log-probs of other tokens than those that were read or drawn")
    logprobs = np.array(flat.logprobs, np.float64).reshape(len(ids), width)
    bad = ~np.isfinite(logprobs).all(axis=1)
    if bad.any():
        raise EngineError(
            f"log-probs at token {int(bad.argmax())} are not finite",
            hint="the weights hold nan, inf or values too large for the dtype; try dtype: float32",
        )
    return logprobs
