"""Files and folders that the user names, and nothing of ours beside them after a failure."""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from kdpipe.errors import KdpipeError
from kdpipe.store.durable import TEMPORARY, remove, set_modes, write_bytes, writing

STDOUT = Path("-")
DRAFT = f"{TEMPORARY}new"
LAST = "config.json"  # without it nothing takes a folder for a model


def write_file(path: Path, data: bytes) -> None:
    """Writes to stdout for `-`, else where `path` leads: behind a link, into a device or pipe."""
    if path == STDOUT:
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
        return
    if not path.exists() or path.is_file():
        try:
            write_bytes(path.resolve(), data)
        except KdpipeError as error:
            if getattr(error.__cause__, "errno", None) != errno.EBUSY:
                raise
        else:
            return
    with writing(path):  # what is no plain file, and a file that is mounted, which cannot be replaced
        path.write_bytes(data)


def is_vacant(path: Path) -> bool:
    """Whether a folder may be written at `path`: nothing is there, or an empty folder."""
    return not path.exists() or (path.is_dir() and all(child.name == DRAFT for child in path.iterdir()))


def write_folder(path: Path, writer: Callable[[Path], None]) -> None:
    """Makes a vacant `path` hold what `writer` writes; where that fails it is left as it was."""
    # An empty folder stays the same one: somebody may stand in it, or it is mounted.
    is_there = path.exists()
    draft = path / DRAFT if is_there else path.with_name(f"{TEMPORARY}{path.name}")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove(draft)
            writer(draft)
            set_modes(draft)
            if is_there:
                for child in sorted(draft.iterdir(), key=lambda child: child.name == LAST):
                    child.replace(path / child.name)
                draft.rmdir()
            else:
                draft.replace(path)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
