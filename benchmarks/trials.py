"""Tries real commands with odd streams, paths, recipes, file systems, servers, models, neighbours and folders.

    python benchmarks/trials.py > benchmarks/results/trials.jsonl
    python benchmarks/trials.py --markdown benchmarks/results/trials.jsonl
    python benchmarks/trials.py --kinds paths --only "workspace of" --show

A trial is a command in a copy of a small finished world (`tests/trials/trial.py` says which promises it must keep).
One JSON line for each kind, with the trials that broke one. Exit status 1 when any did.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from study import ROOT, Rows, commit, parsed, parser_of

sys.path.insert(0, str(ROOT))  # the harness is the tests' own

from tests.trials import file_systems, folders, models, paths, recipes, servers, side_by_side, streams
from tests.trials.trial import Trial, make_world, tried

MODULES = {
    "streams": streams,
    "paths": paths,
    "recipes": recipes,
    "file systems": file_systems,
    "servers": servers,
    "models": models,
    "gc and runs": side_by_side,
    "odd folders": folders,
}


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--kinds", nargs="+", choices=MODULES, default=list(MODULES))
    parser.add_argument("--only", default="", help="trials whose name holds this text")
    parser.add_argument("--every", type=int, default=1, help="each nth trial of a kind")
    parser.add_argument("--jobs", type=int, default=2, help="trials at a time")
    parser.add_argument("--show", action="store_true", help="print what each command said")
    arguments = parsed(parser, markdown)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="kdpipe-trials-") as name:
        world = make_world(Path(name))
        for kind in arguments.kinds:
            chosen = [trial for trial in MODULES[kind].trials() if arguments.only in trial.name][
                :: arguments.every
            ]
            line = all_tried(chosen, world, jobs=arguments.jobs, show=arguments.show)
            print(json.dumps({"benchmark": "trials", "commit": commit(), "kind": kind, **line}), flush=True)
            failed += len(line["failed"])
    return 1 if failed else 0


def all_tried(trials: Iterable[Trial], world: Path, *, jobs: int, show: bool) -> dict[str, Any]:
    """How many there were, how they ended, and which of them broke a promise."""

    def one(trial: Trial) -> tuple[Trial, int, list[str]]:
        folder = Path(tempfile.mkdtemp(dir=world.parent))
        outcome, found = tried(trial, world, folder)
        if show or found:
            print(
                f"{trial.name}: {outcome.code} {found}\n{outcome.said[-1500:]}", file=sys.stderr, flush=True
            )
        shutil.rmtree(folder, ignore_errors=True)
        return trial, outcome.code, found

    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(one, trials))
    return {
        "trials": len(results),
        "exit_codes": {
            str(code): count for code, count in sorted(Counter(code for _, code, _ in results).items())
        },
        "failed": [{"name": trial.name, "found": found} for trial, _, found in results if found],
    }


def markdown(rows: Rows) -> str:
    """The table of docs/reliability.md."""
    lines = ["| kind | trials | ended with | failed |", "| --- | --- | --- | --- |"]
    for row in rows:
        codes = ", ".join(f"{code}: {count}" for code, count in row["exit_codes"].items())
        lines.append(f"| {row['kind']} | {row['trials']} | {codes} | {len(row['failed'])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
