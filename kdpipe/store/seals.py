"""JSON files that vouch for themselves: a format, what kind of file it is, and the sha256 of all of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pydantic import JsonValue

from kdpipe.errors import ArtifactError
from kdpipe.store.step import canonical

FORMAT = 1
DIGEST = "self_sha256"


def sealed(kind: str, value: JsonValue) -> dict[str, JsonValue]:
    """The document that holds `value` and vouches for it."""
    document: dict[str, JsonValue] = {"format": FORMAT, "kind": kind, "value": value}
    return {**document, DIGEST: digest_of(document)}


def unsealed(path: Path, data: bytes, *, kind: str) -> JsonValue:
    """The value in the sealed `data` of `path`; raises ArtifactError when it is damaged or of another format."""
    try:
        document = json.loads(data)
        own = document.pop(DIGEST, None)
        found = document.get("format")
    except (ValueError, AttributeError, TypeError, RecursionError):  # not JSON, or no mapping
        raise ArtifactError(f"{path}: damaged: it is no {kind}") from None
    if found != FORMAT or own is None:
        # Bits flipped in the format's own place end here too: what it says is all that there is to go by.
        raise ArtifactError(f"{path}: a {kind} of format {found}, and this kdpipe reads format {FORMAT}")
    try:
        is_whole = document["kind"] == kind and own == digest_of(document)
        value: JsonValue = document["value"]
    except (KeyError, ValueError, TypeError, RecursionError):  # not even something that has a digest
        is_whole = False
    if not is_whole:
        raise ArtifactError(f"{path}: damaged {kind}: its own sha256 does not match")
    return value


def digest_of(document: JsonValue) -> str:
    """sha256 of a document's canonical JSON."""
    return hashlib.sha256(canonical(document)).hexdigest()
