"""Durable writes: beside their place, flushed, fsynced, renamed; readers see all or nothing."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from kdpipe.errors import KdpipeError, refusal

TEMPORARY = ".tmp-"


def write_durably(path: Path, writer: Callable[[Path], None]) -> None:
    """Makes `path` (file or folder) hold what `writer` writes, wholly or not at all."""
    draft = path.parent / f"{TEMPORARY}{path.name}"
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove(draft)
            writer(draft)
            set_modes(draft)
            for file in files_below(draft):
                flush(file)
            for folder in folders_below(draft):
                flush(folder)
            if path.is_dir():
                remove(path)
            draft.replace(path)
            flush(path.parent)
    except BaseException:
        with contextlib.suppress(KdpipeError):
            remove(draft)
        raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises StepError that names `path` for what the system refuses while this is open."""
    try:
        yield
    except OSError as error:
        raise refusal(error, path) from error


def set_modes(path: Path) -> None:
    """Gives files the rights that the umask leaves: safetensors makes them for their owner alone."""
    for file in files_below(path):
        with contextlib.suppress(OSError):  # a file system without them
            file.chmod(0o666 & ~_umask())


@functools.cache
def _umask() -> int:
    """The umask of this process, which can be read by setting it only."""
    found = os.umask(0o077)
    os.umask(found)
    return found


def write_bytes(path: Path, data: bytes) -> None:
    """`write_durably` of bytes."""

    def write(draft: Path) -> None:
        draft.write_bytes(data)

    write_durably(path, write)


def write_json(path: Path, value: JsonValue) -> None:
    """`write_durably` of JSON with sorted keys."""
    write_bytes(path, (json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n").encode())


def append_line(path: Path, value: Mapping[str, JsonValue]) -> None:
    """Appends one JSON line in one write, on a line of its own though the last one was cut short."""
    line = json.dumps(value, sort_keys=True, allow_nan=False) + "\n"
    with writing(path):
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            is_torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            data = ("\n" + line if is_torn else line).encode()
            if os.write(descriptor, data) < len(data):  # what a disk does that is about to be full
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)


def read_lines(path: Path) -> list[dict[str, JsonValue]]:
    """The JSON lines of `path`, [] when it is missing; leaves out lines cut short or no mapping."""
    rows = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                row = parse_json(line)
                if isinstance(row, dict):
                    rows.append(row)
    return rows


def parse_json(data: bytes) -> Any:
    """The JSON value in a file's bytes; raises ValueError on whatever is none, also on endless nesting."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> bool:
    """Whether a file or folder was flushed to the disk: some file systems do not take folders."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
        return False
    finally:
        os.close(descriptor)
    return True


def files_below(path: Path) -> list[Path]:
    """All files below a folder, sorted; the path itself where it is a file."""
    return [path] if path.is_file() else sorted(found for found in path.rglob("*") if found.is_file())


def folders_below(path: Path) -> list[Path]:
    """A folder and all folders below it; none where the path is a file."""
    return [path, *(found for found in path.rglob("*") if found.is_dir())] if path.is_dir() else []


def remove(path: Path) -> None:
    """Removes a file, a link (not its target), or a folder with all below it, if it is there."""
    with writing(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_lines(path: Path, rows: list[dict[str, JsonValue]]) -> None:
    """Writes rows as JSON lines; not durable by itself."""
    path.write_text("".join(json.dumps(row, sort_keys=True, allow_nan=False) + "\n" for row in rows))
