"""Ends a small run at each of its durable writes in turn, and lets the same command finish it.

    python -m tests.every_write [--stride 7] [--first 0] [--twice]

One process imports everything once and forks for each trial. A child counts every change that the run makes to the
disk (a durable write, a line of a log, a link, a removal) and ends without a word at the n-th: `torn`, in the middle of
it, or `done`, right after it. Another child repeats the command. It must end with the payload digests of a run that
nothing ended, leave no draft behind, and have every metric once. One JSON line a trial.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch

import kdpipe.perform
import kdpipe.runs
import kdpipe.store
from kdpipe.recipe_file import LoadedRecipe
from tests.commands import assert_metrics_are_there_once, assert_nothing_was_done_twice
from tests.worlds import events_of, leftovers, load_tiny, payload_digests, run_near

Phase = Literal["torn", "done"]
ENDED = 77
ROUNDS = 2


@dataclass(frozen=True)
class Trial:
    """Where a run was ended (and, of a resume, once more), what it was doing there, and what was found after it."""

    ends: list[tuple[int, Phase]]
    doing: list[str]
    found: str = "as unbroken"
    seconds: float = 0.0


class Changes:
    """Counts changes to the disk; at number `at` it ends the process, in the middle of it or right after."""

    def __init__(self, at: int | None, phase: Phase, note: Path) -> None:
        self._at, self._phase, self._note = at, phase, note
        self.count = 0

    def made(self, what: str, whole: Callable[[], None], half: Callable[[], None]) -> None:
        number, self.count = self.count, self.count + 1
        if number != self._at:
            whole()
            return
        if self._phase == "torn":
            half()
        else:
            whole()
        self.end(what)

    def end(self, what: str) -> NoReturn:
        with self._note.open("a") as note:
            note.write(f"{self._phase}: {what}\n")
        os._exit(ENDED)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Every change to the disk goes through `made` while this is open."""
        store = kdpipe.store
        write, append, remove, link = (
            store.write_durably,
            store.append_line,
            store._remove,
            kdpipe.runs.RunFolder.link,
        )

        def write_durably(path: Path, writer: Callable[[Path], None]) -> None:
            def torn(draft: Path) -> None:
                writer(draft)
                halve(draft)
                self.end(f"write {place(path)}")

            self.made(f"write {place(path)}", lambda: write(path, writer), lambda: write(path, torn))

        def append_line(path: Path, value: Any) -> None:
            def torn() -> None:
                append(path, value)
                os.truncate(path, path.stat().st_size - 9)

            self.made(f"line of {place(path)}", lambda: append(path, value), torn)

        def removed(path: Path) -> None:
            if not path.exists():
                return
            self.made(f"remove {place(path)}", lambda: remove(path), lambda: halve(path))

        def linked(run: Any, step: Any, entry: Any) -> None:
            self.made(f"link {step.id}", lambda: link(run, step, entry), lambda: None)

        try:
            store.write_durably, store._remove = write_durably, removed
            store.append_line = kdpipe.runs.append_line = kdpipe.perform.append_line = append_line
            kdpipe.runs.RunFolder.link = linked  # type: ignore[method-assign]
            yield
        finally:
            store.write_durably, store._remove = write, remove
            store.append_line = kdpipe.runs.append_line = kdpipe.perform.append_line = append
            kdpipe.runs.RunFolder.link = link  # type: ignore[method-assign]


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
    """The exit status of a child that does the work: 0, or 1 with its story on stderr."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
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

        assert forked(unbroken) == 0
        self.changes = int(counted.read_text())
        self.digests = payload_digests(folder / "unbroken")

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
                    run_near(self.loaded, workspace)

            code = forked(work)
            if code == 0:  # a resume that had less to do
                break
            if code != ENDED:
                return Trial(ends, note.read_text().splitlines(), f"ended with {code}, expected {ENDED}")
            with contextlib.suppress(ValueError):
                cuts.append(len(events_of(workspace)))
        code = forked(lambda: self._finish(workspace, cuts))
        found = "as unbroken" if code == 0 else "NOT as unbroken"
        return Trial(ends, note.read_text().splitlines(), found, round(time.monotonic() - started, 2))

    def _finish(self, workspace: Path, cuts: list[int]) -> None:
        run_near(self.loaded, workspace)
        assert payload_digests(workspace) == self.digests, "other digests"
        assert leftovers(workspace) == [], leftovers(workspace)
        assert_metrics_are_there_once(workspace)
        assert_nothing_was_done_twice(events_of(workspace), cuts)


def trials(world: World, *, first: int, stride: int, twice: bool) -> Iterator[Trial]:
    """A trial at every `stride`-th change from `first` on, in both phases; `twice` ends the resume too."""
    draw = random.Random(0)
    phases: tuple[Phase, Phase] = ("torn", "done")
    for at, phase in itertools.product(range(first, world.changes, stride), phases):
        ends = [(at, phase)]
        if twice:
            ends.append((draw.randrange(world.changes - at + 4), draw.choice(phases)))
        yield world.trial(ends)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--twice", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # threads do not live in a forked child
    kdpipe.store._fsync = lambda _path: (
        None
    )  # no power fails here, and a process that ends loses nothing written
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        for trial in trials(world, first=arguments.first, stride=arguments.stride, twice=arguments.twice):
            print(json.dumps({**asdict(trial), "changes": world.changes}), flush=True)
            failed += trial.found != "as unbroken"
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
