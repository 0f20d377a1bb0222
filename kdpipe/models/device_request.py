"""What `kdpipe doctor` asks a worker about the machine, both ends of it. Never imports torch."""

from __future__ import annotations

from kdpipe.workers.message import Nothing, Talk, message


@message
class LookAtDevice:
    """What does torch make of this device?"""

    device: str


@message
class SeenDevice:
    """The device, the names of all CUDA devices, torch's threads, and what dtype `auto` is and why."""

    device: str
    devices: str | None
    threads: int
    dtype: str
    dtype_reason: str


DEVICE = Talk[LookAtDevice, Nothing, SeenDevice]((LookAtDevice,), (Nothing,), (SeenDevice,))
