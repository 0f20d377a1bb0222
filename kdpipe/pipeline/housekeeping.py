"""What is done with artifacts outside a run: verify, gc, and export."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kdpipe.data.payload import ROLLOUTS_FILE
from kdpipe.errors import ArtifactError, RecipeError
from kdpipe.models.export_request import WEIGHTS, WriteWeights, WrittenWeights
from kdpipe.pipeline.identities import Sources
from kdpipe.pipeline.project import Project
from kdpipe.pipeline.runs import all_runs
from kdpipe.recipe.roles import STUDENT
from kdpipe.recipe.section import DtypeName
from kdpipe.store.artifacts import MANIFEST, Entry, Store, read_document
from kdpipe.store.durable import TEMPORARY, files_below
from kdpipe.store.locks import LOCK, is_running, locked
from kdpipe.store.manifest import Manifest
from kdpipe.store.stage import Stage
from kdpipe.store.step import Step
from kdpipe.store.target import is_vacant, write_folder
from kdpipe.workers.worker import Worker


@dataclass(frozen=True, slots=True)
class Verified:
    """What verifying one step found: files looked at, bytes, and what is wrong (empty: nothing)."""

    step: str
    files: int
    bytes: int
    problem: str


def verify(project: Project, *, full: bool) -> Iterator[Verified]:
    """What is wrong with each step of the plan, done or begun: by sizes, with `full` by sha256."""
    for step in project.plan.steps:
        entry = project.store.entry(step)
        try:
            manifest = entry.manifest()
            if manifest is not None:
                yield _committed(step, entry, manifest, full=full)
            elif pieces := [piece for piece in entry.pieces() if piece.is_finished]:
                problems = [problem for piece in pieces if (problem := piece.problem(full=full))]
                yield Verified(step.id, len(pieces), 0, problems[0] if problems else "")
        except ArtifactError as error:
            yield Verified(step.id, 0, 0, error.message)


def _committed(step: Step, entry: Entry, manifest: Manifest, *, full: bool) -> Verified:
    files = [file for file in manifest.files if file.path not in manifest.dropped]
    problem = entry.problem(manifest) or ""
    if full and not problem:
        for file in files:
            entry.check(file)
        if read_document(entry.folder)["fingerprint"] != step.fingerprint:
            problem = f"{entry.folder}: its fingerprint.json is of another step"
    return Verified(step.id, len(files), sum(file.bytes for file in files), problem)


@dataclass(frozen=True, slots=True)
class Garbage:
    """A folder that no run links, and its size."""

    folder: Path
    bytes: int
    reason: str


def garbage(workspace: Path) -> list[Garbage]:
    """Store entries that no run's links point at. A run's links go when its folder under runs/ is removed."""
    linked = {link.target for run in all_runs(workspace) for link in run.links()}
    found = []
    for folder in Store(workspace).all_folders():
        if folder in linked or is_running(folder):
            continue
        if folder.is_symlink():
            size, reason = 0, "a link out of the workspace, and no run links it: the link alone"
        else:
            size = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
            committed = (folder / MANIFEST).exists()
            reason = "no run links it" if committed else "unfinished, and no run links it"
        found.append(Garbage(folder, size, reason))
    return found


def collect(workspace: Path) -> list[Garbage]:
    """Removes what no run links, and returns it: each entry in one rename, in which no run links another."""
    store = Store(workspace)
    if not store.root.is_dir():
        return []
    aside = store.root / f"{TEMPORARY}{os.getpid()}"
    with contextlib.ExitStack() as held:
        with store.linking(shared=False):
            killed = [left for left in store.root.glob(f"{TEMPORARY}*") if not is_running(left)]
            held.enter_context(locked(aside / LOCK))  # so that no other takes it for one
            found = garbage(workspace)
            for number, item in enumerate(found):
                item.folder.rename(aside / str(number))
        for folder in (*killed, aside):
            shutil.rmtree(folder)
    return found


@dataclass(frozen=True, slots=True)
class Exported:
    """A student that was exported; without `written` its files are those of the run, byte for byte."""

    round: int
    folder: Path
    written: WrittenWeights | None


def export(
    project: Project,
    target: Path,
    *,
    round_number: int | None,
    adapter: bool = False,
    dtype: DtypeName | None = None,
    measure: bool = True,
) -> Exported:
    """The student written to `target`: of a round, or the last trained one.

    A student with a LoRA adapter is merged with the model below, unless `adapter` asks for the adapter alone. `dtype`
    is that of the weights, else the student's own. With `measure`, weights that are written anew are compared with
    those that were trained. Every file is checked against its sha256. Raises RecipeError when there is no such student
    or the target is not empty.
    """
    if not is_vacant(target):
        raise RecipeError(
            f"{target}: exists and is not an empty folder", hint="name a folder that is not there yet"
        )
    if adapter and project.recipe.student.lora is None:
        raise RecipeError(
            "--adapter: the student has none, all its weights are trained", hint="leave --adapter out"
        )
    if adapter and dtype not in (None, "float32"):
        raise RecipeError(f"--dtype {dtype}: an adapter is float32", hint="leave --adapter out, or --dtype")
    number, folder = _student_folder(project, round_number)
    has_adapter = _has_adapter(project, number)
    if adapter and not has_adapter:
        raise RecipeError(
            "--adapter: student 0 has none, the adapter begins in round 1", hint=f"kdpipe run {project.named}"
        )
    is_merged = has_adapter and not adapter
    is_cast = dtype is not None and not adapter and dtype != _dtype_of(folder)
    done: list[WrittenWeights] = []

    def write(draft: Path) -> None:
        if is_merged or is_cast:
            done.append(_write(project, number, folder, draft, dtype=dtype, measure=measure))
            return
        for file in files_below(folder):
            place = draft / file.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)

    write_folder(target, write)
    return Exported(number, target, done[0] if done else None)


def _has_adapter(project: Project, number: int) -> bool:
    """Whether the student of a round is an adapter on the model below."""
    student = project.recipe.student
    return student.lora is not None and (number > 0 or student.warmup is not None)


def _dtype_of(folder: Path) -> str | None:
    """The dtype of the weights in a folder, as its config.json has it; None where it is an adapter's."""
    path = folder / "config.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found.get("dtype", found.get("torch_dtype"))


def _write(
    project: Project, number: int, folder: Path, target: Path, *, dtype: DtypeName | None, measure: bool
) -> WrittenWeights:
    """Writes the student in `folder`, merged with student 0 where it is an adapter.

    A worker does it: torch is not for this process.
    """
    student, runtime = project.recipe.student, project.recipe.runtime
    has_adapter, start = _has_adapter(project, number), None
    if student.warmup is not None:
        start = Sources(project.loaded, project.workspace).fetch()[STUDENT]
    elif number > 0:
        with contextlib.suppress(RecipeError):  # it may be dropped since
            start = _student_folder(project, 0)[1]
    assert start is not None or not has_adapter
    request = WriteWeights(
        folder=start if has_adapter and start else folder,
        adapter=folder if has_adapter else None,
        start=start,
        target=target,
        dtype=dtype or student.dtype,
        device=runtime.device,
        trust_remote_code=student.trust_remote_code,
        rollouts=_rollouts(project, number) if measure else None,
    )
    threads = {} if runtime.threads is None else {"OMP_NUM_THREADS": str(runtime.threads)}
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **threads}
    log = project.workspace / "logs" / "export.log"
    worker = Worker("kdpipe.models.export:ExportServer", WEIGHTS, log=log, environment=environment)
    try:
        found = worker.call(request)
    finally:
        worker.stop()
    assert found is not None
    return found


def _rollouts(project: Project, number: int) -> Path | None:
    """The file of what the student sampled in this round, or the nearest before; None where none is there."""
    for step in reversed(project.plan.steps):
        is_student = step.stage == Stage.ROLLOUT and not step.subject
        if is_student and step.round <= max(number, 1) and project.store.entry(step).manifest():
            return project.store.entry(step).opened(ROLLOUTS_FILE) / ROLLOUTS_FILE
    return None


def _student_folder(project: Project, round_number: int | None) -> tuple[int, Path]:
    candidates: list[Step] = [
        step
        for step in project.plan.steps
        if (step.stage == Stage.TRAIN and round_number in (None, step.round))
        or (step.stage == Stage.SFT and step.subject == STUDENT and round_number == 0)
    ]
    for step in reversed(candidates):
        entry = project.store.entry(step)
        manifest = entry.manifest()
        if manifest is None:
            continue
        if any(path.startswith("model/") for path in manifest.dropped):
            if round_number is None:
                continue
            raise RecipeError(
                f"student {round_number}: its weights were dropped by retention",
                hint=f"train it again from the nearest kept round: --force {step.id}, or raise runtime.keep.weights",
            )
        return step.round, entry.opened("model") / "model"
    if round_number == 0 and project.recipe.student.model is not None:
        return 0, Sources(project.loaded, project.workspace).fetch()[STUDENT]
    which = f"student {round_number}" if round_number is not None else "a trained student"
    untrained = "; --round 0 means the model that training begins with" if round_number is None else ""
    raise RecipeError(f"{which} is not there yet", hint=f"kdpipe run {project.named}{untrained}")
