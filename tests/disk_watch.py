"""Sees each change to files below a folder as it happens, from outside of whoever makes it: Linux's inotify."""

from __future__ import annotations

import ctypes
import os
import select
import struct
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

CREATE, MODIFY, MOVED_TO = 0x100, 0x2, 0x80
IS_FOLDER = 0x40000000
_HEAD = struct.Struct("iIII")


class DiskWatch:
    """Every change below `folder`, of folders that are made later too (but for their first instant)."""

    def __init__(self, folder: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._descriptor < 0:
            raise OSError(ctypes.get_errno(), "inotify")
        self._folders: dict[int, Path] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._add(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def changes(self, seconds: float) -> list[Path]:
        """The paths that changed, in order; waits at most so long for the first."""
        if not select.select([self._descriptor], [], [], seconds)[0]:
            return []
        data, found = os.read(self._descriptor, 1 << 16), []
        while data:
            watch, mask, _, length = _HEAD.unpack_from(data)
            name = data[_HEAD.size : _HEAD.size + length].rstrip(b"\0").decode()
            data = data[_HEAD.size + length :]
            if watch not in self._folders:
                continue
            path = self._folders[watch] / name
            found.append(path)
            if mask & IS_FOLDER:
                self._add(path)
        return found

    def wait(
        self, is_wanted: Callable[[Path], bool], *, count: int, alive: Callable[[], bool]
    ) -> Path | None:
        """The path of the `count`-th change that is wanted, or None when there is nobody alive to make it."""
        while True:
            for path in self.changes(0.05):
                count -= is_wanted(path)
                if count == 0:
                    return path
            if not alive():
                return None

    def _add(self, folder: Path) -> None:
        watch = self._libc.inotify_add_watch(
            self._descriptor, os.fsencode(folder), CREATE | MODIFY | MOVED_TO
        )
        if watch < 0:  # gone again
            return
        self._folders[watch] = folder
        try:
            inside = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
        except FileNotFoundError:
            return
        for path in inside:
            self._add(path)


def spin(seconds: float) -> None:
    """Waits without giving up the processor: a sleep would be late by more than a write takes."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
