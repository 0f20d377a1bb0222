"""Token-by-token decoding with transformers models: a KV cache that is written in place, and its step.

`generate` copies the whole cache at every step, expands key-value heads and builds masks. `LlamaDecoder`
does none of that, for the architectures it knows; `GenericDecoder` runs any other through its own forward.

Shapes: B rows (completions being sampled), H hidden size, S cache slots, D head size, T prompt tokens.
Features come first (`x_HB`) in the step: on CPUs a tall weight times a narrow batch is up to twice as
fast that way round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


def make_decoder(model: PreTrainedModel, *, max_new_tokens: int) -> LlamaDecoder | GenericDecoder:
    """The fastest decoder that computes exactly this model."""
    if is_llama_like(model):
        return LlamaDecoder(model, max_new_tokens=max_new_tokens)
    return GenericDecoder(model)


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
        """Hidden states [H, B] at each prompt's last token, a prompt's row repeated as often as told.

        `max_tokens` bounds the padded prompt tokens of one forward pass.
        """
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
        config, num_rows, hidden = self._model.config, len(row_prompts), []
        for start in range(0, len(prompts), prompts_at_once):
            stop = min(start + prompts_at_once, len(prompts))
            ids_PT = pad_right(prompts[start:stop], device=self._model.device)
            cache = DynamicCache(config=config)
            output = body_of(self._model)(input_ids=ids_PT, past_key_values=cache, use_cache=True)
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
        """Hidden states [H, B] after one more token on each row."""
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
        """Drops all rows but these, in this order."""
        for caches in (self._keys, self._values):
            for index, old in enumerate(caches):
                new = old.new_empty((len(rows), *old.shape[1:]))
                new[:, :, : self._slot] = old[rows, :, : self._slot]
                caches[index] = new
        self._positions = self._positions[rows]
        self._mask = None if self._mask is None else self._mask[rows]


class GenericDecoder:
    """Decoding through a model's own forward and its own kind of cache; prompts must be equally long."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def prefill(
        self, prompts: Sequence[Sequence[int]], repeats: Sequence[int], *, max_tokens: int
    ) -> torch.Tensor:
        """See LlamaDecoder; `max_tokens` cannot be kept, as a cache of any kind cannot be joined to another."""
        del max_tokens
        self._cache = DynamicCache(config=self._model.config)
        device = self._model.device
        output = body_of(self._model)(
            input_ids=pad_right(prompts, device=device), past_key_values=self._cache, use_cache=True
        )
        rows = torch.repeat_interleave(torch.tensor(repeats, device=device))
        self._cache.batch_select_indices(rows)
        hidden: torch.Tensor = output.last_hidden_state[rows, -1]
        return hidden.t()

    def step(self, ids_B: torch.Tensor) -> torch.Tensor:
        output = body_of(self._model)(input_ids=ids_B[:, None], past_key_values=self._cache, use_cache=True)
        hidden: torch.Tensor = output.last_hidden_state[:, -1]
        return hidden.t()

    def keep(self, rows: torch.Tensor) -> None:
        self._cache.batch_select_indices(rows)


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
