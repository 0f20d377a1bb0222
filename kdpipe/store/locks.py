"""Locks by flock, which go with their process: never PID files."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kdpipe.errors import LockError
from kdpipe.store.durable import write_json, writing

if TYPE_CHECKING:
    from filelock import BaseFileLock


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Holds the run in `folder`; raises LockError naming the holder when another process does."""
    lock = file_lock(folder / ".lock")
    holder = folder / "holder.json"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(TimeoutError):
            lock.acquire(timeout=0.5)  # `status` takes it for an instant, to see whether it is free
    if not lock.is_locked:
        who = "another process"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(holder.read_text())
            who = f"process {found['pid']} on {found['host']}, since {found['since']}"
        raise LockError(
            f"{folder.name}: is being run by {who}", hint="wait for it, or stop it; then repeat the command"
        )
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        write_json(holder, {"pid": os.getpid(), "host": os.uname().nodename, "since": since})
        yield
    finally:
        with contextlib.suppress(OSError):  # it only tells others who holds the lock
            holder.unlink(missing_ok=True)
        lock.release()


def is_running(folder: Path) -> bool:
    """Whether some process holds the run in `folder`."""
    # Not by `file_lock`, which opens for writing: a workspace that can only be read can be looked at.
    try:
        descriptor = os.open(folder / ".lock", os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def file_lock(path: Path) -> BaseFileLock:
    """An flock on `path`."""
    # Imported here, as `kdpipe plan` takes none and the import is a tenth of its time.
    from filelock import FileLock

    return FileLock(path)
