"""What each device must hold, by hand; the change that makes a recipe fit; a run that does not fit loads nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import kdpipe.doctor.case
import kdpipe.execution.executor
import kdpipe.execution.probe
from kdpipe.doctor.budget import PROCESS_BYTES, SPARE, DeviceBudget, Sizes, require_fit, sizes
from kdpipe.doctor.estimate import Sized
from kdpipe.errors import PreflightError
from kdpipe.execution.probe import Probe
from kdpipe.models.reference import Shape
from tests.docs.test_objectives_doc import study
from tests.worlds import load_tiny, run_near

BILLION = 10**9
ROOT = Path(__file__).parents[2]
GPU: dict[str, Any] = {
    "runtime__device": "cuda",
    "student__dtype": "bfloat16",
    "rollout__engine": "vllm",
    "teacher_score__engine": "vllm",
}


def sized(name: str, billions: int) -> Sized:
    shape = Shape(billions * BILLION, layers=10, hidden=1000, intermediate=4000, kv_width=200, rows=100_000)
    return Sized(name, shape, "bfloat16")


def sizes_of(folder: Path, memory: dict[str, int], *, teacher: int = 8, **changes: Any) -> Sizes:
    recipe = load_tiny(folder, **(GPU | changes)).recipe
    teachers = {"teacher": sized("teacher", teacher)}
    return sizes(recipe, sized("student", 1), teachers, prompt_tokens=10, memory=memory)


def on(found: Sizes, device: str) -> DeviceBudget:
    [budget] = [one for one in found.devices if one.device == device]
    return budget


def test_the_trainer_stays_and_the_others_take_turns(tmp_path: Path) -> None:
    found = sizes_of(tmp_path, {"cuda:0": 80 * BILLION})
    teacher = sum(found.estimate.memory_bytes["score teacher"].values())
    assert teacher > 16 * BILLION
    # Masters and two moments of each weight, in float32; three processes: trainer, sampler, teacher.
    assert on(found, "cuda:0").peak_bytes == 12 * BILLION + teacher + 3 * PROCESS_BYTES
    assert found.fits
    assert found.changes == ()


def test_a_vllm_that_may_not_sleep_stays(tmp_path: Path) -> None:
    turns = sizes_of(tmp_path, {"cuda:0": 80 * BILLION})
    stays = sizes_of(tmp_path, {"cuda:0": 80 * BILLION}, runtime__vllm__sleep=False)
    memory = stays.estimate.memory_bytes
    training = memory["train student"]
    working = sum(training.values()) - training["weights"] - training["optimizer"]
    engines = sum(sum(memory[role].values()) for role in ("sample student", "score teacher"))
    assert on(stays, "cuda:0").peak_bytes == 12 * BILLION + engines + working + 3 * PROCESS_BYTES
    assert on(stays, "cuda:0").peak_bytes > on(turns, "cuda:0").peak_bytes


def test_roles_are_counted_where_they_are_placed(tmp_path: Path) -> None:
    memory = {f"cuda:{number}": 80 * BILLION for number in range(4)}
    placement = {"sampler": "cuda:1", "teacher": "cuda:2"}
    found = sizes_of(tmp_path, memory, runtime__placement=placement, runtime__vllm__tensor_parallel_size=2)
    parts = found.estimate.memory_bytes
    sampler, teacher = (-(-sum(parts[role].values()) // 2) for role in ("sample student", "score teacher"))
    assert on(found, "cuda:0").peak_bytes == sum(parts["train student"].values()) + PROCESS_BYTES
    assert on(found, "cuda:1").peak_bytes == sampler + PROCESS_BYTES
    assert on(found, "cuda:2").peak_bytes == max(sampler, teacher) + 2 * PROCESS_BYTES
    assert on(found, "cuda:3").peak_bytes == teacher + PROCESS_BYTES


def test_an_hf_engine_beside_the_trainer_is_part_of_its_process(tmp_path: Path) -> None:
    found = sizes_of(tmp_path, {"cuda:0": 80 * BILLION}, rollout__engine="hf", teacher_score__engine="hf")
    loads = on(found, "cuda:0").loads
    assert {load.process for load in loads} == {"trainer"}
    assert {load.role: load.stays for load in loads} == {
        "train student": 12 * BILLION,
        "sample student": 2 * BILLION,  # a copy in bfloat16, beside the masters
        "score teacher": 16 * BILLION,
    }


@pytest.mark.parametrize(
    ("memory", "changes", "expected"),
    [
        ({"cuda:0": 23_500_000_000, "cuda:1": 23_500_000_000}, {}, ("runtime.placement.teacher=cuda:1",)),
        ({"cuda:0": 35 * BILLION}, {"runtime__vllm__sleep": False}, ("runtime.vllm.sleep=null",)),
        ({"cuda:0": 20 * BILLION}, {}, ()),
    ],
)
def test_the_fewest_changes_that_make_it_fit_are_named(
    memory: dict[str, int], changes: dict[str, Any], expected: tuple[str, ...], tmp_path: Path
) -> None:
    found = sizes_of(tmp_path, memory, **changes)
    assert not found.fits
    assert found.changes == expected
    with pytest.raises(PreflightError, match="cuda:0 has") as refused:
        require_fit(found)
    assert all(f"--set {change}" in (refused.value.hint or "") for change in expected)


def test_a_device_fits_up_to_what_is_left_to_allocators(tmp_path: Path) -> None:
    peak = on(sizes_of(tmp_path, {"cuda:0": BILLION}), "cuda:0").peak_bytes
    assert on(sizes_of(tmp_path, {"cuda:0": int(peak / (1 - SPARE)) + 1}), "cuda:0").fits
    assert not on(sizes_of(tmp_path, {"cuda:0": int(peak / (1 - SPARE)) - 1}), "cuda:0").fits


def test_a_gpu_that_is_not_there_has_no_room(tmp_path: Path) -> None:
    found = sizes_of(tmp_path, {"cuda:0": 80 * BILLION}, runtime__placement={"teacher": "cuda:5"})
    assert not on(found, "cuda:5").fits


def test_a_run_that_does_not_fit_a_gpu_is_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def probe_on_a_gpu(roles: Any, trainers: Any, _device: torch.device, *problems: Any) -> Probe:
        return replace(Probe(roles, trainers, torch.device("cpu"), *problems), device=torch.device("cuda"))

    def refuse(*_: Any) -> None:
        raise AssertionError("a probe was made")

    monkeypatch.setattr(kdpipe.doctor.case, "memory_of", lambda _device: {"cuda:0": 1000})
    monkeypatch.setattr(kdpipe.execution.executor, "Probe", probe_on_a_gpu)
    monkeypatch.setattr(kdpipe.execution.probe, "examine", refuse)
    loaded = load_tiny(tmp_path, runtime__preflight=True, runtime__device="auto")
    with pytest.raises(PreflightError, match="do not fit: cuda:0 has 1,000 bytes"):
        run_near(loaded, tmp_path / "out", rounds=1)


def test_the_shipped_gpu_recipe_fits_one_gpu_of_40_gib_as_it_says() -> None:
    fitted = study("fit").fitted
    assert fitted("0.6B", "8B", count=1, gib=40).fits
    assert not fitted("0.6B", "8B", count=1, gib=24).fits


def test_the_table_of_the_docs_is_the_estimators() -> None:
    assert f"\n\n{study('fit').table()}\n\n" in (ROOT / "docs" / "placement.md").read_text(encoding="utf-8")
