"""The harness finds what is lost where something is lost, and a short study of kills finds nothing."""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import tests.kills
from tests.commands import Command
from tests.disk_watch import DiskWatch
from tests.kills import Drawn, Study, Unbroken, gone, is_in, losses, mirrored, tally, unexpected, untold
from tests.worlds import events_of, load_tiny, payload_digests, run_near

KILL = Drawn("SIGKILL", "all", "moment", 0.5, 0.0)
Tamper = Callable[[Path], None]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished workspace, with as much of an MLflow database as the harness reads."""
    folder = tmp_path_factory.mktemp("finished")
    run_near(load_tiny(folder, rounds=1), folder / "out")
    with closing(sqlite3.connect(folder / "out" / "mlflow.db")) as database, database:
        database.execute("create table runs (name, status)")
        database.execute("insert into runs values ('tiny', 'FINISHED')")
        database.execute("create table metrics (key, step, value)")
        rows = [("train/loss", 1, 0.5), ("time/train_seconds", 1, 3.0), ("speed/x_tokens_per_second", 1, 9.0)]
        database.executemany("insert into metrics values (?, ?, ?)", rows)
    return folder / "out"


@pytest.fixture
def workspace(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out", symlinks=True))


def unbroken(finished: Path) -> Unbroken:
    events, digests = tally(events_of(finished)), payload_digests(finished)
    return Unbroken(1.0, 1.0, {}, digests, events, mirrored(finished))


def sql(statement: str) -> Tamper:
    def change(workspace: Path) -> None:
        with closing(sqlite3.connect(workspace / "mlflow.db")) as database, database:
            database.execute(statement)

    return change


def event(**fields: Any) -> Tamper:
    def add(workspace: Path) -> None:
        [path] = workspace.glob("runs/*/events.jsonl")
        path.write_text(path.read_text() + json.dumps(fields) + "\n")

    return add


def without(kind: str, step: str) -> Tamper:
    def remove(workspace: Path) -> None:
        [path] = workspace.glob("runs/*/events.jsonl")
        lines = [line for line in path.read_text().splitlines() if not (kind in line and f'"{step}"' in line)]
        path.write_text("\n".join(lines) + "\n")

    return remove


def other_digest(workspace: Path) -> None:
    path = next(workspace.glob("store/train/*/manifest.json"))
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "payload_digest": "another"}))


def draft(workspace: Path) -> None:
    (next(workspace.glob("store/rollout/*")) / ".tmp-rollouts.parquet").write_bytes(b"half")


def test_nothing_is_found_where_nothing_was_lost(finished: Path, workspace: Path) -> None:
    sql("delete from metrics where key like 'speed/%'")(workspace)  # of a step that only resumed
    sql("update metrics set value = 99 where key like 'time/%'")(workspace)
    assert losses(Command(workspace.parent, workspace), unbroken(finished)) == []


@pytest.mark.parametrize(
    ("tamper", "loss"),
    [
        (other_digest, "other digests: ['train@1']"),
        (draft, "left behind: "),
        (lambda w: (w / "mlflow.db-journal").touch(), "left behind: mlflow.db-journal"),
        (event(event="part done", step="rollout@1", part=0), "done again: "),
        (event(event="checkpoint", step="train@1", optimizer_step=2), "done again: "),
        (event(event="part done", step="rollout@1", part=77), "part done of rollout@1 77 was not expected"),
        (event(event="step done", step="train@1", reused=False), "train@1 was performed 2 times"),
        (without("step started", "train@1"), "train@1 never started"),
        (sql("delete from metrics where key = 'train/loss'"), "train/loss at step 1 is missing"),
        (sql("insert into metrics values ('train/loss', 1, 0.5)"), "train/loss at step 1 is there 2 times"),
        (sql("insert into metrics values ('train/loss', 2, 0.5)"), "train/loss at step 2 was not expected"),
        (sql("update metrics set value = 0.25 where key = 'train/loss'"), "is 0.25, unbroken 0.5"),
        (sql("update runs set status = 'RUNNING'"), "MLflow: status RUNNING"),
        (sql("insert into runs values ('tiny', 'FINISHED')"), "MLflow: 2 runs"),
    ],
)
def test_each_kind_of_loss_is_found(finished: Path, workspace: Path, tamper: Tamper, loss: str) -> None:
    command = Command(workspace.parent, workspace)
    command.kills.append(len(command.events()))
    tamper(workspace)
    found = losses(command, unbroken(finished))
    assert any(loss in one for one in found), found


def test_an_orphan_is_found_and_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tests.kills, "ORPHAN_SECONDS", 0.1)
    code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'input()'], stdin=sys.stdin)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, start_new_session=True, stderr=subprocess.DEVNULL
    )
    process.wait()
    [loss] = gone(process)
    assert loss.startswith("orphans: ")
    assert gone(process) == []


def test_exit_codes_and_words_of_an_end_are_held_against_what_is_promised() -> None:
    going_on = "everything finished is kept; to continue: kdpipe run"
    assert unexpected(KILL, "all", -9, "") == []
    assert unexpected(KILL, "worker", 1, going_on) == []
    assert "exit code 0" in unexpected(KILL, "worker", 0, "")[0]
    assert "traceback" in unexpected(KILL, "worker", 1, going_on + "Traceback")[0]
    assert "how to continue" in unexpected(KILL, "worker", 1, "")[0]
    term = Drawn("SIGTERM", "command", "moment", 0.5, 0.0)
    assert unexpected(term, "command", 143, going_on) == []
    assert "expected 143" in unexpected(term, "command", 1, going_on)[0]


def test_a_stopped_run_that_mlflow_shows_running_is_a_loss_unless_its_end_is_noted(workspace: Path) -> None:
    sql("update runs set status = 'RUNNING'")(workspace)
    [run] = workspace.glob("runs/*")
    for wanted, lost, lost_when_done in (
        ("KILLED", False, False),
        ("RUNNING", True, True),
        ("FINISHED", True, False),
    ):
        (run / "mlflow.json").write_text(json.dumps({"wanted": wanted}))
        assert bool(untold(workspace, is_done=False)) is lost
        assert bool(untold(workspace, is_done=True)) is lost_when_done


def test_changes_are_seen_in_folders_that_were_there_and_that_are_made_later(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    with DiskWatch(tmp_path) as watch:
        (tmp_path / "store" / ".tmp-manifest.json").write_text("{}")
        seen = watch.changes(1.0)
        assert any(is_in("manifest", path) for path in seen)
        (tmp_path / "store" / "later").mkdir()
        watch.changes(1.0)
        (tmp_path / "store" / "later" / ".tmp-part-00000.parquet").write_bytes(b"x")
        wanted = watch.wait(lambda path: is_in("parquet", path), count=2, alive=lambda: True)
        assert wanted == tmp_path / "store" / "later" / ".tmp-part-00000.parquet"
        assert watch.wait(lambda path: is_in("MLflow", path), count=1, alive=lambda: False) is None


@pytest.mark.crash
@pytest.mark.parametrize(("by_signals", "ends"), [(False, 12), (True, 6)])
def test_a_short_study_of_ends_finds_no_loss(study: Study, by_signals: bool, ends: int) -> None:
    dice, number, told = random.Random(f"short {by_signals}"), 100 * by_signals, 0
    while told < ends:
        chain = study.chain(number, dice, by_signals=by_signals)
        assert chain.losses == [], chain
        told, number = told + len(chain.ended), number + 1


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Study(tmp_path_factory.mktemp("study"), rounds=2)
