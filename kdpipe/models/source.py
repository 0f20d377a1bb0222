"""Where a model comes from, and what identifies its content."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from kdpipe.workers.message import message

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@message
class AdapterSource:
    """Where a LoRA adapter comes from: a folder as peft writes it, and what identifies its content."""

    folder: Path
    digest: str


@message
class ModelSource:
    """Where a model comes from.

    `folder` is a Hugging Face folder with tokenizer and safetensors. `digest` identifies its content: two
    sources with equal digests are the same weights, so an engine that holds them need not load again. With an
    `adapter` the model is that one with the adapter on, and both digests together identify it. `quantization` is
    the method by which an engine is to store its weights in fewer bits, which changes what it computes.
    """

    folder: Path
    digest: str
    dtype: Dtype = "auto"
    trust_remote_code: bool = False
    adapter: AdapterSource | None = None
    quantization: str | None = None
