"""What the mirror remembers: no MLflow for a finished run, also in a copy; no kill shows anything twice."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from pydantic import ValidationError

from kdpipe.tracking import mirror as mirroring
from kdpipe.tracking.memory import MIRROR, read_memory
from kdpipe.tracking.mirror import MlflowMirror
from kdpipe.tracking.pending import pending, waiting
from kdpipe.tracking.run import MlflowRun
from tests.mirrored import World, make_world, mirror
from tests.wire import frame_of


@pytest.fixture
def world(mlflow_database: Path, tmp_path: Path) -> World:
    workspace = tmp_path / "one"
    workspace.mkdir()
    shutil.copy(mlflow_database, workspace / "mlflow.db")
    return make_world(workspace)


class NearMirror:
    """A mirror's process in this one, which counts how often it would have been started."""

    pid = None

    started = 0

    def __init__(self, *_arguments: Any, **_settings: Any) -> None:
        self._is_started = False

    def call(self, message: Any, **_settings: Any) -> Any:
        NearMirror.started += not self._is_started
        self._is_started = True
        return mirror(message)

    def kill(self) -> None: ...


def finished_run_starts(world: World) -> int:
    """How often MLflow is started by a `run` that finds everything done."""
    before = NearMirror.started
    assert MlflowMirror(world.request()).finish("FINISHED") is None
    return NearMirror.started - before


def test_a_finished_run_in_a_copied_workspace_starts_no_mlflow_from_the_second_time_on(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirroring, "Worker", NearMirror)
    (world.run.path / "report.html").write_text("first")
    world.finish_everything()
    assert (finished_run_starts(world), finished_run_starts(world)) == (1, 0)
    copy = replace(world, workspace=tmp_path / "two")
    shutil.copytree(world.workspace, copy.workspace, symlinks=True)
    kept = sorted((path, path.stat().st_mtime_ns) for path in world.workspace.rglob("*"))
    environment = json.loads((copy.run.path / "environment.json").read_text())
    (copy.run.path / "environment.json").write_text(json.dumps({**environment, "cpu_cores": 1234}))
    copy.run.write_recipe(replace(copy.loaded, path=tmp_path / "elsewhere.yaml"))
    (copy.run.path / "report.html").write_text("second")
    assert finished_run_starts(copy) <= 1
    assert finished_run_starts(copy) == 0
    assert waiting(copy.run.path) == []
    assert sorted((path, path.stat().st_mtime_ns) for path in world.workspace.rglob("*")) == kept


def test_a_finished_run_whose_report_changed_is_waiting_until_it_is_mirrored(world: World) -> None:
    world.finish_everything()
    world.sync("FINISHED")
    assert waiting(world.run.path) == []
    (world.run.path / "report.html").write_text("new")
    assert waiting(world.run.path) == ["MLflow does not have the latest report.html: the next run mirrors it"]
    assert pending(world.run.path) == 0
    world.sync("FINISHED")
    assert waiting(world.run.path) == []


OFTEN = ("log_batch", "set_terminated", "create_run")


@pytest.mark.parametrize(
    "moment",
    [*OFTEN, *(pytest.param(call, marks=pytest.mark.slow) for call in ("log_text", "log_inputs", "get_run"))],
)
def test_a_kill_after_any_call_loses_nothing_and_shows_nothing_twice(
    world: World, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """The end of the process."""

    world.finish_everything()
    (world.run.path / "report.html").write_text("report")
    real: Callable[..., Any] = getattr(MlflowClient, moment)
    calls = 0

    def kill(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        found = real(*given, **named)
        if calls % 3 == 1:
            raise Killed
        return found

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, moment, kill)
        for attempt in range(4):
            step = ("train@1", ("train/loss", 0.5, 1), ("train/loss", 0.25, 2))
            world.finish(*step, after=100.0 + attempt)  # performed again between two kills
            try:
                world.sync("FINISHED")
            except Killed:
                continue
    world.sync("FINISHED")
    assert calls > 0
    assert waiting(world.run.path) == []
    assert world.statuses() == ["FINISHED"]
    rows = world.metrics()
    assert len(rows) == len(set(rows))
    assert ("Headline/train_step.loss", 2, 0.25) in rows
    assert len(world.query("select * from inputs")) == 2


def test_a_step_that_is_performed_again_after_a_kill_before_it_was_noted_is_not_shown_twice(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """The end of the process."""

    def flush_and_die(run: MlflowRun) -> int:
        flush(run)
        raise Killed

    flush = MlflowRun.flush
    world.sync()
    world.finish("train@1", ("train/loss", 0.5, 1))
    with monkeypatch.context() as patch:
        patch.setattr(MlflowRun, "flush", flush_and_die)
        with pytest.raises(Killed):
            world.sync()
    assert pending(world.run.path) == 1
    world.finish("train@1", ("train/loss", 0.5, 1), after=60)
    world.sync()
    assert world.metrics() == [("Headline/train_step.loss", 1, 0.5)]


def test_a_lost_memory_does_not_show_a_step_twice_that_was_performed_again(world: World) -> None:
    world.finish("train@1", ("train/loss", 0.5, 1), ("train/loss", 0.25, 2))
    world.sync()
    world.finish("train@1", ("train/loss", 0.5, 1), ("train/loss", 0.125, 2), after=60)
    (world.run.path / "mlflow.json").write_bytes(b"torn")
    world.sync()
    assert world.metrics() == [
        ("Headline/train_step.loss", 1, 0.5),
        ("Headline/train_step.loss", 2, 0.125),
        ("Headline/train_step.loss", 2, 0.25),
    ]


def test_a_memory_of_an_older_kdpipe_still_says_which_mlflow_run_it_is(world: World) -> None:
    world.finish_everything()
    world.sync("FINISHED")
    once = world.metrics()
    path = world.run.path / "mlflow.json"
    now = json.loads(path.read_text())
    old = {name: now[name] for name in ("key", "uri", "experiment", "wanted", "status", "run_id", "refused")}
    path.write_text(json.dumps({**old, "mirrored": {}, "datasets": ["train x"], "artifacts": {"a": "b"}}))
    world.sync("FINISHED")
    memory = read_memory(world.run.path)
    assert memory is not None
    assert memory.run_id == now["run_id"]
    assert world.metrics() == once


def test_what_parent_and_mirror_say_is_refused_where_it_is_not_known(world: World) -> None:
    frame = frame_of("call", world.request())
    assert MIRROR.request(frame) == world.request()
    body = json.loads(frame.body)
    for field, value in (("hurry", True), ("status", "SOON")):
        with pytest.raises(ValidationError, match=field):
            MIRROR.request(replace(frame, body=json.dumps({**body, field: value}).encode()))


def test_what_is_pending_is_known_without_mlflow_and_torch(world: World) -> None:
    world.finish_everything()
    program = (
        "import sys, pathlib\n"
        "from kdpipe.tracking.pending import pending, waiting\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "heavy = [name for name in ('mlflow', 'torch', 'numpy', 'pyarrow') if name in sys.modules]\n"
        "print(pending(folder), len(waiting(folder)), heavy)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(world.run.path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(len(world.steps)), "1", "[]"]
