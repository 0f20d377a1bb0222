"""A causal model and token ids to log-probs at completion positions, a chunk of positions at a time.

The output head is the largest matrix of a small model and its logits the largest tensor of a batch, so
they are computed only where a completion token is predicted and never for all of them at once.

Shapes: B sequences, T positions, H hidden size, V ids in use, N completion tokens, C tokens of one chunk,
K most probable ids, S ids of a support.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from kdpipe.models.adapters import factors_of
from kdpipe.models.batching import Batch
from kdpipe.models.config import scale_and_cap

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Extra = Callable[[torch.Tensor, slice], torch.Tensor]
"""Log-probs [C, V] of the tokens in the slice of N -> one value per token [C]."""
_MIN_CHUNK_LOGITS = 2**22
"""Below this many logits a larger chunk costs no memory worth naming, and fewer chunks cost less time."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter adds to a head's products: `scaling * up @ down @ hidden`, in its own dtype."""

    down_RH: torch.Tensor
    up_VR: torch.Tensor
    scaling: float

    def products(self, hidden_CH: torch.Tensor) -> torch.Tensor:
        """The products [C, V] of hidden states."""
        return linear(linear(hidden_CH.to(self.down_RH.dtype), self.down_RH), self.up_VR) * self.scaling


@dataclass(frozen=True, slots=True)
class Head:
    """The rows of the output head that belong to ids in use, and what is made of their products.

    Logits are `cap * tanh(scale * (weight @ hidden + bias) / cap)`, without a `cap` those inside the tanh. With
    a `low_rank` its products are added to those of the weight.
    """

    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None = None
    scale: float = 1.0
    cap: float | None = None
    low_rank: LowRank | None = None


@dataclass(frozen=True, slots=True)
class HeadScores:
    """Log-probs of the completion's ids, of S ids that support a distribution, and of all others together.

    `finite_N` is False where a logit is not finite. Rows of the support as in `engine.TokenScores`.
    """

    logprobs_N: torch.Tensor
    finite_N: torch.Tensor
    topk_ids_NS: torch.Tensor
    topk_logprobs_NS: torch.Tensor
    tail_logprobs_N: torch.Tensor


def body_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model below the output head: what makes hidden states of token ids."""
    body = model.get_decoder()
    if body is model:  # transformers looks under the base model's name, which is not always its own (Llama 4)
        return next((child for child in model.children() if hasattr(child, "get_input_embeddings")), model)
    return body


def hidden_states(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Hidden states [N, H], after the final norm, that predict the batch's completion tokens."""
    hidden_BTH: torch.Tensor = body_of(model)(input_ids=batch.input_ids_BT, use_cache=False).last_hidden_state
    return hidden_BTH[batch.rows_N, batch.positions_N]


def head_of(model: PreTrainedModel, *, num_ids: int) -> Head:
    """The output head without its padding rows, with what an adapter on it adds while that is on."""
    weight_VH, bias_V = (layer := model.get_output_embeddings()).weight, layer.bias
    scale, cap = scale_and_cap(model.config)
    low_rank = None
    if (factors := factors_of(layer)) is not None:
        down_RH, up_VR, scaling = factors
        low_rank = LowRank(down_RH, up_VR[:num_ids], scaling)
    if num_ids == weight_VH.shape[0]:
        return Head(weight_VH, bias_V, scale, cap, low_rank)
    return Head(weight_VH[:num_ids], None if bias_V is None else bias_V[:num_ids], scale, cap, low_rank)


def head_to(head: Head, *, dtype: torch.dtype, device: torch.device) -> Head:
    """A copy of the head, without a gradient."""
    weight_VH = head.weight_VH.detach().to(device, dtype, copy=True)
    bias_V = None if head.bias_V is None else head.bias_V.detach().to(device, dtype, copy=True)
    return replace(head, weight_VH=weight_VH, bias_V=bias_V)


def logits_of(products: torch.Tensor, head: Head) -> torch.Tensor:
    """Logits, float32 or float64, of what the head's rows and biases make of hidden states."""
    logits = products if products.dtype == torch.float64 else products.float()
    if head.scale != 1:
        logits = logits * head.scale
    return logits if head.cap is None else (logits / head.cap).tanh() * head.cap


def head_logits(hidden_CH: torch.Tensor, head: Head, *, temperature: float) -> torch.Tensor:
    """Logits [C, V] divided by the temperature, in float32, or float64 when the model is."""
    products_CV = linear(hidden_CH, head.weight_VH, head.bias_V)
    if head.low_rank is not None:
        products_CV = products_CV + head.low_rank.products(hidden_CH)
    logits_CV = logits_of(products_CV, head)
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
        logits_CV = head_logits(hidden_CH, replace(head, weight_VH=weight_VH), temperature=temperature)
        logprobs_CV = logits_CV.log_softmax(-1)
        token_C = logprobs_CV.gather(-1, ids_N[part, None]).squeeze(-1)
        return (token_C,) if extra is None else (token_C, extra(logprobs_CV, part))

    parts = list(token_slices(len(ids_N), chunk, head))
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
    hidden_NH: torch.Tensor,
    head: Head,
    ids_N: torch.Tensor,
    *,
    temperature: float,
    top_k: int,
    chunk: int,
    support_ids_NS: torch.Tensor | None = None,
) -> HeadScores:
    """Log-probs of `ids_N`, and of the `top_k` most probable ids and `support_ids_NS`, without gradients."""
    results = []
    for part in token_slices(len(ids_N), chunk, head):
        logits_CV = head_logits(hidden_NH[part], head, temperature=temperature)
        finite_C = logits_CV.sum(-1).isfinite()
        logprobs_CV = logits_CV.log_softmax(-1)
        token_C = logprobs_CV.gather(-1, ids_N[part, None]).squeeze(-1)
        given_CS = None if support_ids_NS is None else support_ids_NS[part].long()
        results.append((token_C, finite_C, *support_of(logprobs_CV, top_k, given_CS)))
    return HeadScores(*(torch.cat(column) for column in zip(*results, strict=True)))


def support_of(
    logprobs_CV: torch.Tensor, top_k: int, given_CS: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids and log-probs of the `top_k` most probable ids and the given ones, and the rest's log-mass."""
    ids_CS = _top_ids(logprobs_CV, top_k)
    if given_CS is not None:
        ids_CS = _union(logprobs_CV, ids_CS, given_CS)
    if ids_CS.shape[-1] == 0:
        return ids_CS, logprobs_CV[:, :0], torch.zeros_like(logprobs_CV[:, 0])
    is_padding_CS = ids_CS < 0
    safe_CS = torch.where(is_padding_CS, ids_CS[:, :1], ids_CS)
    support_CS = logprobs_CV.gather(-1, safe_CS).masked_fill(is_padding_CS, -torch.inf)
    return ids_CS, support_CS, logprobs_CV.scatter(-1, safe_CS, -torch.inf).logsumexp(-1)


def _union(logprobs_CV: torch.Tensor, first_CS: torch.Tensor, second_CS: torch.Tensor) -> torch.Tensor:
    """Ids that stand in either, by falling log-prob (ties: lower id first), then -1."""
    ids_CS = torch.cat([first_CS, second_CS], dim=-1).sort(dim=-1).values
    again_CS = torch.zeros_like(ids_CS, dtype=torch.bool)
    again_CS[:, 1:] = ids_CS[:, 1:] == ids_CS[:, :-1]
    order_CS = logprobs_CV.gather(-1, ids_CS).argsort(dim=-1, descending=True, stable=True)
    order_CS = order_CS.gather(-1, again_CS.gather(-1, order_CS).long().argsort(dim=-1, stable=True))
    return ids_CS.masked_fill(again_CS, -1).gather(-1, order_CS)[:, : logprobs_CV.shape[-1]]


def _top_ids(logprobs_CV: torch.Tensor, top_k: int) -> torch.Tensor:
    """Ids [C, K] as a stable sort of the whole row would give, at the price of a selection."""
    if top_k == 0:
        return logprobs_CV[:, :0].long()
    if top_k == logprobs_CV.shape[-1]:
        return logprobs_CV.sort(dim=-1, descending=True, stable=True).indices
    values_CK, ids_CK = logprobs_CV.topk(top_k + 1, dim=-1)
    # topk leaves the order of ties open, inside the selection and at its edge.
    tied_C = values_CK[:, -1] == values_CK[:, -2]
    ids_CK = ids_CK[:, :-1].sort(dim=-1).values
    order_CK = logprobs_CV.gather(-1, ids_CK).sort(dim=-1, descending=True, stable=True).indices
    ids_CK = ids_CK.gather(-1, order_CK)
    if tied_C.any():
        ids_CK[tied_C] = logprobs_CV[tied_C].sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    return ids_CK


def token_slices(num_tokens: int, chunk: int, head: Head) -> Iterator[slice]:
    """Slices that cover `num_tokens`, of as many as have their logits made at once; an empty one for none."""
    chunk = max(chunk, _MIN_CHUNK_LOGITS // head.weight_VH.shape[0])
    for start in range(0, max(num_tokens, 1), chunk):
        yield slice(start, min(start + chunk, num_tokens))
