"""LoRA adapters on a frozen model: made, switched on and off, read, written, merged.

The only door to peft, which makes the layers and defines the file format. Adapters are float32 in memory and on
disk, as peft has them, whatever the model under them is: nothing narrower is ever written, so no second copy is needed
to continue from.

A model without adapters never causes peft to be imported.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import JsonValue
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from kdpipe.errors import ArtifactError, ModelError
from kdpipe.recipe.models import Lora

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_NAME = "default"
_PREFIX = "base_model.model."  # how peft names the model in its files
_SHOWN_TARGETS = 8
_LAYER = re.compile(r".*?\.\d+(?=\.)")  # the name of a numbered layer, at the beginning of a weight's
LEAST_OF_ALL = 0.5
"""Share of the weights that all linear layers hold at least, where these are said to be the targets."""


@dataclass(frozen=True, slots=True)
class Reach:
    """What targets reach of a model: their share of its weights, and in how many of its layers."""

    weights: float
    layers: int
    of_layers: int

    def __str__(self) -> str:
        share = f"{self.weights:.0%} of the weights between embeddings and head"
        return f"{share}, in {self.layers} of {self.of_layers} layers"


@dataclass(frozen=True, slots=True)
class Targets:
    """What gets an adapter, sorted: last parts of names of layers, ends of names of tensors."""

    layers: list[str]
    parameters: list[str]


def targets_of(model: PreTrainedModel, lora: Lora) -> Targets:
    """What gets an adapter of a model that has none yet.

    Raises ModelError on a target that names no layer, or one that is not linear, or a tied output head, on tensors that
    are no experts', and on all linear layers where most weights are in others. An untied head is one where it is named.
    """
    found = Targets(_layer_targets(model, lora), sorted(set(lora.target_parameters)))
    experts = _experts(model)
    for target in found.parameters:
        if not any(_ends(name, target) for name in experts):
            known = sorted({".".join(name.split(".")[-3:]) for name in experts})
            raise ModelError(
                f"student.lora.target_parameters: {type(model).__name__} has no experts called {target!r}",
                hint=f"its experts are {', '.join(known)}"
                if known
                else "it has none: name its layers in targets",
            )
    if lora.targets == "all-linear" and (reached := reach(model, found)).weights < LEAST_OF_ALL:
        known = sorted({".".join(name.split(".")[-3:]) for name in experts})
        raise ModelError(
            f"student.lora: what adapters are asked for of {type(model).__name__} are {reached}: they leave out "
            "most of the model, such as experts whose weights are no linear layers",
            hint=f"name them: target_parameters: [{', '.join(known)}]; if linear layers alone are to be trained, "
            f"say so: targets: [{', '.join(found.layers)}]",
        )
    return found


def _experts(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The tensors that hold the matrices of several experts in one."""
    return {name: weight for name, weight in model.named_parameters() if weight.ndim == 3}


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _layer_targets(model: PreTrainedModel, lora: Lora) -> list[str]:
    """The last parts of the names of the layers."""
    head = model.get_output_embeddings()
    named = dict(model.named_modules())
    linear = {name for name, module in named.items() if type(module) is nn.Linear}
    known = sorted({name.rpartition(".")[2] for name in linear if named[name] is not head})
    if is_tied := model.get_input_embeddings().weight is head.weight:
        linear = {name for name in linear if named[name] is not head}
    targets = known if lora.targets == "all-linear" else sorted(set(lora.targets))
    hint = f"its linear layers are {', '.join(known[:_SHOWN_TARGETS])}" if known else "train all its weights"
    where = f"student.lora.targets: {type(model).__name__}"
    if not targets:
        raise ModelError(f"{where} has no linear layers to adapt", hint=hint)
    for target in targets:
        hit = [name for name in named if name.rpartition(".")[2] == target]
        if not hit:
            raise ModelError(f"{where} has no layer called {target!r}", hint=hint)
        for name in sorted(set(hit) - linear):
            what = type(named[name]).__name__
            if (
                named[name] is head and is_tied
            ):  # merged it would be another model: its embeddings would be parted
                what = "the output head, tied to the input embeddings"
            raise ModelError(
                f"{where}: {target!r} names {name}, which is {what}, expected linear layers", hint=hint
            )
    return targets


def reach(model: PreTrainedModel, targets: Targets) -> Reach:
    """What targets are of a model, counted by its matrices."""
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    ends = {id(weight) for weight in (*tables, model.get_output_embeddings().weight)}
    weights = {
        name: weight.numel()
        for name, weight in model.named_parameters()
        if weight.ndim > 1 and id(weight) not in ends
    }
    reached = [
        name
        for name in weights
        if name.removesuffix(".weight").rpartition(".")[2] in targets.layers
        or any(_ends(name, target) for target in targets.parameters)
    ]
    share = sum(weights[name] for name in reached) / max(sum(weights.values()), 1)
    layers, every = (
        {found[0] for name in names if (found := _LAYER.match(name))} for names in (reached, weights)
    )
    return Reach(share, len(layers), len(every))


def start_adapter(model: PreTrainedModel, lora: Lora, *, seed: int) -> None:
    """Gives the model an adapter, switched on, that changes nothing yet: A from the seed, B zero.

    All other weights are frozen. An adapter that the model has already is started again.
    """
    if not is_adapted(model):
        _inject(model, rank=lora.rank, alpha=lora.alpha, targets=targets_of(model, lora))
    # Drawn on the CPU: the same numbers whatever the device.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in _layers(model):
            weight = layer.lora_A[_NAME].weight
            drawn = nn.init.kaiming_uniform_(torch.empty(weight.shape), a=math.sqrt(5), generator=generator)
            weight.copy_(drawn)
            layer.lora_B[_NAME].weight.zero_()
    switch_adapter(model, on=True)


def is_lora(module: nn.Module) -> bool:
    """Whether the module is a linear layer with an adapter."""
    if "peft" not in sys.modules:  # then nothing here can be peft's
        return False
    from peft.tuners.lora import Linear

    return isinstance(module, Linear) and type(module.base_layer) is nn.Linear


def _is_wrapper(module: nn.Module) -> bool:
    """Whether it is what peft puts around a module of which a tensor has an adapter."""
    if "peft" not in sys.modules:
        return False
    from peft.tuners.lora import ParamWrapper

    return isinstance(module, ParamWrapper)


def is_adapted(model: nn.Module) -> bool:
    """Whether any layer of the model has an adapter, on or off."""
    return any(True for _ in _layers(model))


def switch_adapter(model: nn.Module, *, on: bool) -> None:
    """Switches the adapter on and trainable, or off: then the model is bit for bit the one below."""
    for layer in _layers(model):
        layer.enable_adapters(on)


def factors_of(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """The matrices A [R, H] and B [V, R] of a layer's adapter, and what B A is multiplied with.

    None without an adapter, or while it is off.
    """
    if not is_lora(layer) or layer.disable_adapters:
        return None
    found: Any = layer
    return found.lora_A[_NAME].weight, found.lora_B[_NAME].weight, found.scaling[_NAME]


def read_factors(folder: Path, layer: str) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """Those of the layer of that name in an adapter's files; None where it is no target."""
    config, tensors = _read(folder)
    down, up = (tensors.get(f"{_PREFIX}{layer}.{part}.weight") for part in ("lora_A", "lora_B"))
    return None if down is None or up is None else (down, up, config["lora_alpha"] / config["r"])


def write_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Writes the model's adapter as peft reads it, without a word about where its base is.

    Equal weights give equal bytes, in whatever folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: weight.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, weight in _weights(model).items()
    }
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
    text = json.dumps(_config(model), indent=2, sort_keys=True)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def read_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Gives the model the adapter in a folder, switched on, in place of one that it has.

    Raises ArtifactError when the folder holds none, or one that does not fit the model.
    """
    config, tensors = _read(folder)
    if not is_adapted(model):
        targets = Targets(config["target_modules"], config.get("target_parameters", []))
        _inject(model, rank=config["r"], alpha=config["lora_alpha"], targets=targets)
    weights = _weights(model)
    fits = _config(model) == config and weights.keys() == tensors.keys()
    if not fits or any(weight.shape != tensors[name].shape for name, weight in weights.items()):
        raise ArtifactError(f"{folder}: holds an adapter of other layers or another rank than the model has")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(tensors[name])
    switch_adapter(model, on=True)


def merge_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Adds the adapter in a folder to the weights of a model that has none, and has none after."""
    read_adapter(model, folder)
    for name, layer in list(model.named_modules()):
        if not (is_lora(layer) or _is_wrapper(layer)):
            continue
        weight = layer.get_param() if _is_wrapper(layer) else layer.base_layer.weight
        with torch.no_grad():
            weight.add_(layer.get_delta_weight(_NAME).to(weight.dtype))
        if not name.endswith(".base_layer"):  # a wrapper in another goes with it
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, layer.get_base_layer())


def _inject(model: PreTrainedModel, *, rank: int, alpha: int, targets: Targets) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    settings = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(targets.layers),
        target_parameters=list(targets.parameters) or None,
        lora_dropout=0.0,
    )
    with torch.random.fork_rng(devices=[]):  # peft draws from the global generator what is overwritten here
        inject_adapter_in_model(settings, model, _NAME)
    for weight in model.parameters():
        weight.requires_grad_(False)
    for layer in _layers(model):  # peft makes them as narrow as the weights beside them
        for part in (layer.lora_A, layer.lora_B):
            part[_NAME].float()


def _layers(model: nn.Module) -> Iterator[Any]:
    """The layers with an adapter, and what wraps experts with one, in the model's order."""
    return (module for module in model.modules() if is_lora(module) or _is_wrapper(module))


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's weights under the names of peft's files."""
    marks = tuple(f".{part}.{_NAME}." for part in ("lora_A", "lora_B"))
    return {
        _PREFIX + name.replace(f".{_NAME}.", "."): weight
        for name, weight in model.named_parameters()
        if any(mark in name for mark in marks)
    }


def _config(model: nn.Module) -> dict[str, JsonValue]:
    """The fields that peft needs; its others would tie the bytes to a version and a path."""
    layer = next(_layers(model))  # all were made with the same settings
    named = list(model.named_modules())
    layers = {name.rpartition(".")[2] for name, module in named if is_lora(module)}
    wrapped = {f"{_last_two(name)}.{module.parameter_name}" for name, module in named if _is_wrapper(module)}
    return _document(layer.r[_NAME], layer.lora_alpha[_NAME], sorted(layers), sorted(wrapped))


def _last_two(name: str) -> str:
    """The end of the name of what a wrapper, in however many others, is around."""
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return ".".join(name.split(".")[-2:])


def _document(rank: int, alpha: int, layers: list[str], parameters: list[str]) -> dict[str, JsonValue]:
    found: dict[str, JsonValue] = {
        "base_model_name_or_path": None,
        "bias": "none",
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": list(layers),
        "task_type": "CAUSAL_LM",
    }
    return found | ({"target_parameters": list(parameters)} if parameters else {})


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors: dict[str, torch.Tensor] = load_file(folder / ADAPTER_FILE)
        targets = config["target_modules"], config.get("target_parameters", [])
        if config != _document(config["r"], config["lora_alpha"], *targets):
            raise ValueError(f"{CONFIG_FILE} is not one that kdpipe wrote")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{folder}: the adapter cannot be read: {error}") from error
    return config, tensors
