"""The audit that other tests trust sees what it is to see."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.auditing import audited, listing, noted

PROGRAM = """
import os, pathlib, pickle, shutil, subprocess, sys
place = pathlib.Path(sys.argv[1])
(place / "folder").mkdir()
(place / "folder" / "file").write_text("x")
(place / "folder" / "file").read_text()
os.rename(place / "folder" / "file", place / "folder" / "moved")
os.symlink("/elsewhere", place / "link")
shutil.rmtree(place / "folder")
pickle.loads(pickle.dumps(pathlib.PurePath("x")))
subprocess.run([sys.executable, "-c", "open('child', 'a')"], check=True, cwd=place)
"""


def test_every_change_of_a_process_and_of_what_it_starts_is_noted(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    command = [sys.executable, "-c", PROGRAM, str(place)]
    subprocess.run(command, check=True, env={**os.environ, **audited(tmp_path / "audit")})
    found = {(event.event, Path(event.name).name) for event in noted(tmp_path / "audit")}
    assert found >= {
        ("os.mkdir", "folder"),
        ("open", "file"),
        ("os.rename", "moved"),
        ("os.symlink", "link"),
        ("os.rmdir", "folder"),
        ("open", "child"),
    }
    assert any(event == "pickle.find_class" and name.endswith("PurePosixPath") for event, name in found)
    removed = [event.name for event in noted(tmp_path / "audit") if event.event == "os.remove"]
    assert str(place / "folder" / "moved") in removed
    assert not any("elsewhere" in event.name for event in noted(tmp_path / "audit"))
    assert set(listing(place)) == {str(place / "link"), str(place / "child")}
