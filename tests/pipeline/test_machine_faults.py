"""What the machine does to a run: each fault is told in a sentence, and the same command goes on after it."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.commands import Command, When, members, with_group
from tests.kills import Study, losses
from tests.worlds import Watcher, load_tiny, payload_digests, run_near, write_recipe

SMALL: dict[str, Any] = {"rounds": 1, "runtime__part_rows": 2}
AS_ROOT_WITHOUT_ITS_RIGHTS = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]


def answer(command: Command, *arguments: str) -> tuple[int, str]:
    """The exit code and the words of another command on the same recipe and workspace."""
    line = [sys.executable, "-m", "kdpipe", arguments[0], "recipe.yaml", *arguments[1:]]
    line += ["--workspace", str(command.workspace)]
    done = subprocess.run(
        [*command.before, *line], cwd=command.folder, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def failed(command: Command, *parts: str) -> str:
    """What the command says when it fails as it should: exit 1, these parts, how to go on, and no traceback."""
    start = len(command.output_whole())
    process = command.start()
    code = process.wait(timeout=60)
    said = command.output_whole()[start:]
    assert code == 1, said
    for part in (*parts, "repeat the command", "everything finished is kept; to continue: "):
        assert part in said, said
    assert "Traceback" not in said, said
    assert members(process.pid) == []
    return said


def at(command: Command, when: When, act: Callable[[subprocess.Popen[bytes]], None]) -> tuple[int, str]:
    """Starts the command, acts when the event comes, and returns the exit code and what was said."""
    start, seen = len(command.output_whole()), len(command.events())
    process = command.start()
    try:
        while not any(when.matches(event) for event in command.events()[seen:]):
            assert process.poll() is None, command.output()
            time.sleep(0.002)
        act(process)
        code = process.wait(timeout=90)
    finally:
        with_group(process.pid, signal.SIGKILL)
    return code, command.output_whole()[start:]


@pytest.fixture(scope="module")
def digests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Those of a run of SMALL that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_near(load_tiny(folder, **SMALL), folder / "out")
    return payload_digests(folder / "out")


@pytest.fixture
def half(tmp_path: Path) -> Command:
    """A command whose round 0 is done."""
    run_near(load_tiny(tmp_path, **SMALL), tmp_path / "out", rounds=0)
    return Command(tmp_path, tmp_path / "out")


@contextlib.contextmanager
def mounted(place: Path, *arguments: str) -> Iterator[None]:
    """A file system at `place`; skips where this user may not mount one."""
    place.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", *arguments, str(place)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this user cannot mount: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


# -------------------------------------------------------------------------------------------------- disk


@pytest.mark.crash
def test_a_disk_that_fills_up_stops_the_run_and_space_lets_it_go_on(tmp_path: Path) -> None:
    longer = {
        **SMALL,
        "rounds": 6,
    }  # a round takes a third of a second: on a busy machine it ends before it is seen
    run_near(load_tiny(tmp_path, **longer), tmp_path / "undisturbed")
    write_recipe(tmp_path, **longer, tracking={"enabled": True})  # its database is on that disk too
    command = Command(tmp_path, tmp_path / "disk" / "out")
    ballast = tmp_path / "disk" / "ballast"

    def fill(process: subprocess.Popen[bytes]) -> None:
        # A run as small as this one could end before the disk is full, or before its processes are found.
        for pid in (process.pid, *members(process.pid)):
            os.kill(pid, signal.SIGSTOP)
        with contextlib.suppress(OSError), ballast.open("wb") as file:
            while True:
                file.write(b"\0" * 4096)
                file.flush()
        for pid in members(process.pid):
            os.kill(pid, signal.SIGCONT)

    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=96m", "tmpfs"):
        for when in (When("part done", "rollout@1", 1), When("step started", "train@1")):
            code, said = at(command, when, fill)
            assert code == 1, said
            assert "No space left on device" in said or " MiB free" in said, said
            assert "free some space" in said
            assert "Traceback" not in said
            ballast.unlink()
        command.finish()
        assert payload_digests(command.workspace) == payload_digests(tmp_path / "undisturbed")


@pytest.mark.crash
def test_a_disk_that_is_too_small_is_told_before_anything_is_written_to_it(tmp_path: Path) -> None:
    write_recipe(tmp_path, **SMALL)
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=8m", "tmpfs"):
        command = Command(tmp_path, tmp_path / "disk" / "out")
        said = failed(command, " MiB free, sft:student@0 may need 64 MiB", "free some space")
        assert str(command.workspace) in said
        assert not list(command.workspace.glob("store/*"))


@pytest.mark.crash
def test_a_workspace_that_can_only_be_read_is_looked_at_and_not_run(
    half: Command, digests: dict[str, str]
) -> None:
    place = half.workspace
    with mounted(place, "--bind", str(place)):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(place)], check=True)
        failed(half, f"{place}/.lock", "Read-only file system", "--workspace")
        for looking in ("status", "plan", "verify"):
            code, said = answer(half, looking)
            assert (code, "Traceback" in said) == (0, False), said
    half.finish()
    assert payload_digests(place) == digests


@pytest.mark.crash
def test_a_workspace_of_someone_else_is_looked_at_and_not_run(half: Command, digests: dict[str, str]) -> None:
    if os.geteuid() == 0:
        half.before = AS_ROOT_WITHOUT_ITS_RIGHTS
    modes = {path: path.stat().st_mode for path in half.workspace.rglob("*") if not path.is_symlink()}
    for path, mode in modes.items():
        path.chmod(mode & 0o555)
    try:
        failed(half, f"{half.workspace}/.lock", "Permission denied", "the right to it")
        for looking in ("status", "plan", "verify"):
            code, said = answer(half, looking)
            assert (code, "Traceback" in said) == (0, False), said
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
    half.finish()
    assert payload_digests(half.workspace) == digests


# ------------------------------------------------------------------------------------------------ memory


@pytest.mark.crash
def test_a_worker_that_gets_no_memory_is_told_so_and_repeating_goes_on(
    half: Command, digests: dict[str, str]
) -> None:
    def starve(process: subprocess.Popen[bytes]) -> None:
        for pid in members(process.pid):
            if b"kdpipe.execution.executor:Performer" in Path(f"/proc/{pid}/cmdline").read_bytes().split(
                b"\0"
            ):
                _, most = resource.prlimit(pid, resource.RLIMIT_AS)
                resource.prlimit(pid, resource.RLIMIT_AS, (1 << 20, most))

    code, said = at(half, When("part started", "rollout@1", 0), starve)
    assert code == 1, said
    assert "out of memory: " in said or "the worker died: " in said, said
    assert "everything finished is kept; to continue: " in said
    assert "bug in kdpipe" not in said
    half.finish()
    assert payload_digests(half.workspace) == digests


# ------------------------------------------------------------------------------------- clock and workspace

CLOCK = """
import os, time
_real, _shift = time.time, float(os.environ["CLOCK_SHIFT"])
time.time = lambda: _real() + _shift
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A run with MLflow, and what it leaves."""
    return Study(tmp_path_factory.mktemp("study"), rounds=1)


@pytest.fixture
def tracked(study: Study, tmp_path: Path) -> Command:
    """The command of that run, which nobody has started yet."""
    shutil.copy(study.folder / "recipe.yaml", tmp_path)
    return Command(tmp_path, tmp_path / "out")


@pytest.mark.crash
def test_a_clock_that_jumps_back_between_two_commands_changes_nothing(study: Study, tracked: Command) -> None:
    folder = tracked.folder / "clock"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(CLOCK)
    tracked.environment = {"PYTHONPATH": str(folder), "CLOCK_SHIFT": "0"}
    tracked.kill(When("part done", "evaluate:student@0", 0), "group")
    tracked.environment["CLOCK_SHIFT"] = str(-86_400)
    tracked.kill(When("checkpoint", "train@1"), "group")
    tracked.environment["CLOCK_SHIFT"] = str(-2 * 86_400)
    tracked.finish()
    assert losses(tracked, study.unbroken) == []
    times = [event["time"] for event in tracked.events()]
    assert max(times) - min(times) > 86_400, "the clock did jump"
    assert times != sorted(times)


@pytest.mark.crash
def test_a_workspace_moved_in_the_middle_goes_on_at_its_new_place(study: Study, tracked: Command) -> None:
    old = tracked.workspace
    tracked.kill(When("checkpoint", "train@1"), "group")
    tracked.workspace = tracked.folder / "elsewhere" / "moved"
    tracked.workspace.parent.mkdir()
    old.rename(tracked.workspace)
    tracked.finish()
    assert losses(tracked, study.unbroken) == []
    assert not old.exists(), "nothing is written to the old place"


@pytest.mark.slow
def test_a_copy_of_a_finished_workspace_is_a_finished_workspace(
    half: Command, digests: dict[str, str]
) -> None:
    loaded = load_tiny(half.folder, **SMALL)
    copy = half.folder / "copy"
    shutil.copytree(half.workspace, copy, symlinks=True)
    watcher = Watcher()
    run_near(loaded, copy, watcher=watcher)
    assert all(step.endswith("@1") for step in watcher.performed), watcher.performed
    assert payload_digests(copy) == digests
    shutil.copytree(copy, half.folder / "again", symlinks=True)
    watcher = Watcher()
    run_near(loaded, half.folder / "again", watcher=watcher)
    assert watcher.performed == []


# --------------------------------------------------------------------------------------- several commands


@pytest.mark.crash
def test_a_second_run_of_a_run_is_refused_and_told_who_holds_it(
    half: Command, digests: dict[str, str]
) -> None:
    def run_again(process: subprocess.Popen[bytes]) -> None:
        code, said = answer(half, "run")
        assert code == 3, said
        assert f"is being run by process {process.pid} on {os.uname().nodename}, since " in said
        assert "wait for it, or stop it" in said
        assert "Traceback" not in said

    code, said = at(half, When("step started", "rollout@1"), run_again)
    assert code == 0, said
    assert payload_digests(half.workspace) == digests


def run_digests(workspace: Path, learning_rate: float) -> dict[str, str]:
    """The digest of every step that the run with this learning rate links."""
    found = {}
    for run in workspace.glob("runs/*"):
        recipe = json.loads((run / "resolved.json").read_text())["recipe"]
        if recipe["train"]["optimizer"]["learning_rate"] == learning_rate:
            for manifest in run.glob("round-*/*/manifest.json"):
                step = manifest.parent.relative_to(run)
                found[str(step)] = json.loads(manifest.read_text())["payload_digest"]
    return found


@pytest.mark.crash
def test_two_runs_that_share_entries_at_the_same_time_end_as_each_would_alone(tmp_path: Path) -> None:
    rates, workspace = (1e-3, 2e-3), tmp_path / "shared"
    alone, commands = {}, []
    for rate in rates:
        folder = tmp_path / str(rate)
        folder.mkdir()
        changes = {**SMALL, "train__optimizer__learning_rate": rate}
        run_near(load_tiny(folder, **changes), folder / "alone")
        alone[rate] = run_digests(folder / "alone", rate)
        commands.append(Command(folder, workspace))
    first, second = (command.start() for command in commands)
    started = workspace / "store" / "evaluate"
    while not list(started.glob("*/manifest.json")):  # in the middle of what both need
        assert first.poll() is None, commands[0].output()
        time.sleep(0.002)
    with_group(first.pid, signal.SIGKILL)  # the other takes over what it held
    first.wait()
    again = commands[0].start()
    assert second.wait(timeout=90) == 0, commands[1].output()
    assert again.wait(timeout=90) == 0, commands[0].output()
    assert {rate: run_digests(workspace, rate) for rate in rates} == alone
    shared = {path.resolve() for path in workspace.glob("runs/*/round-*/*") if path.is_symlink()}
    assert len(shared) == len(list(workspace.glob("store/*/*"))) < sum(map(len, alone.values()))
