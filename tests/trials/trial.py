"""One trial: a real command in a copy of a small finished world, with something odd about it, and what it must keep.

Whatever the oddity, a command keeps these promises, and `faults` says which it broke: it ends, by itself and not by a
signal; it shows no traceback and calls nothing a bug in kdpipe; its exit code is one of those that the trial allows;
where it fails, it says so in a sentence; it writes in its workspace and where it was pointed, and nowhere else.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.commands import with_group
from tests.worlds import SMALLEST, write_recipe

DONE, FAILED, USAGE, HELD, PREFLIGHT, DAMAGED, LEFT = 0, 1, 2, 3, 4, 5, 6
REFUSED = frozenset({FAILED, USAGE, PREFLIGHT})
"""What an oddity may end in, where it cannot be lived with."""
LIMIT_SECONDS = 240
"""Of a command, on a busy machine. `seconds` bounds the CPU seconds of the trials that promise to be short."""
MAX_FILE_KIB = 1 << 20
"""A device that is read without end fills no disk."""
PROGRAM = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -P -m kdpipe "$@"\n'
"""`kdpipe` as it is installed: the working folder is not on its path."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code as a shell tells it, its text, and CPU seconds with its children."""

    code: int
    said: str
    cpu_seconds: float
    late: bool
    folder: Path

    def kdpipe(self, *arguments: str) -> tuple[int, str]:
        """The exit code and the text of a plain command in the same folder, after the trial."""
        command = [sys.executable, "-P", "-m", "kdpipe", *arguments]
        done = subprocess.run(
            command, cwd=self.folder, capture_output=True, text=True, check=False, errors="replace"
        )
        return done.returncode, done.stdout + done.stderr


@dataclass(frozen=True)
class Trial:
    """A shell command, where `kdpipe` is the command line, in a copy of the world that `prepare` made odd.

    Args:
        allowed: exit codes that keep the promise; a shell's, so 128 + n stands for signal n.
        may_write: names in the folder that it may make or change, beside `kdpipe-out`.
        silent: nothing can be said, as the stream for it is gone.
        check: one more promise; what was broken, or nothing.
        seconds: CPU seconds that it may take, with its children.
    """

    kind: str
    name: str
    command: str
    allowed: frozenset[int] = frozenset({DONE}) | REFUSED
    prepare: Callable[[Path], object] = lambda _folder: None
    environment: dict[str, str] = field(default_factory=dict)
    may_write: tuple[str, ...] = ()
    silent: bool = False
    check: Callable[[Outcome], str | None] = lambda _outcome: None
    seconds: float = 60.0


def make_world(folder: Path) -> Path:
    """A finished run of one round without MLflow, the student as a folder, data, and recipes that begin from these."""
    world = folder / "world"
    world.mkdir(parents=True)
    write_recipe(world, **{**SMALLEST, "rounds": 1})
    program = folder / "bin" / "kdpipe"
    program.parent.mkdir()
    program.write_text(PROGRAM)
    program.chmod(0o755)
    for command in ("run recipe.yaml", "run recipe.yaml --set seed=2", "export recipe.yaml model"):
        subprocess.run([program, *command.split()], cwd=world, check=True, capture_output=True)
    for split, count in (("train", 32), ("test", 8)):
        rows = (f'{{"question": "What is {i} plus {i}?", "answer": "#### {2 * i}"}}\n' for i in range(count))
        (world / f"{split}.jsonl").write_text("".join(rows))
    return world


def tried(trial: Trial, world: Path, folder: Path) -> tuple[Outcome, list[str]]:
    """What came of a trial in a copy of the world, and which promises it broke."""
    place = folder / "here"
    shutil.copytree(world, place, symlinks=True)
    trial.prepare(place)
    before = names(place)
    outcome = perform(trial, place)
    found = faults(trial, outcome)
    if place.exists():
        found += [f"wrote {name}" for name in sorted(names(place) ^ before) if not may_change(trial, name)]
    return outcome, found


def perform(trial: Trial, place: Path) -> Outcome:
    """Runs the command to its end, or ends it and all its processes at the limit."""
    path = f"{place.parent.parent / 'bin'}:{os.environ['PATH']}"
    with (place.parent / "said").open("wb") as output:
        process = subprocess.Popen(
            ["/bin/bash", "-c", f"ulimit -f {MAX_FILE_KIB}; {trial.command}"],
            cwd=place,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PATH": path, **trial.environment},
        )
    late = threading.Event()

    def end() -> None:
        late.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(LIMIT_SECONDS, end)
    timer.start()
    _pid, status, usage = os.wait4(process.pid, 0)
    timer.cancel()
    process.returncode = code = os.waitstatus_to_exitcode(status)
    with_group(process.pid, signal.SIGKILL)
    said = (place.parent / "said").read_text(errors="replace")
    cpu = usage.ru_utime + usage.ru_stime
    return Outcome(code if code >= 0 else 128 - code, said, cpu, late.is_set(), place)


def faults(trial: Trial, outcome: Outcome) -> list[str]:
    """The promises that were broken, each in a few words."""
    found = []
    if outcome.late:
        return [f"no end within {LIMIT_SECONDS} s"]
    if "Traceback (most recent call last)" in outcome.said:
        found.append("a traceback")
    if "a bug in kdpipe" in outcome.said:
        found.append("told as a bug in kdpipe")
    if outcome.code not in trial.allowed:
        found.append(f"exit code {outcome.code}")
    if outcome.code in REFUSED and not trial.silent and "error" not in outcome.said.lower():
        found.append("failed without a word")
    if outcome.cpu_seconds > trial.seconds:
        found.append(f"{outcome.cpu_seconds:.1f} CPU seconds")
    broken = trial.check(outcome)
    return [*found, broken] if broken else found


def names(place: Path) -> set[str]:
    """Every path in the folder but the workspace's, with size and time of files."""
    found = set()
    for path in place.rglob("*") if place.exists() else ():
        name = str(path.relative_to(place))
        if name.split("/", maxsplit=1)[0] == "kdpipe-out":
            continue
        status = path.lstat()
        found.add(f"{name}\0{status.st_size} bytes at {status.st_mtime_ns}" if path.is_file() else name)
    return found


def may_change(trial: Trial, name: str) -> bool:
    return any(name.split("\0", maxsplit=1)[0].startswith(allowed) for allowed in trial.may_write)


def all_of(*checks: Callable[[Outcome], str | None]) -> Callable[[Outcome], str | None]:
    """The first promise that was broken of several."""
    return lambda outcome: next((broken for check in checks if (broken := check(outcome))), None)


def is_done_if_it_says_so(outcome: Outcome) -> str | None:
    """Exit 0 of `run` means that every step is done."""
    return is_done(outcome) if outcome.code == DONE else None


def is_done(outcome: Outcome) -> str | None:
    """Every step of the recipe is done."""
    code, said = outcome.kdpipe("status", "recipe.yaml", "--check")
    return None if code == DONE else f"it says done, but status --check exits with {code}: {said[-200:]}"


def goes_on(outcome: Outcome) -> str | None:
    """The plain command, repeated, ends with everything done and whole."""
    for arguments in (("run", "recipe.yaml"), ("verify", "recipe.yaml", "--full")):
        code, said = outcome.kdpipe(*arguments)
        if code != DONE:
            return f"{arguments[0]} after it: exit code {code}: {said[-300:]}"
    return None


def says(*words: str) -> Callable[[Outcome], str | None]:
    """One of these words is in what was said."""
    return lambda outcome: None if any(word in outcome.said for word in words) else f"does not say {words}"
