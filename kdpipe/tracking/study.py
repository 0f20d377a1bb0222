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
KINDS = {"change": "since before", "difference": "against the first"}


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
    told = []
    for measure in MEASURES:
        if (found := row.get(measure.metric)) is None:
            continue
        estimate, low, high = (measure.show(found[name]) for name in BOUNDS)
        told.append(f"{measure.name} {estimate}{measure.unit} ({low} to {high})")
        for words, change in _changes(found):
            estimate, low, high = (measure.show_change(change[name]) for name in BOUNDS)
            told.append(f"{estimate} {measure.change_unit} ({low} to {high}) {words}")
    return ", ".join(told)


def _changes(found: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The differences of a measure, with what each is to."""
    yield from ((words, found[kind]) for kind, words in KINDS.items() if found[kind] is not None)
    yield from ((f"against {other}", change) for other, change in found["pairs"].items())


def _children(study: Study, memory: Memory) -> Iterator[Item]:
    """The study's runs that MLflow has in the same place: each is told its parent."""
    for name in study.runs:
        child = read_memory(run_at(study.path.parents[1], name).path)
        if child is not None and child.run_id is not None and child.is_at(memory.uri, memory.experiment):
            yield _child(name, child.run_id)


def _child(name: str, run_id: str) -> Item:
    return Item(f"runs/{name}", run_id, lambda run: run.adopt(run_id))


def _comparison_metrics(found: Mapping[str, Any]) -> Iterator[MetricRow]:
    """Each measure of the comparison's rows and its differences; their bounds are in tags."""
    at = round(1000 * found["time"])
    for row in found["rows"]:
        for measure in (one for one in MEASURES if one.metric in row):
            level = row[measure.metric]
            told = {"": level, **{f"_{kind}": level[kind] for kind in KINDS}}
            told |= {f"_less_{other}": change for other, change in level["pairs"].items()}
            for kind, each in told.items():
                if each:
                    name = f"study/{_label(row)}/{measure.metric}{kind}"
                    yield MetricRow(name, each["estimate"], at, 0)


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
