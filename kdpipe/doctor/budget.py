"""What each device must hold at once, against what it has, and what makes it fit.

On a CUDA device the trainer's weights and optimizer stay; all else has a turn: gradients and activations while it
trains, a model while it samples or scores. A vLLM that may not sleep stays too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from pydantic import JsonValue, TypeAdapter, ValidationError

from kdpipe.doctor.estimate import STAYS, Estimate, Sized, estimate
from kdpipe.errors import PreflightError
from kdpipe.recipe.schema import Recipe, resolved

PROCESS_BYTES = 600_000_000
"""What a process takes of a device before it holds anything: CUDA's context and kernels, about."""
SPARE = 0.05
"""Share of a device that is left to allocators."""
CHANGES = 3
"""How many fields are changed at most to make a recipe fit."""
Change = tuple[str, JsonValue]


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Bytes of a role on each of its devices: what stays there, and what is there while the role works."""

    role: str
    stays: int
    in_turn: int
    process: str


@dataclass(frozen=True, slots=True)
class DeviceBudget:
    """What a device must hold; `total_bytes` is None where its size is not known."""

    device: str
    total_bytes: int | None
    loads: tuple[Occupancy, ...]

    @property
    def peak_bytes(self) -> int:
        """The most that is there at once."""
        processes = len({load.process for load in self.loads}) if self.device.startswith("cuda") else 0
        turn = max(load.in_turn for load in self.loads)
        return sum(load.stays for load in self.loads) + turn + processes * PROCESS_BYTES

    @property
    def fits(self) -> bool:
        return self.total_bytes is None or self.peak_bytes <= (1 - SPARE) * self.total_bytes


@dataclass(frozen=True, slots=True)
class Sizes:
    """The estimate of a recipe, what each device must hold, and what makes it fit where it does not.

    `changes` are of the form `a.b=c`; without any, none was found that does.
    """

    estimate: Estimate
    devices: tuple[DeviceBudget, ...]
    changes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return all(device.fits for device in self.devices)


@dataclass(frozen=True, slots=True)
class NoEstimate:
    """Why there is none."""

    problem: str


SIZES: TypeAdapter[Sizes | NoEstimate] = TypeAdapter(Sizes | NoEstimate)
"""From and to what a worker sends."""


def sizes(
    recipe: Recipe,
    student: Sized,
    teachers: Mapping[str, Sized | None],
    *,
    prompt_tokens: int,
    memory: Mapping[str, int],
) -> Sizes:
    """The sizes of a recipe on devices with so many bytes of `memory`; the first is the default one."""
    default, *others = memory

    def measure(changed: Recipe) -> Sizes:
        found = estimate(changed, student, teachers, prompt_tokens=prompt_tokens)
        return Sizes(found, tuple(_budgets(changed, found, memory, default)))

    asked = measure(recipe)
    if asked.fits:
        return asked
    for fields in _alternatives(recipe, others):
        changed = _changed(recipe, fields)
        if changed is not None and measure(changed).fits:
            return replace(asked, changes=tuple(f"{name}={_text(value)}" for name, value in fields))
    return asked


def require_fit(found: Sizes) -> None:
    """Raises PreflightError where a device is too small, with what helps."""
    if found.fits:
        return
    short = [one for one in found.devices if not one.fits]
    told = ", ".join(
        f"{one.device} has {one.total_bytes or 0:,} bytes and would hold {one.peak_bytes:,}" for one in short
    )
    changes = " ".join(f"--set {change}" for change in found.changes)
    helps = f"it fits with {changes}" if changes else "take smaller models, or more or larger devices"
    raise PreflightError(
        f"the models do not fit: {told}",
        hint=f"{helps}; activations are counted roughly: --set runtime.preflight=false goes on all the same",
    )


def _budgets(
    recipe: Recipe, found: Estimate, memory: Mapping[str, int], default: str
) -> Iterator[DeviceBudget]:
    by_device: dict[str, list[Occupancy]] = {}
    for role, parts in found.memory_bytes.items():
        load, devices = _load(recipe, role, parts, default)
        for device in devices:
            by_device.setdefault(device, []).append(load)
    for device, loads in sorted(by_device.items()):
        yield DeviceBudget(device, memory.get(device, 0 if device.startswith("cuda") else None), tuple(loads))


def _load(recipe: Recipe, role: str, parts: Mapping[str, int], default: str) -> tuple[Occupancy, list[str]]:
    """What a role takes of each of the devices that it is on."""
    runtime, total = recipe.runtime, sum(parts.values())
    home = default if runtime.device == "auto" else _numbered(runtime.device)
    if role.startswith("train "):
        stays = sum(parts.get(name, 0) for name in STAYS)
        return Occupancy(role, stays, total - stays, "trainer"), [home]
    is_student = role.startswith("sample ")
    named = runtime.placement.sampler if is_student else runtime.placement.of_teacher(role.partition(" ")[2])
    device = home if named is None else default if named == "auto" else _numbered(named)
    engine = recipe.rollout.engine if is_student else recipe.teacher_score.engine
    kind = "sampler" if is_student else "teacher"
    if engine == "hf" and device == home and kind not in runtime.placement.own_process:
        weights = parts["weights"]  # the trainer's process keeps the model beside the trained one
        return Occupancy(role, weights, total - weights, "trainer"), [device]
    if engine != "vllm":
        return Occupancy(role, 0, total, role), [device]
    width = runtime.vllm.tensor_parallel_size if device.startswith("cuda") else 1
    share = -(-total // width)
    load = Occupancy(role, share, 0, role) if runtime.vllm.sleep is False else Occupancy(role, 0, share, role)
    return load, _following(device, width)


def _following(device: str, width: int) -> list[str]:
    """A device and those whose numbers follow its own."""
    kind, _, number = device.partition(":")
    return [device] if width == 1 else [f"{kind}:{int(number) + one}" for one in range(width)]


def _numbered(device: str) -> str:
    return "cuda:0" if device == "cuda" else device


def _alternatives(recipe: Recipe, others: Sequence[str]) -> Iterator[tuple[Change, ...]]:
    """Changes to try, few before many, and those that cost nothing first."""
    runtime = recipe.runtime
    steps: list[Change] = []
    if runtime.vllm.sleep is False:
        steps.append(("runtime.vllm.sleep", None))
    if not runtime.gradient_checkpointing:
        steps.append(("runtime.gradient_checkpointing", True))
    steps += [("runtime.train_tokens", size) for size in (8192, 4096, 2048) if size < runtime.train_tokens]
    steps += [("runtime.score_tokens", size) for size in (8192, 2048) if size < runtime.score_tokens]
    if others:
        steps += [("runtime.placement.teacher", others[0]), ("runtime.placement.sampler", others[-1])]
    widths = (width for width in (2, 4, 8) if width <= len(others) + 1)
    steps += [("runtime.vllm.tensor_parallel_size", width) for width in widths]
    for count in range(1, CHANGES + 1):
        for chosen in combinations(steps, count):
            if len({name for name, _ in chosen}) == count:
                yield chosen


def _changed(recipe: Recipe, fields: Sequence[Change]) -> Recipe | None:
    """The recipe with some fields changed; None where it is none then."""
    document = resolved(recipe)
    for name, value in fields:
        *path, leaf = name.split(".")
        section = document
        for key in path:
            inner = section[key]
            assert isinstance(inner, dict)
            section = inner
        section[leaf] = value
    try:
        return Recipe.model_validate(document, strict=True)
    except ValidationError:
        return None


def _text(value: JsonValue) -> str:
    return "null" if value is None else str(value).lower()
