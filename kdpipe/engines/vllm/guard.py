"""Kills the processes of a vLLM when the one that started it is gone. Imports nothing of kdpipe.

    python vllm_guard.py MARK < pipe

The pipe ends with the process that holds its other end. From then on every process whose environment began with
KDPIPE_ENGINE_MARK=MARK is killed, until there is none: vLLM's own would go on for as long as the machine does.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

VARIABLE = "KDPIPE_ENGINE_MARK"


def main(mark: str) -> None:
    """Waits for the end of stdin, then for the end of what it kills."""
    sys.stdin.buffer.read()
    while marked := marked_processes(mark):
        for pid in marked:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)


def marked_processes(mark: str) -> list[int]:
    """Ids of the running processes that were started under this mark."""
    if sys.platform != "linux":
        return []  # nothing tells the environment of a process there
    wanted = f"{VARIABLE}={mark}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # it has just ended, or is not ours
            continue
    return found


if __name__ == "__main__":
    main(sys.argv[1])
