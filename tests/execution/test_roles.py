"""Which engine runs a role and where: placement, processes of their own, turns on one device."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import kdpipe.execution.placement
from kdpipe.engines.handle import ModelHandle, Turns
from kdpipe.engines.remote import Hosting, WorkerEngine
from kdpipe.errors import ArtifactError, RecipeError
from kdpipe.execution.placement import Engines, seen_alone
from kdpipe.models.cache import ModelCache
from kdpipe.models.source import ModelSource
from kdpipe.recipe.roles import STUDENT_ROLE, Role
from kdpipe.recipe.schema import Recipe
from tests.fakes import FakeEngine
from tests.worlds import Watcher, events_of, load_tiny, payload_digests, run_near, tiny_recipe

CPU = torch.device("cpu")
NO_TEXT: Any = None
TEACHER = Role.parse("teacher")
TWO_TEACHERS = [{"name": name, "model": "org/model"} for name in ("ada", "bob")]
ALL_OWN = {"own_process": ["sampler", "teacher"]}
hosted_as: dict[str, tuple[bool | None, float | None]] = {}
"""How vLLM was asked to run in a process, by the process's name: whether it sleeps, and its share of a GPU."""


def recipe_of(**changes: Any) -> Recipe:
    return Recipe.model_validate_json(json.dumps(tiny_recipe(**changes)), strict=True)


# --------------------------------------------------------------------------------------------- placement


def test_hf_engines_on_the_trainers_device_are_one_and_no_process_is_started(tmp_path: Path) -> None:
    placed = Engines(recipe_of(), ModelCache(CPU), logs=tmp_path)
    told: list[str] = []
    assert placed.engine("hf", STUDENT_ROLE, note=told.append) is placed.engine(
        "hf", TEACHER, note=told.append
    )
    assert told == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("role", ["sampler", "teacher"])
def test_a_role_that_wants_a_process_of_its_own_gets_one_and_the_other_shares(
    tmp_path: Path, role: str
) -> None:
    placed = Engines(recipe_of(runtime__placement={"own_process": [role]}), ModelCache(CPU), logs=tmp_path)
    told: list[str] = []
    engines = {
        "sampler": placed.engine("hf", STUDENT_ROLE, note=told.append),
        "teacher": placed.engine("hf", TEACHER, note=told.append),
    }
    name = {"sampler": "sampler", "teacher": "teacher-teacher"}[role]
    assert told == [f"{name}: hf on cpu in a process of its own, which logs to logs/{name}.log"]
    assert [key for key, engine in engines.items() if isinstance(engine, WorkerEngine)] == [role]
    again = placed.engine("hf", STUDENT_ROLE if role == "sampler" else TEACHER, note=told.append)
    assert again is engines[role]
    assert len(told) == 1


def test_an_engine_other_than_hf_has_a_process_of_its_own_and_each_teacher_its_own(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "teachers": TWO_TEACHERS,
        "rollout__engine": "vllm",
        "teacher_score__engine": "vllm",
    }
    placed = Engines(recipe_of(**changes), ModelCache(CPU), logs=tmp_path)
    engines = [
        placed.engine("vllm", role)
        for role in (STUDENT_ROLE, Role.parse("teacher:ada"), Role.parse("teacher:bob"))
    ]
    assert all(isinstance(engine, WorkerEngine) for engine in engines)
    assert len({id(engine) for engine in engines}) == 3


def test_a_device_that_is_not_there_is_refused_by_its_field() -> None:
    for placement, field in (
        ({"sampler": "cuda:99"}, "runtime.placement.sampler"),
        ({"teacher": "cuda:99"}, "runtime.placement.teacher"),
        ({"teacher": {"teacher": "nonsense"}}, "runtime.placement.teacher"),
    ):
        with pytest.raises(RecipeError, match=field) as caught:
            Engines(recipe_of(runtime__placement=placement), ModelCache(CPU), logs=Path("nowhere"))
        assert "cpu" in caught.value.hint


def test_a_device_for_a_teacher_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="names 'eve', and no teacher has that name: ada, bob"):
        load_tiny(tmp_path, teachers=TWO_TEACHERS, runtime__placement={"teacher": {"eve": "cpu"}})


@pytest.mark.parametrize(
    ("numbers", "visible", "expected"),
    [([1], None, "1"), ([1], "2,5", "5"), ([0], "GPU-ab, GPU-cd", "GPU-ab"), ([1, 2], "4,5,6", "5,6")],
)
def test_a_process_sees_no_cuda_devices_but_its_own(
    numbers: list[int], visible: str | None, expected: str
) -> None:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    devices = [torch.device("cuda", number) for number in numbers]
    assert seen_alone(devices, environment) == ("cuda:0", {"CUDA_VISIBLE_DEVICES": expected})
    assert seen_alone([CPU], environment) == ("cpu", {})


def test_more_devices_than_there_are_to_be_seen_are_refused() -> None:
    devices = [torch.device("cuda", number) for number in (1, 2)]
    with pytest.raises(RecipeError, match="cuda:2: CUDA_VISIBLE_DEVICES lets kdpipe see 2"):
        seen_alone(devices, {"CUDA_VISIBLE_DEVICES": "6,7"})


# ------------------------------------------------------------------------------------------------- turns


class Sleeper(FakeEngine):
    """Writes down when it loads and sleeps."""

    def __init__(self, name: str, diary: list[str]) -> None:
        super().__init__()
        self.name, self.diary = name, diary

    def load(self, source: ModelSource) -> None:
        super().load(source)
        self.diary.append(f"{self.name} loads")

    def sleep(self) -> None:
        super().sleep()
        self.diary.append(f"{self.name} sleeps")


def handle(placed: Engines, engine: Any, role: Role, source: ModelSource) -> ModelHandle:
    """A model in a role, as a step opens it."""
    turns = placed.turns(engine, role)
    return ModelHandle(str(role), source, NO_TEXT, engine, partial(placed.engine, engine, role), turns)


def test_of_the_engines_on_a_device_one_is_awake_at_a_time(tmp_path: Path) -> None:
    diary: list[str] = []
    turns, source = Turns(), ModelSource(tmp_path, "a")
    engines = {name: Sleeper(name, diary) for name in ("sampler", "teacher")}
    sampler, teacher = (
        ModelHandle(name, source, NO_TEXT, "hf", partial(engines.__getitem__, name), [turns])
        for name in engines
    )
    for model in (sampler, sampler, teacher, sampler):
        model.load()
    assert diary == [
        "sampler loads",
        "sampler loads",
        "sampler sleeps",
        "teacher loads",
        "teacher sleeps",
        "sampler loads",
    ]


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Engines, list[str]]]:
    """Engines on devices that are not there, whose engines write a diary."""

    def make(placement: dict[str, Any], device: str = "cuda:0", **runtime: Any) -> tuple[Engines, list[str]]:
        diary: list[str] = []
        names = iter(("trainer", "sampler", "teacher"))
        monkeypatch.setattr(kdpipe.execution.placement, "resolve_device", torch.device)
        monkeypatch.setattr(kdpipe.execution.placement, "HfEngine", lambda *_: Sleeper(next(names), diary))
        monkeypatch.setattr(kdpipe.execution.placement, "memory_of", lambda name: {name: 80_000})

        def hosted(hosting: Hosting, log: Path, **_: Any) -> Sleeper:
            vllm = hosting.runtime.vllm
            hosted_as[log.stem] = (vllm.sleep, vllm.gpu_memory_utilization)
            return Sleeper(log.stem, diary)

        monkeypatch.setattr(kdpipe.execution.placement, "WorkerEngine", hosted)
        more = {f"runtime__{name}": value for name, value in runtime.items()}
        recipe = recipe_of(runtime__device=device, runtime__placement=placement, **more)
        return Engines(recipe, ModelCache(torch.device(device)), logs=Path("nowhere")), diary

    return make


def test_on_one_gpu_roles_sleep_while_others_work_and_before_training(
    with_cuda: Callable[..., tuple[Engines, list[str]]], tmp_path: Path
) -> None:
    placed, diary = with_cuda({"own_process": ["sampler"]}, "cuda")
    source = ModelSource(tmp_path, "a")
    for _ in range(2):
        handle(placed, "hf", STUDENT_ROLE, source).load()
        handle(placed, "hf", TEACHER, source).load()  # which shares the trainer's process
        placed.make_room()
    assert diary == [
        "sampler loads",
        "sampler sleeps",
        "trainer loads",
        "trainer sleeps",
        "sampler loads",
        "sampler sleeps",
        "trainer loads",
    ]
    handle(placed, "hf", STUDENT_ROLE, source).load()
    placed.make_room()
    assert diary[-2:] == ["sampler loads", "sampler sleeps"]


@pytest.mark.parametrize(
    ("placement", "vllm", "expected"),
    [
        ({}, {}, (True, 0.9 - 0.25)),  # beside the trainer, which keeps 20,000 of 80,000 bytes
        ({"sampler": "cuda:1", "teacher": "cuda:1"}, {}, (True, 0.9)),
        ({"sampler": "cuda:1", "teacher": "cuda:2"}, {}, (False, 0.9)),
        ({"sampler": "cuda:1", "teacher": "cuda:2"}, {"tensor_parallel_size": 2}, (True, 0.9)),
        ({}, {"sleep": False, "gpu_memory_utilization": 0.3}, (False, 0.3)),
    ],
)
def test_vllm_sleeps_where_it_shares_a_gpu_and_leaves_the_trainer_its_share(
    placement: dict[str, Any],
    vllm: dict[str, Any],
    expected: tuple[bool, float],
    with_cuda: Callable[..., tuple[Engines, list[str]]],
    tmp_path: Path,
) -> None:
    placed, _ = with_cuda(placement, vllm=vllm)
    placed.trainer_bytes = 20_000
    handle(placed, "vllm", STUDENT_ROLE, ModelSource(tmp_path, "a")).load()
    sleeps, share = hosted_as["sampler"]
    assert (sleeps, share) == (expected[0], pytest.approx(expected[1]))


def test_on_gpus_of_their_own_roles_do_not_sleep(
    with_cuda: Callable[..., tuple[Engines, list[str]]], tmp_path: Path
) -> None:
    placed, diary = with_cuda({"sampler": "cuda:1", "teacher": "cuda:2"})
    source = ModelSource(tmp_path, "a")
    for _ in range(2):
        handle(placed, "hf", STUDENT_ROLE, source).load()
        handle(placed, "hf", TEACHER, source).load()
        placed.make_room()
    assert diary == ["sampler loads", "teacher-teacher loads"] * 2


def test_a_model_that_is_spread_over_two_gpus_waits_for_both(
    with_cuda: Callable[..., tuple[Engines, list[str]]], tmp_path: Path
) -> None:
    placed, diary = with_cuda({"sampler": "cuda:1", "teacher": "cuda:2"}, vllm={"tensor_parallel_size": 2})
    source = ModelSource(tmp_path, "a")
    handle(placed, "hf", TEACHER, source).load()
    handle(placed, "vllm", STUDENT_ROLE, source).load()  # on cuda:1 and cuda:2
    handle(placed, "hf", TEACHER, source).load()
    assert diary == [
        "teacher-teacher loads",
        "teacher-teacher sleeps",
        "sampler loads",
        "sampler sleeps",
        "teacher-teacher loads",
    ]


def test_on_the_cpu_nothing_sleeps(
    with_cuda: Callable[..., tuple[Engines, list[str]]], tmp_path: Path
) -> None:
    placed, diary = with_cuda(ALL_OWN, "cpu")
    source = ModelSource(tmp_path, "a")
    handle(placed, "hf", STUDENT_ROLE, source).load()
    handle(placed, "hf", TEACHER, source).load()
    placed.make_room()
    assert diary == ["sampler loads", "teacher-teacher loads"]


# ---------------------------------------------------------------------------------------------- whole runs


DISTRIBUTIONS: dict[str, dict[str, Any]] = {
    "vocabulary": {"kind": "kd", "kd": {"term": "jsd", "beta": 1.0, "support": "vocabulary"}},
    "union": {"kind": "kd", "kd": {"term": "jsd", "beta": 0.5, "support": {"union_top_k": 4}}},
}


@pytest.mark.slow
@pytest.mark.parametrize("support", DISTRIBUTIONS)
def test_roles_in_processes_of_their_own_end_with_the_digests_of_a_shared_one(
    tmp_path: Path, support: str
) -> None:
    """With hidden states, or ids that the student chooses, over rounds that start no process again."""
    changes: dict[str, Any] = {"rounds": 2, "train__objective": DISTRIBUTIONS[support]}
    run_near(load_tiny(tmp_path, **changes), tmp_path / "shared")
    notes: list[str] = []

    def note(_step: str, event: dict[str, Any]) -> None:
        if event["kind"] == "note":
            notes.append(event["text"])

    watcher = Watcher()
    watcher.on_event = note
    run_near(load_tiny(tmp_path, **changes, runtime__placement=ALL_OWN), tmp_path / "own", watcher=watcher)
    assert payload_digests(tmp_path / "own") == payload_digests(tmp_path / "shared")
    assert sum("process of its own" in text for text in notes) == 2, notes
    logs = {path.name for path in (tmp_path / "own").glob("runs/*/logs/*")}
    assert logs == {"sampler.log", "teacher-teacher.log"}


@pytest.mark.slow
def test_processes_of_roles_stay_over_rounds_and_end_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids: list[tuple[str, int | None]] = []
    load = WorkerEngine.load

    def noted(self: WorkerEngine, source: ModelSource) -> None:
        load(self, source)
        pids.append((self._worker.log.name, self._worker.pid))

    monkeypatch.setattr(WorkerEngine, "load", noted)
    run_near(load_tiny(tmp_path, rounds=3, runtime__placement={"own_process": ["sampler"]}), tmp_path / "out")
    assert len(pids) > 6
    [(name, pid)] = set(pids)
    assert name == "sampler.log"
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.slow
def test_weights_that_another_process_opens_are_checked_though_the_trainer_holds_them(tmp_path: Path) -> None:
    loaded = load_tiny(tmp_path, rounds=2, evaluate__every=2, runtime__placement={"own_process": ["sampler"]})
    watcher = Watcher()

    def damage(step: str, event: dict[str, Any]) -> None:
        done = [e["step"] for e in events_of(tmp_path / "out") if e["event"] == "step done"]
        if "train@1" in done and not damaged:
            [path] = (tmp_path / "out").glob("store/train/*/model/model.safetensors")
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
            damaged.append(step)

    damaged: list[str] = []
    begins = watcher.step_begins

    def step_begins(step: Any) -> None:
        begins(step)
        damage(step.id, {})

    watcher.step_begins = step_begins  # type: ignore[method-assign]
    with pytest.raises(ArtifactError, match=r"model\.safetensors: sha256"):
        run_near(loaded, tmp_path / "out", watcher=watcher)
    assert damaged == ["rollout@2"]
