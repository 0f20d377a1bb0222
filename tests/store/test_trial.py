"""File systems that lack something: what a run does without is said, and what it cannot do without refuses it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from typer.testing import CliRunner

from kdpipe.cli.app import app
from kdpipe.errors import StepError
from kdpipe.pipeline.housekeeping import garbage
from kdpipe.pipeline.runs import all_runs
from kdpipe.store.link import linked_folder, read_link, write_link
from kdpipe.store.locks import is_running
from kdpipe.store.trial import try_workspace
from tests.worlds import SMALLEST, Watcher, load_tiny, payload_digests, run_near


def refuse(number: int) -> Callable[..., NoReturn]:
    def refused(*_arguments: object, **_named: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return refused


@pytest.fixture
def without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "symlink_to", refuse(errno.EPERM))


@pytest.fixture
def without_folder_flushes(monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_workspace_that_has_all_lacks_nothing_and_keeps_nothing_of_the_trial(tmp_path: Path) -> None:
    assert try_workspace(tmp_path / "out") == []
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_a_run_without_links_and_flushed_folders_says_so_once_and_ends_as_any_other(
    tmp_path: Path, without_links: None, without_folder_flushes: None
) -> None:
    watcher = Watcher()
    project = run_near(load_tiny(tmp_path, **SMALLEST), tmp_path / "out", watcher=watcher, rounds=0)
    assert [text.partition(": ")[2].partition(":")[0] for text in watcher.warnings] == [
        "has no symbolic links",
        "its folders cannot be flushed to the disk",
    ]
    links = list(project.run.path.rglob("round-*/*"))
    assert links
    assert all(path.is_file() and not path.is_symlink() for path in links)
    assert {link.target for link in project.run.links()} == {linked_folder(path) for path in links}
    assert all(linked_folder(path).is_dir() for path in links)  # type: ignore[union-attr]
    assert garbage(project.workspace) == []
    again = Watcher()
    run_near(load_tiny(tmp_path, **SMALLEST), tmp_path / "out", watcher=again, rounds=0)
    assert again.performed == []
    place = [str(project.loaded.path), "--workspace", str(project.workspace)]
    status = CliRunner().invoke(app, ["status", *place, "--json"])
    assert json.loads(status.stdout)["rounds_done"] == 0
    shutil.rmtree(project.run.path)
    assert len(garbage(project.workspace)) == len(links)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_without_locks_a_run_is_refused_and_a_look_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    monkeypatch.setattr(fcntl, "flock", refuse(number))
    with pytest.raises(StepError, match=os.strerror(number)) as caught:
        run_near(load_tiny(tmp_path, **SMALLEST), tmp_path / "out", rounds=0)
    assert "name another place with --workspace" in caught.value.hint
    assert not is_running(tmp_path / "run")
    assert all_runs(tmp_path / "out") == []


def test_locks_that_keep_nobody_off_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda _descriptor, _operation: None)
    with pytest.raises(StepError, match="a lock here keeps nobody off"):
        try_workspace(tmp_path)


def test_a_file_that_cannot_be_flushed_is_no_written_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    with pytest.raises(StepError, match="Invalid argument"):
        try_workspace(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "../../store/x", "kdpipe: a link", "\0" * 5000, "kdpipe: a link to \0"]
)
def test_any_other_small_file_is_no_link_of_a_run(tmp_path: Path, content: str) -> None:
    (tmp_path / "place").write_text(content)
    assert read_link(str(tmp_path / "place")) is None
    assert read_link(str(tmp_path / "nothing")) is None
    assert read_link(str(tmp_path)) is None


def test_a_link_becomes_a_file_and_a_file_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "runs" / "train"
    write_link(place, tmp_path / "store" / "a")
    with monkeypatch.context() as without:
        without.setattr(Path, "symlink_to", refuse(errno.EPERM))
        write_link(place, tmp_path / "store" / "b")
    assert (place.is_symlink(), linked_folder(place)) == (False, tmp_path / "store" / "b")
    write_link(place, tmp_path / "store" / "c")
    assert (place.is_symlink(), linked_folder(place)) == (True, tmp_path / "store" / "c")


# ------------------------------------------------------------------------- real commands on such a file system

LACKING = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/types.h>

static int lacks(const char *name) {
    const char *value = getenv(name);
    if (value) errno = atoi(value);
    return value != NULL;
}
int fsync(int descriptor) {
    struct stat found;
    if (!fstat(descriptor, &found) && S_ISDIR(found.st_mode) && lacks("LACKS_FSYNC")) return -1;
    return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(descriptor);
}
int flock(int descriptor, int operation) {
    return lacks("LACKS_FLOCK") ? -1 : ((int (*)(int, int))dlsym(RTLD_NEXT, "flock"))(descriptor, operation);
}
int symlink(const char *target, const char *place) {
    return lacks("LACKS_SYMLINK") ? -1
        : ((int (*)(const char *, const char *))dlsym(RTLD_NEXT, "symlink"))(target, place);
}
"""


@pytest.fixture(scope="module")
def lacking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that makes the system lack what LACKS_... name, by the errors that they hold."""
    if shutil.which("gcc") is None:
        pytest.skip("no compiler (gcc) to make a file system lack something")
    folder = tmp_path_factory.mktemp("lacking")
    (folder / "lacking.c").write_text(LACKING)
    made = folder / "lacking.so"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-o", str(made), str(folder / "lacking.c"), "-ldl"], check=True
    )
    return made


def command(lacking: Path, folder: Path, *words: str, **lacks: int) -> subprocess.CompletedProcess[str]:
    names = {f"LACKS_{name.upper()}": str(number) for name, number in lacks.items()}
    return subprocess.run(
        [sys.executable, "-m", "kdpipe", *words, "--workspace", str(folder / "out")],
        env={**os.environ, "LD_PRELOAD": str(lacking), **names},
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )


@pytest.mark.slow
def test_real_commands_go_on_without_links_and_flushes_and_stop_without_locks(
    lacking: Path, tmp_path: Path
) -> None:
    recipe = str(load_tiny(tmp_path, **SMALLEST, rounds=1).path)
    whole = command(lacking, tmp_path, "run", recipe)
    assert whole.returncode == 0, whole.stderr
    before = payload_digests(tmp_path / "out")
    for number in (errno.ENOLCK, errno.ENOSYS):
        refused = command(lacking, tmp_path, "run", recipe, flock=number)
        assert (refused.returncode, os.strerror(number) in refused.stderr) == (1, True), refused.stderr
        assert "Traceback" not in refused.stderr
        for look in (("status", recipe), ("gc",)):
            assert command(lacking, tmp_path, *look, flock=number).returncode == 0
        assert command(lacking, tmp_path, "gc", "--delete", flock=number).returncode == 1
    shutil.rmtree(tmp_path / "out")
    lacks = {"fsync": errno.EINVAL, "symlink": errno.EPERM}
    again = command(lacking, tmp_path, "run", recipe, **lacks)
    assert again.returncode == 0, again.stderr
    assert [again.stderr.count(text) for text in ("cannot be flushed", "has no symbolic links")] == [1, 1]
    assert payload_digests(tmp_path / "out") == before
    for look in (
        ("status", recipe),
        ("verify", recipe),
        ("samples", recipe),
        ("gc", "--delete"),
        ("report", recipe),
    ):
        found = command(lacking, tmp_path, *look, **lacks)
        assert found.returncode == 0, (look, found.stderr)
    assert payload_digests(tmp_path / "out") == before
