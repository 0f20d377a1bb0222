"""The finished steps of a run, and their metrics under the names that MLflow shows."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdpipe.errors import ArtifactError
from kdpipe.pipeline.runs import RunFolder
from kdpipe.recipe.roles import STUDENT
from kdpipe.store.artifacts import Entry, linked_entry
from kdpipe.store.stage import Stage
from kdpipe.store.step import link_name_of

HEADLINES = frozenset(
    {
        "evaluate/accuracy",
        "evaluate/accuracy_change",
        "evaluate/reverse_kl_exact_nats",
        "evaluate/reverse_kl_nats",
        "evaluate/truncated_fraction",
        "rollout/completion_tokens_mean",
        "rollout/reward_mean",
        "score/reverse_kl_nats",
        "train_step/grad_norm",
        "train_step/loss",
    }
)
"""What one looks at first."""
HEADLINE = "Headline"
"""Their group: MLflow's page orders groups by their names, capitals before small letters."""
BOUNDS = ("_low", "_high")
"""How the names of bounds end: a chart of one alone says little, so that tags have them."""


@dataclass(frozen=True, slots=True)
class DoneStep:
    """A finished step of a run; `name` is that of its link, `finished` in seconds since the epoch."""

    name: str
    stage: str
    subject: str
    round: int
    entry: Entry
    fields: Mapping[str, Any]
    finished: float

    @property
    def mark(self) -> str:
        """What changes when the step is performed again."""
        return f"{self.entry.fingerprint[:16]} {self.finished}"


@dataclass(frozen=True, slots=True)
class MetricRow:
    """A metric's value as MLflow stores it; `step`: a round or optimizer step, `timestamp`: milliseconds."""

    name: str
    value: float
    timestamp: int
    step: int


def done_steps(run_folder: Path) -> Iterator[DoneStep]:
    """The finished steps that the run links, by round."""
    for link in RunFolder(run_folder).links():
        with contextlib.suppress(ArtifactError):  # such a step is not done
            entry, document = linked_entry(link.target)
            manifest = entry.manifest()
            stage, subject = f"{document.get('stage')}", f"{document.get('subject') or ''}"
            is_own = (link_name_of(stage, subject), document.get("round")) == (link.name, link.round)
            if manifest is not None and is_own:
                finished = manifest.provenance["finished"]
                assert isinstance(finished, int | float)
                fields = document["fields"]
                assert isinstance(fields, dict)
                name = f"round-{link.round:03d}/{link.name}"
                yield DoneStep(name, stage, subject, link.round, entry, fields, finished)


def event_times(folder: Path) -> list[int]:
    """When each event of the run or study was noted, in milliseconds; now where none was."""
    found = [round(1000 * event.time) for event in RunFolder(folder).events()]
    return found or [round(1000 * time.time())]


def metrics(step: DoneStep, *, several: bool) -> Iterator[MetricRow]:
    """The metrics of a step of a run that has `several` teachers or one, without bounds.

    Raises ArtifactError on damage.
    """
    for row in step.entry.metrics():
        if row.name.endswith(BOUNDS):
            continue
        at, per_step = row.optimizer_step, row.optimizer_step is not None
        name = metric_name(
            row.name, stage=step.stage, subject=step.subject, per_step=per_step, several=several
        )
        yield MetricRow(name, row.value, round(step.finished * 1000), step.round if at is None else at)


def metric_name(name: str, *, stage: str, subject: str, per_step: bool, several: bool = False) -> str:
    """The name in MLflow of a metrics.jsonl row: student and each teacher, steps and rounds stay apart."""
    found = _apart(name, stage=stage, subject=subject, per_step=per_step, several=several)
    return f"{HEADLINE}/{found.replace('/', '.')}" if found in HEADLINES else found


def _apart(name: str, *, stage: str, subject: str, per_step: bool, several: bool) -> str:
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
