"""What is in the place of MLflow's database and is none: named by run, status and ui, with what mends it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kdpipe.cli.app import app
from kdpipe.errors import ArtifactError
from kdpipe.tracking import mirror as mirroring
from kdpipe.tracking.memory import MirrorRequest, require_database
from kdpipe.tracking.mirror import MlflowMirror
from kdpipe.tracking.pending import waiting
from tests.mirrored import World, make_world
from tests.worlds import write_recipe


def _of_another_application(path: Path) -> None:
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE recipes (name)")


def _pages_of_noise(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8192 : len(data) // 2] = os.urandom(len(data) // 2 - 8192)
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "random bytes": (lambda path: path.write_bytes(os.urandom(8192)), "is damaged: file is not a database"),
    "cut": (lambda path: os.truncate(path, path.stat().st_size // 3 + 100), "is damaged: "),
    "pages of noise": (_pages_of_noise, "is damaged: "),
    "empty": (lambda path: os.truncate(path, 0), "is no database of MLflow"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "is no file"),
    "of another application": (_of_another_application, "is no database of MLflow"),
}


@pytest.fixture
def world(mlflow_database: Path, tmp_path: Path) -> World:
    shutil.copy(mlflow_database, tmp_path / "mlflow.db")
    return make_world(tmp_path)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_database_is_named_with_the_command_that_moves_it_away(
    kind: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = world.workspace / "mlflow.db"
    require_database(world.workspace)
    damage, said = DAMAGE[kind]
    damage(path)
    words = [f"{path}: {said}", f"mv {path} {path}.damaged"]
    with pytest.raises(ArtifactError) as caught:
        require_database(world.workspace)
    assert caught.value.message.startswith(words[0])
    assert words[1] in caught.value.hint
    [shown] = waiting(world.run.path)
    assert all(word in shown for word in words)

    page = CliRunner().invoke(app, ["ui", "--workspace", str(world.workspace)])
    assert page.exit_code == 5
    assert all(word in page.stderr for word in words)

    monkeypatch.setattr(mirroring.Worker, "_start", lambda _: pytest.fail("MLflow is started for nothing"))
    mirror = MlflowMirror(MirrorRequest("run", world.run.path, world.loaded.recipe.tracking, "RUNNING"))
    mirror.nudge()
    trouble = mirror.finish("FINISHED")
    assert trouble is not None
    assert all(word in trouble for word in words)
    assert "the next command" not in trouble, "no later command mends it"

    path.rename(path.with_name("mlflow.db.damaged"))
    require_database(world.workspace)


def test_what_is_behind_a_server_needs_no_database(world: World) -> None:
    (world.workspace / "mlflow.db").write_bytes(b"garbage")
    require_database(world.workspace, "http://127.0.0.1:5000")


def test_a_database_that_is_locked_is_not_called_damaged(world: World) -> None:
    with contextlib.closing(sqlite3.connect(world.workspace / "mlflow.db")) as database:
        database.execute("BEGIN EXCLUSIVE")
        require_database(world.workspace)


@pytest.mark.slow
def test_a_run_fills_a_new_database_after_the_damaged_one_was_moved_away(tmp_path: Path) -> None:
    recipe, place = str(write_recipe(tmp_path, rounds=1, tracking={})), ["--workspace", str(tmp_path / "out")]

    def kdpipe(command: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "kdpipe", command, recipe, *place],
            stderr=subprocess.STDOUT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return done.stdout

    def metrics() -> int:
        with contextlib.closing(sqlite3.connect(database)) as opened:
            return int(opened.execute("SELECT count(*) FROM metrics").fetchone()[0])

    database = tmp_path / "out" / "mlflow.db"
    kdpipe("run")
    count = metrics()
    database.write_bytes(os.urandom(10_000))
    [said] = [line for line in kdpipe("run").splitlines() if line.startswith("warning: MLflow")]
    assert "is damaged: file is not a database" in said
    [command] = re.findall(r"mv \S+ \S+\.damaged", said)
    assert command in kdpipe("status")
    subprocess.run(["bash", "-c", command], check=True)
    kdpipe("run")
    assert metrics() == count > 0
