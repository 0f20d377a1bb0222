"""Token-by-token decoding with transformers models: a KV cache that is written in place, and its step.

`generate` copies the whole cache at every step, expands key-value heads and builds masks. `LlamaDecoder`
does none of that, for the architectures it knows; `CacheDecoder` runs any other through its own forward and cache,
and `WholeDecoder` needs no cache. Which of them computes a model exactly is found out in `choice.py`.

Shapes: B rows (completions being sampled), H hidden size, S cache slots, D head size, T prompt tokens.
Features come first (`x_HB`) in the step: on CPUs a tall weight times a narrow batch is up to twice as
fast that way round.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.functional import embedding, scaled_dot_product_attention
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from kdpipe.models.adapters import is_lora
from kdpipe.models.batching import pad_right
from kdpipe.models.logprobs import body_of

_LLAMA_LIKE = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Decoder(Protocol):
    """Hidden states of rows that grow by a token at a time."""

    def __init__(self, model: PreTrainedModel, *, max_new_tokens: int) -> None: ...

    def prefill(
        self, prompts: Sequence[Sequence[int]], repeats: Sequence[int], *, max_tokens: int
    ) -> torch.Tensor:
        """Hidden states [H, B] at each prompt's last token, a prompt's row repeated as often as told.

        `max_tokens` bounds the padded prompt tokens of one forward pass, where a decoder can keep to it.
        """

    def step(self, ids_B: torch.Tensor) -> torch.Tensor:
        """Hidden states [H, B] after one more token on each row."""

    def keep(self, rows: torch.Tensor) -> None:
        """Drops all rows but these, in this order."""


def is_llama_like(model: PreTrainedModel) -> bool:
    """Whether `LlamaDecoder` computes this model: class, attention, positions, layers are known ones."""
    config = model.config
    if type(model) not in _LLAMA_LIKE or config.rope_parameters["rope_type"] not in _FIXED_ROPE:
        return False
    windowed = "sliding_attention" in (getattr(config, "layer_types", None) or [])
    if windowed or (type(model) is MistralForCausalLM and config.sliding_window is not None):
        return False
    # Quantisation replaces the projections, and so do adapters, of which LoRA is computed here.
    return all(
        type(module) is nn.Linear or is_lora(module)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in _PROJECTIONS
    )


class LlamaDecoder:
    """Decoding for models of the Llama family (rotary positions, RMS norms, gated MLP).

    Prompts of different lengths stand left-aligned in the cache and new tokens go to the same slot of all
    rows, so a step writes one slice; the hole behind a short prompt is masked. Rotary positions are
    those of the tokens, not of the slots.
    """

    def __init__(self, model: PreTrainedModel, *, max_new_tokens: int) -> None:
        self._model = model
        self._max_new_tokens = max_new_tokens
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []

    def prefill(
        self, prompts: Sequence[Sequence[int]], repeats: Sequence[int], *, max_tokens: int
    ) -> torch.Tensor:
        device = self._model.device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        row_prompts = torch.repeat_interleave(torch.tensor(repeats, device=device))
        width = int(lengths.max())
        self._slot = width
        self._positions = lengths[row_prompts]
        self._mask = self._hole_mask(width)
        self._cos, self._sin = self._rotary_tables(width)
        hidden = self._fill_cache(prompts, row_prompts, lengths, max(1, max_tokens // width))
        return hidden.t().contiguous()

    def _fill_cache(
        self,
        prompts: Sequence[Sequence[int]],
        row_prompts: torch.Tensor,
        lengths: torch.Tensor,
        prompts_at_once: int,
    ) -> torch.Tensor:
        body, num_rows, hidden = body_of(self._model), len(row_prompts), []
        cache_name = _cache_name(body)
        for start in range(0, len(prompts), prompts_at_once):
            stop = min(start + prompts_at_once, len(prompts))
            ids_PT = pad_right(prompts[start:stop], device=self._model.device)
            output = body(input_ids=ids_PT, use_cache=True)
            cache = output[cache_name]
            rows = ((row_prompts >= start) & (row_prompts < stop)).nonzero().squeeze(-1)
            sources = row_prompts[rows] - start
            hidden.append(output.last_hidden_state[sources, lengths[row_prompts[rows]] - 1])
            if not self._keys:
                self._allocate(cache, num_rows)
            first, last = int(rows[0]), int(rows[-1]) + 1
            width = ids_PT.shape[1]
            for index, layer in enumerate(cache.layers):
                self._keys[index][first:last, :, :width] = layer.keys[sources]
                self._values[index][first:last, :, :width] = layer.values[sources]
        return torch.cat(hidden)

    def _allocate(self, cache: Any, num_rows: int) -> None:
        slots = self._slot + self._max_new_tokens
        for layer in cache.layers:
            _, num_heads, _, head_dim = layer.keys.shape
            # Zeros where prompts are short: a masked slot must still be finite.
            shape = (num_rows, num_heads, slots, head_dim)
            for caches, like in ((self._keys, layer.keys), (self._values, layer.values)):
                slab = like.new_empty(shape)
                slab[:, :, : self._slot] = 0
                caches.append(slab)

    def _hole_mask(self, width: int) -> torch.Tensor | None:
        """What is added to attention scores [B, 1, 1, S]; None where all prompts are equally long."""
        if bool((self._positions == width).all()):
            return None
        slots = torch.arange(width + self._max_new_tokens, device=self._positions.device)
        is_hole = (slots >= self._positions[:, None]) & (slots < width)
        mask = torch.zeros(is_hole.shape, dtype=self._model.dtype, device=is_hole.device)
        return mask.masked_fill_(is_hole, -torch.inf)[:, None, None, :]

    def _rotary_tables(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [positions, D]; the sine of the first half negated, as the rotation wants it."""
        positions = torch.arange(width + self._max_new_tokens, device=self._model.device)
        like = torch.empty(0, dtype=self._model.dtype, device=positions.device)
        cos, sin = body_of(self._model).rotary_emb(like, position_ids=positions[None])
        half = sin.shape[-1] // 2
        return cos[0], torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=-1)

    def step(self, ids_B: torch.Tensor) -> torch.Tensor:
        body = body_of(self._model)
        x_HB = embedding(ids_B, body.embed_tokens.weight).t().contiguous()
        rotation = (self._cos[self._positions].t().contiguous(), self._sin[self._positions].t().contiguous())
        mask = None if self._mask is None else self._mask[..., : self._slot + 1]
        for index, layer in enumerate(body.layers):
            h_HB = _norm(x_HB, layer.input_layernorm)
            attended = self._attend(index, layer, h_HB, rotation, mask=mask)
            x_HB = _project(layer.self_attn.o_proj, attended, onto=x_HB)
            h_HB = _norm(x_HB, layer.post_attention_layernorm)
            mlp = layer.mlp
            gated = mlp.act_fn(_project(mlp.gate_proj, h_HB)).mul_(_project(mlp.up_proj, h_HB))
            x_HB = _project(mlp.down_proj, gated, onto=x_HB)
        self._slot += 1
        self._positions = self._positions + 1
        return _norm(x_HB, body.norm)

    def _attend(
        self,
        index: int,
        layer: Any,
        h_HB: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        *,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of the new tokens to all slots so far [heads * D, B], before the output projection."""
        attention = layer.self_attn
        keys, values, slot = self._keys[index], self._values[index], self._slot
        num_rows, num_kv_heads, _, head_dim = keys.shape
        shape = (-1, head_dim, num_rows)
        q = _project(attention.q_proj, h_HB).view(shape)
        k = _project(attention.k_proj, h_HB).view(shape)
        v = _project(attention.v_proj, h_HB).view(shape)
        if type(self._model) is Qwen3ForCausalLM:
            q, k = _norm(q, attention.q_norm), _norm(k, attention.k_norm)
        q, k = _rotate(q, *rotation), _rotate(k, *rotation)
        keys[:, :, slot] = k.permute(2, 0, 1)
        values[:, :, slot] = v.permute(2, 0, 1)
        # Query heads that share a key-value head stand as its queries: nothing is expanded.
        attended = scaled_dot_product_attention(
            q.permute(2, 0, 1).contiguous().view(num_rows, num_kv_heads, -1, head_dim),
            keys[:, :, : slot + 1],
            values[:, :, : slot + 1],
            attn_mask=mask,
            scale=attention.scaling,
        )
        return attended.reshape(num_rows, -1).t()

    def keep(self, rows: torch.Tensor) -> None:
        for caches in (self._keys, self._values):
            for index, old in enumerate(caches):
                new = old.new_empty((len(rows), *old.shape[1:]))
                new[:, :, : self._slot] = old[rows, :, : self._slot]
                caches[index] = new
        self._positions = self._positions[rows]
        self._mask = None if self._mask is None else self._mask[rows]


class CacheDecoder:
    """Decoding through a model's own forward and the cache that it makes for itself.

    Prompts that are shorter than others are padded on the left, behind a mask.
    """

    def __init__(self, model: PreTrainedModel, *, max_new_tokens: int) -> None:
        del max_new_tokens  # the cache grows by itself
        self._model = model
        body = body_of(model)
        self._takes_positions = "position_ids" in inspect.signature(body.forward).parameters
        self._cache_name = _cache_name(body)
        self._cache: Any = None

    def prefill(
        self, prompts: Sequence[Sequence[int]], repeats: Sequence[int], *, max_tokens: int
    ) -> torch.Tensor:
        """See Decoder; `max_tokens` cannot be kept, as a cache of any kind cannot be joined to another."""
        del max_tokens
        device = self._model.device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        width = int(lengths.max())
        ids_PT = torch.tensor([[*[0] * (width - len(ids)), *ids] for ids in prompts], device=device)
        places = torch.arange(width, device=device) - (width - lengths[:, None])
        self._mask = None if bool((lengths == width).all()) else (places >= 0).long()
        hidden_PH = self._forward(ids_PT, places.clamp(min=0))
        rows = torch.repeat_interleave(torch.tensor(repeats, device=device))
        self._positions = lengths
        self.keep(rows)
        return hidden_PH[rows].t()

    def step(self, ids_B: torch.Tensor) -> torch.Tensor:
        if self._mask is not None:
            self._mask = torch.cat((self._mask, torch.ones_like(self._mask[:, :1])), dim=1)
        hidden_BH = self._forward(ids_B[:, None], self._positions[:, None])
        self._positions = self._positions + 1
        return hidden_BH.t()

    def keep(self, rows: torch.Tensor) -> None:
        # Layers of linear attention can only be reordered; of a model's own kind of cache rows can be selected.
        if type(self._cache) is DynamicCache:
            self._cache.reorder_cache(rows)
        else:
            self._cache.batch_select_indices(rows)
        self._positions = self._positions[rows]
        self._mask = None if self._mask is None else self._mask[rows]

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Hidden states [rows, H] at the last of the ids."""
        given = {} if self._mask is None else {"attention_mask": self._mask}
        if self._takes_positions:
            given["position_ids"] = positions
        if self._cache is not None:
            given[self._cache_name] = self._cache
        output = body_of(self._model)(input_ids=ids, use_cache=True, **given)
        self._cache = output[self._cache_name]
        hidden: torch.Tensor = output.last_hidden_state[:, -1]
        return hidden


class WholeDecoder:
    """Decoding without a cache: each token is the last of a forward over all of its sequence."""

    def __init__(self, model: PreTrainedModel, *, max_new_tokens: int) -> None:
        del max_new_tokens
        self._model = model
        self._rows: list[list[int]] = []

    def prefill(
        self, prompts: Sequence[Sequence[int]], repeats: Sequence[int], *, max_tokens: int
    ) -> torch.Tensor:
        self._max_tokens = max_tokens
        self._rows = [list(ids) for ids, count in zip(prompts, repeats, strict=True) for _ in range(count)]
        return self._last()

    def step(self, ids_B: torch.Tensor) -> torch.Tensor:
        for row, token in zip(self._rows, ids_B.tolist(), strict=True):
            row.append(token)
        return self._last()

    def keep(self, rows: torch.Tensor) -> None:
        self._rows = [self._rows[row] for row in rows.tolist()]

    def _last(self) -> torch.Tensor:
        """Hidden states [H, B] at the last token of each row."""
        at_once = max(1, self._max_tokens // max(map(len, self._rows)))
        hidden = []
        for start in range(0, len(self._rows), at_once):
            rows = self._rows[start : start + at_once]
            ids_BT = pad_right(rows, device=self._model.device)
            states_BTH = body_of(self._model)(input_ids=ids_BT, use_cache=False).last_hidden_state
            hidden.append(states_BTH[range(len(rows)), [len(row) - 1 for row in rows]])
        return torch.cat(hidden).t()


def _cache_name(body: PreTrainedModel) -> str:
    """What its cache is called; transformers has renamed that, not in all models at once."""
    known = inspect.signature(body.forward).parameters
    return next((name for name in ("cache", "past_key_values", "cache_params") if name in known), "cache")


def _project(linear: nn.Module, x_HB: torch.Tensor, *, onto: torch.Tensor | None = None) -> torch.Tensor:
    """`weight @ x + bias`, and what an adapter adds to it, added to `onto` where given."""
    if not isinstance(linear, nn.Linear):
        return _project_adapted(linear, x_HB, onto=onto)
    if onto is None:
        if linear.bias is None:
            return torch.mm(linear.weight, x_HB)
        return torch.addmm(linear.bias[:, None], linear.weight, x_HB)
    result = torch.addmm(onto, linear.weight, x_HB)
    return result if linear.bias is None else result.add_(linear.bias[:, None])


def _project_adapted(layer: Any, x_HB: torch.Tensor, *, onto: torch.Tensor | None) -> torch.Tensor:
    """The projection below the adapter, and `B (A x) * scaling` in the adapter's dtype where it is on."""
    result = _project(layer.base_layer, x_HB, onto=onto)
    if layer.disable_adapters:
        return result
    [name] = layer.active_adapters
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    inner = torch.mm(down, x_HB.to(down.dtype))
    return torch.addmm(result.to(down.dtype), up, inner, alpha=layer.scaling[name]).to(x_HB.dtype)


def _norm(x: torch.Tensor, norm: Any) -> torch.Tensor:
    """RMS norm over the second dimension from the right, rounded where transformers rounds."""
    wide = x if x.dtype == torch.float64 else x.float()
    scale = torch.rsqrt(wide.square().mean(-2, keepdim=True) + norm.variance_epsilon)
    normed: torch.Tensor = (wide * scale).to(x.dtype) * norm.weight[:, None]
    return normed


def _rotate(x: torch.Tensor, cos_DB: torch.Tensor, sin_DB: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [heads, D, B]."""
    return torch.addcmul(x * cos_DB, x.roll(x.shape[1] // 2, dims=1), sin_DB)
