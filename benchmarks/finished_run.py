"""CPU seconds of commands that have nothing to do: `run` on finished rounds, and `plan` in a store of many entries.

    python -m benchmarks.finished_run [--rounds 50] [--entries 1000] > benchmarks/results/finished_run.jsonl

A tiny run of that many rounds is made by the package itself, then as many further runs of one round, each of another
learning rate, as the store lacks entries: their rollouts, scores and students are copied under their own
fingerprints by the store's own drafts. Each command is the real one, in a process of its own; its time is that of the
process and all that it started, the least of several. One JSON line.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kdpipe.pipeline.project import Project, open_project
from kdpipe.recipe.file import load_recipe
from kdpipe.store.artifacts import MANIFEST, Draft
from kdpipe.store.environment import environment
from tests.worlds import load_tiny, run_near

ATTEMPTS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--entries", type=int, default=1000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = make_run(folder, arguments.rounds)
        small = measured(folder, recipe)
        fill(folder, recipe, arguments.entries)
        large = measured(folder, recipe)
    found = {
        "commit": environment()["git_commit"],
        "processor": environment()["processor"],
        "rounds": arguments.rounds,
        "own store": small,
        "shared store": large,
    }
    print(json.dumps(found, sort_keys=True))


def make_run(folder: Path, rounds: int) -> Path:
    """A finished run of the tiny world, as MLflow's mirror is off there; returns its recipe."""
    changes: dict[str, Any] = {"rounds": rounds, "evaluate": {"reverse_kl_problems": 2, "every": 1}}
    loaded = load_tiny(folder, **changes)
    run_near(loaded, folder / "out")
    return loaded.path


def fill(folder: Path, recipe: Path, entries: int) -> None:
    """Adds runs of other learning rates until the store holds so many entries."""
    own = open_project(load_recipe(recipe), folder / "out")
    number = 0
    while (count := len(own.store.all_folders())) < entries:
        number += 1
        rate = f"train.optimizer.learning_rate={1e-3 + number * 1e-7!r}"
        other = open_project(load_recipe(recipe, (rate,)), folder / "out")
        other.run.write_recipe(other.loaded)
        copy_steps(own, other, at_most=entries - count)


def copy_steps(own: Project, other: Project, *, at_most: int) -> None:
    """Commits steps of `other` with the payload that `own` has for them, where they are not there yet."""
    for step, origin in zip(other.plan.steps, own.plan.steps, strict=True):
        entry, source = other.store.entry(step), own.store.entry(origin)
        if not (entry.folder / MANIFEST).exists():
            if not at_most:
                return
            at_most -= 1
            manifest = source.manifest()
            assert manifest is not None
            draft = Draft(entry, step, note=lambda _kind, _fields: None)
            kept = [file.path for file in manifest.files if file.path not in manifest.dropped]
            for top in sorted({path.partition("/")[0] for path in kept}):
                draft.write(top, functools.partial(copied, source.folder / top))
            draft.commit(inputs=inputs_of(other, step), provenance=manifest.provenance)
        other.run.link(step, entry)


def copied(origin: Path, target: Path) -> None:
    """Copies a file or a folder."""
    if origin.is_dir():
        shutil.copytree(origin, target)
    else:
        shutil.copyfile(origin, target)


def inputs_of(project: Project, step: Any) -> dict[str, str]:
    """The payload digests that the step's inputs have."""
    digests = {}
    for role, wanted in step.inputs.items():
        manifest = project.store.entry(project.plan.step(wanted.step_id)).manifest()
        assert manifest is not None
        digests[role] = manifest.payload_digest
    return digests


def measured(folder: Path, recipe: Path) -> dict[str, Any]:
    """CPU and wall seconds of each command, the least of several."""
    place = [str(recipe), "--workspace", str(folder / "out")]
    project = open_project(load_recipe(recipe), folder / "out")
    found: dict[str, Any] = {
        "entries": len(project.store.all_folders()),
        "runs": len(list((folder / "out/runs").iterdir())),
    }
    mirrored = ["run", *place, "--set", "tracking.enabled=true"]
    subprocess.run([sys.executable, "-m", "kdpipe.cli.app", *mirrored], check=True, capture_output=True)
    commands = {
        "run": ["run", *place],
        "run, mirrored": mirrored,
        "plan": ["plan", *place],
        "status": ["status", *place],
    }
    for name, command in commands.items():
        found[name] = min((seconds(command) for _ in range(ATTEMPTS)), key=lambda pair: pair["cpu_seconds"])
    return found


def seconds(command: list[str]) -> dict[str, float]:
    """What the real command takes, with all that it starts."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "kdpipe.cli.app", *command],
        check=True,
        capture_output=True,
        env={**os.environ},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {"cpu_seconds": round(cpu, 3), "wall_seconds": round(time.monotonic() - started, 3)}


if __name__ == "__main__":
    main()
