"""Sealed documents: JSON files that hold the sha256 of all else in them.

Every file of a workspace that proves itself is one: manifests, fingerprints, seals of finished pieces, memories.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from kdpipe.errors import ArtifactError
from kdpipe.store.step import Fields, canonical

FORMAT = 1
DIGEST = "self_sha256"
FORMAT_HINT = "use another --workspace, or the kdpipe that wrote this one"


def seal(document: Fields, *, digest: str = DIGEST) -> Fields:
    """The document with its own sha256 under the name `digest`."""
    return {**document, digest: digest_of(document)}


def unseal(
    path: Path, data: bytes, *, kind: str, digest: str = DIGEST, reads: int | None = FORMAT
) -> dict[str, Any]:
    """The document in the bytes of a sealed file, without its digest.

    Raises ArtifactError where it is damaged, or of another format than `reads`; None reads any.
    """
    try:
        document = json.loads(data)
        own, found = document.pop(digest, None), document.get("format")
    except (ValueError, AttributeError, TypeError, RecursionError):  # not JSON, or no mapping
        raise ArtifactError(f"{path}: damaged {kind}: it is no sealed document") from None
    if reads is not None and found != reads:
        # Bits flipped in the format's own place end here too: what it says is all that there is to go by.
        raise ArtifactError(
            f"{path}: a {kind} of format {found}, and this kdpipe reads format {reads}", hint=FORMAT_HINT
        )
    try:
        is_whole = own == digest_of(document)
    except (ValueError, TypeError, RecursionError):  # not even something that has a digest
        is_whole = False
    if not is_whole:
        raise ArtifactError(f"{path}: damaged {kind}: its own sha256 does not match")
    return dict(document)


def seal_value(kind: str, value: JsonValue) -> Fields:
    """The sealed document of this kind that holds `value`."""
    return seal({"format": FORMAT, "kind": kind, "value": value})


def unseal_value(path: Path, data: bytes, *, kind: str) -> JsonValue:
    """The value in a sealed document; raises ArtifactError where it is damaged or of another kind."""
    document = unseal(path, data, kind=kind)
    if document.get("kind") != kind or "value" not in document:
        raise ArtifactError(f"{path}: damaged {kind}: it is of another kind")
    value: JsonValue = document["value"]
    return value


def digest_of(document: JsonValue) -> str:
    """sha256 of a document's canonical JSON."""
    return hashlib.sha256(canonical(document)).hexdigest()
