"""The manifest of an entry: its files with size and sha256. Written last, it makes the entry done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from pydantic import JsonValue

from kdpipe.errors import ArtifactError
from kdpipe.store.sealed import FORMAT, seal, unseal
from kdpipe.store.step import Fields


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of an entry, of its payload or its metrics: the path inside the entry, size and sha256."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a done entry holds; `dropped` names files that retention removed."""

    fingerprint: str
    files: tuple[StoredFile, ...]
    inputs: Mapping[str, str]
    payload_digest: str
    dropped: tuple[str, ...]
    provenance: Mapping[str, JsonValue]

    def to_json(self) -> Fields:
        """The manifest as a sealed document."""
        return seal({"format": FORMAT, **asdict(self)})


def parse_manifest(path: Path, data: bytes, fingerprint: str) -> Manifest:
    """The manifest in a file's bytes; raises ArtifactError when it is damaged or of another step."""
    document = unseal(path, data, kind="manifest")
    try:
        if document["fingerprint"] != fingerprint:
            raise ValueError("it belongs to another step")
        for name in (*(f["path"] for f in document["files"]), *document["dropped"]):
            require_inside(name)
        if not all(type(f["bytes"]) is int and type(f["sha256"]) is str for f in document["files"]):
            raise ValueError("sizes and digests of its files are not numbers and texts")
        if not all(type(document[name]) is dict for name in ("inputs", "provenance")):
            raise ValueError("its inputs or its provenance are no mapping")
        return Manifest(
            fingerprint=document["fingerprint"],
            files=tuple(StoredFile(f["path"], f["bytes"], f["sha256"]) for f in document["files"]),
            inputs=document["inputs"],
            payload_digest=str(document["payload_digest"]),
            dropped=tuple(document["dropped"]),
            provenance=document["provenance"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path}: damaged manifest: {error}") from None


def require_inside(name: str) -> None:
    """Raises ValueError, or TypeError, unless `name` is a path to something below its folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
        raise ValueError(f"{name!r} leads out of its folder")
