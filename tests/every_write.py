"""Ends a small run at each of its durable writes in turn, and lets the same command finish it.

    python -m tests.every_write [--stride 7] [--first 0] [--twice] [--fault ENOSPC]

One process imports everything and runs once, and then forks for each trial. A child counts every change that the run
makes to the disk (a durable write, a line of a log, a link, a removal) and ends without a word at the n-th: `torn`, in
the middle of it, or `done`, right after it. With `--fault` nothing ends it, but the system refuses the n-th change: the
run has to stop with a message that names the place and says what to do. Another child repeats the command. It must end
with the payload digests of a run that nothing ended, leave no draft behind, and have every metric once. One JSON line
a trial.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import gc
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import pytest
import torch

import kdpipe.execution.executor
import kdpipe.pipeline.runs
import kdpipe.store.artifacts
from kdpipe.errors import StepError
from kdpipe.recipe.file import LoadedRecipe
from kdpipe.store import durable
from tests.commands import assert_metrics_are_there_once, assert_nothing_was_done_twice
from tests.worlds import events_of, leftovers, load_tiny, payload_digests, run_near

Fault = Literal["ENOSPC", "EIO", "EROFS", "EACCES"]
Phase = Literal["torn", "done", "ENOSPC", "EIO", "EROFS", "EACCES"]
ENDED = 77
REFUSED = 78
ROUNDS = 2
CHILD_SECONDS = 300  # a trial takes two or three


@dataclass(frozen=True)
class Trial:
    """Where a run was ended (and, of a resume, once more), what it was doing there, and what was found after it."""

    ends: list[tuple[int, Phase]]
    doing: list[str]
    found: str = "as unbroken"
    seconds: float = 0.0


class Changes:
    """Counts changes to the disk; at number `at` it ends the process there, or has the system refuse the change."""

    def __init__(self, at: int | None, phase: Phase, note: Path) -> None:
        self._at, self._phase, self._note = at, phase, note
        self.count = 0

    def made(self, what: str, whole: Callable[[], None], half: Callable[[], None], *, calls: str) -> None:
        """Makes a change, of which `half` makes the half; the system makes it when `calls` are called."""
        number, self.count = self.count, self.count + 1
        if number != self._at:
            whole()
            return
        if self._phase in ("torn", "done"):
            (half if self._phase == "torn" else whole)()
            self.end(what)
        self.write_note(what)
        error = OSError(getattr(errno, self._phase), os.strerror(getattr(errno, self._phase)))
        with refused(calls, error):
            whole()

    def end(self, what: str) -> NoReturn:
        self.write_note(what)
        os._exit(ENDED)

    def write_note(self, what: str) -> None:
        with self._note.open("a") as note:
            note.write(f"{self._phase}: {what}\n")

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Every change to the disk goes through `made` while this is open."""
        write, append, remove = durable.write_durably, durable.append_line, durable.remove
        link = kdpipe.pipeline.runs.RunFolder.link

        def write_durably(path: Path, writer: Callable[[Path], None]) -> None:
            what = f"write {place(path)}"

            def torn(draft: Path) -> None:
                writer(draft)
                halve(draft)
                self.end(what)

            step = ("bytes", "fsync", "rename")[self.count % 3]
            self.made(what, lambda: write(path, writer), lambda: write(path, torn), calls=step)

        def append_line(path: Path, value: Any) -> None:
            def torn() -> None:
                append(path, value)
                os.truncate(path, path.stat().st_size - 9)

            self.made(f"line of {place(path)}", lambda: append(path, value), torn, calls="line")

        def removed(path: Path) -> None:
            if not path.exists():
                return
            self.made(f"remove {place(path)}", lambda: remove(path), lambda: halve(path), calls="remove")

        def linked(run: Any, step: Any, entry: Any) -> None:
            self.made(f"link {step.id}", lambda: link(run, step, entry), lambda: None, calls="link")

        try:
            replace_everywhere(write_durably, append_line, remove=removed)
            kdpipe.pipeline.runs.RunFolder.link = linked  # type: ignore[method-assign]
            yield
        finally:
            replace_everywhere(write, append, remove=remove)
            kdpipe.pipeline.runs.RunFolder.link = link  # type: ignore[method-assign]


def replace_everywhere(
    write_durably: Callable[..., None], append_line: Callable[..., None], *, remove: Callable[..., None]
) -> None:
    """Puts these in the place of the store's own, in every module that has them by name."""
    new = {"write_durably": write_durably, "append_line": append_line, "remove": remove}
    for module in (durable, kdpipe.store.artifacts, kdpipe.pipeline.runs, kdpipe.execution.executor):
        for name in new.keys() & vars(module).keys():
            setattr(module, name, new[name])


@contextlib.contextmanager
def refused(calls: str, error: OSError) -> Iterator[None]:
    """The system refuses what a change needs while this is open; lines and bytes of files get through by half."""

    def fail(*_arguments: Any, **_named: Any) -> NoReturn:
        raise error

    def fail_in_the_middle(descriptor: int, data: bytes) -> NoReturn:
        real_write(descriptor, data[: len(data) // 2])
        raise error

    def fail_after_half(path: Path) -> list[Path]:
        halve(path)
        raise error

    real_write = os.write
    places: dict[str, list[tuple[Any, str, Any]]] = {
        "bytes": [(durable, "files_below", fail_after_half)],  # what is called when the writer has written
        "fsync": [(durable, "flush", fail)],
        "rename": [(Path, "replace", fail)],
        "line": [(os, "write", fail_in_the_middle)],
        "remove": [(shutil, "rmtree", fail), (Path, "unlink", fail)],
        "link": [(Path, "symlink_to", fail)],
    }
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in places[calls]]
    try:
        for owner, name, replacement in places[calls]:
            setattr(owner, name, replacement)
        yield
    finally:
        for owner, name, real in before:
            setattr(owner, name, real)


def place(path: Path) -> str:
    """The end of a path, without fingerprints."""
    return "/".join(part for part in path.parts[-3:] if not (len(part) == 16 and part.isalnum()))


def halve(path: Path) -> None:
    """Cuts a file to half of its bytes; of a folder it removes every second file and cuts the others."""
    if path.is_dir():
        for number, file in enumerate(sorted(found for found in path.rglob("*") if found.is_file())):
            if number % 2:
                file.unlink()
            else:
                halve(file)
        return
    with contextlib.suppress(FileNotFoundError):
        os.truncate(path, path.stat().st_size // 2)


def forked(work: Callable[[], None]) -> int:
    """The exit status of a child that does the work: 0, or 1 with its story on stderr; a stuck one is ended."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        signal.alarm(CHILD_SECONDS)
        try:
            work()
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class World:
    """The recipe, and what a run of it leaves that nothing ended."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder = folder
        small = {"train_problems": 16, "test_problems": 4}
        task = {"kind": "arithmetic", "steps": [1], "max_operand": 10, **small}
        settings = {"rounds": ROUNDS, "task": task, "rollout__prompts": 4, "rollout__max_new_tokens": 6}
        self.loaded: LoadedRecipe = load_tiny(folder, **{**settings, **changes})
        counted = folder / "count"

        def unbroken() -> None:
            changes = Changes(None, "done", folder / "note")
            with changes.watched():
                run_near(self.loaded, folder / "unbroken")
            counted.write_text(str(changes.count))

        unbroken()  # here, not in a child: what it imports and compiles is there for every trial
        self.changes = int(counted.read_text())
        self.digests = payload_digests(folder / "unbroken")
        gc.freeze()  # a child that looked for garbage would copy every page that it looks at

    def trial(self, ends: list[tuple[int, Phase]]) -> Trial:
        """Ends the run there, one after the other in resumes of it, and then lets it finish."""
        started = time.monotonic()
        workspace, note = self.folder / "out", self.folder / "note"
        shutil.rmtree(workspace, ignore_errors=True)
        note.write_text("")
        cuts: list[int] = []
        for at, phase in ends:

            def work(at: int = at, phase: Phase = phase) -> None:
                with Changes(at, phase, note).watched():
                    self._run(workspace, phase)

            code = forked(work)
            if code == 0:  # a resume that had less to do
                break
            wanted = ENDED if phase in ("torn", "done") else REFUSED
            if code != wanted:
                return Trial(ends, note.read_text().splitlines(), f"ended with {code}, expected {wanted}")
            with contextlib.suppress(ValueError):
                cuts.append(len(events_of(workspace)))
        code = forked(lambda: self._finish(workspace, cuts))
        found = "as unbroken" if code == 0 else "NOT as unbroken"
        return Trial(ends, note.read_text().splitlines(), found, round(time.monotonic() - started, 2))

    def _run(self, workspace: Path, phase: Phase) -> None:
        """Runs; where the system refuses something that has to be said, or the child fails."""
        if phase in ("torn", "done"):
            run_near(self.loaded, workspace)
            return
        with pytest.raises(StepError) as caught:
            run_near(self.loaded, workspace)
        error = caught.value
        assert os.strerror(getattr(errno, phase)) in error.message, error.message
        assert str(workspace) in error.message, error.message
        assert "then repeat the command: finished pieces are kept" in error.hint, error.hint
        os._exit(REFUSED)

    def _finish(self, workspace: Path, cuts: list[int]) -> None:
        run_near(self.loaded, workspace)
        assert payload_digests(workspace) == self.digests, "other digests"
        assert leftovers(workspace) == [], leftovers(workspace)
        assert_metrics_are_there_once(workspace)
        assert_nothing_was_done_twice(events_of(workspace), cuts)


def trials(
    world: World, *, first: int, stride: int, twice: bool, fault: Fault | None = None
) -> Iterator[Trial]:
    """Trials at every `stride`-th change from `first` on, in both phases or by a fault; `twice` ends resumes too."""
    draw = random.Random(0)
    phases: tuple[Phase, ...] = (fault,) if fault else ("torn", "done")
    for at, phase in itertools.product(range(first, world.changes, stride), phases):
        ends = [(at, phase)]
        if twice:
            ends.append((draw.randrange(world.changes - at + 4), draw.choice(phases)))
        yield world.trial(ends)


@contextlib.contextmanager
def a_world() -> Iterator[World]:
    """A world to try in. No power fails here, and what an ended process has written is not lost with it."""
    threads, fsync = torch.get_num_threads(), durable.flush
    torch.set_num_threads(1)  # threads do not live in a forked child
    durable.flush = lambda _path: True
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield World(Path(folder))
    finally:
        torch.set_num_threads(threads)
        durable.flush = fsync


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--twice", action="store_true")
    parser.add_argument("--fault", choices=get_args(Fault))
    arguments = parser.parse_args()
    failed = 0
    with a_world() as world:
        for trial in trials(world, **vars(arguments)):
            print(json.dumps({**asdict(trial), "changes": world.changes}), flush=True)
            failed += trial.found != "as unbroken"
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
