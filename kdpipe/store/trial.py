"""What a workspace needs of its file system, tried before it is relied on."""

from __future__ import annotations

from pathlib import Path

from kdpipe.errors import StepError
from kdpipe.store.durable import TEMPORARY, flush, remove, write_bytes
from kdpipe.store.link import write_link
from kdpipe.store.locks import LOCK, locked, take

NEEDS = "whole writes, renames, locks, links"
ELSEWHERE = "name another place with --workspace"


def try_workspace(workspace: Path) -> list[str]:
    """What a workspace does without on its file system; raises StepError where it cannot be there."""
    place, lacks = workspace / f"{TEMPORARY}trial", list[str]()
    with locked(workspace / LOCK):
        if take(workspace / LOCK, wait=False) is not None:
            raise StepError(f"{workspace}: a lock here keeps nobody off", hint=ELSEWHERE)
        remove(place)
        for data in (b"first", b"second"):
            write_bytes(place / "file", data)
        write_link(place / "link", place / "file")
        if not (place / "link").is_symlink():
            lacks.append(f"{workspace}: has no symbolic links: a run's links to its steps are small files")
        if not flush(place):
            lacks.append(
                f"{workspace}: its folders cannot be flushed to the disk: a power cut may undo the last seconds"
            )
        remove(place)
    return lacks
