"""What a run left on disk, read with pyarrow, json and safetensors alone."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors import safe_open

Record = dict[str, Any]
Tensors = dict[str, torch.Tensor]
Key = tuple[str, int]


@dataclass(frozen=True)
class Run:
    """The folder of a run under `runs/`; `faults` are changes of the recipe as it is read here."""

    path: Path
    faults: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def resolved(self) -> Record:
        found: Record = json.loads((self.path / "resolved.json").read_text())
        return found

    @functools.cached_property
    def recipe(self) -> Record:
        """Every setting of the recipe, defaults too."""
        recipe: Record = json.loads(json.dumps(self.resolved["recipe"]))
        for name, value in self.faults.items():
            *parents, leaf = name.split(".")
            section = recipe
            for parent in parents:
                section = section[int(parent)] if isinstance(section, list) else section[parent]
            section[leaf] = value
        return recipe

    def beside_recipe(self, name: str) -> Path:
        """A file or folder that the recipe names."""
        return Path(self.resolved["path"]).parent / name

    def problems(self) -> list[Record]:
        """The records of the train file, each with its `prompt_id`."""
        lines = self.beside_recipe(self.recipe["task"]["train"]).read_text().splitlines()
        return [{"prompt_id": f"jsonl/train/{n}", **json.loads(line)} for n, line in enumerate(lines)]

    def step(self, number: int, name: str) -> Path:
        return self.path / f"round-{number:03d}" / name

    def rows(self, number: int, file: str) -> list[Record]:
        found: list[Record] = pq.read_table(self.step(number, file)).to_pylist()
        return found

    def metrics(self, number: int, step: str) -> dict[tuple[int | None, str], float]:
        """Values by optimizer step and name."""
        lines = (self.step(number, step) / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        return {(record["optimizer_step"], record["name"]): record["value"] for record in records}


def read_tensors(path: Path) -> Tensors:
    """All tensors of a safetensors file, or of those in a folder, in float64."""
    files = [path] if path.suffix == ".safetensors" else sorted(path.glob("*.safetensors"))
    found: Tensors = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:  # type: ignore[no-untyped-call]
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                tensor = tensors.get_tensor(name)
                found[name] = tensor.double() if tensor.is_floating_point() else tensor
    return found


def key(row: Record) -> Key:
    """What joins the tables of a round."""
    return row["prompt_id"], row["sample"]
