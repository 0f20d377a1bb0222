"""Many commands at once in one workspace, a run that is stopped for half a minute, and one of 500 rounds.

    python benchmarks/load.py > benchmarks/results/load.jsonl
    python benchmarks/load.py --markdown benchmarks/results/load.jsonl

`side by side`: eight runs of different recipes, some of whose steps are the same, begun at once, with `status --watch`,
and with `status`, `report` and `gc --delete` repeated beside them. `paused`: SIGSTOP to every process of a run, SIGCONT
after 30 seconds. `long`: what the main process and MLflow's database hold after each 100 rounds. Digests are those of
the same recipes run alone. One JSON line each. Exit status 1 when anything failed or a digest differs.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from study import ROOT, Rows, commit, parsed, parser_of

sys.path.insert(0, str(ROOT))  # the harness is the tests' own

from tests.commands import members
from tests.worlds import SMALLEST, write_recipe

RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "another seed": {"seed": 2},
    "another rate": {"train__optimizer": {"learning_rate": 3e-3}},
    "whole vocabulary": {
        "train__objective": {"kind": "kd", "kd": {"term": "jsd", "beta": 0.5, "support": "vocabulary"}}
    },
    "rewards": {"train__objective": {"kind": "kdrl"}},
    "off-policy": {"rollout__on_policy_fraction": 0.5},
    "its own average": {"teachers": [{"self": "ema", "decay": 0.9}]},
    "LoRA": {"student__lora": {"rank": 2}},
}
ROUNDS = 3
PAUSE_SECONDS = 30.0
BESIDE = (
    ["plan", "rewards.yaml"],
    ["gc", "--delete"],
    ["report", "plain.yaml", "-o", "page.html"],
    ["status", "plain.yaml"],
)
EARLY = "report: 2"
"""Nothing of the run is done yet."""


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=500, help="of the long run")
    arguments = parsed(parser, markdown)
    failed = 0
    for part in arguments.parts:
        with tempfile.TemporaryDirectory(prefix="kdpipe-load-") as name:
            line = PARTS[part](Path(name), arguments.rounds)
        print(json.dumps({"benchmark": "load", "commit": commit(), "part": part, **line}), flush=True)
        failed += len(line["failed"])
    return 1 if failed else 0


def side_by_side(folder: Path, _rounds: int) -> dict[str, Any]:
    """Eight runs at once, and what others do beside them; each alone before."""
    recipes = {name: recipe_of(folder, name, changes) for name, changes in RECIPES.items()}
    alone = {name: digests_alone(folder, path) for name, path in recipes.items()}
    shutil.rmtree(folder / "kdpipe-out", ignore_errors=True)
    runs = {name: start(folder, ["run", path.name]) for name, path in recipes.items()}
    watch = start(folder, ["status", "plain.yaml", "--watch"])
    codes: Counter[str] = Counter()
    while any(process.poll() is None for process in runs.values()):
        for command in BESIDE:
            codes[f"{command[0]}: {start(folder, command).wait()}"] += 1
    watch.send_signal(signal.SIGINT)
    codes[f"status --watch: {watch.wait()}"] += 1
    failed = [
        f"{name}: exit code {process.returncode}" for name, process in runs.items() if process.returncode
    ]
    failed += [
        f"{name}: other digests" for name, path in recipes.items() if digests(folder, path) != alone[name]
    ]
    failed += [
        f"{what} ({count})"
        for what, count in codes.items()
        if not what.endswith((": 0", "watch: 130", EARLY))
    ]
    return {"runs": len(runs), "beside": dict(codes), "failed": failed}


def paused(folder: Path, _rounds: int) -> dict[str, Any]:
    """A run whose processes all stand still in the middle of its second round."""
    recipe = recipe_of(folder, "plain", {"tracking": {"enabled": True}})
    alone = digests_alone(folder, recipe)
    shutil.rmtree(folder / "kdpipe-out")
    process = start(folder, ["run", recipe.name])
    until(
        lambda: "round-002" in " ".join(str(path) for path in folder.glob("kdpipe-out/runs/*/round-*")),
        process,
    )
    stopped = members(process.pid)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(PAUSE_SECONDS)
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    code = process.wait()
    failed = [] if code == 0 else [f"exit code {code}"]
    failed += [] if digests(folder, recipe) == alone else ["other digests"]
    return {"processes": len(stopped), "seconds": PAUSE_SECONDS, "failed": failed}


def long(folder: Path, rounds: int) -> dict[str, Any]:
    """Memory, open files and the size of MLflow's database, each 100 rounds; flat, flat and linear."""
    evaluate = {"teacher": False, "reverse_kl_problems": 0, "every": 1}
    recipe = write_recipe(
        folder, **{**SMALLEST, "evaluate": evaluate, "tracking": {"enabled": True}}, rounds=rounds
    )
    process = start(folder, ["run", recipe.name, "--json"], stdout=subprocess.PIPE)
    seen: list[dict[str, float]] = []
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "round ends" and event["round"] % (rounds // 5) == 0:
            seen.append({"round": event["round"], **held(process.pid, folder / "kdpipe-out/mlflow.db")})
    code = process.wait()
    failed = [] if code == 0 else [f"exit code {code}"]
    first, last = seen[0], seen[-1]
    failed += [] if last["megabytes"] <= 1.1 * first["megabytes"] else ["memory grows"]
    failed += [] if last["open_files"] <= first["open_files"] + 2 else ["open files grow"]
    steps = [b["database_megabytes"] - a["database_megabytes"] for a, b in itertools.pairwise(seen)]
    failed += [] if max(steps) <= 2 * max(min(steps), 0.1) else ["the database does not grow linearly"]
    return {"each": seen, "failed": failed}


PARTS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "side by side": side_by_side,
    "paused": paused,
    "long": long,
}


def recipe_of(folder: Path, name: str, changes: dict[str, Any]) -> Path:
    path = write_recipe(
        folder, **{**SMALLEST, "name": name.replace(" ", "-").lower(), "rounds": ROUNDS, **changes}
    )
    return path.rename(folder / f"{name.replace(' ', '-')}.yaml")


def start(folder: Path, arguments: list[str], **settings: Any) -> subprocess.Popen[str]:
    """A command in a session of its own; what it says goes into a file."""
    command = [sys.executable, "-P", "-m", "kdpipe", *arguments]
    with (folder / "said").open("a") as said:
        streams = {"stdout": said, "stderr": said, **settings}
        return subprocess.Popen(command, cwd=folder, text=True, start_new_session=True, **streams)


def digests_alone(folder: Path, recipe: Path) -> dict[str, str]:
    """Those of the recipe's steps, run in a workspace where nothing else is."""
    shutil.rmtree(folder / "kdpipe-out", ignore_errors=True)
    if start(folder, ["run", recipe.name]).wait():
        raise SystemExit((folder / "said").read_text()[-3000:])
    return digests(folder, recipe)


def digests(folder: Path, recipe: Path) -> dict[str, str]:
    """The payload digest of every entry that the recipe's run links."""
    name = next(line for line in recipe.read_text().splitlines() if line.startswith("name: ")).removeprefix(
        "name: "
    )
    found = {}
    for path in folder.glob(f"kdpipe-out/runs/{name}-*/round-*/*/manifest.json"):
        manifest = json.loads(path.read_text())
        found[manifest["provenance"]["step"]] = manifest["payload_digest"]
    return found


def held(pid: int, database: Path) -> dict[str, float]:
    """Megabytes of the process in memory, its open files, megabytes of the database with its log."""
    rss = next(
        line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")
    )
    sizes = sum(path.stat().st_size for path in database.parent.glob(database.name + "*"))
    return {
        "megabytes": round(int(rss.split()[1]) / 1024, 1),
        "open_files": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "database_megabytes": round(sizes / 1e6, 2),
    }


def until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition():
        if process.poll() is not None:
            raise SystemExit("the run ended before it was paused")
        time.sleep(0.02)


def markdown(rows: Rows) -> str:
    """The table of docs/reliability.md."""
    lines = ["| part | seen | failed |", "| --- | --- | --- |"]
    for row in rows:
        if row["part"] == "long":
            seen = "; ".join(
                f"round {each['round']}: {each['megabytes']} MB, {each['open_files']} files, "
                f"database {each['database_megabytes']} MB"
                for each in row["each"]
            )
        elif "beside" in row:
            ends = [(*what.rsplit(": ", 1), count) for what, count in sorted(row["beside"].items())]
            seen = f"{row['runs']} runs; " + ", ".join(
                f"{count} x `{command}` (exit {code})" for command, code, count in ends
            )
        else:
            seen = f"{row['processes']} processes, {row['seconds']:.0f} s"
        lines.append(f"| {row['part']} | {seen} | {len(row['failed'])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
