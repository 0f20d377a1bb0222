"""The student before and after each round, and the teachers, as a run's folders hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.replay.forward import Network, Policy, read_adapter
from tests.replay.reading import Run, Tensors, read_tensors

MASTER = "master."


def student_folder(run: Run, number: int) -> Path:
    """The student after round `number`; 0 is that before round 1."""
    if number:
        return run.step(number, "train/model")
    cold = run.step(0, "sft-student/model")
    return cold if cold.is_dir() else run.beside_recipe(run.recipe["student"]["model"])


def has_adapter(run: Run) -> bool:
    return run.recipe["student"]["lora"] is not None


def sampler(run: Run, number: int, num_ids: int) -> Policy:
    """The student that samples in round `number`, as engines load it."""
    if not has_adapter(run):
        network = Network(student_folder(run, number - 1), num_ids)
        return Policy(network, network.weights)
    network = Network(student_folder(run, 0), num_ids)
    if number == 1:  # an adapter that has not moved is nothing
        return Policy(network, network.weights)
    return Policy(network, *read_adapter(student_folder(run, number - 1)))


def trained(run: Run, number: int) -> Tensors:
    """The weights that are trained, after round `number`, as wide as they are trained."""
    state = read_tensors(run.step(number, "train/trainer")) if number else {}
    masters = {name.removeprefix(MASTER): value for name, value in state.items() if name.startswith(MASTER)}
    if masters:
        return masters
    folder = student_folder(run, number)
    return read_adapter(folder)[0] if number and has_adapter(run) else read_weights(folder)


def read_weights(folder: Path) -> Tensors:
    """Those of a model; an output head that is tied to the embeddings is none of its own."""
    found = read_tensors(folder)
    if json.loads((folder / "config.json").read_text())["tie_word_embeddings"]:
        found.pop("lm_head.weight", None)
    return found


def moments(run: Run, number: int) -> tuple[Tensors, Tensors]:
    """Those of AdamW after round `number`."""
    state = read_tensors(run.step(number, "train/trainer")) if number else {}
    first, second = (
        {name.removeprefix(kind): value for name, value in state.items() if name.startswith(kind)}
        for kind in ("exp_avg.", "exp_avg_sq.")
    )
    return first, second


def teacher_folder(run: Run, teacher: dict[str, Any], number: int) -> Path:
    """The weights of a teacher in round `number`."""
    match teacher["self"]:
        case "initial":
            return student_folder(run, 0)
        case "current":
            return student_folder(run, number - 1)
        case "ema":
            return run.step(number - 1, "train/ema") if number > 1 else student_folder(run, 0)
    return run.beside_recipe(teacher["model"])
