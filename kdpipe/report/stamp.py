"""Of which artifacts a report was made, so that a command knows whether it has to be made again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from pydantic import JsonValue

from kdpipe import __version__
from kdpipe.store.step import canonical

NAME = "kdpipe-made-from"
HEAD_BYTES = 4096


def stamp(digests: Mapping[str, str | None]) -> str:
    """What a report is made from: the payload digest of every step of the plan, None where it is not done."""
    document: JsonValue = {"kdpipe": __version__, "steps": dict(digests)}
    return hashlib.sha256(canonical(document)).hexdigest()[:32]


def is_current(path: Path, digests: Mapping[str, str | None]) -> bool:
    """Whether the report at `path` was made from just these artifacts by this kdpipe."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return False
    return f'name="{NAME}" content="{stamp(digests)}"'.encode() in head
