"""What torch sees of this machine: the device, the dtype that `auto` means there, and why. Called in a worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kdpipe.models.devices import dtype_name, resolve_device, resolve_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

    from kdpipe.workers.worker import Message, Report


def serve() -> Callable[[Message, Report], Message]:
    """What a worker runs for `kdpipe doctor`: a device's name to what there is of it."""

    def look(request: Message, _report: Report) -> Message:
        device = resolve_device(str(request["device"]))
        dtype, why = resolve_dtype("auto", device)
        return {
            "device": str(device),
            "devices": ", ".join(_devices()) or None,
            "threads": torch.get_num_threads(),
            "dtype": dtype_name(dtype),
            "dtype_reason": why,
        }

    return look


def _devices() -> list[str]:
    """Name and memory of every CUDA device."""
    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return [f"{device.name} {device.total_memory / 2**30:.0f} GiB" for device in found]
