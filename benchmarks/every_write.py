"""Ends a two-round run at every change that it makes to the disk, or has the system refuse it; one line a sweep.

    python benchmarks/every_write.py > benchmarks/results/every_write.jsonl
    python benchmarks/every_write.py --markdown benchmarks/results/every_write.jsonl

The trials are those of `python -m tests.every_write`, which prints each: the run is ended, in the middle of a change
or right after it, or stops as it is refused, and the same command finishes it. Exit status 1 when one did not end as
the unbroken run did.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from typing import Any

from study import ROOT, commit, parsed, parser_of

sys.path.insert(0, str(ROOT))  # the harness is the tests' own

from tests.every_write import Fault, World, a_world, trials

SWEEPS: dict[str, tuple[bool, Fault | None, int]] = {
    "ended": (False, None, 1),
    "ended, and the resume too": (True, None, 6),
    "ENOSPC": (False, "ENOSPC", 1),
    "EIO": (False, "EIO", 2),
    "EROFS": (False, "EROFS", 8),
    "EACCES": (False, "EACCES", 8),
}
"""Name -> whether the resume is ended too, the fault, and at each which change."""


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    arguments = parsed(parser, markdown)
    lost = 0
    with a_world() as world:
        for name in arguments.sweeps:
            line = swept(world, name)
            print(json.dumps({"benchmark": "every_write", "commit": commit(), **line}), flush=True)
            lost += len(line["not_as_unbroken"])
    return 1 if lost else 0


def swept(world: World, name: str) -> dict[str, Any]:
    """What a sweep found: trials by what was done to the disk, and those that did not end as the unbroken run."""
    twice, fault, stride = SWEEPS[name]
    kinds, seconds, wrong, before = Counter[str](), [], [], os.times()
    for trial in trials(world, first=0, stride=stride, twice=twice, fault=fault):
        kinds.update(doing.split()[1] for doing in trial.doing)
        seconds.append(trial.seconds)
        if trial.found != "as unbroken":
            wrong.append({"ends": trial.ends, "doing": trial.doing, "found": trial.found})
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {
        "sweep": name,
        "changes": world.changes,
        "stride": stride,
        "trials": len(seconds),
        "at": dict(kinds),
        "cpu_seconds_per_trial": round(cpu / len(seconds), 2),
        "wall_seconds": round(sum(seconds)),
        "not_as_unbroken": wrong,
    }


NAMES = {
    "ended": "ended in the middle of a change, and right after it",
    "ended, and the resume too": "the same, and the resume ended at a random change too",
    "ENOSPC": "no space left (ENOSPC)",
    "EIO": "input/output error (EIO)",
    "EROFS": "read-only file system (EROFS)",
    "EACCES": "permission denied (EACCES)",
}


def markdown(rows: list[dict[str, Any]]) -> str:
    """A line for each sweep."""
    lines = [["fault", "at which changes", "trials", "CPU seconds a trial", "losses"], ["---"] * 5]
    for row in rows:
        which = f"{'all' if row['stride'] == 1 else 'each ' + ordinal(row['stride'])} of {row['changes']}"
        cost, lost = f"{row['cpu_seconds_per_trial']:.1f}", str(len(row["not_as_unbroken"]))
        lines.append([NAMES[row["sweep"]], which, str(row["trials"]), cost, lost])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ordinal(number: int) -> str:
    return {2: "2nd"}.get(number, f"{number}th")


if __name__ == "__main__":
    sys.exit(main())
