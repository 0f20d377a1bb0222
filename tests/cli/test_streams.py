"""Standard streams that are missing, full, or read by nobody: work goes on, and exit 0 means that all was done."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kdpipe.cli import app as application
from kdpipe.cli import stream as streams
from kdpipe.cli.stream import Stream
from tests.worlds import write_recipe

KDPIPE = f"{sys.executable} -P -m kdpipe"


def shell(script: str, folder: Path) -> tuple[int, str]:
    """The exit status of a script that says `KDPIPE`, and all that it printed."""
    done = subprocess.run(
        ["bash", "-c", script.replace("KDPIPE", KDPIPE)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("script", "code", "words"),
    [
        ("KDPIPE recipes >&-", 0, ""),
        ("KDPIPE recipes <&- >&- 2>&-", 0, ""),
        ("KDPIPE recipes <&- 2>&-", 0, "quickstart"),
        ("KDPIPE recipes nosuch 2>&-", 2, ""),
        ("KDPIPE recipes nosuch 2>/dev/full", 2, ""),
        ("KDPIPE recipes >/dev/full", 1, "standard output: No space left on device"),
        ("KDPIPE --version >/dev/full", 1, "standard output: No space left on device"),
        ("KDPIPE schema | true; exit ${PIPESTATUS[0]}", 141, ""),
        ("KDPIPE --help | true; exit ${PIPESTATUS[0]}", 141, ""),
        ("KDPIPE recipes nosuch 2>&1 | true; exit ${PIPESTATUS[0]}", 2, ""),
    ],
)
def test_a_command_without_a_stream_does_its_work_or_says_so(
    script: str, code: int, words: str, tmp_path: Path
) -> None:
    found, said = shell(script, tmp_path)
    assert found == code, said
    assert words in said
    assert bool(words) == bool(said)
    assert "Traceback" not in said


def test_output_that_nobody_reads_is_dropped_where_work_goes_on_and_raised_once_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read, write = os.pipe()
    os.close(read)
    with Stream(write, "w") as stream:
        with pytest.raises(BrokenPipeError, match="standard output"):
            stream.write(b"lost")
        assert stream.write(b"dropped") == 7
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(streams, "_dropped", {write})
    with Stream(write, "w") as stream:
        assert stream.write(b"dropped") == 7
    full = os.open("/dev/full", os.O_WRONLY)  # a full disk loses what somebody would read
    monkeypatch.setattr(streams, "_dropped", {full})
    with Stream(full, "w") as stream, pytest.raises(OSError, match="No space left"):
        stream.write(b"lost")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("KDPIPE run recipe.yaml --json | head -2 >/dev/null; exit ${PIPESTATUS[0]}", 0),
        ("KDPIPE run recipe.yaml 2>&1 >/dev/null | true; exit ${PIPESTATUS[0]}", 0),
        ("KDPIPE run recipe.yaml <&- >&- 2>&-", 0),
        ("KDPIPE run recipe.yaml --json --force rollout@9 2>&1 | true; exit ${PIPESTATUS[0]}", 2),
        ("KDPIPE run recipe.yaml --sweep seed=1,2 2>&1 | head -1 >/dev/null; exit ${PIPESTATUS[0]}", 0),
    ],
)
def test_a_run_that_nobody_listens_to_does_all_of_its_work(how: str, code: int, tmp_path: Path) -> None:
    write_recipe(tmp_path, rounds=1)
    assert shell(how, tmp_path) == (code, "")
    assert shell("KDPIPE status recipe.yaml --check", tmp_path)[0] == (6 if code else 0)


def test_ctrl_c_while_the_arguments_are_read_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupting(str):
        def __format__(self, _spec: str) -> str:
            raise KeyboardInterrupt

    monkeypatch.setattr(application, "prepare_streams", lambda: None)
    monkeypatch.setattr(application, "__version__", Interrupting("1"))
    monkeypatch.setattr(sys, "argv", ["kdpipe", "--version"])
    with pytest.raises(SystemExit) as end:
        application.main()
    assert end.value.code == 130
    assert "to continue: kdpipe --version" in capsys.readouterr().err
