"""A Hugging Face model in float64: log-probs of one sequence at a time, and with an adapter added by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from tests.replay.reading import Tensors, read_tensors

A, B = ".lora_A.default.weight", ".lora_B.default.weight"


class Network:
    """The model in a folder, without padding rows: its ids are the first `num_ids`."""

    def __init__(self, folder: Path, num_ids: int) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, attn_implementation="sdpa"
        ).eval()
        self.num_ids = num_ids
        for module in self.model.modules():
            if type(module).__name__.endswith("RMSNorm"):  # transformers' own goes by float32
                module.forward = _norm(module)
        self.weights: Tensors = {name: weight.detach() for name, weight in self.model.named_parameters()}

    def logits(
        self, prompt: Sequence[int], completion: Sequence[int], weights: Tensors | None = None
    ) -> Tensor:
        """Logits [n, V] at the completion's tokens, of other weights if given."""
        arguments = {"input_ids": torch.tensor([[*prompt, *completion]]), "use_cache": False}
        found: Tensor = functional_call(self.model, weights or self.weights, (), arguments).logits[0]
        return found[len(prompt) - 1 : -1, : self.num_ids]

    def head(self, states: Tensor) -> Tensor:
        """Logits [n, V] of hidden states."""
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        return states @ head[: self.num_ids].T


def _norm(module: Any) -> Any:
    def forward(states: Tensor) -> Tensor:
        scaled = states * (states.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()
        return module.weight * scaled

    return forward


@dataclass(frozen=True)
class Policy:
    """A network of which `trained` are the weights that learn: all of them, or those of an adapter."""

    network: Network
    trained: Tensors
    scale: float | None = None
    """What an adapter's product is multiplied by; None where there is none."""

    def logits(
        self, prompt: Sequence[int], completion: Sequence[int], trained: Tensors | None = None
    ) -> Tensor:
        return self.network.logits(prompt, completion, self._whole(trained or self.trained))

    def _whole(self, trained: Tensors) -> Tensors:
        if self.scale is None:
            return trained
        whole = dict(self.network.weights)
        for name in trained:
            if name.endswith(A):
                layer = name.removesuffix(A)
                product = trained[layer + B] @ trained[name]
                whole[f"{layer}.weight"] = whole[f"{layer}.weight"] + self.scale * product
        return whole


def read_adapter(folder: Path) -> tuple[Tensors, float]:
    """The weights of a stored adapter under the names of its trainer, and its scale."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    stored = read_tensors(folder / "adapter_model.safetensors")
    trained = {
        name.removeprefix("base_model.model.").replace(".weight", ".default.weight"): tensor
        for name, tensor in stored.items()
    }
    return trained, settings["lora_alpha"] / settings["r"]


def logprobs(logits: Tensor, temperature: float) -> Tensor:
    return (logits / temperature).log_softmax(-1)


def of_tokens(found: Tensor, completion: Sequence[int]) -> Tensor:
    """The log-prob [n] of each token of a completion, out of log-probs [n, V]."""
    return found[torch.arange(len(completion)), torch.tensor(completion, dtype=torch.long)]


def cut(found: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """Log-probs [n, V] of what sampling leaves: the `top_k` best ids, then the smallest set with mass `top_p`."""
    result = torch.full_like(found, -math.inf)
    for row, line in enumerate(found):
        order = line.argsort(descending=True)[: top_k or None]
        best = line[order].log_softmax(-1)
        before = best.exp().cumsum(0) - best.exp()
        order = order[before < top_p]
        result[row, order] = line[order].log_softmax(-1)
    return result
