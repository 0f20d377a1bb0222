"""A run's links to entries: symbolic ones, and small files where the file system has none."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from kdpipe.store.durable import TEMPORARY, writing

MARK = "kdpipe: a link to "
WITHOUT_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)  # vfat and exFAT say EPERM, some shares the others


def write_link(place: Path, target: Path) -> None:
    """Makes `place` lead to `target`, by the way from one to the other."""
    text = os.path.relpath(target, place.parent)
    with writing(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        draft = place.with_name(f"{TEMPORARY}{place.name}")
        draft.unlink(missing_ok=True)
        try:
            draft.symlink_to(text)
        except OSError as error:
            if error.errno not in WITHOUT_LINKS:
                raise
            draft.write_text(f"{MARK}{text}\n")
        draft.replace(place)


def read_link(place: str) -> str | None:
    """The way that is written in a link, or None where there is none; it is not followed."""
    try:
        return os.readlink(place)  # noqa: PTH115 (asked for each run)
    except OSError as error:
        if error.errno != errno.EINVAL or not Path(place).is_file():
            return None
    with Path(place).open("rb") as file:
        text = file.read(4096).decode(errors="replace")
    return text.removeprefix(MARK).rstrip("\n") if text.startswith(MARK) and "\0" not in text else None


def linked_folder(place: Path) -> Path | None:
    """The folder that a link names, or None where there is none."""
    text = read_link(str(place))
    return None if text is None else Path(os.path.normpath(place.parent / text))
