"""Locks by flock, which go with their process: never PID files.

Where a file system has none no run begins, and so none is running.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from kdpipe.errors import LockError
from kdpipe.store.durable import write_json, writing

LOCK = ".lock"
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
TRIES, PAUSE_SECONDS = 10, 0.05  # others take a lock for an instant, to see whether it is free


def take(path: Path, *, shared: bool = False, wait: bool = True) -> int | None:
    """A descriptor that holds the lock on a file until it is closed; None where another holds it."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(
                descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
            )
        except OSError as error:
            os.close(descriptor)
            if not isinstance(error, BlockingIOError):
                raise
            return None
    return descriptor


@contextlib.contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Holds the lock on a file, after those who hold it: alone, or with all who share it."""
    descriptor = take(path, shared=shared)
    assert descriptor is not None
    try:
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Holds the run in `folder`; raises LockError naming the holder when another process does."""
    holder = folder / "holder.json"
    for _ in range(TRIES):
        if (descriptor := take(folder / LOCK, wait=False)) is not None:
            break
        time.sleep(PAUSE_SECONDS)
    else:
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
        os.close(descriptor)


def is_running(folder: Path) -> bool:
    """Whether some process holds the run in `folder`; none can where the file system has no locks."""
    # Not by `take`, which opens for writing: a workspace that can only be read can be looked at.
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(
            descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB
        )  # NFS locks alone only what is open for writing
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
    finally:
        os.close(descriptor)
    return False
