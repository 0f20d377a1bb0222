"""A study: runs that one command makes together, such as control arms or the points of a sweep.

    studies/<recipe>-<kind>-<hash8>/ study.json comparison.json comparison.md events.jsonl

It is its set of runs: the same command again goes on with the same study, other runs make another one.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import JsonValue

from kdpipe.pipeline.runs import RunFolder
from kdpipe.store.durable import parse_json, write_bytes, write_json
from kdpipe.store.step import canonical

Kind = Literal["arms", "sweep"]
STUDIES = "studies"
NOTE = "study.json"
COMPARISON = "comparison.json"
TABLE = "comparison.md"


@dataclass(frozen=True, slots=True)
class Study:
    """A study and its folder; `runs` are what the study calls its runs, by their names."""

    path: Path
    kind: Kind
    recipe: str
    runs: Mapping[str, str]

    @property
    def name(self) -> str:
        """`<recipe>-<kind>-<hash8>`."""
        return self.path.name

    def event(self, kind: str, **fields: JsonValue) -> None:
        """Notes one event with the time."""
        RunFolder(self.path).event(kind, **fields)

    def comparison(self) -> dict[str, Any] | None:
        """What `keep` kept last, or None."""
        with contextlib.suppress(OSError, ValueError):
            found = parse_json((self.path / COMPARISON).read_bytes())
            if isinstance(found, dict):
                return found
        return None

    def keep(self, rows: Sequence[JsonValue], table: Sequence[str], failed: Sequence[str]) -> None:
        """Keeps the comparison of the runs that ended, its `time` that of the first one that was just so."""
        now: dict[str, JsonValue] = {"rows": list(rows), "failed": list(failed)}
        before = self.comparison()
        if before is not None and {key: before.get(key) for key in now} == now:
            return
        names = [f"* {label}: `{run}`" for run, label in self.runs.items()]
        missing = ["", f"Failed: {'; '.join(failed)}."] if failed else []
        lines = [f"# {self.recipe}: {self.kind}", "", *table, *missing, "", "Runs:", "", *names]
        write_bytes(self.path / TABLE, ("\n".join(lines) + "\n").encode())
        write_json(self.path / COMPARISON, {**now, "time": time.time()})


def make_study(workspace: Path, kind: Kind, *, recipe: str, runs: Mapping[str, str]) -> Study:
    """The study of these runs, by name what it calls each; its folder is there after that."""
    names: list[JsonValue] = [*sorted(runs)]
    digest = hashlib.sha256(canonical(names)).hexdigest()[:8]
    study = Study(workspace / STUDIES / f"{recipe}-{kind}-{digest}", kind, recipe, dict(runs))
    named: list[JsonValue] = [{"run": run, "label": label} for run, label in runs.items()]
    write_json(study.path / NOTE, {"kind": kind, "recipe": recipe, "runs": named})
    return study


def read_study(path: Path) -> Study | None:
    """The study in this folder, or None where none can be read."""
    try:
        found = parse_json((path / NOTE).read_bytes())
        runs = {str(one["run"]): str(one["label"]) for one in found["runs"]}
        kind = next(kind for kind in get_args(Kind) if kind == found["kind"])
        return Study(path, kind, str(found["recipe"]), runs)
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return None


def all_studies(workspace: Path) -> list[Study]:
    """Every study of the workspace, the one begun last first."""
    notes = sorted((workspace / STUDIES).glob(f"*/{NOTE}"), key=lambda path: path.stat().st_mtime)
    found = [read_study(path.parent) for path in reversed(notes)]
    return [study for study in found if study is not None]
