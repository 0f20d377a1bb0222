"""Devices and dtypes: what the names in a recipe, and its `auto`, mean on this machine.

Asks torch alone: `kdpipe doctor` reports it in half the time that the libraries of models take to be imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kdpipe.errors import RecipeError
from kdpipe.models.device_request import DEVICE, LookAtDevice, SeenDevice

if TYPE_CHECKING:
    from kdpipe.models.source import Dtype
    from kdpipe.workers.message import Nothing
    from kdpipe.workers.worker import Report

_CPU_BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16")


def resolve_device(name: str) -> torch.device:
    """The device of that name; `auto` is the first CUDA device, or the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(
            f"device {name!r}: torch knows no such device", hint="use auto, cpu or cuda:N"
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RecipeError(
            f"device {name!r}: torch sees {torch.cuda.device_count()} CUDA devices", hint="use auto or cpu"
        )
    return device


def resolve_dtype(
    name: Dtype, device: torch.device, *, cpuinfo: Path = Path("/proc/cpuinfo")
) -> tuple[torch.dtype, str]:
    """The dtype that `name` means on this device, and why."""
    match name:
        case "float32":
            return torch.float32, "asked for"
        case "bfloat16":
            return torch.bfloat16, "asked for"
        case "float16":
            return torch.float16, "asked for"
        case "auto":
            return _best_dtype(device, cpuinfo)


def dtype_name(dtype: torch.dtype) -> str:
    """The name by which recipes, configs and manifests call a dtype: `float32`."""
    return str(dtype).removeprefix("torch.")


def _best_dtype(device: torch.device, cpuinfo: Path) -> tuple[torch.dtype, str]:
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, f"{torch.cuda.get_device_name(device)} has bfloat16 matrix products"
        return torch.float32, f"{torch.cuda.get_device_name(device)} has no bfloat16 matrix products"
    if device.type != "cpu":
        return torch.float32, f"bfloat16 is not tried on {device.type}"
    words = set(cpuinfo.read_text(encoding="utf-8").split()) if cpuinfo.exists() else set()
    found = [flag for flag in _CPU_BFLOAT16_FLAGS if flag in words]
    if found:
        return torch.bfloat16, f"the CPU has {' and '.join(found)}"
    missing = " or ".join(_CPU_BFLOAT16_FLAGS)
    return torch.float32, f"no {missing} here: bfloat16 would be emulated, 100 times slower"


class DeviceServer:
    """What a worker runs for `kdpipe doctor`."""

    talk = DEVICE

    def __call__(self, request: LookAtDevice, _report: Report[Nothing]) -> SeenDevice:
        """What torch makes of a device."""
        device = resolve_device(request.device)
        dtype, why = resolve_dtype("auto", device)
        devices = ", ".join(_devices()) or None
        return SeenDevice(str(device), devices, torch.get_num_threads(), dtype_name(dtype), why)


def _devices() -> list[str]:
    """Name and memory of every CUDA device."""
    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return [f"{device.name} {device.total_memory / 2**30:.0f} GiB" for device in found]
