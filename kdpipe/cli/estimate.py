"""What a recipe takes, as lines: memory of every device, disk, tokens."""

import re
import sys
from typing import TYPE_CHECKING

from kdpipe.cli.parameters import Given
from kdpipe.cli.terminal import Paint, indented, painter, say
from kdpipe.errors import RecipeError
from kdpipe.results.visible_text import visible

if TYPE_CHECKING:
    from kdpipe.doctor.budget import DeviceBudget, NoEstimate, Sizes


def show_estimate(given: Given, gpus: str) -> None:
    """Prints what a recipe takes on GPUs as in 8x80, or on what is here."""
    import shutil
    from dataclasses import asdict

    from kdpipe.doctor.sizing_request import SIZING, AskSizes
    from kdpipe.pipeline.identities import Sources
    from kdpipe.workers.worker import Worker

    bytes_of = _bytes_of(gpus)
    loaded = given.load()
    folders = Sources(loaded, given.place).fetch(say, without_weights=True)
    log = given.place / "logs" / "estimate.log"
    worker = Worker("kdpipe.doctor.sizing:SizingServer", SIZING, log=log, environment={"HF_HUB_OFFLINE": "1"})
    try:
        found = worker.call(AskSizes(loaded.recipe, loaded.folder, folders, bytes_of))
    finally:
        worker.stop()
    assert found is not None
    free = shutil.disk_usage(given.place).free
    lines = estimate_lines(found.sizes, painter(sys.stdout), free_bytes=free)
    devices = [asdict(one) | {"peak_bytes": one.peak_bytes, "fits": one.fits} for one in found.sizes.devices]
    document = {
        "recipe": str(loaded.path),
        "fits": found.sizes.fits,
        **asdict(found.sizes),
        "devices": devices,
    }
    given.show(document, "\n".join(lines))


def _bytes_of(gpus: str) -> tuple[int, ...]:
    """The memory of each GPU in a text like 8x80; raises RecipeError on another."""
    if not gpus:
        return ()
    match = re.fullmatch(r"(\d{1,3})x(\d{1,4})", gpus)
    if match is None or not (int(match[1]) and int(match[2])):
        raise RecipeError(f"--gpus {gpus}: expected number and GiB of GPUs, as in 8x80", hint="--gpus 1x24")
    return (int(match[2]) << 30,) * int(match[1])


def estimate_lines(sizes: "Sizes | NoEstimate", paint: Paint, *, free_bytes: int) -> list[str]:
    """What the recipe takes: memory by role and device, disk and tokens of a round."""
    from kdpipe.doctor.budget import NoEstimate

    if isinstance(sizes, NoEstimate):
        return [f"what it takes is unknown: {visible(sizes.problem)}"]
    found = sizes.estimate
    lines = [paint("takes (completions of full length, nothing compressed, activations roughly)", "bold")]
    parameters = ", ".join(
        f"{name} {count / 1e9:.2f} B" if count >= 1e9 else f"{name} {count / 1e6:.2f} M"
        for name, count in found.parameters.items()
    )
    lines.append(f"  parameters  {parameters}")
    for role, parts in found.memory_bytes.items():
        kept = ", ".join(f"{name} {_size(size)}" for name, size in parts.items() if size)
        lines += indented(f"{role} {_size(sum(parts.values()))}: {kept}", "  memory      ", " " * 16)
    for device in sizes.devices:
        lines += indented(_device_text(device), f"  {visible(device.device):<12}", " " * 16)
    if not sizes.fits:
        lines += indented(advice(sizes), "  ", "    ")
    disk = found.disk_bytes_per_round
    files = ", ".join(f"{name} {_size(size)}" for name, size in disk.items())
    text = (
        f"{_size(sum(disk.values()))} a round ({files}); {_size(found.disk_bytes_written)} in all, of which "
        f"{_size(found.disk_bytes_kept)} stay; {_size(free_bytes)} are free"
    )
    lines += indented(text, "  disk        ", " " * 16)
    tokens = ", ".join(f"{count:,} {name}" for name, count in found.tokens_per_round.items())
    lines.append(f"  tokens      {tokens}, a round")
    return lines


def advice(sizes: "Sizes") -> str:
    """What to set so that it fits."""
    if not sizes.changes:
        return "no placement, batch size or parallelism was found that fits: take smaller models or larger devices"
    return f"fits with {' '.join(f'--set {change}' for change in sizes.changes)}"


def _device_text(device: "DeviceBudget") -> str:
    """What is on a device at most, and whether that fits."""
    of = "" if device.total_bytes is None else f" of {_size(device.total_bytes)}"
    stays = sum(load.stays for load in device.loads)
    turn = max(device.loads, key=lambda load: load.in_turn)
    verdict = "fits" if device.fits else "DOES NOT FIT"
    most = f"{_size(stays)} always, {_size(turn.in_turn)} in the turn of {visible(turn.role)}"
    return f"{_size(device.peak_bytes)}{of}: {most}; {verdict}"


def _size(count: int) -> str:
    """Bytes in the largest unit that keeps the number above 1."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1e3:,.0f} kB"
