"""A run's own folder: recipe, environment, events, logs, and links to the entries that its steps use.

    runs/<name>-<hash8>/ recipe.yaml resolved.json environment.json events.jsonl logs/ round-003/rollout -> ...

The links are for people, and they say which entries a run still counts on: retention and gc ask them.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from kdpipe.data.payload import SUMMARY_FILE
from kdpipe.errors import ArtifactError
from kdpipe.pipeline.plan import run_hash
from kdpipe.recipe.file import LoadedRecipe, read_recipe
from kdpipe.recipe.roles import STUDENT
from kdpipe.recipe.schema import Recipe, resolved
from kdpipe.store.artifacts import Entry, linked_entry, read_document
from kdpipe.store.durable import append_line, parse_json, read_lines, write_bytes, write_json, writing
from kdpipe.store.environment import environment
from kdpipe.store.step import Fields, Stage, Step, link_name_of

RUNS = "runs"
ROUND = re.compile(r"round-(\d+)$")
PAYLOADS = ("model", "trainer", "ema")
"""The folders of a train entry that retention may drop."""


@dataclass(frozen=True, slots=True)
class Link:
    """One link of a run: the step's round and link name, and the entry's folder."""

    round: int
    name: str
    target: Path


@dataclass(frozen=True, slots=True)
class RunFolder:
    """One run's folder."""

    path: Path

    @property
    def name(self) -> str:
        """`<name>-<hash8>`."""
        return self.path.name

    @property
    def events_path(self) -> Path:
        """Where every step, part and checkpoint is noted as it happens."""
        return self.path / "events.jsonl"

    def write_recipe(self, loaded: LoadedRecipe) -> None:
        """Keeps the recipe as it was written and as it was understood, and what it runs on."""
        write_bytes(self.path / "recipe.yaml", loaded.text.encode())
        meaning: dict[str, JsonValue] = {
            "recipe": resolved(loaded.recipe),
            "path": str(loaded.path),
            "overrides": list(loaded.overrides),
        }
        write_json(self.path / "resolved.json", meaning)
        write_json(self.path / "environment.json", dict(environment()))

    def recipe(self) -> Recipe:
        """The recipe that this run was last given."""
        meaning = parse_json((self.path / "resolved.json").read_bytes())
        return Recipe.model_validate_json(json.dumps(meaning["recipe"]), strict=True)

    def loaded(self, changes: tuple[str, ...] = ()) -> LoadedRecipe:
        """The recipe that this run was last given; with `changes` that of another run, which differs by them.

        Raises ArtifactError where the run's own files are missing or damaged, RecipeError for a bad change.
        """
        try:
            meaning = parse_json((self.path / "resolved.json").read_bytes())
            text = (self.path / "recipe.yaml").read_text(encoding="utf-8")
            path, overrides = Path(meaning["path"]), tuple(meaning["overrides"])
            recipe = self.recipe()
        except (OSError, ValueError, KeyError, TypeError):
            raise ArtifactError(
                f"{self.path}: its recipe.yaml or resolved.json is missing or damaged",
                hint="run its recipe again, by the recipe's file: both are written again",
            ) from None
        if changes:
            overrides += changes
            recipe = read_recipe(text, f"{self.path / 'recipe.yaml'}", overrides)
        return LoadedRecipe(recipe=recipe, text=text, path=path, overrides=overrides)

    def link(self, step: Step, entry: Entry) -> None:
        """Points the step's link at its entry."""
        place = self.path / f"round-{step.round:03d}" / step.link_name
        target = Path(os.path.relpath(entry.folder, place.parent))
        if place.is_symlink() and place.readlink() == target:
            return
        with writing(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            draft = place.with_name(f".tmp-{place.name}")
            draft.unlink(missing_ok=True)
            draft.symlink_to(target)
            draft.replace(place)

    def links(self) -> Iterator[Link]:
        """Every link of the run, by round."""
        for folder in sorted(self.path.glob("round-*")):
            match = ROUND.search(folder.name)
            for place in sorted(folder.iterdir()) if match else ():
                if match and place.is_symlink():
                    yield Link(int(match[1]), place.name, place.resolve())

    def linked_document(self, step: Step) -> Fields | None:
        """The fingerprint document of what this run's link for `step` points at, or None."""
        place = self.path / f"round-{step.round:03d}" / step.link_name
        try:
            return read_document(place.resolve())
        except ArtifactError:
            return None

    def event(self, kind: str, **fields: JsonValue) -> None:
        """Notes one event with the time."""
        append_line(self.events_path, {"time": time.time(), "event": kind, **fields})

    def events(self) -> list[dict[str, Any]]:
        """Every event so far."""
        return read_lines(self.events_path)


def run_at(workspace: Path, name: str) -> RunFolder:
    """The folder of the run called `name`, whether it is there or not."""
    return RunFolder(workspace / RUNS / name)


def run_folder(workspace: Path, recipe: Recipe) -> RunFolder:
    """The folder of the run that `recipe` means."""
    return run_at(workspace, f"{recipe.name}-{run_hash(recipe)}")


def named_run(workspace: Path, name: str) -> RunFolder | None:
    """The run of this name, or None where the workspace has none."""
    run = run_at(workspace, name)
    is_there = "/" not in name and (run.path / "resolved.json").exists()
    return run if is_there else None


def all_runs(workspace: Path) -> list[RunFolder]:
    """Every run of the workspace, the one changed last first; one that lost its recipe still has its links."""
    found: list[tuple[float, Path]] = []
    for path in (workspace / RUNS).glob("*"):
        recipe = path / "resolved.json"
        if recipe.exists():
            found.append((recipe.stat().st_mtime, path))
        elif any(path.glob("round-*")):
            found.append((0.0, path))
    return [RunFolder(path) for _, path in sorted(found, reverse=True)]


# ------------------------------------------------------------------------------------------ retention


def retained(run: RunFolder) -> dict[Path, set[str]]:
    """Which of "model", "trainer" and "ema" this run keeps of each train entry that it links.

    The last rounds by `runtime.keep` that are whole, what is damaged or unfinished among them, and the weights of the
    best and of the last evaluated round.
    """
    links = list(run.links())
    trained = {link.round: link.target for link in links if link.name == Stage.TRAIN}
    try:
        recipe = run.recipe()
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
    ):  # damaged, or of another version: such a run keeps all that it links
        return {target: set(PAYLOADS) for target in trained.values()}
    keep: dict[Path, set[str]] = {}
    counts = recipe.runtime.keep
    for kind, count in (("model", counts.weights), ("trainer", counts.optimizer), ("ema", counts.weights)):
        for target in _newest(trained, kind, count):
            keep.setdefault(target, set()).add(kind)
    scores = {
        link.round: accuracy
        for link in links
        if link.name == link_name_of(Stage.EVALUATE, STUDENT)
        and (accuracy := _accuracy(link.target)) is not None
    }
    readable = {number: accuracy for number, accuracy in scores.items() if accuracy < math.inf}
    wanted = set(scores) - set(readable)  # may be the best
    wanted |= {max(scores)} if scores else set()
    wanted |= {max(readable, key=lambda number: (readable[number], number))} if readable else set()
    for number in wanted:
        if number in trained:
            keep.setdefault(trained[number], set()).add("model")
    return keep


def _newest(trained: Mapping[int, Path], kind: str, count: int) -> Iterator[Path]:
    """The entries of the last `count` rounds that have this payload whole, and of those after them."""
    whole = 0
    for number in sorted(trained, reverse=True):
        if whole == count:
            return
        yield trained[number]
        whole += _is_whole(trained[number], kind)


def _is_whole(folder: Path, kind: str) -> bool:
    """Whether an entry is done and has the files of this payload, by their sizes."""
    try:
        entry, _ = linked_entry(folder)
        manifest = entry.manifest()
    except ArtifactError:
        return False
    if manifest is None or entry.problem(manifest) is not None:
        return False
    own = {file.path for file in manifest.files if file.path.startswith(f"{kind}/")}
    return bool(own) and own.isdisjoint(manifest.dropped)


def droppable(run: RunFolder, workspace: Path) -> list[tuple[Path, str]]:
    """(train entry, folder of its payload) of `run` that neither it nor any other run keeps."""
    kept: dict[Path, set[str]] = {}
    linked = {link.target for link in run.links() if link.name == Stage.TRAIN}
    for other in all_runs(workspace):
        for target, kinds in retained(other).items():
            kept.setdefault(target, set()).update(kinds)
    return [
        (target, kind)
        for target in sorted(linked)
        for kind in PAYLOADS
        if kind not in kept.get(target, set())
    ]


def _accuracy(folder: Path) -> float | None:
    """The accuracy of an evaluation; None while it is not done, infinite where it is damaged and could be any."""
    if not folder.exists():
        return None
    try:
        entry, _ = linked_entry(folder)
        return None if entry.manifest() is None else float(entry.read_json(SUMMARY_FILE)["accuracy"])
    except (ArtifactError, ValueError, KeyError, TypeError):
        return math.inf
