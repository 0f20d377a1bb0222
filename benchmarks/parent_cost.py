"""CPU time that each round costs the parent of a run: it must not grow with rounds done or with other runs.

    python -m benchmarks.parent_cost [--rounds 300] [--others 0] >> benchmarks/results/parent_cost.jsonl

Runs `kdpipe run --json` on a tiny recipe that evaluates after every round, and reads the CPU clock of that process at
the end of each round: the worker, where sampling and training happen, is another process and not counted. With
`--others N` the workspace also has N copies of a finished run of the first rounds, whose entries this run shares. One
JSON line.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kdpipe.store.environment import environment
from tests.worlds import SMALLEST, write_recipe

SHARED_ROUNDS = 8
WINDOW = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--others", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        times = measured(Path(name), arguments.rounds, arguments.others)
    last = arguments.rounds
    early, late = mean(times, 10, 10 + WINDOW), mean(times, last - WINDOW, last)
    found = {
        "commit": environment()["git_commit"],
        "processor": environment()["processor"],
        "rounds": arguments.rounds,
        "others": arguments.others,
        "milliseconds_by_50_rounds": [
            round(1e3 * mean(times, start, start + WINDOW), 2) for start in range(0, last, WINDOW)
        ],
        f"milliseconds_rounds_10_to_{10 + WINDOW}": round(1e3 * early, 2),
        f"milliseconds_rounds_{last - WINDOW}_to_{last}": round(1e3 * late, 2),
        "ratio": round(late / early, 3),
    }
    print(json.dumps(found))


def mean(times: dict[int, float], after: int, last: int) -> float:
    """The mean CPU seconds of a round, over the rounds after `after` up to `last`."""
    return statistics.fmean(seconds for number, seconds in times.items() if after < number <= last)


def measured(folder: Path, rounds: int, others: int) -> dict[int, float]:
    """CPU seconds of the parent in each round that it performed."""
    evaluate = {"teacher": False, "reverse_kl_problems": 0, "every": 1}
    recipe = write_recipe(folder, **{**SMALLEST, "evaluate": evaluate}, rounds=rounds)
    command = [
        sys.executable,
        "-m",
        "kdpipe",
        "run",
        str(recipe),
        "--workspace",
        str(folder / "out"),
        "--json",
    ]
    if others:
        subprocess.run([*command, "--rounds", str(SHARED_ROUNDS)], check=True, stdout=subprocess.DEVNULL)
        [run] = (folder / "out/runs").iterdir()
        for number in range(others):
            shutil.copytree(run, run.with_name(f"tiny-{number:08x}"), symlinks=True)
    times: dict[int, float] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        clock = (~process.pid << 3) | 2  # Linux: the CPU clock of another process
        before = 0.0
        assert process.stdout is not None
        for line in process.stdout:
            event: dict[str, Any] = json.loads(line)
            now = time.clock_gettime(clock)
            if event["event"] == "round ends":
                times[event["round"]] = now - before
            if event["event"] in ("begin", "round ends"):
                before = now
    if process.returncode:
        raise SystemExit(process.returncode)
    return times


if __name__ == "__main__":
    main()
