"""File systems that refuse what a workspace needs, each by LD_PRELOAD of `refuse.c` under a real command."""

from __future__ import annotations

import errno
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

from tests.trials.trial import DONE, HELD, REFUSED, Outcome, Trial, goes_on, is_done_if_it_says_so

CALLS: dict[str, tuple[str, ...]] = {
    "fsync of a folder": ("EINVAL", "ENOTSUP", "EIO", "EACCES"),
    "fsync of a file": ("EINVAL", "EIO", "ENOSPC", "EDQUOT"),
    "flock": ("ENOLCK", "ENOSYS", "EOPNOTSUPP", "EIO", "EINVAL"),
    "symlink": ("EPERM", "EOPNOTSUPP", "ENOSYS", "EACCES", "ENOSPC"),
    "link": ("EPERM", "EMLINK"),
    "rename": ("EXDEV", "EACCES", "EBUSY", "ESTALE"),
    "mkdir": ("EMLINK", "ENOSPC", "EROFS", "EDQUOT"),
    "unlink": ("EBUSY", "EPERM", "EACCES", "ESTALE"),
    "chmod": ("EPERM", "ENOTSUP"),
    "utime": ("EPERM", "ENOSYS"),
    "open to write": ("EMFILE", "ENFILE", "ENOSPC", "EROFS", "ETXTBSY", "ESTALE"),
}
"""Call -> errors that file systems are known to answer it with."""
COMMANDS = {
    "a new run": "rm -r kdpipe-out; kdpipe run recipe.yaml",
    "a finished run": "kdpipe run recipe.yaml",
    "status": "kdpipe status recipe.yaml",
    "gc": "rm -r kdpipe-out/runs/*; kdpipe gc --delete",
    "export": "kdpipe export recipe.yaml out",
    "report": "kdpipe report recipe.yaml -o page.html",
}
LATER = ("5", "40")
"""Calls of which number on are refused, of a new run."""


def trials() -> Iterator[Trial]:
    if shutil.which("cc") is None:
        return
    for (call, errors), (name, command) in product(CALLS.items(), COMMANDS.items()):
        for error in errors:
            yield refusing(name, command, call, error, "1")
            if name == "a new run" and error in errors[:2]:
                for number in LATER:
                    yield refusing(name, command, call, error, number)


def refusing(name: str, command: str, call: str, error: str, number: str) -> Trial:
    before, _, kdpipe = command.rpartition("; ")
    refuse = f"{call}:{getattr(errno, error)}:{number}"
    line = f"{before + '; ' if before else ''}export LD_PRELOAD={library()} REFUSE='{refuse}'; {kdpipe}"
    return Trial(
        "file systems",
        f"{name}: {call} says {error} from the {number}th on",
        line,
        frozenset({DONE, HELD}) | REFUSED,
        may_write=("out", "page.html", ".tmp-"),
        check=promised(name),
    )


def promised(name: str) -> Callable[[Outcome], str | None]:
    """Done where it says so; and where it fails, the same command goes on once the file system is right."""

    def check(outcome: Outcome) -> str | None:
        return is_done_if_it_says_so(outcome) or goes_on(outcome) if "run" in name else None

    return check


@functools.cache
def library() -> Path:
    """The compiled library, in a folder of this process."""
    folder = Path(tempfile.mkdtemp(prefix="kdpipe-refuse-"))
    source = Path(__file__).with_name("refuse.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", folder / "refuse.so", source, "-ldl"], check=True)
    return folder / "refuse.so"
