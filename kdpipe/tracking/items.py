"""What MLflow is to show of a run, as one list of items: a name, a mark, and how it is sent.

`kdpipe status` and the mirror use the same list. It is made without MLflow, and what is slow to read is read when it
is sent.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue

from kdpipe.data.payload import SUMMARY_FILE
from kdpipe.errors import ArtifactError
from kdpipe.pipeline.runs import RunFolder
from kdpipe.pipeline.status import leaves
from kdpipe.recipe.roles import STUDENT
from kdpipe.recipe.schema import Recipe, resolved
from kdpipe.store.durable import TEMPORARY, parse_json
from kdpipe.store.sealed import digest_of
from kdpipe.store.stage import Stage
from kdpipe.tracking.memory import Memory, artifacts_uri
from kdpipe.tracking.steps import DoneStep, MetricRow, done_steps, metrics

if TYPE_CHECKING:
    from kdpipe.tracking.run import MlflowRun

STATUS, PARAMS, METRICS = "status", "params", "metrics/"
FILES = ("recipe.yaml", "resolved.json", "environment.json", "report.html")
DERIVED = 4  # another number: tables and findings of all runs are sent again
MAX_NAME = 250
MAX_VALUE = 500
MAX_DIGEST = 36


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that MLflow is to show: its name, what changes with its contents, and how it is sent.

    `send` raises ArtifactError where the files that it reads are damaged.
    """

    name: str
    mark: str
    send: Callable[[MlflowRun], None]


def run_items(folder: Path, memory: Memory) -> Iterator[Item]:
    """All that MLflow is to show of a run, in sending order; raises ArtifactError where it is damaged."""
    recipe = RunFolder(folder).loaded().recipe
    document, several = resolved(recipe), len(recipe.teachers) > 1
    steps = list(done_steps(folder))
    tags = _tags(folder, document, memory.key)
    yield Item("tags", digest_of({**tags}), lambda run: run.set_tags(tags))
    yield _params(document, memory)
    yield from (metrics_item(step.name, step.mark, memory, metrics(step, several=several)) for step in steps)
    yield from _findings(recipe, steps)
    yield from _data_sets(document, steps)
    yield status_item(folder, memory)
    if has_room_for_files(folder, memory):
        for name in (*FILES, *sorted(f"figures/{path.name}" for path in folder.glob("figures/*.svg"))):
            yield from file_item(folder, name)
        yield from (item for step in steps for item in _texts(step))
        if recipe.tracking.log_model and memory.wanted == "FINISHED":
            yield from _model(steps)


def _tags(folder: Path, recipe: Mapping[str, Any], key: str) -> dict[str, str]:
    path = folder / "environment.json"
    try:
        environment = dict(parse_json(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        raise ArtifactError(
            f"{path}: is missing or damaged", hint="repeat the run: it is written again"
        ) from None
    teachers = [(f"{teacher['name']}: ", _origin(teacher)) for teacher in recipe["teachers"]]
    tags = {
        "kdpipe.run": folder.name,
        "kdpipe.key": key,
        "task": recipe["task"]["kind"],
        "objective": recipe["train"]["objective"]["kind"],
        "student": _origin(recipe["student"]),
        "teacher": ", ".join(name + origin for name, origin in teachers) if teachers[1:] else teachers[0][1],
        **authorship(),
        **{f"environment.{name}": str(value) for name, value in environment.items() if value is not None},
    }
    if commit := environment.get("git_commit"):
        tags["mlflow.source.git.commit"] = commit
    return {name: shortened(value) for name, value in tags.items()}


def _origin(model: Mapping[str, Any]) -> str:
    name: str | None = model.get("model") or ("self" if model.get("self") else None)
    return name or "scratch"


def _params(recipe: JsonValue, memory: Memory) -> Item:
    def send(run: MlflowRun) -> None:
        memory.refused = run.log_params(dict(flatten(recipe)))

    return Item(PARAMS, digest_of(recipe), send)


def _findings(recipe: Recipe, steps: Sequence[DoneStep]) -> Iterator[Item]:
    """Tags and a description that say what the evaluations came to, once there are any."""

    def send(run: MlflowRun) -> None:
        from kdpipe.tracking.findings import Findings

        summaries = []
        for step in evaluated:
            with contextlib.suppress(ArtifactError):
                summaries.append(step.entry.read_json(SUMMARY_FILE))
        if summaries:
            findings = Findings(summaries)
            run.set_tags({name: shortened(text) for name, text in findings.tags(recipe).items()})
            run.set_note(findings.note(recipe))

    evaluated = [step for step in steps if step.stage == Stage.EVALUATE]
    if evaluated:
        yield Item("findings", digest_of([DERIVED, *(step.mark for step in evaluated)]), send)


def _data_sets(recipe: Mapping[str, Any], steps: Sequence[DoneStep]) -> Iterator[Item]:
    """The data that finished steps have used, by split."""

    def item(split: str, digest: str) -> Item:
        source = str(task.get("data") or task.get(split) or task["kind"])
        name = f"{task['kind']}/{split}"
        return Item(f"data/{split}", digest, lambda run: run.log_data_set(name, digest, source, split))

    task, found = recipe["task"], dict[str, str]()
    for step in steps:
        if step.stage in (Stage.ROLLOUT, Stage.EVALUATE):
            made = "train" if step.stage == Stage.ROLLOUT else "test"  # by the task itself
            used = step.fields["task.data"] or {made: {"task": step.fields["task"]}}
            for split, identity in used.items():
                digest = identity.get("digest", identity.get("revision", digest_of(identity)))
                found[split] = digest[:MAX_DIGEST]
    yield from (item(*one) for one in found.items())


def _texts(step: DoneStep) -> Iterator[Item]:
    """An evaluation's summary, and the student's answers or samples as a table."""

    def send_summary(run: MlflowRun) -> None:
        path = step.entry.opened(SUMMARY_FILE) / SUMMARY_FILE
        run.log_text(summary, path.read_text(encoding="utf-8"))

    def send_table(run: MlflowRun) -> None:
        from kdpipe.tracking.findings import table_of

        text, shown, total = table_of(step)
        run.log_text(table, text)
        if shown < total:
            run.set_tags({f"tables.{kind}": f"the first {shown} of {total}, round {step.round}"})

    at = f"round-{step.round:03d}"
    kind = "samples" if step.stage == Stage.ROLLOUT else "evaluate"
    summary, table = f"evaluate/{at}-{step.subject}.json", f"tables/{kind}-{at}.json"
    if step.stage == Stage.EVALUATE:
        yield Item(summary, step.mark, send_summary)
    if (step.stage, step.subject) in ((Stage.EVALUATE, STUDENT), (Stage.ROLLOUT, "")):
        yield Item(table, f"{DERIVED} {step.mark}", send_table)


def _model(steps: Sequence[DoneStep]) -> Iterator[Item]:
    """The last trained student."""

    def send(run: MlflowRun) -> None:
        run.log_model(last.entry.opened("model") / "model", name, last.mark, round_number=last.round)

    if trained := [step for step in steps if step.stage == Stage.TRAIN]:
        last = max(trained, key=lambda step: step.round)
        name = f"student-round-{last.round:03d}"
        yield Item(name, last.mark, send)


def metrics_item(name: str, mark: str, memory: Memory, rows: Iterable[MetricRow]) -> Item:
    """Metrics; of those that were sent before, with another mark or in part, only what is new is sent."""
    name = f"{METRICS}{name}"
    is_known = name in memory.sent
    return Item(name, mark, lambda run: run.log_metrics(rows, is_known=is_known))


def status_item(folder: Path, memory: Memory) -> Item:
    """The status that is wanted; what is over ended with its last event, whoever tells MLflow."""

    def send(run: MlflowRun) -> None:
        run.set_status(memory.wanted, folder)
        memory.status = memory.wanted

    return Item(STATUS, memory.wanted, send)


def file_item(folder: Path, name: str) -> Iterator[Item]:
    """A file of the folder as the artifact of this name, if it is there, whole, and text."""
    with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
        text = (folder / name).read_text(encoding="utf-8")
        if TEMPORARY not in name:
            yield Item(name, digest_of(text), lambda run: run.log_text(name, text))


def has_room_for_files(folder: Path, memory: Memory) -> bool:
    """Whether MLflow keeps this run's files in this workspace or on a server.

    Of a workspace that was moved or copied the place is in the old one, which is not ours to write to.
    """
    if memory.uri is not None or memory.artifact_uri is None:
        return True
    return memory.artifact_uri.startswith(f"{artifacts_uri(folder.parents[1])}/")


def authorship() -> dict[str, str]:
    """The tags by which MLflow says where a run comes from."""
    tags = {"mlflow.source.name": "kdpipe", "mlflow.source.type": "LOCAL"}
    with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    return tags


def flatten(value: JsonValue) -> Iterator[tuple[str, str]]:
    """The leaves of a resolved recipe as MLflow takes them: dotted names, shortened text."""
    for name, leaf in leaves(value):
        text = leaf if isinstance(leaf, str) else json.dumps(leaf, sort_keys=True)
        yield re.sub(r"[^\w. :-]", "_", name)[:MAX_NAME], shortened(text)


def shortened(text: str) -> str:
    """The text as params and tags show it."""
    return text if len(text) <= MAX_VALUE else text[: MAX_VALUE - 3] + "..."
