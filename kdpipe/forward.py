"""A causal model and token ids to log-probs at completion positions, a chunk of positions at a time.

The output head is the largest matrix of a small model and its logits the largest tensor of a batch, so
they are computed only where a completion token is predicted and never for all of them at once.

Shapes: B sequences, T positions, H hidden size, V ids in use, N completion tokens, C tokens of one chunk,
K most probable ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kdpipe.batching import Batch

Extra = Callable[[torch.Tensor, slice], torch.Tensor]
"""Log-probs [C, V] of the tokens in the slice of N -> one value per token [C]."""

_MIN_CHUNK_LOGITS = 2**22
"""Below this many logits a larger chunk costs no memory worth naming, and fewer chunks cost less time."""


class CausalModel(Protocol):
    """What is asked of a model: its decoder body (final norm included) and its output head."""

    def get_decoder(self) -> Callable[..., Any]:
        """Returns the body: `input_ids` to `last_hidden_state`."""

    def get_output_embeddings(self) -> torch.nn.Linear:
        """Returns the output head."""


@dataclass(frozen=True, slots=True)
class Head:
    """The rows of the output head that belong to ids in use."""

    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probs of the given ids and, for K > 0, of the most probable ones and all others together.

    `finite_N` is False where a logit is not finite.
    """

    logprobs_N: torch.Tensor
    finite_N: torch.Tensor
    topk_ids_NK: torch.Tensor
    topk_logprobs_NK: torch.Tensor
    tail_logprobs_N: torch.Tensor


def hidden_states(model: CausalModel, batch: Batch) -> torch.Tensor:
    """Hidden states [N, H], after the final norm, that predict the batch's completion tokens."""
    hidden_BTH: torch.Tensor = model.get_decoder()(
        input_ids=batch.input_ids_BT, use_cache=False
    ).last_hidden_state
    return hidden_BTH[batch.rows_N, batch.positions_N]


def head_of(model: CausalModel, *, num_ids: int) -> Head:
    """The output head without its padding rows."""
    weight_VH, bias_V = (layer := model.get_output_embeddings()).weight, layer.bias
    if num_ids == weight_VH.shape[0]:
        return Head(weight_VH, bias_V)
    return Head(weight_VH[:num_ids], None if bias_V is None else bias_V[:num_ids])


def head_logits(hidden_CH: torch.Tensor, head: Head, *, temperature: float) -> torch.Tensor:
    """Logits [C, V] divided by the temperature, in float32, or float64 when the model is."""
    logits_CV = linear(hidden_CH, head.weight_VH, head.bias_V)
    if logits_CV.dtype != torch.float64:
        logits_CV = logits_CV.float()
    return logits_CV if temperature == 1 else logits_CV / temperature


def token_logprobs(
    hidden_NH: torch.Tensor,
    head: Head,
    ids_N: torch.Tensor,
    *,
    temperature: float,
    chunk: int,
    extra: Extra | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probs [N] of `ids_N`, and what `extra` makes of the full log-probs, both with gradients.

    Each chunk's logits are dropped and computed again in the backward pass. `chunk` is in tokens; small
    vocabularies take larger ones.
    """

    def step(hidden_CH: torch.Tensor, weight_VH: torch.Tensor, part: slice) -> tuple[torch.Tensor, ...]:
        logits_CV = head_logits(hidden_CH, Head(weight_VH, head.bias_V), temperature=temperature)
        logprobs_CV = logits_CV.log_softmax(-1)
        token_C = logprobs_CV.gather(-1, ids_N[part, None]).squeeze(-1)
        return (token_C,) if extra is None else (token_C, extra(logprobs_CV, part))

    parts = list(_parts(len(ids_N), _chunk_tokens(chunk, head)))
    recompute = len(parts) > 1 and torch.is_grad_enabled()
    results = [
        checkpoint(step, hidden_NH[part], head.weight_VH, part, use_reentrant=False, preserve_rng_state=False)
        if recompute
        else step(hidden_NH[part], head.weight_VH, part)
        for part in parts
    ]
    columns = [torch.cat(column) for column in zip(*results, strict=True)]
    return columns[0], columns[1] if extra is not None else None


@torch.no_grad()
def score_tokens(
    hidden_NH: torch.Tensor, head: Head, ids_N: torch.Tensor, *, temperature: float, top_k: int, chunk: int
) -> Scores:
    """Log-probs of `ids_N` and of the `top_k` most probable ids at each position, without gradients."""
    results = []
    for part in _parts(len(ids_N), _chunk_tokens(chunk, head)):
        logits_CV = head_logits(hidden_NH[part], head, temperature=temperature)
        finite_C = logits_CV.sum(-1).isfinite()
        logprobs_CV = logits_CV.log_softmax(-1)
        token_C = logprobs_CV.gather(-1, ids_N[part, None]).squeeze(-1)
        results.append((token_C, finite_C, *_top(logprobs_CV, top_k)))
    return Scores(*(torch.cat(column) for column in zip(*results, strict=True)))


def _top(logprobs_CV: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids and log-probs of the `top_k` most probable ids, ties by lower id, and the rest's log-mass."""
    if top_k == 0:
        empty_C0 = logprobs_CV[:, :0]
        return empty_C0.long(), empty_C0, torch.zeros_like(logprobs_CV[:, 0])
    if top_k == logprobs_CV.shape[-1]:
        topk_CK, ids_CK = logprobs_CV.sort(dim=-1, descending=True, stable=True)
        return ids_CK, topk_CK, torch.full_like(topk_CK[:, 0], -torch.inf)
    ids_CK = _top_ids(logprobs_CV, top_k)
    topk_CK = logprobs_CV.gather(-1, ids_CK)
    tail_C = logprobs_CV.scatter(-1, ids_CK, -torch.inf).logsumexp(-1)
    return ids_CK, topk_CK, tail_C


def _top_ids(logprobs_CV: torch.Tensor, top_k: int) -> torch.Tensor:
    """Ids [C, K] as a stable sort of the whole row would give, at the price of a selection."""
    values_CK, ids_CK = logprobs_CV.topk(top_k + 1, dim=-1)
    # topk leaves the order of ties open, inside the selection and at its edge.
    tied_C = values_CK[:, -1] == values_CK[:, -2]
    ids_CK = ids_CK[:, :-1].sort(dim=-1).values
    order_CK = logprobs_CV.gather(-1, ids_CK).sort(dim=-1, descending=True, stable=True).indices
    ids_CK = ids_CK.gather(-1, order_CK)
    if tied_C.any():
        ids_CK[tied_C] = logprobs_CV[tied_C].sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    return ids_CK


def _chunk_tokens(chunk: int, head: Head) -> int:
    return max(chunk, _MIN_CHUNK_LOGITS // head.weight_VH.shape[0])


def _parts(num_tokens: int, chunk: int) -> Iterator[slice]:
    """Slices of at most `chunk` that cover `num_tokens`; a single empty one for none."""
    for start in range(0, max(num_tokens, 1), chunk):
        yield slice(start, min(start + chunk, num_tokens))
