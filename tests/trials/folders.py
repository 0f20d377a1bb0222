"""Odd folders: code where the command stands, strange things in the workspace, workspaces of odd names, rights."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

from tests.trials.trial import DAMAGED, DONE, HELD, LEFT, REFUSED, Outcome, Trial

MODULES = (
    "queue",
    "random",
    "types",
    "torch",
    "numpy",
    "datasets",
    "tokenizers",
    "mlflow",
    "kdpipe",
    "yaml",
    "typing",
    "sitecustomize",
)
STARTERS = {
    "a new run": "rm -r kdpipe-out; kdpipe run recipe.yaml --set tracking.enabled=true",
    "check-loss": "kdpipe check-loss recipe.yaml",
    "doctor": "kdpipe doctor",
    "plan": "kdpipe plan recipe.yaml",
}
"""Commands, most of which start processes."""
STRANGE: dict[str, Callable[[Path], object]] = {
    "a file among the entries": lambda out: (out / "store/rollout/x").write_text("x"),
    "a folder among the entries": lambda out: (out / "store/rollout/x").mkdir(),
    "a link to itself among the entries": lambda out: (out / "store/rollout/loop").symlink_to("loop"),
    "a link out among the entries": lambda out: (out / "store/rollout" / ("a" * 64)).symlink_to(outside(out)),
    "a stage that is none": lambda out: (out / "store/nothing/x").mkdir(parents=True),
    "a name with control codes": lambda out: (out / "store/rollout" / "x\x1b[2Jy").mkdir(),
    "a name that is no UTF-8": lambda out: (out / "store/rollout/\udcff").mkdir(),
    "a pipe among the runs": lambda out: os.mkfifo(out / "runs/pipe"),
    "a file among the runs": lambda out: (out / "runs/x").write_text("x"),
    "a run without a recipe": lambda out: (out / "runs/tiny-00000000").mkdir(),
    "a link to itself in a run": lambda out: (first(out / "runs") / "round-001/loop").symlink_to("loop"),
    "a file for a round": lambda out: (first(out / "runs") / "round-009").write_text("x"),
    "a round without an end": lambda out: (first(out / "runs") / f"round-{'9' * 200}").mkdir(),
    "events that are a folder": lambda out: swapped(first(out / "runs") / "events.jsonl"),
    "a recipe that is a folder": lambda out: swapped(first(out / "runs") / "recipe.yaml"),
    "a lock that is a folder": lambda out: [swapped(path) for path in out.rglob("*.lock")],
    "a file for the store": lambda out: (
        shutil.move(out / "store", out.parent / "kdpipe-out-store"),
        (out / "store").write_text("x"),
    ),
    "a file for the runs": lambda out: (shutil.rmtree(out / "runs"), (out / "runs").write_text("x")),
    "a database of random bytes": lambda out: (out / "mlflow.db").write_bytes(os.urandom(5000)),
    "an empty database": lambda out: (out / "mlflow.db").write_bytes(b""),
    "a database that is a folder": lambda out: (out / "mlflow.db").mkdir(),
    "no rights on the store": lambda out: (out / "store").chmod(0),
    "no rights on the runs": lambda out: (out / "runs").chmod(0),
    "a store that cannot be written": lambda out: [
        path.chmod(0o500) for path in (out / "store").rglob("*") if path.is_dir()
    ],
    "an entry on another disk": lambda out: moved_out(first(out / "store/rollout")),
}
LOOKERS = {
    "status": "kdpipe status recipe.yaml",
    "samples": "kdpipe samples recipe.yaml",
    "plan": "kdpipe plan recipe.yaml",
    "gc --delete": "kdpipe gc --delete",
    "verify": "kdpipe verify recipe.yaml",
    "report": "kdpipe report recipe.yaml -o page.html",
    "run": "kdpipe run recipe.yaml",
}
WORKSPACES = (
    "a b",
    "a?b=c",
    "a#b",
    "a%20b",
    "a;b",
    "a:b",
    "日本 Ω",
    "a'b",
    'a"b',
    "a&b",
    "-a",
    "a\\b",
    "x" * 200,
)
TRACKED = "--set tracking.enabled=true"
AS_A_USER = "setpriv --reuid=12345 --regid=12345 --clear-groups --inh-caps=-all "


def trials() -> Iterator[Trial]:
    for (name, command), module in product(STARTERS.items(), MODULES):
        for kind, hostile in {"file": True, "innocent file": False}.items():
            yield Trial(
                "odd folders",
                f"{name}: {module}.py, {kind}",
                command,
                frozenset({DONE}),
                module_in(module, hostile=hostile),
                check=not_owned,
            )
    for (name, prepare), (looker, command) in product(STRANGE.items(), LOOKERS.items()):
        yield Trial(
            "odd folders",
            f"{looker}: {name}",
            command,
            frozenset({DONE, HELD, DAMAGED, LEFT}) | REFUSED,
            lambda folder, prepare=prepare: prepare(folder / "kdpipe-out"),  # type: ignore[misc]
            may_write=("page.html",),
        )
    for name in WORKSPACES:
        place = shlex.quote(f"--workspace={name}")
        yield Trial(
            "odd folders",
            f"a workspace called {name[:20]}",
            f"kdpipe run recipe.yaml {TRACKED} {place} && kdpipe status recipe.yaml {TRACKED} --check {place}",
            frozenset({DONE}),
            may_write=(name,),
        )
    for name, command in LOOKERS.items() if others_may_run() else ():
        yield Trial(
            "odd folders",
            f"{name}: as a user without a home or rights",
            AS_A_USER + "/bin/sh -c " + shlex.quote(command),
            frozenset({DONE, LEFT}) | REFUSED,
            lambda folder: ([path.chmod(0o755) for path in (folder, folder.parent, folder.parent.parent)]),
            environment={"HOME": "/nonexistent"},
        )


def others_may_run() -> bool:
    """Whether another user may run this interpreter, which an environment of root's own may forbid."""
    command = [*shlex.split(AS_A_USER), "/bin/sh", "-c", f"exec {shlex.quote(sys.executable)} -c ''"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def module_in(name: str, *, hostile: bool) -> Callable[[Path], object]:
    text = "open('OWNED', 'w')\nraise SystemExit('owned')\n" if hostile else "x = 1\n"
    return lambda folder: (folder / f"{name}.py").write_text(text)


def not_owned(outcome: Outcome) -> str | None:
    return "code of the folder ran" if (outcome.folder / "OWNED").exists() else None


def first(folder: Path) -> Path:
    return min(folder.iterdir())


def swapped(path: Path) -> None:
    """A folder in the place of a file."""
    path.unlink()
    path.mkdir()


def outside(out: Path) -> Path:
    """A folder beside the workspace that must not be touched."""
    folder = out.parent / "outside"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    return folder


def moved_out(entry: Path) -> None:
    shutil.move(entry, entry.parents[3] / "elsewhere")
    entry.symlink_to(entry.parents[3] / "elsewhere")
