"""A run's own folder: recipe, environment, events, logs, and links to the entries that its steps use.

    runs/<name>-<hash8>/ recipe.yaml resolved.json environment.json events.jsonl logs/ round-003/rollout -> ...

The links are for people, and they say which entries a run still counts on: retention and gc ask them.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pydantic import JsonValue

from kdpipe.errors import ArtifactError
from kdpipe.pipeline.plan import run_hash
from kdpipe.recipe.file import LoadedRecipe, read_recipe
from kdpipe.recipe.schema import Recipe, resolved
from kdpipe.store.artifacts import Entry, Store, read_document
from kdpipe.store.durable import append_line, parse_json, read_lines, write_bytes, write_json
from kdpipe.store.environment import environment
from kdpipe.store.link import linked_folder, write_link
from kdpipe.store.step import Fields, Step

RUNS = "runs"
ROUND = re.compile(r"round-(\d+)$")


class Link(NamedTuple):
    """One link of a run: the step's round and link name, and the entry's folder."""

    round: int
    name: str
    target: Path


class RunEvent(NamedTuple):
    """What happened at `time`, in seconds since the epoch; `reused`: another run had made the step."""

    time: float
    kind: str
    step: str = ""
    reused: bool = False


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
        return Recipe.model_validate(meaning["recipe"], strict=True)

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
        if linked_folder(place) != entry.folder:
            with Store(self.path.parents[1]).linking(shared=True):
                write_link(place, entry.folder)

    def links(self) -> Iterator[Link]:
        """Every link of the run, by round."""
        # Not by glob: what cannot be read is not empty.
        for folder in sorted(self.path.iterdir()) if self.path.is_dir() else ():
            if (match := ROUND.match(folder.name)) and folder.is_dir():
                for place in sorted(folder.iterdir()):
                    if (target := linked_folder(place)) is not None:
                        yield Link(int(match[1]), place.name, target)

    def linked_document(self, step: Step) -> Fields | None:
        """The fingerprint document of what this run's link for `step` points at, or None."""
        place = self.path / f"round-{step.round:03d}" / step.link_name
        if (target := linked_folder(place)) is not None:
            with contextlib.suppress(ArtifactError):
                return read_document(target)
        return None

    def event(self, kind: str, **fields: JsonValue) -> None:
        """Notes one event with the time."""
        append_line(self.events_path, {"time": time.time(), "event": kind, **fields})

    def events(self) -> list[RunEvent]:
        """Every event so far; leaves out damaged lines."""
        found = []
        for row in read_lines(self.events_path):
            at, kind, step = row.get("time"), row.get("event"), row.get("step", "")
            if isinstance(at, int | float) and isinstance(kind, str) and isinstance(step, str):
                found.append(RunEvent(at, kind, step, reused=bool(row.get("reused"))))
        return found


def unended(events: Sequence[RunEvent]) -> RunEvent | None:
    """The last step's begin or stop, where it did not end."""
    kinds = ("step started", "step stopped", "step done")
    last = next((event for event in reversed(events) if event.kind in kinds), None)
    return None if last is None or last.kind == "step done" else last


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
    """Every run of the workspace, last changed first; one that lost its recipe still has its links."""
    found: list[tuple[float, Path]] = []
    for path in (workspace / RUNS).glob("*"):
        recipe = path / "resolved.json"
        if recipe.exists():
            found.append((recipe.stat().st_mtime, path))
        elif any(path.glob("round-*")):
            found.append((0.0, path))
    return [RunFolder(path) for _, path in sorted(found, reverse=True)]
