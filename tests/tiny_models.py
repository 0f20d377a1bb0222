"""Tiny random models of several architectures, and the plainest way to compute their log-probs."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

FLOAT32_NATS = 2**-14
"""How far two float32 computations of one log-prob of a tiny model may lie apart, each on kernels of its own.

Its logits are below 16, where one rounding is at most 2^-21 nats, and it takes some dozens of them, of either sign:
2^-14 is 128 that all agree. 1.3e-5 was seen (AMX), of 6.1e-5. A wrong token, position, mask or adapter is a thousand
times more.
"""
ROWS = 16
COMMON = {
    "vocab_size": ROWS,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": LlamaConfig(**COMMON, tie_word_embeddings=False),
    "llama-tied-biased": LlamaConfig(
        **COMMON | {"num_key_value_heads": 4}, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "llama-yarn": LlamaConfig(
        **COMMON,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "qwen2": Qwen2Config(**COMMON, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**COMMON, head_dim=8, tie_word_embeddings=False),
    "mistral": MistralConfig(**COMMON, sliding_window=None),
    "mistral-windowed": MistralConfig(**COMMON, sliding_window=5),
    "gpt2": GPT2Config(
        vocab_size=ROWS,
        n_embd=24,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=1,
    ),
}
# vLLM computes attention on a CPU for heads of 32 and more.
_WIDE = COMMON | {
    "hidden_size": 96,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "initializer_range": 0.2,
}
WIDE_CONFIGS = {
    "wide": LlamaConfig(**_WIDE, tie_word_embeddings=False),
    "wide-tied": LlamaConfig(**_WIDE, tie_word_embeddings=True),
}
FAST = ("llama", "llama-tied-biased", "llama-yarn", "qwen2", "qwen3", "mistral")


def tiny_model(name: str, *, seed: int = 0) -> PreTrainedModel:
    """A random float32 model whose biases and norms are not what they are initialised to."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy((CONFIGS | WIDE_CONFIGS)[name]), dtype=torch.float32
        )
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One word `w<id>.` for each id."""
    words = {f"w{token}.": token for token in range(ROWS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0."))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1.", pad_token="w0.")


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """A copy for `plain_logprobs`."""
    return copy.deepcopy(model).double()


def plain_logprobs(
    wide: PreTrainedModel,
    prompt: Sequence[int],
    completion: Sequence[int],
    *,
    temperature: float = 1.0,
    num_ids: int = ROWS,
) -> torch.Tensor:
    """Log-probs [n, num_ids] at each completion token by one unbatched forward of a float64 model."""
    assert wide.dtype == torch.float64
    with torch.no_grad():
        logits = wide(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
    rows = logits[len(prompt) - 1 : len(prompt) + len(completion) - 1, :num_ids]
    return (rows / temperature).log_softmax(-1)
