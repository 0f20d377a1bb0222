"""What is written where the user points: through links, devices and pipes, in folders that stay, with usual rights."""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
import threading
from pathlib import Path

import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

import kdpipe.store.durable
from kdpipe.cli.app import app
from kdpipe.errors import StepError
from kdpipe.store.durable import write_durably
from kdpipe.store.target import is_vacant, write_file, write_folder
from tests.worlds import SMALLEST, load_tiny, run_near


def model(draft: Path) -> None:
    """Writes a folder as models are."""
    import numpy as np

    (draft / "below").mkdir(parents=True)
    save_file({"a": np.zeros(2)}, draft / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "below/code.txt"):
        (draft / name).write_text("{}")


def half(draft: Path) -> None:
    """Writes half of it, and then the disk is full."""
    draft.mkdir()
    (draft / "config.json").write_text("{}")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


WRITTEN = ["below", "below/code.txt", "config.json", "model.safetensors", "tokenizer.json"]


def test_a_file_is_written_through_links_pipes_devices_and_to_stdout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, dangling, pipe = tmp_path / "link", tmp_path / "dangling", tmp_path / "pipe"
    (tmp_path / "file").write_bytes(b"before")
    link.symlink_to("file")
    dangling.symlink_to("new")
    os.mkfifo(pipe)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()), daemon=True)
    reader.start()
    for place in (link, dangling, pipe, Path("/dev/null")):
        write_file(place, b"page")
    reader.join(timeout=20)
    assert received == [b"page"]
    assert Path("/dev/null").is_char_device()
    assert [link.is_symlink(), dangling.is_symlink(), pipe.is_fifo()] == [True] * 3
    assert [(tmp_path / name).read_bytes() for name in ("file", "new")] == [b"page"] * 2
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    write_file(Path("-"), "größer".encode())
    assert out.buffer.getvalue() == "größer".encode()  # type: ignore[attr-defined]


def test_a_file_that_is_mounted_is_written_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(_draft: Path, _place: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    (tmp_path / "file").write_bytes(b"before")
    monkeypatch.setattr(Path, "replace", busy)
    write_file(tmp_path / "file", b"page")
    assert (names(tmp_path), (tmp_path / "file").read_bytes()) == (["file"], b"page")


@pytest.mark.parametrize("place", ["new", "new/in/new", "there", "link", "dangling"])
def test_a_folder_is_written_where_the_name_leads(tmp_path: Path, place: str) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    (tmp_path / "dangling").symlink_to("elsewhere")
    target = (tmp_path / place).resolve()
    before = target.stat().st_ino if target.exists() else None
    assert is_vacant(target)
    with pytest.raises(StepError, match="No space left on device") as caught:
        write_folder(target, half)
    assert "free some space" in caught.value.hint
    assert not [name for name in names(tmp_path) if ".tmp-" in name]
    assert target.exists() == (before is not None)
    write_folder(target, model)
    assert names(tmp_path / place) == WRITTEN
    assert before in (None, target.stat().st_ino), "a folder that was there is the same one"
    assert not is_vacant(target)


def test_what_a_kill_has_left_in_a_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".tmp-new").mkdir()
    (tmp_path / ".tmp-new" / "half").touch()
    assert is_vacant(tmp_path)
    write_folder(tmp_path, model)
    assert names(tmp_path) == WRITTEN


def test_a_write_that_fails_leaves_no_draft(tmp_path: Path) -> None:
    with pytest.raises(StepError, match="No space left"):
        write_durably(tmp_path / "folder", half)
    with pytest.raises(KeyboardInterrupt):
        write_durably(tmp_path / "folder", interrupted)
    assert names(tmp_path) == []


def interrupted(draft: Path) -> None:
    draft.write_text("half")
    raise KeyboardInterrupt


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_weights_and_exports_have_the_rights_that_the_umask_leaves(
    tmp_path: Path, umask: int, mode: int
) -> None:
    before = os.umask(umask)
    kdpipe.store.durable._umask.cache_clear()
    try:
        write_durably(tmp_path / "stored", model)
        write_folder(tmp_path / "exported", model)
    finally:
        os.umask(before)
        kdpipe.store.durable._umask.cache_clear()
    for folder in ("stored", "exported"):
        files = [path for path in (tmp_path / folder).rglob("*") if path.is_file()]
        assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {mode}


def test_export_here_and_report_to_stdout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_tiny(tmp_path, **SMALLEST)
    run_near(loaded, tmp_path / "out", rounds=0)
    place = [str(loaded.path), "--workspace", str(tmp_path / "out")]
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    done = CliRunner().invoke(app, ["export", *place, ".", "--round", "0"])
    assert (done.exit_code, done.stdout) == (0, ".: student 0\n"), done.output
    assert "config.json" in names(here)
    again = CliRunner().invoke(app, ["export", *place, ".", "--round", "0"])
    assert (again.exit_code, "not an empty folder" in again.stderr) == (2, True)
    page = CliRunner().invoke(app, ["report", *place, "-o", "-"])
    assert page.exit_code == 0
    assert page.stdout.startswith("<!")
    assert page.stdout.rstrip().endswith("</html>")
    assert not (here / "-").exists()
    both = CliRunner().invoke(app, ["report", *place, "-o", "-", "--json"])
    assert (both.exit_code, "both go to stdout" in both.stderr) == (2, True)
