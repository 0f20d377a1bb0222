"""Kills a real two-round run at random moments, and inside its writes, until hundreds of kills are told; what is lost?

    python benchmarks/kills.py --kills 200 --signals 60 > benchmarks/results/kills.jsonl
    python benchmarks/kills.py --markdown benchmarks/results/kills.jsonl

Real commands with their workers and their MLflow store (SQLite), models of 10,000 parameters. Half of the kills come
at a moment drawn uniformly over the unbroken run's duration, half within a millisecond of a change to a file of a
drawn kind. They end the whole process tree, the command, its worker or its mirror. Signals come before the kills. One
JSON line for the unbroken run, then one for each chain: a run that was ended up to six times and finished by the same
command. Exit status 1 when anything was lost.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from study import ROOT, commit, parsed, parser_of

sys.path.insert(0, str(ROOT))  # the harness is the tests' own

from tests.kills import Study

RECIPE: dict[str, Any] = {"rounds": 2}
WHEN = {
    "moment": "SIGKILL at a random moment",
    "parquet": "SIGKILL while parquet is written",
    "tensors": "SIGKILL while a model or an optimizer is written (safetensors)",
    "manifest": "SIGKILL while a manifest is written",
    "MLflow": "SIGKILL while MLflow's database or record is written",
    "notes": "SIGKILL while events, metrics or a fingerprint are written",
}
WHOM = {
    "all": "the whole process tree",
    "command": "the command alone",
    "worker": "its worker, as the system does when memory ends",
    "mirror": "its MLflow mirror",
}


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--signals", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parsed(parser, markdown)
    lost = 0
    with tempfile.TemporaryDirectory(prefix="kdpipe-kills-", ignore_cleanup_errors=True) as name:
        study = Study(Path(name), **RECIPE)
        unbroken = study.unbroken
        head = {
            "benchmark": "kills",
            "commit": commit(),
            "seed": arguments.seed,
            "unbroken_seconds": unbroken.seconds,
            "unbroken_cpu_seconds": unbroken.cpu_seconds,
            "changes": unbroken.changes,
            "steps": len(unbroken.digests),
            "metrics": len(unbroken.metrics),
        }
        print(json.dumps(head, sort_keys=True), flush=True)
        number = 0
        for by_signals, wanted in ((True, arguments.signals), (False, arguments.kills)):
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


def markdown(rows: list[dict[str, Any]]) -> str:
    """A line for each way to be ended: how often, how often a half-written draft was left, the slowest end, losses."""
    chains = [row for row in rows if "ended" in row]
    lines = [
        ["fault", "times", "in the middle of a write", "slowest end, seconds", "losses"],
        ["---"] * 5,
    ]

    def add(name: str, **wanted: Any) -> None:
        found = [(chain, end) for chain in chains for end in chain["ended"] if wanted.items() <= end.items()]
        torn = sum(bool(end["drafts"]) for _, end in found)
        # Where only the mirror is killed the command goes on: that is no end.
        ends = [end["seconds"] for _, end in found if end["code"] != 0]
        lost = sum({id(chain): len(chain["losses"]) for chain, _ in found}.values())
        slowest = f"{max(ends):.1f}" if ends else "-"
        lines.append([name, str(len(found)), str(torn), slowest, str(lost)])

    for target, name in WHEN.items():
        add(name, how="SIGKILL", target=target)
    for victim, name in WHOM.items():
        add(f"of these: {name}", how="SIGKILL", victim=victim)
    add("SIGTERM", how="SIGTERM")
    add("SIGHUP, as a closed terminal sends it", how="SIGHUP")
    add("SIGINT", how="SIGINT")
    add("SIGINT to the whole group, as a terminal sends it", how="SIGINT to the group")
    add("of these signals: with a second one soon after", second_signal=True)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def totals(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Kills, signals, runs that were ended, commands that they took, and losses."""
    chains = [row for row in rows if "ended" in row]
    ends = [end for chain in chains for end in chain["ended"]]
    kills = sum(end["how"] == "SIGKILL" for end in ends)
    return {
        "kills": kills,
        "signals": len(ends) - kills,
        "runs": len(chains),
        "at most": max((len(chain["ended"]) for chain in chains), default=0),
        "losses": sum(len(chain["losses"]) for chain in chains),
    }


if __name__ == "__main__":
    sys.exit(main())
