"""Two specialists as teachers, each of its own problems, against either of them alone: one JSON line an arm and seed.

    python benchmarks/specialists.py --output benchmarks/results/specialists.jsonl
    python benchmarks/specialists.py --markdown benchmarks/results/specialists.jsonl

`specialists.yaml` as it is (`routed`), with both teachers mixed on all problems (`mixed`), and with one of them for all
problems (`adds alone`, `takes alone`: the very weights that the routed run made). All arms of a seed have the same
student before.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from objectives import Rows, points, read
from study import ROOT, run_recipe

RECIPE = ROOT / "benchmarks" / "specialists.yaml"
TEACHERS = ("adds", "takes")
ARMS = ("routed", "mixed", *(f"{name} alone" for name in TEACHERS))
WEAK = "runtime.allow_weak_teacher=true"  # a specialist may be worse than the student on what it never saw


def main() -> None:
    """Runs the study, or prints the table of one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--workspace", type=Path, default=Path("kdpipe-out") / "specialists")
    parser.add_argument("--output", type=Path, help="where the JSON lines go as well")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--markdown", type=Path, metavar="RESULTS.jsonl", help="print its table, run nothing")
    arguments = parser.parse_args()
    if arguments.markdown is not None:
        print(markdown(read(arguments.markdown)))
        return
    lines = []
    for seed in arguments.seeds:
        for row in run_seed(seed, arguments.workspace, arguments.overrides):
            lines.append(json.dumps(row, sort_keys=True))
            print(lines[-1], flush=True)
            if arguments.output is not None:
                arguments.output.write_text("\n".join(lines) + "\n")


def run_seed(seed: int, workspace: Path, overrides: list[str]) -> Rows:
    """All arms on one seed; the routed one first, which makes the specialists."""
    rows, made = [], Path()
    for arm in ARMS:
        own = teachers_of(arm, made)
        run = run_recipe(RECIPE, workspace, [f"seed={seed}", WEAK, *own, *overrides])
        if arm == "routed":
            made = workspace / "runs" / run["run"] / "round-000"
        rows.append(line(arm, seed, run, overrides))
    return rows


def teachers_of(arm: str, made: Path) -> list[str]:
    """The overrides that make the recipe that arm; `made` holds the routed run's cold starts."""
    if arm == "routed":
        return []
    if arm == "mixed":
        models = [
            f"{{name: {name}, model: {(made / f'sft-{name}' / 'model').resolve()}}}" for name in TEACHERS
        ]
        return [f"teachers=[{', '.join(models)}]"]
    name = arm.partition(" ")[0]
    return [f"teachers=[{{name: {name}, model: {(made / f'sft-{name}' / 'model').resolve()}}}]"]


def line(arm: str, seed: int, run: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """What is kept of a run."""
    evaluations = run["evaluations"]
    [after] = [summary for label, summary in evaluations.items() if label.startswith("student after")]
    numbers = ("accuracy", "accuracy_low", "accuracy_high", "reverse_kl_exact_nats")
    return {
        "arm": arm,
        "seed": seed,
        "commit": run["commit"],
        "overrides": overrides,
        "before": {name: evaluations["student before"][name] for name in numbers},
        "after": {name: after[name] for name in numbers},
        "teachers": {name: evaluations[name]["accuracy"] for name in TEACHERS if name in evaluations},
        "cpu_seconds": run["cpu_seconds"],
    }


def markdown(rows: Rows) -> str:
    """Means over seeds, ± half their 95 % t-interval (smallest to largest); differences seed by seed."""
    lines = [["arm", "seeds", "accuracy, %", "routed less this arm"], ["---"] * 4]
    routed = {row["seed"]: row for row in rows if row["arm"] == "routed"}
    lines.append(
        ["student before", str(len(routed)), points([r["before"]["accuracy"] for r in routed.values()]), ""]
    )
    for arm in ARMS:
        own = [row for row in rows if row["arm"] == arm]
        ahead = [routed[row["seed"]]["after"]["accuracy"] - row["after"]["accuracy"] for row in own]
        compared = "" if arm == "routed" else points(ahead, signed=True)
        lines.append([arm, str(len(own)), points([row["after"]["accuracy"] for row in own]), compared])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    main()
