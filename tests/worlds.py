"""Tiny complete experiments: a recipe that runs in seconds, and ways to run it.

Everything is real (hf engine, training, store) but small: about 10,000 parameters, 16 completions a round.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from kdpipe.execution.executor import Performer
from kdpipe.pipeline.project import Project
from kdpipe.pipeline.request import (
    STEPS,
    Noted,
    Performed,
    StepEvent,
    StepRequest,
    StepResult,
    Waiting,
    Warned,
)
from kdpipe.pipeline.runner import Request, run
from kdpipe.recipe.file import LoadedRecipe, load_recipe
from kdpipe.store.durable import read_lines
from kdpipe.workers.pulse import Progressed, Stopped
from kdpipe.workers.worker import Report
from tests.wire import answered, asked, reported

_SCRATCH = {"hidden_size": 16, "intermediate_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
_TINY: dict[str, Any] = {
    "name": "tiny",
    "seed": 1,
    "rounds": 3,
    "task": {"kind": "arithmetic", "steps": [1], "max_operand": 10, "train_problems": 64, "test_problems": 8},
    "student": {"dtype": "float32", "scratch": _SCRATCH, "sft": {"steps": 6, "batch": 8}},
    "teachers": [
        {
            "dtype": "float32",
            "scratch": {**_SCRATCH, "hidden_size": 32, "num_heads": 2},
            "sft": {"steps": 10, "batch": 16, "optimizer": {"learning_rate": 5e-3}},
        }
    ],
    "rollout": {"prompts": 8, "samples": 2, "max_new_tokens": 12},
    "train": {"optimizer": {"learning_rate": 1e-3}, "minibatches": 4},
    "evaluate": {"reverse_kl_problems": 4},
    "tracking": {"enabled": False},
    "runtime": {
        "device": "cpu",
        "threads": 1,
        "part_rows": 4,
        "checkpoint_steps": 2,
        "allow_weak_teacher": True,
        "preflight": False,  # tests/doctor/test_doctor.py has it on
    },
}

SMALLEST: dict[str, Any] = {
    "rollout": {"prompts": 4, "samples": 2, "max_new_tokens": 8},
    "task__train_problems": 32,
    "task__test_problems": 4,
    "evaluate": {"reverse_kl_problems": 2},
    "train__minibatches": 2,
    "student__sft": {"steps": 2, "batch": 4},
}
"""Changes that make the recipe smaller still: one step of each kind has two of everything."""


_Dumper = yaml.CSafeDumper if yaml.__with_libyaml__ else yaml.SafeDumper


def tiny_recipe(**changes: Any) -> dict[str, Any]:
    """The recipe as a document; `a__b=value` replaces field a.b, a mapping value replaces all of a."""
    document = copy.deepcopy(_TINY)
    for path, value in changes.items():
        *parents, leaf = path.split("__")
        section = document
        for name in parents:
            section = section.setdefault(name, {})
        section[leaf] = value
    return document


def write_recipe(folder: Path, **changes: Any) -> Path:
    """The path of a recipe file in `folder` with these changes."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.dump(tiny_recipe(**changes), Dumper=_Dumper, sort_keys=False), encoding="utf-8")
    return path


def load_tiny(folder: Path, *overrides: str, **changes: Any) -> LoadedRecipe:
    """The recipe with these changes, read from a file in `folder`."""
    return load_recipe(write_recipe(folder, **changes), overrides)


class Watcher:
    """A display that remembers which steps were performed, reused after waiting, and which rounds were told."""

    def __init__(self) -> None:
        self.performed: list[str] = []
        self.rounds: list[int] = []
        self.warnings: list[str] = []
        self.notes: list[str] = []
        self.todo: int | None = None
        self.on_event: Callable[[str, dict[str, Any]], None] = lambda _step, _event: None

    def begin(self, run: Any, todo: int, reused: int) -> None:
        self.todo = todo

    def step_begins(self, step: Any) -> None:
        self.performed.append(step.id)

    def step_event(self, step: Any, event: StepEvent) -> None:
        kinds = {Progressed: "progress", Noted: "note", Warned: "warning", Waiting: "waiting"}
        self.on_event(step.id, {"kind": kinds[type(event)], **asdict(event)})

    def note(self, message: str) -> None:
        self.notes.append(message)

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    def step_ends(self, step: Any, result: Performed) -> None: ...
    def stop(self) -> None: ...

    def round_ends(self, number: int, rounds: int, metrics: dict[str, float]) -> None:
        self.rounds.append(number)


class NearServer:
    """A worker that serves in this process what it is started for."""

    def __init__(self, target: str, talk: Any, **_settings: Any) -> None:
        module, _, name = target.partition(":")
        self._server = getattr(importlib.import_module(module), name)()
        self._talk = talk

    def call(self, request: Any) -> Any:
        return answered(self._talk, self._server(asked(self._talk, request), Report(lambda _event: None)))

    def stop(self) -> None: ...


class SilentMirror:
    """A tracker that only remembers how the run ended."""

    def __init__(self) -> None:
        self.status: str | None = None

    def nudge(self) -> None: ...

    def finish(self, status: str, *, patience: Callable[[], float] = lambda: 0.0) -> None:
        self.status = status


class NearWorker:
    """Performs in this process what a worker would: nothing is imported again, nothing stays warm after stop.

    `forgetful` begins every single step as cold as a new process.
    """

    started = 0
    forgetful = False

    def __init__(
        self, target: str, talk: Any, *, log: Path, environment: Mapping[str, str] | None = None, **_more: Any
    ) -> None:
        self._performer: Performer | None = None

    def call(
        self,
        request: StepRequest,
        *,
        on_event: Callable[[StepEvent], None] = lambda _event: None,
        stop: Callable[[], bool] = lambda: False,
        tick: Callable[[], None] = lambda: None,
    ) -> StepResult | None:
        if self._performer is None or NearWorker.forgetful:
            self.kill()
            self._performer = Performer()
            NearWorker.started += 1

        def send(event: StepEvent) -> None:
            on_event(reported(STEPS, event))
            if stop():
                report.stopping.set()

        report = Report(send)
        try:
            return answered(STEPS, self._performer(asked(STEPS, request), report))
        except Stopped:
            return None

    def kill(self) -> None:
        if self._performer is not None:
            self._performer.close()  # the roles have processes of their own, here too
        self._performer = None

    def stop(self, last: StepRequest | None = None) -> None:
        self.kill()


def run_near(
    loaded: LoadedRecipe,
    workspace: Path,
    *,
    watcher: Watcher | None = None,
    mirror: SilentMirror | None = None,
    **request: Any,
) -> Project:
    """Runs the recipe without starting a process; every call begins as cold as a new command."""
    import kdpipe.pipeline.request

    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    real, kdpipe.pipeline.request.Worker = kdpipe.pipeline.request.Worker, NearWorker
    try:
        return run(
            loaded,
            workspace,
            lambda _project: Request(**request),
            display=watcher or Watcher(),
            open_mirror=lambda _project: mirror or SilentMirror(),
        )
    finally:
        kdpipe.pipeline.request.Worker = real
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(mode=deterministic)


def payload_digests(workspace: Path) -> dict[str, str]:
    """The payload digest of every committed step by its id; a workspace of one run only."""
    manifests = [json.loads(path.read_text()) for path in workspace.glob("store/*/*/manifest.json")]
    return {manifest["provenance"]["step"]: manifest["payload_digest"] for manifest in manifests}


def leftovers(workspace: Path) -> list[Path]:
    """What no finished run leaves behind: temporary files, parts, checkpoints."""
    return [
        path
        for path in workspace.rglob("*")
        if path.name.startswith(".tmp-") or path.name in ("parts", "checkpoints")
    ]


def events_of(workspace: Path) -> list[dict[str, Any]]:
    """The events of the only run in the workspace, without a line that a kill cut short."""
    [path] = workspace.glob("runs/*/events.jsonl")
    return read_lines(path)
