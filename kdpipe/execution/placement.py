"""Which engine runs which role, and where: in this process beside the trainer, or in its own.

Roles are the sampler (the student's engine, wherever it samples), each teacher, and the trainer, which is always here.
On a CUDA device that several share, one has its model there at a time: who loads puts the others to sleep.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kdpipe.engines.handle import Turns
from kdpipe.engines.hf.engine import HfEngine
from kdpipe.engines.protocol import Engine
from kdpipe.engines.remote import Hosting, WorkerEngine
from kdpipe.errors import RecipeError
from kdpipe.models.cache import ModelCache
from kdpipe.models.devices import memory_of, resolve_device
from kdpipe.models.source import ModelSource
from kdpipe.recipe.roles import STUDENT_ROLE, Role, teacher_role
from kdpipe.recipe.runtime import WHOLE_SHARE, Vllm
from kdpipe.recipe.schema import Recipe
from kdpipe.recipe.section import EngineName

VISIBLE = "CUDA_VISIBLE_DEVICES"
LEAST_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Place:
    """Where a role's engine runs: its device, whether in a process of its own, and that one's name.

    `num_models` is how many models the process keeps: a teacher's engine may be asked for the student's top k too.
    """

    device: torch.device
    has_own_process: bool
    name: str
    num_models: int


class Engines:
    """The engines of a run, opened when first asked for; RecipeError on a device that is not there."""

    def __init__(self, recipe: Recipe, cache: ModelCache, *, logs: Path) -> None:
        self._runtime = recipe.runtime
        self._keys = recipe.key_names
        self._cache = cache
        self._logs = logs
        self._device = _numbered(cache.device)
        self._places = _places(recipe)
        self._shared = HfEngine(cache, recipe.runtime)
        self._engines: dict[str, WorkerEngine] = {}
        self.trainer_bytes = 0
        """What the trainer keeps on its device while others work."""
        self._turns: dict[torch.device, Turns] = {}

    @property
    def is_on_cuda(self) -> bool:
        """Whether the trainer is on a CUDA device."""
        return self._device.type == "cuda"

    def engine(self, name: EngineName, role: Role, *, note: Callable[[str], None] = lambda _: None) -> Engine:
        """The engine `name` for the model in `role`; `note` is called when a process is opened for it."""
        if self._is_shared(name, role):
            return self._shared
        place, key = self._places[role], f"{name} {role}"
        if key not in self._engines:
            log = self._logs / f"{place.name}.log"
            devices = self._devices_of(name, place)
            device, environment = seen_alone(devices, os.environ)
            runtime = self._runtime.model_copy(update={"vllm": self._shared_out(devices)})
            hosting = Hosting(name, device, runtime, place.num_models)
            self._engines[key] = WorkerEngine(hosting, log=log, environment=environment, keys=self._keys)
            note(
                f"{place.name}: {name} on {place.device} in a process of its own, which logs to logs/{log.name}"
            )
        return self._engines[key]

    def turns(self, name: EngineName, role: Role) -> list[Turns]:
        """The turns that this engine takes: one for each CUDA device that it has its model on."""
        devices = self._devices_of(name, self._places[role])
        return [self._turns_on(device) for device in devices if device.type == "cuda"]

    def holds(self, name: EngineName, role: Role, source: ModelSource) -> bool:
        """Whether that engine would open nothing to load `source`."""
        if self._is_shared(name, role):
            return self._cache.holds(source)
        engine = self._engines.get(f"{name} {role}")
        return engine is not None and engine.holds(source)

    def make_room(self) -> None:
        """Puts to sleep what is on the trainer's device, but for the engine that shares its weights."""
        if self.is_on_cuda:
            self._turns_on(self._device).take(self._shared)

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()
        self._shared.close()

    def _is_shared(self, name: EngineName, role: Role) -> bool:
        """Whether it is the engine of this process, whose models the trainer has too."""
        place = self._places[role]
        return name == "hf" and place.device == self._device and not place.has_own_process

    def _devices_of(self, name: EngineName, place: Place) -> list[torch.device]:
        """The device of a role's engine, and those that follow it where the model is spread over several."""
        if name != "vllm" or place.device.type != "cuda":
            return [place.device]
        count = self._runtime.vllm.tensor_parallel_size
        return [torch.device("cuda", place.device.index + number) for number in range(count)]

    def _shared_out(self, devices: Sequence[torch.device]) -> Vllm:
        """How vLLM runs on these devices: it sleeps where it shares one, and leaves the trainer's share of it."""
        asked = self._runtime.vllm
        # Of an engine hf more devices than its own: at worst a vLLM sleeps that need not.
        taken = [
            self._device,
            *(one for place in self._places.values() for one in self._devices_of("vllm", place)),
        ]
        is_shared = any(taken.count(device) > 1 for device in devices if device.type == "cuda")
        share = WHOLE_SHARE
        if self.is_on_cuda and self._device in devices:
            share -= self.trainer_bytes / memory_of(str(self._device))[str(self._device)]
        return asked.model_copy(
            update={
                "sleep": is_shared if asked.sleep is None else asked.sleep,
                "gpu_memory_utilization": asked.gpu_memory_utilization or max(share, LEAST_SHARE),
            }
        )

    def _turns_on(self, device: torch.device) -> Turns:
        return self._turns.setdefault(device, Turns())


def _places(recipe: Recipe) -> dict[Role, Place]:
    """Where each role's engine runs, by role."""
    placement, default = recipe.runtime.placement, recipe.runtime.device

    def resolve(name: str | None, field: str) -> torch.device:
        try:
            return _numbered(resolve_device(name or default))
        except RecipeError as error:
            raise RecipeError(f"runtime.{field}: {error.message}", hint=error.hint) from None

    sampler = resolve(placement.sampler, "placement.sampler" if placement.sampler else "device")
    places = {STUDENT_ROLE: Place(sampler, "sampler" in placement.own_process, "sampler", 1)}
    for teacher in recipe.teachers:
        named = placement.of_teacher(teacher.name)
        device = resolve(named, "placement.teacher" if named else "device")
        num_models = 2 if recipe.keep.student_top_k else 1
        own = "teacher" in placement.own_process
        places[teacher_role(recipe, teacher)] = Place(device, own, f"teacher-{teacher.name}", num_models)
    return places


def _numbered(device: torch.device) -> torch.device:
    """The device with its number: `cuda` is the first one."""
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def seen_alone(devices: Sequence[torch.device], environment: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """The first device's name in a process that sees these devices only, and its environment.

    Numbers count among the devices that this process sees itself. Raises RecipeError when it does not see so many.
    """
    if devices[0].type != "cuda":
        return str(devices[0]), {}
    numbers = [device.index for device in devices]
    visible = [name.strip() for name in environment.get(VISIBLE, "").split(",") if name.strip()]
    if visible and numbers[-1] >= len(visible):
        raise RecipeError(
            f"cuda:{numbers[-1]}: {VISIBLE} lets kdpipe see {len(visible)} CUDA devices",
            hint="lower runtime.vllm.tensor_parallel_size, or place the role on a lower number",
        )
    return "cuda:0", {VISIBLE: ",".join(visible[number] if visible else str(number) for number in numbers)}
