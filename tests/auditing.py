"""What Python processes do to the disk and what they unpickle, told by their own audit events.

`audited` prepares an environment in which each Python process, and what it starts, notes such events in one file, and
which code of a watched folder it runs. What C and Rust libraries write by themselves (arrow, safetensors, sqlite)
raises no event: compare folders for that.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_HOOK = """
import json, os, sys

_note = os.open(os.environ["KDPIPE_TEST_AUDIT"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {
    "os.mkdir": 1, "os.remove": 1, "os.rmdir": 1, "os.truncate": 1, "os.chmod": 1, "os.chown": 1, "os.utime": 1,
    "os.rename": 2, "os.link": 2, "os.symlink": 2, "shutil.rmtree": 1,
}
_busy = False

def _hook(event, arguments):
    global _busy
    if _busy:
        return
    if event == "open":
        path, mode, flags = arguments
        changes = isinstance(flags, int) and flags & _WRITES
        names = [path] if changes and isinstance(path, (str, bytes)) else []
    elif event in _CHANGES:
        # The source of a symbolic link is only a text.
        names = list(arguments[: _CHANGES[event]])[1 if event == "os.symlink" else 0 :]
        if event in ("os.mkdir", "os.remove", "os.rmdir") and arguments[-1] != -1:
            names = [os.path.join(os.readlink(f"/proc/self/fd/{arguments[-1]}"), os.fsdecode(names[0]))]
    elif event == "pickle.find_class":
        names = [".".join(map(str, arguments))]
    elif event == "exec":
        place = getattr(arguments[0], "co_filename", "")
        names = [place] if place.startswith(os.environ.get("KDPIPE_TEST_WATCHED", "no folder")) else []
    else:
        return
    _busy = True
    try:
        frame, stack = sys._getframe().f_back, []
        while frame is not None:
            stack.append(frame.f_code.co_filename)
            frame = frame.f_back
        for name in names:
            shown = os.fsdecode(name) if isinstance(name, (str, bytes, os.PathLike)) else None
            if shown is not None:
                if event != "pickle.find_class":
                    shown = os.path.abspath(shown)
                row = {"event": event, "name": shown, "argv": sys.argv[:1] + sys.argv[1:3], "stack": stack[:12]}
                os.write(_note, (json.dumps(row) + "\\n").encode())
    finally:
        _busy = False

sys.addaudithook(_hook)
"""


@dataclass(frozen=True)
class Noted:
    """One event: what was changed, or the class that a pickle asked for; and whose code did it, innermost first."""

    event: str
    name: str
    argv: list[str]
    stack: list[str]


def audited(folder: Path, *, watched: Path | None = None) -> dict[str, str]:
    """Variables of an environment in which Python processes note what they do, in `folder`.

    Code of files below `watched` that is run is noted too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(_HOOK)
    return {
        "PYTHONPATH": str(folder),
        "KDPIPE_TEST_AUDIT": str(folder / "events"),
        "PYTHONDONTWRITEBYTECODE": "1",
        **({} if watched is None else {"KDPIPE_TEST_WATCHED": str(watched)}),
    }


def noted(folder: Path) -> list[Noted]:
    """The events so far; a line that a kill cut short is left out."""
    rows = []
    for line in (folder / "events").read_text().splitlines():
        try:
            rows.append(Noted(**json.loads(line)))
        except ValueError:
            continue
    return rows


def listing(
    folder: Path, *, without: Mapping[Path, object] | tuple[Path, ...] = ()
) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file below a folder, but those below `without`."""
    found = {}
    for path in folder.rglob("*"):
        if not path.is_dir() and not any(path.is_relative_to(other) for other in without):
            status = os.lstat(path)
            found[str(path)] = (status.st_size, status.st_mtime_ns)
    return found
