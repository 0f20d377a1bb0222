"""Text models inside models that also see or hear, and output heads under the names that files have for them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from kdpipe.errors import ModelError
from kdpipe.models.config import context_of, left_out, open_config
from kdpipe.models.folder import open_model, read_head, write_model
from kdpipe.models.logprobs import head_of
from tests.tiny_models import COMMON, tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
IDS = torch.tensor([[3, 4, 5, 9, 11]])
SIGHT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_TEXT = COMMON | {"head_dim": 8}
WHOLES: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": _TEXT,
        "vision_config": SIGHT,
        "mm_tokens_per_image": 4,
        "image_token_index": 5,
        "boi_token_index": 6,
        "eoi_token_index": 7,
        "eos_token_id": [1, 7],
    },
    "gemma4": {
        "text_config": _TEXT | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 16},
        "vision_config": SIGHT | {"head_dim": 8},
        "audio_config": None,
    },
    "mistral3": {
        "text_config": _TEXT | {"model_type": "mistral"},
        "vision_config": SIGHT | {"model_type": "pixtral"},
    },
}


def whole(name: str, folder: Path) -> PreTrainedModel:
    """A tiny model that sees, written to the folder as transformers writes it."""
    torch.manual_seed(5)
    config = CONFIG_MAPPING[name](**copy.deepcopy(WHOLES[name]))
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "name",
    [
        "gemma3",
        pytest.param("gemma4", marks=pytest.mark.slow),
        pytest.param("mistral3", marks=pytest.mark.slow),
    ],
)
def test_the_text_model_of_a_model_that_sees_is_opened_and_written_alone(name: str, tmp_path: Path) -> None:
    expected = whole(name, tmp_path / "whole")(input_ids=IDS, use_cache=False).logits
    model = open_model(tmp_path / "whole", dtype=torch.float32, device=CPU)
    assert torch.equal(model(input_ids=IDS, use_cache=False).logits, expected)
    kind, others = left_out(tmp_path / "whole")
    assert kind.lower() == f"{name}forconditionalgeneration"
    assert {part.split(".")[0] for part in (other.removeprefix("model.") for other in others)} <= {
        *("vision_tower", "multi_modal_projector", "embed_vision"),
    }
    head = read_head(tmp_path / "whole", num_ids=13, dtype=torch.float32, device=CPU)
    assert torch.equal(head.weight_VH, head_of(model, num_ids=13).weight_VH)
    assert context_of(open_config(tmp_path / "whole", trust_remote_code=False)) == 64
    write_model(model, tiny_tokenizer(), tmp_path / "text")
    assert left_out(tmp_path / "text") == ("", [])
    for written in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "text", dtype=torch.float32).eval(),
        open_model(tmp_path / "text", dtype=torch.float32, device=CPU),
    ):
        assert torch.equal(written(input_ids=IDS, use_cache=False).logits, expected)
    settings = json.loads((tmp_path / "text/config.json").read_text())
    assert settings["eos_token_id"] == WHOLES[name].get("eos_token_id", 1)


def test_a_weight_of_the_text_model_that_has_no_place_in_it_is_refused(tmp_path: Path) -> None:
    whole("gemma3", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["language_model.model.layers.7.mlp.up_proj.weight"] = torch.zeros(4, 4)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights in its files are none of Gemma3ForCausalLM.*layers\.7"):
        open_model(tmp_path, dtype=torch.float32, device=CPU)


def _renamed(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(old)]:
            tensors[new + name.removeprefix(old)] = tensors.pop(name)

    return change


def _with_head_of_its_own(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


def _with_head_twice(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


HEADS = {
    "Pythia's": ("gpt_neox", _renamed("lm_head", "embed_out")),
    "GPT-2's on the hub": ("gpt2", _renamed("transformer.", "")),
    "tied, and there twice": ("qwen2", _with_head_twice),
    "said to be tied, and not": ("qwen2", _with_head_of_its_own),
    "tied, and there as the head alone": ("qwen2", _renamed("model.embed_tokens", "lm_head")),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_the_opened_models_own_whatever_files_call_it(name: str, tmp_path: Path) -> None:
    family, change = HEADS[name]
    if family == "gpt_neox":
        config = CONFIG_MAPPING[family](**COMMON)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    else:
        write_model(tiny_model(family), tiny_tokenizer(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    wanted = head_of(open_model(tmp_path, dtype=torch.float32, device=CPU), num_ids=13)
    found = read_head(tmp_path, num_ids=13, dtype=torch.float32, device=CPU)
    assert torch.equal(found.weight_VH, wanted.weight_VH)
    assert found.bias_V is wanted.bias_V is None
    assert not found.weight_VH.requires_grad
