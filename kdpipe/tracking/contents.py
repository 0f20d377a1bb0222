"""What there is to mirror of a run: its finished steps, and what each shows in MLflow and under which name."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from kdpipe.data.payload import SUMMARY_FILE
from kdpipe.errors import ArtifactError
from kdpipe.pipeline.runs import RunFolder
from kdpipe.recipe.roles import STUDENT
from kdpipe.results.studies import COMPARISON, TABLE
from kdpipe.store.artifacts import METRICS, Entry, linked_entry
from kdpipe.store.durable import TEMPORARY
from kdpipe.store.step import Stage, canonical, link_name_of

MAX_METRICS = 1000  # what a server takes in one batch
MAX_NAME = 250
MAX_VALUE = 500
MAX_DIGEST = 36
TABLE_FORMAT = 2  # another number: the tables of all runs are written anew


@dataclass(frozen=True, slots=True)
class DoneStep:
    """A finished step of a run; `finished` is in seconds since the epoch."""

    name: str
    round: int
    entry: Entry
    document: Mapping[str, Any]
    finished: float

    @property
    def mark(self) -> str:
        """What changes when the step is performed again."""
        return f"{self.document['fingerprint'][:16]} {self.finished}"


@dataclass(frozen=True, slots=True)
class MetricRow:
    """One value of a metric, as MLflow counts: `step` is a round or an optimizer step, `timestamp` milliseconds."""

    name: str
    value: float
    timestamp: int
    step: int


def authorship() -> dict[str, str]:
    """The tags by which MLflow says where a run comes from."""
    tags = {"mlflow.source.name": "kdpipe", "mlflow.source.type": "LOCAL"}
    with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    return tags


def done_steps(run_folder: Path) -> Iterator[DoneStep]:
    """The finished steps that the run links, by round."""
    for link in RunFolder(run_folder).links():
        with contextlib.suppress(ArtifactError):  # such a step is not done
            entry, document = linked_entry(link.target)
            manifest = entry.manifest()
            name = link_name_of(f"{document.get('stage')}", document.get("subject"))
            is_own = (name, document.get("round")) == (link.name, link.round)
            if manifest is not None and is_own:
                finished = manifest.provenance["finished"]
                assert isinstance(finished, int | float)
                yield DoneStep(f"round-{link.round:03d}/{link.name}", link.round, entry, document, finished)


def whole_steps(steps: Iterable[DoneStep]) -> tuple[list[DoneStep], ArtifactError | None]:
    """Those whose metrics and summary are as they were written, and what is wrong with the first other one."""
    whole, damage = list[DoneStep](), None
    for step in steps:
        try:
            step.entry.opened(METRICS, SUMMARY_FILE)
        except ArtifactError as error:
            damage = damage or error
        else:
            whole.append(step)
    return whole, damage


def event_times(run_folder: Path) -> Iterator[float]:
    """When each event of the run was noted, in seconds since the epoch."""
    for event in RunFolder(run_folder).events():
        if isinstance(found := event.get("time"), int | float):
            yield found


def metric_name(name: str, *, stage: str, subject: str, per_step: bool, several: bool = False) -> str:
    """The name in MLflow of a metrics.jsonl row: student and each teacher, steps and rounds stay apart."""
    owner = STUDENT if subject == STUDENT else f"teacher/{subject}" if several else "teacher"
    match stage:
        case Stage.TRAIN if per_step:
            return f"train_step/{name.removeprefix('train/')}"
        case Stage.SFT if name.startswith("sft/"):
            return name.replace("sft/", f"sft/{owner}/", 1)
        case Stage.SFT:
            return name.replace("sft", f"sft_{owner}", 1)
        case Stage.EVALUATE if owner != STUDENT:
            return name.replace("evaluate", f"evaluate_{owner}", 1)
        case _:
            return name


def metrics(step: DoneStep, *, several: bool) -> Iterator[MetricRow]:
    """What a step measured; `several`: whether the run has more than one teacher."""
    stage, subject = step.document["stage"], step.document["subject"]
    for row in step.entry.metrics():
        per_step = row["optimizer_step"] is not None
        name = metric_name(row["name"], stage=stage, subject=subject, per_step=per_step, several=several)
        at = row["optimizer_step"] if per_step else step.round
        yield MetricRow(name, row["value"], round(step.finished * 1000), at)


def flatten(value: JsonValue, name: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of a resolved recipe as MLflow takes them: dotted names, shortened text."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from flatten(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from flatten(item, f"{name}.{index}")
    else:
        text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        yield re.sub(r"[^\w. :-]", "_", name)[:MAX_NAME], shortened(text)


def shortened(text: str) -> str:
    """The text as params and tags show it."""
    return text if len(text) <= MAX_VALUE else text[: MAX_VALUE - 3] + "..."


def data_sets(recipe: Mapping[str, Any], steps: Sequence[DoneStep]) -> dict[str, tuple[str, str]]:
    """Split -> (digest, where it comes from), of the data that finished steps have used."""
    task = recipe["task"]
    found: dict[str, tuple[str, str]] = {}
    for step in steps:
        fields, stage = step.document["fields"], step.document["stage"]
        if stage not in (Stage.ROLLOUT, Stage.EVALUATE):
            continue
        made = {"train" if stage == Stage.ROLLOUT else "test": {"task": fields["task"]}}  # by the task itself
        for split, identity in (fields["task.data"] or made).items():
            digest = hashlib.sha256(canonical(identity)).hexdigest()
            digest = identity.get("digest", identity.get("revision", digest))
            found[split] = digest[:MAX_DIGEST], str(task.get("data") or task.get(split) or task["kind"])
    return found


def artifacts(run_folder: Path, steps: Sequence[DoneStep]) -> Iterator[tuple[str, Path, Entry | None]]:
    """(name in MLflow, file, the entry that vouches for it) of everything that is shown there besides numbers."""
    names = ("recipe.yaml", "resolved.json", "environment.json", "report.html")
    yield from ((name, run_folder / name, None) for name in names)
    figures = sorted(run_folder.glob("figures/*.svg"))
    yield from (
        (f"figures/{path.name}", path, None) for path in figures if not path.name.startswith(TEMPORARY)
    )
    for step in steps:
        if step.document["stage"] == Stage.EVALUATE:
            name = f"evaluate/round-{step.round:03d}-{step.document['subject']}.json"
            yield name, step.entry.folder / SUMMARY_FILE, step.entry


def study_artifacts(folder: Path) -> Iterator[tuple[str, Path]]:
    """(name in MLflow, file) of what is shown of a study besides numbers."""
    yield from ((name, folder / name) for name in (COMPARISON, TABLE) if (folder / name).exists())


def tables(steps: Sequence[DoneStep]) -> Iterator[tuple[str, DoneStep, str]]:
    """(name in MLflow, step, what changes with it) of each table of texts: the student's answers, and samples."""
    for step in steps:
        subject, mark = step.document["subject"], f"{TABLE_FORMAT} {step.mark}"
        match step.document["stage"]:
            case Stage.EVALUATE if subject == STUDENT:
                yield f"tables/evaluate-round-{step.round:03d}.json", step, mark
            case Stage.ROLLOUT if not subject:
                yield f"tables/samples-round-{step.round:03d}.json", step, mark


def newest_model(steps: Sequence[DoneStep]) -> tuple[str, DoneStep, str] | None:
    """(name in MLflow, step, what changes with it) of the last trained student, or None before there is one."""
    trained = [step for step in steps if step.document["stage"] == Stage.TRAIN]
    if not trained:
        return None
    last = max(trained, key=lambda step: step.round)
    return f"student-round-{last.round:03d}", last, last.mark


def text_digest(text: str) -> str:
    """What tells two texts apart."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
