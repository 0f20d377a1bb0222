"""A model's config read: the one place for the names that architectures have for the same thing."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from kdpipe.models.model_folder import unfit

_CONTEXTS = "max_position_embeddings", "n_positions", "max_seq_len"
_CAPS = "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"
_MULTIPLIED = ("hyperclovax",)
"""Architectures whose `logits_scaling` is what logits are multiplied with; others divide by it."""


def open_config(folder: Path, *, trust_remote_code: bool) -> PretrainedConfig:
    """The config of the model in a folder; raises ModelError when it is not of one."""
    with unfit(f"{folder}: its config.json is not of a causal language model"):
        return AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trust_remote_code
        )


def context_of(config: PretrainedConfig) -> int | None:
    """How many tokens the model holds; None where its positions have no end (Bloom, Mamba)."""
    told = (getattr(config.get_text_config(), name, None) for name in _CONTEXTS)
    return next((value for value in told if isinstance(value, int)), None)


def scale_and_cap(config: PretrainedConfig) -> tuple[float, float | None]:
    """The `scale` and the `cap` of the model's output head (`logprobs.Head`)."""
    text = config.get_text_config()

    def told(*names: str) -> float | None:
        values = (getattr(text, name, None) for name in names)
        return next((float(value) for value in values if isinstance(value, int | float)), None)

    divisor = told("logits_scaling") or 1.0
    factor = told("logit_scale", "lm_head_multiplier")
    scale = divisor if text.model_type in _MULTIPLIED else 1 / divisor
    return scale if factor is None else scale * factor, told(*_CAPS)
