"""A model's config read: the one place for the names that architectures have for the same thing."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from kdpipe.errors import ModelError
from kdpipe.models.model_folder import tensors_of, unfit

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TEXT_KEYS = {
    r"^language_model\.lm_head": "lm_head",
    r"^language_model\.model": "model",
    r"^model\.language_model": "model",
}
"""How files of a model that sees or hears name what its text model alone has, as transformers' `key_mapping`."""
_OF_THE_TEXT = re.compile(r"(model\.)?language_model\.|lm_head\.")
# What the config of the whole says of its text model.
_OF_THE_WHOLE = "quantization_config", "eos_token_id", "bos_token_id", "pad_token_id"
_CONTEXTS = "max_position_embeddings", "n_positions", "max_seq_len"
_CAPS = "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"
_MULTIPLIED = ("hyperclovax",)
"""Architectures whose `logits_scaling` is what logits are multiplied with; others divide by it."""


def open_config(folder: Path, *, trust_remote_code: bool) -> PretrainedConfig:
    """The config of the model in a folder, of one that sees or hears that of the text model in it.

    Raises ModelError when it is not of a model.
    """
    from transformers import AutoConfig, PretrainedConfig

    with unfit(f"{folder}: its config.json is not of a causal language model"):
        whole = AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trust_remote_code
        )
        text = getattr(whole, "text_config", None)
        if not isinstance(text, PretrainedConfig):
            return whole
        for name in _OF_THE_WHOLE:
            if (value := getattr(whole, name, None)) is not None:
                setattr(text, name, value)
        if not any("lm_head." in name for name in tensors_of(folder)):
            text.tie_word_embeddings = True
        return text


def left_out(folder: Path) -> tuple[str, list[str]]:
    """The class of a model that is more than its text model, and its weights beside that; "" if it is not."""
    file = folder / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    if not isinstance(settings, dict) or not isinstance(settings.get("text_config"), dict):
        return "", []
    kind = next(iter(settings.get("architectures") or []), settings.get("model_type"))
    return str(kind), sorted(name for name in tensors_of(folder) if not _OF_THE_TEXT.match(name))


def rows_of(folder: Path, *, trust_remote_code: bool) -> int | None:
    """How many ids the model in a folder has rows for; None where its config does not tell."""
    with suppress(ModelError):  # a server may run what is not known here; an engine that cannot says so
        config = open_config(folder, trust_remote_code=trust_remote_code)
        rows = getattr(config, "vocab_size", None)
        return rows if isinstance(rows, int) else None
    return None


def context_of(config: PretrainedConfig) -> int | None:
    """How many tokens the model holds; None where its positions have no end (Bloom, Mamba)."""
    text = config.get_text_config()
    sizes = (getattr(text, name, None) for name in _CONTEXTS)
    context = next((size for size in sizes if isinstance(size, int) and size > 0), None)
    rope = getattr(text, "rope_parameters", None) or {}
    ropes = [rope, *(layers for layers in rope.values() if isinstance(layers, dict))]
    # Beyond its original context longrope places all tokens of a sequence otherwise, those before it too.
    ends = [told["original_max_position_embeddings"] for told in ropes if told.get("rope_type") == "longrope"]
    return min(ends, default=context)


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
