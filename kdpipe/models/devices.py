"""Devices and dtypes: what the names in a recipe, and its `auto`, mean on this machine.

Asks torch alone: `kdpipe doctor` reports it in half the time that the libraries of models take to be imported.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from kdpipe.errors import RecipeError
from kdpipe.models.device_request import DEVICE, LookAtDevice, SeenDevice
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
    if name != "auto":
        return getattr(torch, name), "asked for"
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


def memory_of(device: str) -> dict[str, int]:
    """Bytes of each device of the kind that `device` is, by name; the first is the one that `auto` means."""
    if resolve_device(device).type == "cuda":
        found = range(torch.cuda.device_count())
        return {f"cuda:{number}": torch.cuda.get_device_properties(number).total_memory for number in found}
    return {"cpu": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")}


def dtype_name(dtype: torch.dtype) -> str:
    """The name by which recipes, configs and manifests call a dtype: `float32`."""
    return str(dtype).removeprefix("torch.")


class DeviceServer:
    """What a worker runs for `kdpipe doctor`."""

    talk = DEVICE

    def __call__(self, request: LookAtDevice, _report: Report[Nothing]) -> SeenDevice:
        device = resolve_device(request.device)
        dtype, why = resolve_dtype("auto", device)
        found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        devices = ", ".join(f"{one.name} {one.total_memory / 2**30:.0f} GiB" for one in found) or None
        return SeenDevice(str(device), devices, torch.get_num_threads(), dtype_name(dtype), why)
