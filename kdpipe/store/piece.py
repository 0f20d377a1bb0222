"""Finished pieces of a step that is not done: parts and checkpoints, each with its seal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from kdpipe.errors import ArtifactError
from kdpipe.store.durable import file_digest, files_below
from kdpipe.store.sealed import seal_value, unseal_value
from kdpipe.store.step import Fields

SEAL = "seal.json"
PIECE = "finished piece"


@dataclass(frozen=True, slots=True)
class Piece:
    """A finished part (a file) or checkpoint (a folder) of a step that is not done, and its seal.

    The seal is written last and names the step, so that neither half a piece nor one of another step is ever used.
    """

    path: Path
    seal: Path
    fingerprint: str

    @property
    def is_finished(self) -> bool:
        """Whether there is a piece with a seal."""
        return self.seal.exists() and self.path.exists()

    def document(self, path: Path) -> Fields:
        """The seal of the piece, which still stands at `path`."""
        files: list[JsonValue] = [
            [_below(path, file), file.stat().st_size, file_digest(file)]
            for file in files_below(path)
            if file.name != SEAL
        ]
        return seal_value(PIECE, {"step": self.fingerprint, "name": self.path.name, "files": files})

    def problem(self, *, full: bool = True) -> str | None:
        """What is wrong with a finished piece, by sha256 or by sizes only, or None."""
        try:
            value: Any = unseal_value(self.seal, self.seal.read_bytes(), kind=PIECE)
            if (value["step"], value["name"]) != (self.fingerprint, self.path.name):
                return f"{self.path}: its seal is of another step or piece"
            known = {name: (size, digest) for name, size, digest in value["files"]}
            found = {_below(self.path, file): file for file in files_below(self.path) if file.name != SEAL}
            if wrong := sorted(known.keys() ^ found.keys()):
                missing = wrong[0] not in found
                return f"{self.path / wrong[0]}: {'is missing' if missing else 'is not in its seal'}"
            for name, file in found.items():
                size, digest = known[name]
                if file.stat().st_size != size or (full and file_digest(file) != digest):
                    return f"{file}: is not what its seal says"
        except ArtifactError as error:
            return error.message
        except OSError as error:
            return f"{error.filename}: cannot be read: {error.strerror}"
        return None


def _below(root: Path, file: Path) -> str:
    return file.name if file == root else file.relative_to(root).as_posix()
