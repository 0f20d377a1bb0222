"""Kills a real two-round run at random moments, and inside its writes, until hundreds of kills are told; what is lost?

    python benchmarks/kills.py --kills 200 --signals 60 > benchmarks/results/kills.jsonl

Real commands with their workers and their MLflow store (SQLite), models of 10,000 parameters. Half of the kills come
at a moment drawn uniformly over the unbroken run's duration, half within a millisecond of a change to a file of a
drawn kind. They end the whole process tree, the command, its worker or its mirror. Signals come after the kills. One
JSON line for the unbroken run, then one for each chain: a run that was ended up to six times and finished by the same
command. Exit status 1 when anything was lost.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from study import ROOT, commit

sys.path.insert(0, str(ROOT))  # the harness is the tests' own

from tests.kills import Study

RECIPE: dict[str, Any] = {"rounds": 2}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--signals", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    lost = 0
    with tempfile.TemporaryDirectory(prefix="kdpipe-kills-") as name:
        study = Study(Path(name), **RECIPE)
        unbroken = study.unbroken
        head = {
            "benchmark": "kills",
            "commit": commit(),
            "seed": arguments.seed,
            "unbroken_seconds": unbroken.seconds,
            "changes": unbroken.changes,
            "steps": len(unbroken.digests),
            "metrics": len(unbroken.metrics),
        }
        print(json.dumps(head, sort_keys=True), flush=True)
        number = 0
        for by_signals, wanted in ((False, arguments.kills), (True, arguments.signals)):
            told = 0
            while told < wanted:
                dice = random.Random(f"{arguments.seed} {number}")
                chain = study.chain(number, dice, by_signals=by_signals)
                told += len(chain.ended)
                lost += len(chain.losses)
                print(json.dumps(dataclasses.asdict(chain), sort_keys=True), flush=True)
                if not chain.losses:
                    shutil.rmtree(Path(name) / f"chain-{number}")
                number += 1
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
