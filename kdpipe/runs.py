"""A run's own folder: recipe, environment, events, logs, and links to the entries that its steps use.

    runs/<name>-<hash8>/ recipe.yaml resolved.json environment.json events.jsonl logs/ round-003/rollout -> ...

The links are for people, and they say which entries a run still counts on: retention and gc ask them.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from kdpipe.environment import environment
from kdpipe.plan import Fields, Step, run_hash
from kdpipe.recipe import Recipe, resolved
from kdpipe.recipe_file import LoadedRecipe
from kdpipe.store import (
    FINGERPRINT,
    Entry,
    append_line,
    parse_json,
    read_lines,
    write_bytes,
    write_json,
    writing,
)

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
            document = parse_json((place / FINGERPRINT).read_bytes())
        except (OSError, ValueError):
            return None
        return document if isinstance(document, dict) else None

    def event(self, kind: str, **fields: JsonValue) -> None:
        """Notes one event with the time."""
        append_line(self.events_path, {"time": time.time(), "event": kind, **fields})

    def events(self) -> list[dict[str, Any]]:
        """Every event so far."""
        return read_lines(self.events_path)


def run_folder(workspace: Path, recipe: Recipe) -> RunFolder:
    """The folder of the run that `recipe` means."""
    return RunFolder(workspace / "runs" / f"{recipe.name}-{run_hash(recipe)}")


def all_runs(workspace: Path) -> list[RunFolder]:
    """Every run of the workspace, the one changed last first."""
    folders = [path for path in (workspace / "runs").glob("*") if (path / "resolved.json").exists()]
    return [
        RunFolder(p)
        for p in sorted(folders, key=lambda p: (p / "resolved.json").stat().st_mtime, reverse=True)
    ]


# ------------------------------------------------------------------------------------------ retention


def retained(run: RunFolder) -> dict[Path, set[str]]:
    """Which of "model", "trainer" and "ema" this run keeps of each train entry that it links.

    The last rounds by `runtime.keep`, and the weights of the best and of the last evaluated round.
    """
    links = list(run.links())
    trained = {link.round: link.target for link in links if link.name == "train"}
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
    rounds = sorted(trained)
    counts = recipe.runtime.keep
    for kind, count in (("model", counts.weights), ("trainer", counts.optimizer), ("ema", counts.weights)):
        for number in rounds[-count:]:
            keep.setdefault(trained[number], set()).add(kind)
    scores = {
        link.round: accuracy
        for link in links
        if link.name == "evaluate-student" and (accuracy := _accuracy(link.target)) is not None
    }
    wanted = [max(scores), max(scores, key=lambda number: (scores[number], number))] if scores else []
    for number in wanted:
        if number in trained:
            keep.setdefault(trained[number], set()).add("model")
    return keep


def droppable(run: RunFolder, workspace: Path) -> list[tuple[Path, str]]:
    """(train entry, folder of its payload) of `run` that neither it nor any other run keeps."""
    kept: dict[Path, set[str]] = {}
    linked = {link.target for link in run.links() if link.name == "train"}
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
    try:
        return float(parse_json((folder / "summary.json").read_bytes())["accuracy"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
