"""What gc removes beside runs that go on, of entries on other disks, and after a kill of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import kdpipe.pipeline.housekeeping
from kdpipe.cli.app import app
from kdpipe.errors import RecipeError
from kdpipe.pipeline.housekeeping import collect, export, garbage
from kdpipe.pipeline.project import open_project
from kdpipe.store.artifacts import Store
from kdpipe.store.locks import LOCK, locked, take
from tests.worlds import SMALLEST, Watcher, load_tiny, payload_digests, run_near


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose run has round 0 done."""
    folder = tmp_path_factory.mktemp("begun")
    run_near(load_tiny(folder, **SMALLEST), folder / "out", rounds=0)
    return folder


@pytest.fixture
def world(begun: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(begun, tmp_path / "world", symlinks=True))


class Between(Watcher):
    """Removes garbage when a run has seen what is done and has linked nothing yet."""

    def __init__(self, workspace: Path) -> None:
        super().__init__()
        self.workspace = workspace
        self.removed: list[Any] = []

    def begin(self, run: Any, todo: int, reused: int) -> None:
        super().begin(run, todo, reused)
        self.removed = collect(self.workspace)


def test_a_run_whose_entries_go_before_it_links_them_performs_them(world: Path) -> None:
    workspace = world / "out"
    before = payload_digests(workspace)
    shutil.rmtree(workspace / "runs")
    watcher = Between(workspace)
    project = run_near(load_tiny(world, **SMALLEST), workspace, watcher=watcher, rounds=0)
    assert watcher.todo == 0, "all was done when the run looked"
    assert len(watcher.removed) == len(before) == len(watcher.performed)
    assert payload_digests(workspace) == before
    assert [state.done for state in project.states()][: len(before)] == [True] * len(before)


def test_gc_leaves_what_a_run_has_linked_by_the_time_it_removes(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, watcher, removed = world / "out", Watcher(), list[Any]()
    entries = Store(workspace).all_folders()
    shutil.rmtree(workspace / "runs")
    inspect = kdpipe.pipeline.runner.inspect

    def looked(*args: Any) -> Any:
        state = inspect(*args)
        removed.extend(collect(workspace))  # right after the run has found a step done, before it uses it
        return state

    monkeypatch.setattr(kdpipe.pipeline.runner, "inspect", looked)
    run_near(load_tiny(world, **SMALLEST), workspace, watcher=watcher, rounds=0)
    assert (len(removed), len(watcher.performed)) == (len(entries) - 1, len(entries) - 1)
    assert Store(workspace).all_folders() == entries


def test_nothing_is_linked_while_it_is_decided_what_goes(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, free = world / "out", list[bool]()
    decide = kdpipe.pipeline.housekeeping.garbage
    shutil.rmtree(workspace / "runs")

    def decided(place: Path) -> Any:
        found = decide(place)
        free.append(take(place / LOCK, shared=True, wait=False) is not None)
        return found

    monkeypatch.setattr(kdpipe.pipeline.housekeeping, "garbage", decided)
    assert collect(workspace)
    assert free == [False]
    with locked(workspace / LOCK, shared=True), locked(workspace / LOCK, shared=True):
        assert garbage(workspace) == [], "which only looks, also while runs link"


def test_what_a_killed_gc_has_set_aside_goes_with_the_next_unless_it_lives(world: Path) -> None:
    store = world / "out" / "store"
    for name in ("killed", "alive"):
        (store / f".tmp-{name}" / "0").mkdir(parents=True)
    with locked(store / ".tmp-alive" / LOCK):
        assert collect(world / "out") == []
        assert [path.name for path in store.glob(".tmp-*")] == [".tmp-alive"]


@pytest.mark.parametrize("moved", ["entry", "stage", "store"])
def test_what_is_linked_in_from_another_disk_stays_there(world: Path, tmp_path: Path, moved: str) -> None:
    workspace, elsewhere = world / "out", tmp_path / "elsewhere"
    entry = Store(workspace).all_folders()[0]
    folder = {"entry": entry, "stage": entry.parent, "store": entry.parents[1]}[moved]
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    assert garbage(workspace) == []
    shutil.rmtree(workspace / "runs")
    files = sorted(elsewhere.rglob("*"))
    listed = [item.folder for item in collect(workspace)]
    assert sorted(path for path in elsewhere.rglob("*") if path.name != LOCK or path in files) == files
    assert os.path.lexists(folder) == (moved != "entry")
    assert (entry in listed) == (moved == "entry")


def test_a_name_in_the_store_does_nothing_to_a_terminal(world: Path) -> None:
    (world / "out" / "store" / "train" / "x\x1b[2Jy").mkdir(parents=True)
    result = CliRunner().invoke(app, ["gc", "--workspace", str(world / "out")])
    assert result.exit_code == 0
    assert "x\\x1b[2Jy  0.0 MB  unfinished, and no run links it" in result.stdout
    assert "\x1b" not in result.stdout


def test_a_run_whose_links_cannot_be_read_is_not_one_without_links(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.listdir

    def refused(path: Any = ".") -> Any:
        if Path(path).name.startswith("round-"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "listdir", refused)
    result = CliRunner().invoke(app, ["gc", "--delete", "--workspace", str(world / "out")])
    assert (result.exit_code, "round-000: Permission denied" in result.stderr) == (1, True), result.output


@pytest.mark.slow
@pytest.mark.parametrize(("entries", "killed"), [(400, False), (1200, True)])
def test_real_runs_and_real_gc_at_once_lose_nothing(
    begun: Path, tmp_path: Path, entries: int, killed: bool
) -> None:
    """Two runs that share entries which nobody links any more, and two gc beside them, one of which may be killed."""
    world = Path(shutil.copytree(begun, tmp_path / "world", symlinks=True))
    workspace = world / "out"
    before = payload_digests(workspace)
    shutil.rmtree(workspace / "runs")
    for number in range(entries):  # garbage, so that removing it takes its time
        folder = workspace / "store" / "train" / f"{number:016x}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
    recipes = [
        load_tiny(world, **SMALLEST, name=name).path.rename(world / f"{name}.yaml") for name in ("tiny", "b")
    ]
    place = ["--workspace", str(workspace)]

    def start(*words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "kdpipe", *words, *place], cwd=world, stderr=subprocess.PIPE
        )

    runs = [start("run", str(recipe), "--rounds", "0") for recipe in recipes]
    collectors = [start("gc", "--delete") for _ in range(2)]
    if killed:
        while collectors[0].poll() is None and not list((workspace / "store").glob(".tmp-*/*")):
            os.sched_yield()
        collectors[0].kill()
    ends = [process.communicate() for process in (*runs, *collectors)]
    codes = [process.returncode for process in (*runs, *collectors)]
    assert codes in ([0, 0, 0, 0], [0, 0, -9, 0]), ends
    assert payload_digests(workspace) == before
    for recipe in recipes:
        status = CliRunner().invoke(app, ["status", str(recipe), *place, "--json"])
        grid = json.loads(status.stdout)["grid"]
        assert {cells["0"] for cells in grid.values() if "0" in cells} == {"done"}
    collect(workspace)
    assert garbage(workspace) == []
    assert not list((workspace / "store").glob(".tmp-*"))


def test_a_student_after_its_cold_start_alone_is_exported_only_by_its_round(
    world: Path, tmp_path: Path
) -> None:
    project = open_project(load_tiny(world, **SMALLEST), world / "out")
    with pytest.raises(RecipeError, match="a trained student is not there yet") as caught:
        export(project, tmp_path / "exported", round_number=None)
    assert "--round 0" in caught.value.hint
    assert not (tmp_path / "exported").exists()
    done = export(project, tmp_path / "exported", round_number=0)
    assert done.round == 0
    assert (done.folder / "model.safetensors").is_file()
