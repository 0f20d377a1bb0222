"""The store: entries on disk that are either whole or not there.

Every durable write is made beside its place, flushed, fsynced, renamed, and its directory fsynced; the
manifest comes last and makes the entry *done*. A killed step leaves parts or checkpoints, which the next
attempt uses. Locks are flock (they go with their process), never PID files.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import JsonValue

from kdpipe.errors import ArtifactError, KdpipeError
from kdpipe.store.durable import (
    TEMPORARY,
    file_digest,
    files_below,
    read_lines,
    remove,
    write_durably,
    write_json,
    write_lines,
)
from kdpipe.store.locks import LOCK, locked, take
from kdpipe.store.manifest import Manifest, StoredFile, parse_manifest, require_inside
from kdpipe.store.piece import SEAL, Piece
from kdpipe.store.sealed import digest_of, unseal
from kdpipe.store.step import Fields, Step, step_id_of

MANIFEST = "manifest.json"
FINGERPRINT = "fingerprint.json"
METRICS = "metrics.jsonl"
PARTS = "parts"
CHECKPOINTS = "checkpoints"
CHECKPOINT = "step-"  # what the names of checkpoints begin with, before the optimizer step
FINGERPRINT_KEY = "fingerprint"


@dataclass(frozen=True, slots=True)
class Entry:
    """The place of one step's artifacts: `store/<stage>/<fingerprint16>`."""

    folder: Path
    step_id: str
    fingerprint: str

    def manifest(self) -> Manifest | None:
        """The manifest, or None when the entry is not committed; raises ArtifactError when damaged."""
        path = self.folder / MANIFEST
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._damage(f"{path}: cannot be read: {error}") from error
        try:
            return parse_manifest(path, data, self.fingerprint)
        except ArtifactError as error:
            raise error if error.hint else self._damage(error.message) from None

    def problem(self, manifest: Manifest) -> str | None:
        """What is wrong with the files of a committed entry by their sizes, or None."""
        for file in manifest.files:
            if file.path in manifest.dropped:
                continue
            try:
                size = (self.folder / file.path).stat().st_size
            except FileNotFoundError:
                return f"{self.folder / file.path}: is missing"
            if size != file.bytes:
                return f"{self.folder / file.path}: {size} bytes, its manifest says {file.bytes}"
        return None

    def opened(self, *prefixes: str) -> Path:
        """The entry's folder, after the sha256 of every file below `prefixes` was checked."""
        manifest = self.manifest()
        if manifest is None:
            raise ArtifactError(f"{self.folder}: {self.step_id} is not there", hint="repeat the run")
        for file in manifest.files:
            if any(file.path == prefix or file.path.startswith(f"{prefix}/") for prefix in prefixes):
                self.check(file)
        # Payload folders must hold no other files or links, which libraries would read.
        known, names = {file.path for file in manifest.files}, {name.partition("/")[0] for name in prefixes}
        for path in (found for name in names for found in (self.folder / name).rglob("*")):
            if path.is_symlink():
                raise self._damage(f"{path}: is a link, expected plain files")
            is_ours = path.relative_to(self.folder).as_posix() in known or path.name.startswith(TEMPORARY)
            if not is_ours and not path.is_dir():
                raise self._damage(f"{path}: is not in the entry's manifest")
        return self.folder

    def check(self, file: StoredFile) -> None:
        """Raises ArtifactError unless `file` is there with its sha256."""
        path = self.folder / file.path
        if path.is_symlink():  # what it leads to could be changed at any time
            raise self._damage(f"{path}: is a link, expected a plain file")
        try:
            found = file_digest(path)
        except OSError as error:
            raise self._damage(f"{path}: cannot be read: {error.strerror}") from error
        if found != file.sha256:
            raise self._damage(f"{path}: sha256 {found[:16]}..., its manifest says {file.sha256[:16]}...")

    def read_json(self, name: str) -> Any:
        """The JSON of payload file `name`, after its sha256 was checked."""
        return json.loads((self.opened(name) / name).read_bytes())

    def metrics(self) -> list[Metric]:
        """What the step measured, after the sha256 of the file was checked; none before it is committed."""
        return [] if self.manifest() is None else read_metrics(self.opened(METRICS) / METRICS)

    def describe(self, step: Step) -> None:
        """Makes fingerprint.json tell what was hashed, unless it does: it follows from the recipe."""
        with contextlib.suppress(ArtifactError):
            if read_document(self.folder)[FINGERPRINT_KEY] == step.fingerprint:
                return
        write_json(self.folder / FINGERPRINT, {**step.document, FINGERPRINT_KEY: step.fingerprint})

    def part(self, index: int) -> Piece:
        """The place of part `index`."""
        path = self.folder / PARTS / f"part-{index:05d}.parquet"
        return Piece(path, path.with_suffix(".json"), self.fingerprint)

    def checkpoint(self, name: str) -> Piece:
        """The place of the checkpoint called `name`."""
        path = self.folder / CHECKPOINTS / name
        return Piece(path, path / SEAL, self.fingerprint)

    def pieces(self) -> list[Piece]:
        """What earlier attempts have finished of a step that is not done."""
        if not self.folder.is_dir():  # as of most steps of a new run, which `kdpipe plan` asks for one by one
            return []
        parts = sorted((self.folder / PARTS).glob("part-*.parquet"))
        checkpoints = sorted((self.folder / CHECKPOINTS).glob(f"{CHECKPOINT}*"))
        return [
            *(Piece(path, path.with_suffix(".json"), self.fingerprint) for path in parts),
            *(self.checkpoint(path.name) for path in checkpoints),
        ]

    def discard(self) -> None:
        """Forgets everything of the entry, so that the step is performed from nothing."""
        remove(self.folder / MANIFEST)
        for child in self.folder.iterdir() if self.folder.is_dir() else ():
            if child.name != LOCK:
                remove(child)

    def drop(self, prefix: str) -> int:
        """Removes the files below `prefix` and says so in the manifest; returns the bytes freed."""
        manifest = self.manifest()
        if manifest is None:
            return 0
        below = [file for file in manifest.files if file.path.startswith(f"{prefix}/")]
        gone = [file for file in below if file.path not in manifest.dropped]
        if gone:
            dropped = tuple(sorted({*manifest.dropped, *(file.path for file in gone)}))
            write_json(self.folder / MANIFEST, replace(manifest, dropped=dropped).to_json())
            remove(self.folder / prefix)
        return sum(file.bytes for file in gone)

    @contextlib.contextmanager
    def locked(self, waiting: Callable[[], None]) -> Iterator[None]:
        """Holds the entry; calls `waiting` once when another run has it, and waits for that run."""
        descriptor = take(self.folder / LOCK, wait=False)
        if descriptor is None:
            waiting()
            descriptor = take(self.folder / LOCK)
            assert descriptor is not None
        try:
            yield
        finally:
            os.close(descriptor)

    def _damage(self, message: str) -> ArtifactError:
        return ArtifactError(
            message, hint=f"rebuild it and what depends on it: repeat the run with --force {self.step_id}"
        )


def read_document(folder: Path) -> Fields:
    """What was hashed into an entry's fingerprint, with it; raises ArtifactError where it is damaged."""
    path = folder / FINGERPRINT
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from None
    document: Fields = unseal(path, data, kind="fingerprint", digest=FINGERPRINT_KEY, reads=None)
    fingerprint = digest_of(document)
    if fingerprint[:16] != folder.name:
        raise ArtifactError(f"{path}: damaged: it does not hash to the fingerprint of its folder")
    return {**document, FINGERPRINT_KEY: fingerprint}


def linked_entry(folder: Path) -> tuple[Entry, Fields]:
    """The entry in `folder`, and its fingerprint document; raises ArtifactError when that is damaged."""
    document = read_document(folder)
    stage, subject, number = (document.get(name) for name in ("stage", "subject", "round"))
    step_id = step_id_of(f"{stage}", f"{subject or ''}", number if isinstance(number, int) else -1)
    return Entry(folder, step_id, str(document[FINGERPRINT_KEY])), document


class Metric(NamedTuple):
    """A number that a step measured; `optimizer_step` is None where it is of the whole round."""

    round: int
    name: str
    value: float
    optimizer_step: int | None


def read_metrics(path: Path) -> list[Metric]:
    """The rows of a metrics.jsonl, [] where it is missing; leaves out what is no metric."""
    found = []
    for row in read_lines(path):
        number, name, value, at = (row.get(key) for key in ("round", "name", "value", "optimizer_step"))
        if (
            isinstance(number, int)
            and isinstance(name, str)
            and isinstance(value, int | float)
            and (at is None or isinstance(at, int))
        ):
            found.append(Metric(number, name, float(value), at))
    return found


@dataclass(frozen=True, slots=True)
class Store:
    """The workspace's entries, shared by all its runs."""

    workspace: Path

    def entry(self, step: Step) -> Entry:
        """The place of `step`'s artifacts."""
        folder = Path(f"{self.workspace}/store/{step.stage}/{step.fingerprint[:16]}")
        return Entry(folder, step.id, step.fingerprint)

    @property
    def root(self) -> Path:
        """Where the stages' folders are."""
        return self.workspace / "store"

    def all_folders(self) -> list[Path]:
        """Every entry's folder, committed or not; none of a stage that is linked in from elsewhere."""
        stages = [stage for stage in self.root.glob("[!.]*") if stage.resolve() == stage]
        return sorted(path for stage in stages for path in stage.glob("*") if path.is_dir())

    def linking(self, *, shared: bool) -> AbstractContextManager[None]:
        """Held by runs while they link entries (together), and while garbage is set aside (alone)."""
        return locked(self.workspace / LOCK, shared=shared)


class Draft:
    """What a stage writes to. Only `commit` makes it count; parts and checkpoints survive a kill."""

    def __init__(
        self, entry: Entry, step: Step, *, note: Callable[[str, Mapping[str, JsonValue]], None]
    ) -> None:
        self.folder = entry.folder
        self.round = step.round
        self._entry = entry
        self._step = step
        self._note = note
        self._metrics: list[dict[str, JsonValue]] = []
        self._payload: list[str] = []
        for leftover in self.folder.rglob(f"{TEMPORARY}*"):
            remove(leftover)
        entry.describe(step)

    def write(self, name: str, writer: Callable[[Path], None]) -> None:
        """Durably writes the payload file or folder `name` through `writer(temporary path)`."""
        write_durably(self.folder / _inside(name), writer)
        self._payload.append(name)

    def write_json(self, name: str, value: JsonValue) -> None:
        """Durably writes the payload file `name` as JSON."""
        write_json(self.folder / _inside(name), value)
        self._payload.append(name)

    def metric(self, name: str, value: float, *, optimizer_step: int | None = None) -> None:
        """One row of metrics.jsonl; it is durable at the next checkpoint, or at commit."""
        row: dict[str, JsonValue] = {"round": self.round, "name": name, "value": float(value)}
        self._metrics.append({**row, "optimizer_step": optimizer_step})

    def part(self, index: int, writer: Callable[[Path], None]) -> Path:
        """The path of part `index`, written through `writer` unless an earlier attempt finished it."""
        piece = self._entry.part(index)
        if not self._is_whole(piece):
            self._note("part started", {"part": index})
            write_durably(piece.path, writer)
            write_json(piece.seal, piece.document(piece.path))
            self._note("part done", {"part": index})
        return piece.path

    def _is_whole(self, piece: Piece) -> bool:
        """Whether a piece can be used; notes what is wrong with a finished one."""
        if not piece.is_finished:
            return False
        problem = piece.problem()
        if problem is not None:
            self._note("damaged", {"piece": piece.path.name, "problem": problem})
        return problem is None

    def checkpoint(self) -> tuple[int, Path] | None:
        """The newest whole checkpoint as (optimizer step, folder), with the metrics of the steps before it."""
        for folder in sorted((self.folder / CHECKPOINTS).glob(f"{CHECKPOINT}*"), reverse=True):
            if self._is_whole(self._entry.checkpoint(folder.name)):
                self._metrics = read_lines(folder / METRICS)
                return int(folder.name.removeprefix(CHECKPOINT)), folder
            remove(folder)
        return None

    def write_checkpoint(self, optimizer_step: int, writer: Callable[[Path], None]) -> None:
        """Durably writes a checkpoint folder through `writer`, then removes the older ones."""

        def write(path: Path) -> None:
            path.mkdir()
            writer(path)
            write_lines(path / METRICS, self._metrics)
            (path / SEAL).write_text(json.dumps(piece.document(path), sort_keys=True, indent=1))

        folder = self.folder / CHECKPOINTS
        name = f"{CHECKPOINT}{optimizer_step:06d}"
        piece = self._entry.checkpoint(name)
        write_durably(folder / name, write)
        self._note("checkpoint", {"optimizer_step": optimizer_step})
        for older in folder.glob(f"{CHECKPOINT}*"):
            if older.name < name:
                remove(older)

    def commit(self, *, inputs: Mapping[str, str], provenance: Mapping[str, JsonValue]) -> Manifest:
        """Writes metrics and, last, the manifest; then parts and checkpoints go."""
        write_durably(self.folder / METRICS, lambda path: write_lines(path, self._metrics))
        files = [
            StoredFile(path.relative_to(self.folder).as_posix(), path.stat().st_size, file_digest(path))
            for name in (*self._payload, METRICS)
            for path in files_below(self.folder / name)
        ]
        files.sort(key=lambda file: file.path)
        payload: JsonValue = [[file.path, file.sha256] for file in files if file.path != METRICS]
        manifest = Manifest(
            fingerprint=self._entry.fingerprint,
            files=tuple(files),
            inputs=dict(inputs),
            payload_digest=digest_of(payload),
            dropped=(),
            provenance={**provenance, "step": self._step.id},
        )
        write_json(self.folder / MANIFEST, manifest.to_json())
        tidy(self._entry, manifest)
        return manifest


def tidy(entry: Entry, manifest: Manifest) -> None:
    """Removes what a kill left beside the payload of an entry that this process holds."""
    for leftover in _leftovers(entry, manifest):
        remove(leftover)


def tidy_if_free(entry: Entry, manifest: Manifest) -> None:
    """`tidy` for an entry that is not held; nothing where another process holds it and will tidy."""
    try:
        if not _leftovers(entry, manifest):
            return
    except FileNotFoundError:  # it vanishes while it is looked at
        return
    descriptor = take(entry.folder / LOCK, wait=False)
    if descriptor is None:
        return
    try:
        if entry.manifest() == manifest:  # else it was begun anew, and its parts are not left over
            tidy(entry, manifest)
    finally:
        os.close(descriptor)


def _leftovers(entry: Entry, manifest: Manifest) -> list[Path]:
    names = (PARTS, CHECKPOINTS, *sorted({path.partition("/")[0] for path in manifest.dropped}))
    found = [entry.folder / name for name in names]
    return [*(path for path in found if path.exists()), *entry.folder.rglob(f"{TEMPORARY}*")]


def _inside(name: str) -> str:
    try:
        require_inside(name)
    except ValueError as error:
        raise KdpipeError(str(error)) from None
    return name
