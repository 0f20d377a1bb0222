"""Two specialists as teachers, each of its own problems, against either of them alone: one JSON line an arm and seed.

    python benchmarks/specialists.py --output benchmarks/results/specialists.jsonl
    python benchmarks/specialists.py --markdown benchmarks/results/specialists.jsonl

`specialists.yaml` as it is (`routed`), with both teachers mixed on all problems (`mixed`), and with one of them for all
problems (`adds alone`, `takes alone`: the very weights that the routed run made). All arms of a seed have the same
student before.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from arms import arms_command, line
from objectives import points
from study import ROOT, Rows, run_recipe

RECIPE = ROOT / "benchmarks" / "specialists.yaml"
TEACHERS = ("adds", "takes")
ARMS = ("routed", "mixed", *(f"{name} alone" for name in TEACHERS))
WEAK = "runtime.allow_weak_teacher=true"  # a specialist may be worse than the student on what it never saw


def main() -> None:
    """Runs the study, or prints the table of one."""
    arms_command(__doc__, workspace=Path("kdpipe-out") / "specialists", run_seed=run_seed, markdown=markdown)


def run_seed(seed: int, workspace: Path, overrides: list[str]) -> Iterator[dict[str, Any]]:
    """All arms on one seed; the routed one first, which makes the specialists."""
    made = Path()
    for arm in ARMS:
        own = teachers_of(arm, made)
        run = run_recipe(RECIPE, workspace, [f"seed={seed}", WEAK, *own, *overrides])
        if arm == "routed":
            made = workspace / "runs" / run["run"] / "round-000"
        yield {**line(arm, seed, run, overrides), "teachers": accuracies(run)}


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


def accuracies(run: dict[str, Any]) -> dict[str, float]:
    """Accuracy of each teacher on what it teaches."""
    evaluations = run["evaluations"]
    return {name: evaluations[name]["accuracy"] for name in TEACHERS if name in evaluations}


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
