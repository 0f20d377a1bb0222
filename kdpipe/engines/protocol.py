"""The one seam between the pipeline and whatever runs a model. Names no backend.

An engine is loaded with a model and then samples from it or scores under it. Token ids travel, never
text; index t of everything returned is completion token t, and shifts by one happen behind this seam only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from kdpipe.errors import EngineError
from kdpipe.models.source import ModelSource
from kdpipe.recipe.section import Ability
from kdpipe.workers.message import ArrayField, message

Floats: TypeAlias = Annotated[npt.NDArray[np.float32], ArrayField()]
Ids: TypeAlias = Annotated[npt.NDArray[np.int32], ArrayField()]
Progress = Callable[[int], None]
"""Called with the number of completion tokens just sampled or scored."""


@message
class Sampling:
    """How to sample. `temperature` 0 is greedy; log-probs are then those at temperature 1.

    `end_ids` are all token ids that end a completion. `stop` strings end it too, as soon as the decoded
    completion contains one. `num_ids` is the number of token ids in use: logits of ids from there on
    are padding rows, and have no probability. `top_p` 1.0 and `top_k` 0 mean the whole distribution; when
    they truncate, log-probs are those of the truncated, renormalised distribution.
    """

    temperature: float
    max_new_tokens: int
    end_ids: tuple[int, ...]
    num_ids: int
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()


@message
class SampleRequest:
    """One prompt and a seed for each completion wanted. Seeds are in [0, 2**63).

    The completion depends on the prompt, its seed, the model and `Sampling` only, never on what else is
    in the batch (beyond floating-point rounding).
    """

    prompt_token_ids: Sequence[int]
    seeds: tuple[int, ...]


@message
class Completion:
    """`token_ids` includes the end token (or those that completed a stop string) when stopped."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]


@message
class ScoreRequest:
    """A completion to score after a prompt. The prompt has at least one token.

    `target_ids` [n] are the ids that are scored at its tokens, where they are not those that are read there;
    `support_ids` [n, S] are further ids to score at each of the n completion tokens, distinct in a row.
    """

    prompt_token_ids: Sequence[int]
    completion_token_ids: Sequence[int]
    support_ids: Ids | None = None
    target_ids: Sequence[int] | None = None

    @property
    def scored_ids(self) -> Sequence[int]:
        """The id at each completion token whose log-prob is asked for."""
        return self.completion_token_ids if self.target_ids is None else self.target_ids


@message
class Scoring:
    """How to score: log-probs at `temperature` (over 0), over the first `num_ids` ids.

    `top_k` asks for so many of the most probable ids of each token, `hidden` for its hidden state.
    """

    temperature: float
    num_ids: int
    top_k: int = 0
    hidden: bool = False


@message
class TokenScores:
    """Log-probs in nats at the asked temperature, over the first `num_ids` ids, for n completion tokens.

    The support of a token is its k most probable ids, the request's `support_ids`, or their union:
    `topk_ids` [n, S] int32 sorted by falling log-prob (ties: lower id first), `topk_logprobs` [n, S] float32,
    `tail_logprobs` [n] float32 the log of the mass outside it, computed from the full distribution (-inf
    when it holds all ids). A row of a union that is shorter ends with id -1 and log-prob -inf. None without support.
    `hidden` [n, H] float32, if asked for, are the states that the output head turns into logits.
    """

    logprobs: Floats
    topk_ids: Ids | None = None
    topk_logprobs: Floats | None = None
    tail_logprobs: Floats | None = None
    hidden: Floats | None = None


@contextlib.contextmanager
def about(request: int) -> Iterator[None]:
    """Makes every EngineError raised while this is open say that it is about this request of the call."""
    try:
        yield
    except EngineError as error:
        raise type(error)(error.what, hint=error.hint, request=request) from error


class Engine(Protocol):
    """Samples and scores with one loaded model at a time."""

    @property
    def abilities(self) -> frozenset[Ability]:
        """What it scores beyond the completion's own ids and the most probable ones."""

    def load(self, source: ModelSource) -> str | None:
        """Makes `source` the model that the next calls use; free when it already is.

        Returns what a user should know of how it runs, None where there is nothing.

        Raises EngineError when the folder is missing or not a model that this engine can run.
        """

    def sample(
        self, requests: Sequence[SampleRequest], sampling: Sampling, *, progress: Progress
    ) -> list[list[Completion]]:
        """Completions, in the order of `requests`, one for each seed in the order of `seeds`.

        Raises EngineError on a prompt longer than the model's context less `max_new_tokens`, and on
        logits that are not finite.
        """

    def score(
        self, requests: Sequence[ScoreRequest], scoring: Scoring, *, progress: Progress
    ) -> list[TokenScores]:
        """Scores, in the order of `requests`; an empty completion gets arrays of length 0.

        `support_ids` are given by all requests or by none, with one S. Raises EngineError on a sequence longer
        than the context, on logits that are not finite, and on what it has no ability for: `support_ids` and
        `target_ids` ("support"), `hidden`.
        """

    def sleep(self) -> None:
        """Frees device memory until the next load."""

    def close(self) -> None:
        """Ends what the engine started; it is not used again."""
