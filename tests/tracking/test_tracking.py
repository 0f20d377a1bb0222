"""The mirror against a real SQLite store; the entries are made up, the files and MLflow are not."""

from __future__ import annotations

import json
import queue
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from kdpipe.errors import KdpipeError
from kdpipe.recipe.file import load_recipe
from kdpipe.store.artifacts import Draft, Store
from kdpipe.store.locks import run_lock
from kdpipe.tracking import mirror as mirroring
from kdpipe.tracking import page as serving
from kdpipe.tracking.items import MAX_VALUE, flatten
from kdpipe.tracking.memory import (
    ENVIRONMENT,
    MirrorRequest,
    MirrorResult,
    database_uri,
    read_memory,
    write_memory,
)
from kdpipe.tracking.mirror import MlflowMirror, settle
from kdpipe.tracking.pending import is_finished, pending, unsettled
from kdpipe.tracking.run import beating, without_secret
from kdpipe.tracking.steps import metric_name
from kdpipe.tracking.synchronizer import Synchronizer
from tests.mirrored import RECIPE, T0, World, make_world, mirror


@pytest.fixture
def workspace(mlflow_database: Path, tmp_path: Path) -> Path:
    shutil.copy(mlflow_database, tmp_path / "mlflow.db")
    return tmp_path


@pytest.fixture
def world(workspace: Path) -> World:
    return make_world(workspace)


# ----------------------------------------------------------------------------------------------- headroom


def test_a_teachers_headroom_is_a_tag_of_the_run(world: World) -> None:
    world.finish("evaluate:student@0", ("evaluate/accuracy", 0.1, None))
    world.sync()
    assert world.query("select value from tags where key like 'headroom%'") == []
    world.finish("evaluate:teacher@0", ("evaluate/accuracy_change", 0.125, None))
    world.sync()
    [(name, text)] = world.query("select key, value from tags where key like 'headroom%'")
    assert name == "headroom"
    assert text == (
        "accuracy 50.0%, headroom +12.5 points (paired 95 % interval +3.0 to +22.0, p = 0.004) on 200 problems"
    )
    assert ("evaluate_teacher/accuracy_change", 0, 0.125) in world.metrics()


# ------------------------------------------------------------------------------------------------ metrics


def test_every_metric_is_there_once_with_its_step(world: World) -> None:
    world.finish("sft:student@0", ("sft/loss", 3.0, 1), ("sft/loss", 2.0, 2), ("time/sft_seconds", 7.0, None))
    world.finish("sft:teacher@0", ("sft/loss", 1.0, 1), ("time/sft_seconds", 8.0, None))
    world.finish("evaluate:student@0", ("evaluate/accuracy", 0.1, None), ("time/evaluate_seconds", 2.0, None))
    world.finish("evaluate:teacher@0", ("evaluate/accuracy", 0.9, None), ("time/evaluate_seconds", 3.0, None))
    world.finish("rollout@1", ("rollout/reward_mean", 0.25, None))
    world.finish("teacher-score@1", ("score/reverse_kl_nats", 1.5, None))
    world.finish(
        "train@1", ("train/loss", 0.5, 7), ("train/loss", 0.4, 8), ("train/mismatch_nats_p99", 0.01, None)
    )
    expected = [
        ("Headline/evaluate.accuracy", 0, 0.1),
        ("evaluate_teacher/accuracy", 0, 0.9),
        ("Headline/rollout.reward_mean", 1, 0.25),
        ("Headline/score.reverse_kl_nats", 1, 1.5),
        ("sft/student/loss", 1, 3.0),
        ("sft/student/loss", 2, 2.0),
        ("sft/teacher/loss", 1, 1.0),
        ("time/evaluate_seconds", 0, 2.0),
        ("time/evaluate_teacher_seconds", 0, 3.0),
        ("time/sft_student_seconds", 0, 7.0),
        ("time/sft_teacher_seconds", 0, 8.0),
        ("train/mismatch_nats_p99", 1, 0.01),
        ("Headline/train_step.loss", 7, 0.5),
        ("Headline/train_step.loss", 8, 0.4),
    ]
    assert world.sync() == len(expected)
    assert world.metrics() == sorted(expected)
    assert {row[0] for row in world.query("select timestamp from metrics")} == {round(T0 * 1000)}


def test_a_second_sync_logs_only_what_is_new(world: World) -> None:
    warm = Synchronizer()
    world.finish("rollout@1", ("rollout/reward_mean", 0.25, None))
    assert world.sync(synchronizer=warm) == 1
    assert world.sync(synchronizer=warm) == 0
    assert world.sync() == 0
    world.finish("rollout@2", ("rollout/reward_mean", 0.5, None))
    assert pending(world.run.path) == 1
    assert world.sync(synchronizer=warm) == 1
    assert pending(world.run.path) == 0
    assert world.metrics() == [
        ("Headline/rollout.reward_mean", 1, 0.25),
        ("Headline/rollout.reward_mean", 2, 0.5),
    ]
    assert len(world.statuses()) == 1


def test_a_kill_between_logging_and_noting_it_leaves_no_duplicates(world: World) -> None:
    world.sync()
    before = (world.run.path / "mlflow.json").read_bytes()
    world.finish_everything()
    logged = world.sync()
    once = world.metrics()
    (world.run.path / "mlflow.json").write_bytes(before)
    assert world.sync() == logged > 0
    assert world.metrics() == once
    assert len(once) == logged


def test_a_lost_memory_finds_its_run_again(world: World) -> None:
    world.finish_everything()
    world.sync()
    once = world.metrics()
    (world.run.path / "mlflow.json").unlink()
    world.sync()
    assert world.metrics() == once
    assert world.statuses() == ["RUNNING"]


def test_on_a_shared_server_only_the_key_tells_whose_run_it_is(workspace: Path) -> None:
    uri = database_uri(workspace / "mlflow.db")
    mine = make_world(workspace)
    mine = World(mine.workspace, mine.loaded, uri)
    mine.sync()
    memory = read_memory(mine.run.path)
    assert memory is not None
    write_memory(mine.run.path, memory.model_copy(update={"run_id": None}))  # killed after creation
    mine.sync()
    assert len(mine.statuses()) == 1
    (mine.run.path / "mlflow.json").unlink()  # as in another workspace with the same recipe
    mine.sync()
    assert len(mine.statuses()) == 2


def test_a_run_deleted_in_mlflow_is_made_again_whole(world: World) -> None:
    from mlflow import MlflowClient

    world.finish_everything()
    count = world.sync()
    memory = read_memory(world.run.path)
    assert memory is not None
    MlflowClient(database_uri(world.workspace / "mlflow.db")).delete_run(memory.run_id)
    assert world.sync() == count
    now = read_memory(world.run.path)
    assert now is not None
    assert now.run_id != memory.run_id
    assert len(world.metrics()) == 2 * count


def test_a_step_performed_again_adds_only_what_changed_and_shows_it(world: World) -> None:
    world.finish("train@1", ("train/loss", 0.5, 1), ("train/loss", 0.4, 2), ("time/train_seconds", 9.0, None))
    world.sync()
    world.finish(
        "train@1", ("train/loss", 0.5, 1), ("train/loss", 0.4, 2), ("time/train_seconds", 3.0, None), after=60
    )
    assert world.sync() == 1
    assert [row for row in world.metrics() if row[0] == "Headline/train_step.loss"] == [
        ("Headline/train_step.loss", 1, 0.5),
        ("Headline/train_step.loss", 2, 0.4),
    ]
    assert world.query("select value from latest_metrics where key = 'time/train_seconds'") == [(3.0,)]


def test_more_metrics_than_one_batch_takes(world: World) -> None:
    rows = [("train/loss", float(index), index) for index in range(2345)]
    world.finish("rollout@1", ("rollout/reward_mean", 0.5, None))
    world.finish("train@1", *rows)
    assert world.sync() == 2346
    assert world.query(
        "select count(*), min(step), max(step) from metrics where key = 'Headline/train_step.loss'"
    ) == [(2345, 0, 2344)]


def test_a_step_that_is_linked_but_not_finished_is_not_mirrored(world: World) -> None:
    step = world.steps["rollout@1"]
    entry = Store(world.workspace).entry(step)
    Draft(entry, step, note=lambda _kind, _fields: None).metric("rollout/reward_mean", 1.0)
    world.run.link(step, entry)
    assert pending(world.run.path) == 0
    assert world.sync() == 0


def test_a_second_run_gets_the_metrics_of_the_steps_it_reuses(workspace: Path) -> None:
    first = make_world(workspace, "first")
    first.finish_everything()
    count = first.sync("FINISHED")
    second = make_world(workspace, "second")
    assert second.run.path != first.run.path
    for step in second.steps.values():
        second.run.link(step, Store(workspace).entry(step))
    assert second.sync("FINISHED") == count
    by_run = second.query("select run_uuid, count(*) from metrics group by run_uuid")
    assert [number for _, number in by_run] == [count, count]


# -------------------------------------------------------------------------------- params, tags, artifacts


def test_params_are_logged_once_though_runtime_changed(workspace: Path) -> None:
    make_world(workspace).sync("KILLED")
    again = make_world(workspace, overrides=("runtime.threads=1", "student.scratch.num_layers=2"))
    again.sync()
    params = dict(again.query("select key, value from params"))
    assert params["runtime.threads"] == "null"  # what it was first: MLflow lets no param change
    assert params["student.scratch.hidden_size"] == "96"
    assert params["teachers.0.name"] == "teacher"
    assert params["name"] == "tiny"
    leaves = dict(flatten(json.loads((again.run.path / "resolved.json").read_text())["recipe"]))
    assert params.keys() == leaves.keys()


def test_params_that_a_newer_recipe_adds_are_logged(world: World) -> None:
    world.sync()
    with closing(sqlite3.connect(world.workspace / "mlflow.db")) as database, database:
        database.execute("delete from params where key = 'runtime.threads'")
    memory = read_memory(world.run.path)
    assert memory is not None
    memory.sent["params"] = "of an older recipe"
    write_memory(world.run.path, memory)
    world.sync()
    assert world.query("select value from params where key = 'runtime.threads'") == [("null",)]


def test_tags_datasets_and_artifacts_tell_what_it_was(world: World) -> None:
    world.finish_everything()
    (world.run.path / "report.html").write_text("<p>first</p>")
    (world.run.path / "figures").mkdir()
    (world.run.path / "figures" / "accuracy.svg").write_text("<svg/>")
    (world.run.path / "figures" / ".tmp-reward.svg").write_text("<svg")  # a kill left it: not shown
    world.sync()
    tags = dict(world.query("select key, value from tags"))
    assert tags["kdpipe.run"] == tags["mlflow.runName"] == world.run.name
    assert (tags["student"], tags["teacher"], tags["mlflow.source.name"]) == ("scratch", "scratch", "kdpipe")
    assert tags["environment.python"].startswith("3.")
    assert world.query("select name from experiments where name = 'tiny'")
    kinds = world.query("select value from experiment_tags where key = 'mlflow.experimentKind'")
    assert kinds == [("custom_model_development",)]
    data = sorted(name for (name,) in world.query("select name from datasets"))
    assert data == ["arithmetic/test", "arithmetic/train"]
    assert len(world.query("select * from inputs")) == 2
    (artifacts,) = (world.workspace / "mlartifacts").glob("*/artifacts")
    found = sorted(path.relative_to(artifacts).as_posix() for path in artifacts.rglob("*") if path.is_file())
    assert found == [
        "environment.json",
        "evaluate/round-000-student.json",
        "evaluate/round-000-teacher.json",
        "evaluate/round-001-student.json",
        "evaluate/round-002-student.json",
        "figures/accuracy.svg",
        "recipe.yaml",
        "report.html",
        "resolved.json",
        "tables/evaluate-round-000.json",
        "tables/evaluate-round-001.json",
        "tables/evaluate-round-002.json",
        "tables/samples-round-001.json",
        "tables/samples-round-002.json",
    ]
    (world.run.path / "report.html").write_text("<p>second</p>")
    world.sync()
    assert (artifacts / "report.html").read_text() == "<p>second</p>"
    assert len(world.query("select * from inputs")) == 2


def test_several_teachers_are_tagged_by_name_and_each_has_metrics_of_its_own(workspace: Path) -> None:
    teachers = "teachers: [{name: a, scratch: {}, sft: {steps: 2}}, {name: b, self: initial}]"
    path = workspace / "several.yaml"
    path.write_text(
        RECIPE.format(name="several", rounds=1).replace(
            "teachers: [{scratch: {}, sft: {steps: 2}}]", teachers
        )
    )
    world = World(workspace, load_recipe(path))
    world.run.path.mkdir(parents=True)
    world.run.write_recipe(world.loaded)
    world.finish("evaluate:a@0", ("evaluate/accuracy", 0.25, None))
    world.finish("evaluate:b@0", ("evaluate/accuracy", 0.75, None))
    world.finish("teacher-score:a@1", ("score/a/reverse_kl_nats", 0.5, None))
    world.sync()
    assert dict(world.query("select key, value from tags"))["teacher"] == "a: scratch, b: self"
    assert dict(world.query("select key, value from metrics")) == {
        "evaluate_teacher/a/accuracy": 0.25,
        "evaluate_teacher/b/accuracy": 0.75,
        "score/a/reverse_kl_nats": 0.5,
    }


def test_a_workspace_that_was_moved_writes_nothing_to_its_old_place(world: World, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
    shutil.copy(world.workspace / "mlflow.db", old / "mlflow.db")
    before = make_world(old)
    before.finish("rollout@1", ("rollout/reward_mean", 0.5, None))
    before.sync()
    new.rmdir()
    old.rename(new)
    moved = make_world(new)
    moved.finish("rollout@2", ("rollout/reward_mean", 0.5, None))
    (moved.run.path / "report.html").write_text("report")
    assert moved.sync() == 1
    assert not old.exists()


NAMES = ["a%20b;c?d=e#f g", "ä ö", "a?b=c", "a#b", "a%20b", "a b", "file:x", "~"]


@pytest.mark.parametrize(
    "name", [NAMES[0], *(pytest.param(one, marks=pytest.mark.slow) for one in NAMES[1:])]
)
def test_a_workspace_of_any_name_keeps_database_and_files_inside(
    name: str, mlflow_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    workspace = tmp_path / "above" / name
    workspace.mkdir(parents=True)
    world = make_world(workspace)
    if name == NAMES[0]:  # else MLflow makes it, in the same way
        shutil.copy(mlflow_database, workspace / "mlflow.db")
    world.finish_everything()
    assert world.sync("FINISHED") > 0
    assert world.statuses() == ["FINISHED"]
    assert any(path.is_file() for path in (workspace / "mlartifacts").rglob("*"))
    assert [path.name for path in tmp_path.iterdir()] == ["above"]
    assert [path.name for path in (tmp_path / "above").iterdir()] == [name]


def test_a_password_in_the_address_goes_nowhere(world: World) -> None:
    uri = "postgresql://kim:hunter2@db/mlflow"
    text = without_secret(f"cannot reach {uri}", uri)
    assert text == "cannot reach postgresql://***@db/mlflow"
    assert without_secret("plain", "sqlite:////tmp/a@b.db") == "plain"


@pytest.mark.parametrize(
    ("name", "stage", "subject", "per_step", "expected"),
    [
        ("train/loss", "train", "", True, "Headline/train_step.loss"),
        ("train/learning_rate", "train", "", True, "train_step/learning_rate"),
        ("train/loss", "train", "", False, "train/loss"),
        ("sft/loss", "sft", "student", True, "sft/student/loss"),
        ("speed/sft_tokens_per_second", "sft", "qwen", False, "speed/sft_teacher_tokens_per_second"),
        ("evaluate/accuracy", "evaluate", "student", False, "Headline/evaluate.accuracy"),
        ("evaluate/accuracy_strict", "evaluate", "student", False, "evaluate/accuracy_strict"),
        ("evaluate/accuracy", "evaluate", "qwen", False, "evaluate_teacher/accuracy"),
        ("time/evaluate_seconds", "evaluate", "qwen", False, "time/evaluate_teacher_seconds"),
        ("score/reverse_kl_nats", "teacher-score", "", False, "Headline/score.reverse_kl_nats"),
    ],
)
def test_metric_names_keep_students_teachers_steps_and_rounds_apart(
    name: str, stage: str, subject: str, per_step: bool, expected: str
) -> None:
    assert metric_name(name, stage=stage, subject=subject, per_step=per_step) == expected


@pytest.mark.parametrize(
    ("name", "stage", "subject", "expected"),
    [
        ("sft/loss", "sft", "student", "sft/student/loss"),
        ("sft/loss", "sft", "qwen", "sft/teacher/qwen/loss"),
        ("speed/sft_tokens_per_second", "sft", "qwen", "speed/sft_teacher/qwen_tokens_per_second"),
        ("evaluate/accuracy", "evaluate", "student", "Headline/evaluate.accuracy"),
        ("evaluate/accuracy", "evaluate", "qwen", "evaluate_teacher/qwen/accuracy"),
        ("score/qwen/reverse_kl_nats", "teacher-score", "qwen", "score/qwen/reverse_kl_nats"),
        ("score/reverse_kl_nats", "train", "", "Headline/score.reverse_kl_nats"),
    ],
)
def test_metric_names_keep_several_teachers_apart(name: str, stage: str, subject: str, expected: str) -> None:
    assert metric_name(name, stage=stage, subject=subject, per_step=False, several=True) == expected


def test_bounds_are_tags_and_no_metrics(world: World) -> None:
    rows = [
        (f"evaluate/accuracy{end}", value, None)
        for end, value in (("", 0.5), ("_low", 0.43), ("_high", 0.57))
    ]
    world.finish("evaluate:student@1", *rows)
    world.finish("evaluate:teacher@0", *rows, accuracy_low=0.25)
    world.sync()
    assert [name for name, _, _ in world.metrics()] == [
        "Headline/evaluate.accuracy",
        "evaluate_teacher/accuracy",
    ]
    tags = world.tags()
    assert tags["interval.accuracy"] == "0.43 to 0.57, round 1"
    assert tags["interval.accuracy_change"] == "0.03 to 0.22, round 1"
    assert tags["interval.teacher.accuracy"] == "0.25 to 0.57, round 0"


def test_flatten_names_every_leaf_as_mlflow_takes_it() -> None:
    assert [len(text) for _, text in flatten({"a": "x" * 9000})] == [MAX_VALUE]
    value = {"a": {"b": 1, "c": {}}, "d": [{"e": None}, {"e": True}], "f": [1, 2], "weird/$key": "text"}
    assert dict(flatten(value)) == {
        "a.b": "1",
        "a.c": "{}",
        "d.0.e": "null",
        "d.1.e": "true",
        "f": "[1, 2]",
        "weird__key": "text",
    }


# ------------------------------------------------------------------------------------------------- status


def test_the_status_follows_the_run(world: World) -> None:
    warm = Synchronizer()
    for status in ("RUNNING", "FAILED", "RUNNING", "KILLED", "FINISHED"):
        world.sync(status, warm)
        assert world.statuses() == [status]


def test_a_run_that_a_later_command_tells_of_ended_with_its_last_step(world: World) -> None:
    world.run.event("step done")
    with run_lock(world.run.path):
        world.sync("FINISHED")
    assert world.query("select end_time from runs") == [(round(world.run.events()[-1].time * 1000),)]


def test_a_run_that_was_killed_is_settled_by_whoever_sees_its_lock_free(world: World) -> None:
    world.sync()
    world.run.event("part done")
    with run_lock(world.run.path):
        assert unsettled(world.workspace) == []
    (request,) = unsettled(world.workspace)
    assert (request.folder, request.status) == (world.run.path, "KILLED")
    mirror(request)
    assert world.statuses() == ["KILLED"]
    assert world.query("select end_time from runs") == [(round(world.run.events()[-1].time * 1000),)]
    assert unsettled(world.workspace) == []
    assert settle(world.workspace) == []


@pytest.mark.slow
def test_the_mirror_delivers_and_settles_without_its_parent_importing_mlflow(workspace: Path) -> None:
    killed = make_world(workspace, "killed")
    killed.sync()
    world = make_world(workspace, "alive")
    world.finish_everything()
    with run_lock(world.run.path):
        program = (
            "import sys, time\n"
            "from pydantic import TypeAdapter\n"
            "from kdpipe.tracking.memory import MirrorRequest\n"
            "from kdpipe.tracking.mirror import MlflowMirror\n"
            "mirror = MlflowMirror(TypeAdapter(MirrorRequest).validate_json(sys.argv[1]))\n"
            "start = time.monotonic(); mirror.nudge(); nudged = time.monotonic() - start\n"
            "while mirror._progress_at == 0.0: time.sleep(0.05)\n"
            "mirror.finish('FINISHED')\n"
            "print(nudged, mirror.error, 'mlflow' in sys.modules, 'torch' in sys.modules)\n"
        )
        request = TypeAdapter(MirrorRequest).dump_json(world.request()).decode()
        done = subprocess.run(
            [sys.executable, "-c", program, request], capture_output=True, text=True, check=True
        )
    nudged, *rest = done.stdout.split()
    assert float(nudged) < 0.2
    assert rest == ["None", "False", "False"]
    assert pending(world.run.path) == 0
    statuses = dict(world.query("select name, status from runs"))
    assert statuses[world.run.name] == "FINISHED"
    assert statuses[killed.run.name] in ("RUNNING", "KILLED")  # settled when there was time for it


def dead_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def test_a_refused_connection_fails_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    dead = World(world.workspace, world.loaded, f"http://{dead_address()}")
    start = time.monotonic()
    with pytest.raises(KdpipeError, match=r"MLflow at http://127"):
        dead.sync()
    assert time.monotonic() - start < 10


def test_a_memory_with_a_password_of_an_older_kdpipe_is_left_alone(world: World) -> None:
    world.sync()
    memory = read_memory(world.run.path)
    assert memory is not None
    old = memory.model_copy(update={"uri": "http://kim:hunter2@host", "status": "RUNNING"})
    write_memory(world.run.path, old)
    assert unsettled(world.workspace) == []


def test_a_finished_run_that_is_repeated_asks_mlflow_for_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    class Asked:
        """Notes what status MLflow is asked to show."""

        pid = None

        def __init__(self, *_arguments: Any, **_settings: Any) -> None: ...

        def call(self, request: MirrorRequest, **_settings: Any) -> MirrorResult:
            asked.append(request.status)
            return MirrorResult(run_id="1", metrics=0)

        def kill(self) -> None: ...

    def statuses(*, nudged: bool = False, status: str = "FINISHED") -> list[str]:
        asked.clear()
        mirror = MlflowMirror(world.request())
        if nudged:
            mirror.nudge()
        assert mirror.finish(status) is None
        return list(asked)

    monkeypatch.setattr(mirroring, "Worker", Asked)
    world.finish_everything()
    assert statuses()[-1] == "FINISHED"  # nothing is mirrored yet
    monkeypatch.undo()
    world.sync("FINISHED")
    monkeypatch.setattr(mirroring, "Worker", Asked)
    assert statuses() == []
    assert statuses(nudged=True)[-1] == "FINISHED"
    assert statuses(status="FAILED")[-1] == "FAILED"
    (world.run.path / "report.html").write_text("new")
    assert statuses()[-1] == "FINISHED"
    (world.run.path / "report.html").unlink()
    assert statuses() == []
    database = world.workspace / "mlflow.db"
    database.rename(world.workspace / "gone")
    assert statuses()[-1] == "FINISHED"
    (world.workspace / "gone").rename(database)
    assert statuses() == []
    elsewhere = World(world.workspace, world.loaded, f"http://{dead_address()}")
    assert not is_finished(elsewhere.request())


@pytest.mark.slow
def test_a_dead_server_costs_seconds_and_loses_nothing(world: World) -> None:
    world.finish_everything()
    dead = World(world.workspace, world.loaded, f"http://{dead_address()}")
    mirror = MlflowMirror(dead.request())
    mirror.nudge()
    start = time.monotonic()
    mirror.finish("FINISHED")
    assert time.monotonic() - start < mirroring.LONGEST_SECONDS + 2
    assert mirror.error is not None
    assert mirror._has_ended.is_set()
    assert "not mirrored" in (world.run.path / "logs" / "tracking.log").read_text()
    assert pending(world.run.path) == len(world.steps)
    (request,) = unsettled(world.workspace)
    assert request.status == "FINISHED"
    assert world.sync(request.status) > 0
    assert pending(world.run.path) == 0
    assert world.statuses() == ["FINISHED"]


def test_a_mirror_that_cannot_even_start_is_delivered_by_the_next_command(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirroring, "LONGEST_SECONDS", 0.0)  # MLflow is not even imported by then
    world.finish_everything()
    mirror = MlflowMirror(world.request())
    assert mirror.finish("FINISHED") is not None
    (request,) = unsettled(world.workspace)
    assert request.status == "FINISHED"
    assert world.sync(request.status) > 0
    assert (pending(world.run.path), world.statuses()) == (0, ["FINISHED"])


@pytest.mark.parametrize("status", ["KILLED", "FINISHED"])
@pytest.mark.slow
def test_a_server_that_never_answers_does_not_hold_up_a_stop(world: World, status: str) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        mute = World(world.workspace, world.loaded, f"http://127.0.0.1:{silent.getsockname()[1]}")
        mirror = MlflowMirror(mute.request())
        start = time.monotonic()
        mirror.finish(status, patience=lambda: 2.0)  # a signal came when all was done
        assert time.monotonic() - start < 5
        assert mirror.error is not None


@pytest.mark.parametrize("status", ["KILLED", pytest.param("FINISHED", marks=pytest.mark.slow)])
def test_a_second_signal_leaves_a_note_of_what_was_not_delivered(world: World, status: str) -> None:
    class SecondSignal(Exception):
        """What the handler of a signal raises in the thread that waits."""

    def raise_it(*_: object) -> None:
        raise SecondSignal

    world.finish_everything()
    world.sync("RUNNING")
    world.finish("evaluate:student@0", ("evaluate/accuracy", 0.1, None))
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        mute = World(world.workspace, world.loaded, f"http://127.0.0.1:{silent.getsockname()[1]}")
        mirror = MlflowMirror(mute.request())
        mirror.nudge()
        before = signal.signal(signal.SIGALRM, raise_it)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.35)  # while it waits
            with pytest.raises(SecondSignal):
                mirror.finish(status)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert (
            mirror._has_ended.is_set()
        )  # by itself: nothing that goes on may write what it thinks is wanted
    memory = read_memory(world.run.path)
    assert memory is not None
    assert memory.wanted == status


def test_a_database_that_takes_long_to_make_is_no_silence() -> None:
    told: queue.Queue[Any] = queue.Queue()
    with beating(lambda: told.put("alive")):
        assert told.get(timeout=10) == "alive"


def test_an_unknown_place_is_a_clear_error(world: World) -> None:
    nowhere = World(world.workspace, world.loaded, "file:///nowhere")
    with pytest.raises(KdpipeError, match="MLflow at file:///nowhere"):
        nowhere.sync()


# --------------------------------------------------------------------------------------------------- page


def test_the_page_takes_the_next_free_port() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert serving.free_port("127.0.0.1", port) > port


def test_the_page_is_served_over_the_workspace(tmp_path: Path) -> None:
    command = serving.ui_command(tmp_path, "127.0.0.1", 5001)
    assert command[:4] == [sys.executable, "-m", "mlflow", "server"]
    assert f"sqlite:///{tmp_path.resolve()}/mlflow.db" in command
    assert command[command.index("--host") + 1] == "127.0.0.1"


@pytest.mark.parametrize(("arguments", "host"), [([], "127.0.0.1"), (["--host", "0.0.0.0"], "0.0.0.0")])
def test_the_page_is_for_this_machine_alone_unless_told(
    arguments: list[str], host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from kdpipe.cli.app import app

    started: list[list[str]] = []

    class Page:
        """Notes the command that would serve the page, and ends."""

        pid = 0

        def __init__(self, command: list[str], **_settings: object) -> None:
            started.append(command)

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(serving.subprocess, "Popen", Page)
    result = CliRunner().invoke(app, ["ui", "--workspace", str(tmp_path), *arguments])
    assert result.exit_code == 0, result.output
    [command] = started
    assert [command[at + 1] for at, word in enumerate(command) if word == "--host"] == [host]


@pytest.mark.slow
def test_a_real_page_listens_on_the_loopback_alone(tmp_path: Path) -> None:
    port = serving.free_port("127.0.0.1", 24000)
    command = [
        sys.executable,
        "-m",
        "kdpipe.cli.app",
        "ui",
        "--workspace",
        str(tmp_path),
        "--port",
        str(port),
    ]
    page = subprocess.Popen(command)
    try:
        listening: set[str] = set()
        for _ in range(600):
            assert page.poll() is None
            if listening := listeners(port):
                break
            time.sleep(0.2)
        assert listening == {"0100007F"}  # 127.0.0.1, as the kernel writes it
    finally:
        page.terminate()
        assert page.wait(timeout=20) == 0


def listeners(port: int) -> set[str]:
    """The addresses at which somebody listens on that port."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            local, state = (line.split()[column] for column in (1, 3))
            address, _, number = local.partition(":")
            if int(number, 16) == port and state == "0A":
                found.add(address)
    return found


@pytest.mark.slow
def test_a_real_server_mirrors_as_the_database_does(world: World, tmp_path: Path) -> None:
    """From a working folder whose modules it must not run."""
    import urllib.request

    trap = tmp_path / "ran"
    for name in ("queue", "random", "graphene", "fastapi", "mlflow", "colorsys", "this"):
        (tmp_path / f"{name}.py").write_text(f"open({str(trap)!r}, 'w')\n")

    port = serving.free_port("127.0.0.1", 23000)
    program = (
        "import sys, pathlib\n"
        "from kdpipe.tracking.page import serve_ui\n"
        "sys.exit(serve_ui(pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))\n"
    )
    command = [sys.executable, "-P", "-c", program, str(world.workspace), "127.0.0.1", str(port)]
    server = subprocess.Popen(command, cwd=tmp_path)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                assert server.poll() is None
                time.sleep(0.2)
        far = World(world.workspace, world.loaded, f"http://127.0.0.1:{port}")
        world.sync()
        before = (world.run.path / "mlflow.json").read_bytes()
        assert far.sync() == 0
        memory = (world.run.path / "mlflow.json").read_bytes()
        assert memory != before
        far.finish_everything()
        count = far.sync("FINISHED")
        once = far.metrics()
        assert len(once) == count
        (far.run.path / "mlflow.json").write_bytes(memory)
        assert far.sync("FINISHED") == count
        assert far.metrics() == once
        assert "FINISHED" in far.statuses()
        assert not trap.exists()
    finally:
        server.terminate()
        assert server.wait(timeout=20) == 0
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.slow
def test_settle_tells_the_end_of_killed_runs(world: World) -> None:
    world.finish_everything()
    world.sync()
    assert settle(world.workspace, seconds=200) == [world.run.name]
    assert world.statuses() == ["KILLED"]
