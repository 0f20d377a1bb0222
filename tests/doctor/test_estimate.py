"""The estimate against what is measured: parameters exactly, disk and tokens of a round that was run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from kdpipe.doctor.budget import SIZES, Sizes
from kdpipe.doctor.estimate import Sized, estimate
from kdpipe.models.adapters import start_adapter
from kdpipe.models.reference import Shape, adapter_parameters, shape_of
from kdpipe.recipe.models import Lora
from tests import clinic
from tests.clinic import load_world, new_model, write_world
from tests.models.families import tiny_config
from tests.worlds import load_tiny, run_near

HEADERS = 30_000
"""Bytes that parquet and safetensors files of a few rows take for their own description, all of them together."""
BILLION = 10**9
SHAPE = Shape(
    parameters=BILLION,
    layers=10,
    hidden=1000,
    intermediate=4000,
    kv_width=200,
    rows=150_000,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with clinic.one_thread():
        torch.set_num_threads(1)
        yield


@pytest.mark.parametrize("kind", ["tied", "untied", "gpt2"])
def test_parameters_are_counted_from_the_config_alone(kind: str, tmp_path: Path) -> None:
    model = new_model(kind, seed=0)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    shape = shape_of(tmp_path)
    assert shape.parameters == sum(weight.numel() for weight in model.parameters())
    assert (shape.rows, shape.layers) == (clinic.NUM_IDS + 5, 2)


def test_keys_and_values_are_as_wide_as_the_cache_that_transformers_makes(tmp_path: Path) -> None:
    for kind in ("tied", "gpt2"):
        model = new_model(kind, seed=0)
        model.save_pretrained(tmp_path / kind)
        cache = model(input_ids=torch.ones(1, 7, dtype=torch.long), use_cache=True).past_key_values
        held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
        shape = shape_of(tmp_path / kind)
        assert held == 2 * 7 * shape.layers * shape.kv_width


@pytest.mark.parametrize("family", ["mamba", "rwkv", "gemma3n_text", "falcon", "jamba", "gpt2"])
def test_sizes_are_known_of_families_without_heads_and_of_those_whose_layers_differ(
    family: str, tmp_path: Path
) -> None:
    config = tiny_config(family)
    config.save_pretrained(tmp_path)
    shape = shape_of(tmp_path)
    assert min(shape.parameters, shape.layers, shape.hidden, shape.intermediate, shape.rows) > 0
    assert (shape.kv_width == 0) == (family in ("mamba", "rwkv"))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_an_adapters_parameters_are_those_that_train(targets: Any, tmp_path: Path) -> None:
    model = new_model("untied", seed=0)
    model.save_pretrained(tmp_path)
    lora = Lora(rank=3, targets=targets)
    start_adapter(model, lora, seed=0)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert adapter_parameters(tmp_path, lora) == trained


OBJECTIVES: dict[str, dict[str, Any]] = {
    "token": {"kd": "rkl"},
    "top-k": {"kd": {"term": "jsd", "support": {"teacher_top_k": 8}}},
    "hidden": {"kd": {"term": "jsd", "support": "vocabulary"}},
}


@pytest.mark.slow
@pytest.mark.parametrize("keep", OBJECTIVES)
def test_a_round_writes_and_reads_no_more_than_estimated_and_not_much_less(keep: str, tmp_path: Path) -> None:
    folder = write_world(tmp_path)
    rollout = {"prompts": 24, "samples": 8, "max_new_tokens": 40, "temperature": 30.0}
    loaded = load_world(folder, rollout=rollout, train__objective=OBJECTIVES[keep])
    project = run_near(loaded, folder / "out", rounds=1)
    rounds = project.run.path / "round-001"
    files = {
        "rollouts": rounds / "rollout" / "rollouts.parquet",
        "completions": rounds / "train" / "completions.parquet",
        "model": rounds / "train" / "model" / "model.safetensors",
        "trainer": rounds / "train" / "trainer" / "trainer.safetensors",
    }
    sizes = {name: path.stat().st_size for name, path in files.items()}
    sizes["scores"] = sum(
        path.stat().st_size
        for path in (rounds / "teacher-score").iterdir()
        if path.suffix in (".parquet", ".safetensors")
    )
    rows = pq.read_table(files["rollouts"]).to_pylist()
    prompt = sum(len(row["prompt_token_ids"]) for row in rows) / len(rows)
    tokens = sum(len(row["completion_token_ids"]) for row in rows)
    models = {name: Sized(name, shape_of(folder / name), "float32") for name in ("student", "teacher")}
    student, teachers = models["student"], {"teacher": models["teacher"]}
    bound = estimate(loaded.recipe, student, teachers, prompt_tokens=round(prompt))
    assert set(bound.disk_bytes_per_round) == set(sizes)
    for name, size in sizes.items():
        assert size <= bound.disk_bytes_per_round[name] + HEADERS, name
    assert tokens <= bound.tokens_per_round["sampled"]
    assert bound.tokens_per_round["trained"] == pytest.approx(len(rows) * (prompt + 40), rel=0.05)
    # With completions as long as they came, the estimate is near: what it leaves out is compression.
    rollout["max_new_tokens"] = round(tokens / len(rows))
    shorter = load_world(folder, rollout=rollout, train__objective=OBJECTIVES[keep]).recipe
    near = estimate(shorter, student, teachers, prompt_tokens=round(prompt))
    assert near.tokens_per_round["sampled"] == pytest.approx(tokens, rel=0.05)
    for name in ("model", "trainer", *(["scores"] if keep == "hidden" else [])):
        assert sizes[name] == pytest.approx(near.disk_bytes_per_round[name], rel=0.15), name
    assert sum(near.disk_bytes_per_round.values()) <= 1.5 * sum(sizes.values())


def sized(**changes: Any) -> Sized:
    return Sized(**{"name": "student", "shape": SHAPE, "dtype": "bfloat16", **changes})


def test_training_all_weights_takes_16_bytes_each_and_an_adapter_only_its_own(tmp_path: Path) -> None:
    recipe = load_tiny(tmp_path).recipe
    teacher = {"teacher": sized(name="teacher")}
    whole = estimate(recipe, sized(), teacher, prompt_tokens=10).memory_bytes["train student"]
    assert whole["weights"] + whole["gradients"] + whole["optimizer"] == 16 * BILLION
    few = estimate(recipe, sized(adapter=BILLION // 100), teacher, prompt_tokens=10).memory_bytes[
        "train student"
    ]
    assert few["weights"] == 2 * BILLION + 4 * BILLION // 100
    assert few["gradients"] + few["optimizer"] == 12 * BILLION // 100


def test_gradient_checkpointing_takes_less_and_a_teacher_no_optimizer(tmp_path: Path) -> None:
    plain, saving = (
        estimate(
            load_tiny(tmp_path, runtime__gradient_checkpointing=on).recipe,
            sized(),
            {"teacher": sized(name="teacher")},
            prompt_tokens=10,
        )
        for on in (False, True)
    )
    name = "activations, roughly"
    assert saving.memory_bytes["train student"][name] < 0.5 * plain.memory_bytes["train student"][name]
    assert set(plain.memory_bytes["score teacher"]) == {"weights", name}
    assert plain.memory_bytes["score teacher"]["weights"] == 2 * BILLION


def test_a_teacher_elsewhere_takes_disk_and_no_memory(tmp_path: Path) -> None:
    recipe = load_tiny(tmp_path).recipe
    elsewhere = estimate(recipe, sized(), {"teacher": None}, prompt_tokens=10)
    here = estimate(recipe, sized(), {"teacher": sized(name="teacher")}, prompt_tokens=10)
    assert elsewhere.disk_bytes_per_round == here.disk_bytes_per_round
    assert set(here.memory_bytes) - set(elsewhere.memory_bytes) == {"score teacher"}


def test_a_teacher_that_is_the_student_has_no_weights_of_its_own(tmp_path: Path) -> None:
    loaded = load_tiny(tmp_path, teachers=[{"self": "initial", "prompt": "{question} {question}"}])
    found = estimate(loaded.recipe, sized(), {"teacher": sized()}, prompt_tokens=10)
    assert set(found.memory_bytes) == {"train student", "sample student"}
    assert found.parameters == {"student": BILLION}
    sizes = Sizes(found, ())
    sent = json.loads(json.dumps(SIZES.dump_python(sizes, mode="json")))
    assert SIZES.validate_python(sent) == sizes


def test_what_a_run_writes_is_what_its_rounds_write(tmp_path: Path) -> None:
    found = estimate(load_tiny(tmp_path, rounds=500).recipe, sized(), {"teacher": None}, prompt_tokens=10)
    assert found.disk_bytes_written == 500 * sum(found.disk_bytes_per_round.values())
    assert found.disk_bytes_kept < found.disk_bytes_written
