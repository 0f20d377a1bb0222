"""What MLflow is to show of a study: a run that is the parent of the study's runs, and a comparison."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kdpipe.errors import ArtifactError
from kdpipe.pipeline.headline import MEASURES
from kdpipe.pipeline.runs import run_at
from kdpipe.results.studies import COMPARISON, TABLE, Study, all_studies, read_study
from kdpipe.store.sealed import digest_of
from kdpipe.tracking.items import (
    MAX_NAME,
    Item,
    authorship,
    file_item,
    has_room_for_files,
    metrics_item,
    shortened,
    status_item,
)
from kdpipe.tracking.memory import Memory, read_memory
from kdpipe.tracking.steps import MetricRow

BOUNDS = ("estimate", "low", "high")


def study_items(folder: Path, memory: Memory) -> Iterator[Item]:
    """All that MLflow is to show of a study, in sending order; raises ArtifactError where it is damaged."""
    study = read_study(folder)
    if study is None:
        raise ArtifactError(f"{folder}: no study can be read here", hint="repeat the command that made it")
    found = study.comparison()
    tags = _tags(study, found, memory.key)
    yield Item("tags", digest_of({**tags}), lambda run: run.set_tags(tags))
    yield from _children(study, memory)
    if found is not None:
        yield metrics_item(COMPARISON, digest_of(found), memory, _comparison_metrics(found))
    yield status_item(folder, memory)
    if found is not None and has_room_for_files(folder, memory):
        yield from file_item(folder, COMPARISON)
        yield from file_item(folder, TABLE)
        note = (folder / TABLE).read_text(encoding="utf-8")
        yield Item("note", digest_of(note), lambda run: run.set_note(note))


def _tags(study: Study, found: Mapping[str, Any] | None, key: str) -> dict[str, str]:
    tags = {
        "kdpipe.study": study.name,
        "kdpipe.key": key,
        "study": study.kind,
        "study.runs": f"{len(study.runs)}",
        **authorship(),
    }
    if found is not None:
        tags["study.failed"] = "; ".join(found["failed"]) or "none"
        tags |= {f"study.{_label(row)}": shortened(_sentence(row)) for row in found["rows"]}
    return tags


def _sentence(row: Mapping[str, Any]) -> str:
    """A row of the comparison in a line."""
    measure = next(one for one in MEASURES if one.metric == row["headline"])
    level, change = row[measure.metric], row["difference"]
    estimate, low, high = (measure.show(level[name]) for name in BOUNDS)
    text = f"{estimate}{measure.unit} ({low} to {high})"
    if change is None:
        return text
    estimate, low, high = (measure.show_change(change[name]) for name in BOUNDS)
    return f"{text}, {estimate} {measure.change_unit} ({low} to {high}) against the first"


def _children(study: Study, memory: Memory) -> Iterator[Item]:
    """The study's runs that MLflow has in the same place: each is told its parent."""
    for name in study.runs:
        child = read_memory(run_at(study.path.parents[1], name).path)
        if child is not None and child.run_id is not None and child.is_at(memory.uri, memory.experiment):
            yield _child(name, child.run_id)


def _child(name: str, run_id: str) -> Item:
    return Item(f"runs/{name}", run_id, lambda run: run.adopt(run_id))


def _comparison_metrics(found: Mapping[str, Any]) -> Iterator[MetricRow]:
    """Headlines and differences of the comparison's rows, each with its interval."""
    at = round(1000 * found["time"])
    for row in found["rows"]:
        for name in (row["headline"], "difference"):
            for bound, value in (row[name] or {}).items():
                suffix = "" if bound == "estimate" else f"_{bound}"
                yield MetricRow(f"study/{_label(row)}/{name}{suffix}", value, at, 0)


def _label(row: Mapping[str, Any]) -> str:
    """What a row of the comparison is called in names of metrics and tags."""
    return re.sub(r"[^\w. :-]", "_", row["label"])[: MAX_NAME - 40]


def study_of(run_folder: Path, memory: Memory) -> tuple[Study, Memory] | None:
    """A run's study with its memory, if MLflow has it in the same place; of several the newest."""
    for study in all_studies(run_folder.parents[1]):
        parent = read_memory(study.path) if run_folder.name in study.runs else None
        if parent is not None and parent.is_at(memory.uri, memory.experiment):
            return study, parent
    return None
