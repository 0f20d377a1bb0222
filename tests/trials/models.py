"""Model folders that say another thing than their weights, or hold what no library expects."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.trials.trial import DONE, REFUSED, Trial

Change = Callable[[Path], object]
"""Changes a model folder."""


def edited(name: str, **fields: Any) -> Change:
    def change(model: Path) -> None:
        path = model / name
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | fields))

    return change


def weights(edit: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def change(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        edit(tensors)
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    return change


def normalizers(count: int) -> Change:
    """Each doubles the text."""
    one = {"type": "Replace", "pattern": {"Regex": "(?s)(.)"}, "content": "aa"}
    return edited("tokenizer.json", normalizer={"type": "Sequence", "normalizers": [one] * count})


def split_by(pattern: str) -> Change:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return edited("tokenizer.json", pre_tokenizer=split)


def every(value: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return weights(lambda tensors: tensors.update({name: value(tensor) for name, tensor in tensors.items()}))


NUMBERS = (
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "num_key_value_heads",
    "max_position_embeddings",
)
WRONG = (10_000_000, -1, 0, 1.5, "x", None, [1], 10**30, True)
CHANGES: dict[str, Change] = {
    **{
        f"{name}: {value!r}": edited("config.json", **{name: value})
        for name, value in product(NUMBERS, WRONG)
    },
    **{
        f"eos_token_id: {value!r}": edited("config.json", eos_token_id=value)
        for value in (["a"], "a", -1, 10**12, 1.5, [[1]], {})
    },
    "a tensor more": weights(lambda tensors: tensors.update({"evil.weight": torch.ones(2)})),
    "a layer more": weights(
        lambda tensors: tensors.update(
            {
                name.replace("layers.0", "layers.1"): tensor.clone()
                for name, tensor in list(tensors.items())
                if "layers.0" in name
            }
        )
    ),
    "a tensor less": weights(lambda tensors: tensors.pop("model.norm.weight")),
    "a tensor of another shape": weights(
        lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)})
    ),
    "integers": every(lambda tensor: torch.ones(tensor.shape, dtype=torch.int8)),
    "booleans": every(lambda tensor: torch.ones(tensor.shape, dtype=torch.bool)),
    "nan": weights(lambda tensors: tensors["model.norm.weight"].fill_(float("nan"))),
    "inf": weights(lambda tensors: tensors["model.norm.weight"].fill_(float("inf"))),
    "no tensor at all": weights(lambda tensors: tensors.clear()),
    "an unknown quantization": edited("config.json", quantization_config={"quant_method": "evil"}),
    "a quantization without a method": edited("config.json", quantization_config={}),
    "a quantization that is a text": edited("config.json", quantization_config="int8"),
    "an unknown type": edited("config.json", model_type="nothing-known"),
    "no type": edited("config.json", model_type=None),
    "an unknown dtype": edited("config.json", dtype="float3"),
    "an unknown activation": edited("config.json", hidden_act="evil"),
    "rope of nothing": edited(
        "config.json", rope_scaling={"rope_type": "nothing"}, rope_parameters={"rope_type": "nothing"}
    ),
    "an encoder": edited("config.json", architectures=["BertModel"], model_type="bert"),
    "24 doubling normalizers": normalizers(24),
    "a pattern without end": split_by("(a+)+$"),
    "a pattern that is none": split_by("(("),
    "a tokenizer of a text": lambda model: (model / "tokenizer.json").write_text('"x"'),
    "no tokenizer": lambda model: (model / "tokenizer.json").unlink(),
    "no config": lambda model: (model / "config.json").unlink(),
    "a config that is a list": lambda model: (model / "config.json").write_text("[]"),
    "weights cut": lambda model: (model / "model.safetensors").write_bytes(
        (model / "model.safetensors").read_bytes()[:-100]
    ),
    "a header of nothing": lambda model: (model / "model.safetensors").write_bytes(
        struct.pack("<Q", 1 << 60)
    ),
    "a name of weights twice": lambda model: (model / "model.safetensors").write_bytes(
        b"\x40\0\0\0\0\0\0\0" + b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":1}   '
    ),
    "generation settings of a list": lambda model: (model / "generation_config.json").write_text("[1]"),
    "a template that is a number": edited("tokenizer_config.json", chat_template=5),
}
TAKEN = (
    r"max_position_embeddings: (0|10000000|None|10{30})$",  # 0 and null are no limit
    r"eos_token_id: (-1|10{12})$",
    r"a pattern without end|a quantization without|rope|generation|a template|an unknown dtype|.*: True$",
)
"""What nothing that is distilled follows from, and may be refused or not."""


def trials() -> Iterator[Trial]:
    for name, change in CHANGES.items():
        yield Trial(
            "models",
            name,
            "kdpipe run changed.yaml --rounds 0",
            frozenset({DONE}) | REFUSED if is_taken(name) else REFUSED,
            placed(change),
            seconds=30.0,
        )


def is_taken(name: str) -> bool:
    return any(re.match(pattern, name) for pattern in TAKEN)


def placed(change: Change) -> Callable[[Path], object]:
    def prepare(folder: Path) -> None:
        import yaml

        change(folder / "model")
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
        recipe |= {"name": "changed", "student": {"model": "./model", "dtype": "float32"}}
        (folder / "changed.yaml").write_text(yaml.safe_dump(recipe))
        shutil.rmtree(folder / "kdpipe-out")

    return prepare
