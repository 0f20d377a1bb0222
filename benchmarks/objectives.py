"""The objectives of docs/objectives.md at equal rollouts: one JSON line for each arm and seed.

    python benchmarks/objectives.py --output benchmarks/results/objectives.jsonl
    python benchmarks/objectives.py --markdown benchmarks/results/objectives.jsonl

The first runs `objectives.yaml` with each objective on each seed, prints each line and appends it to the output;
what the output already holds for this commit is skipped. The arms of a seed share student, teacher and their
evaluations before training, which are made first and are in no arm's CPU seconds. A line that went on from an
interrupted run counts the CPU seconds after the interruption only. The second prints the table of the document,
from the lines with the commit and settings of the last one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from study import ROOT, Rows, parsed, parser_of, run_recipe

RECIPE = ROOT / "benchmarks" / "objectives.yaml"
JOINT = "rl_weight: 1.0, distill_weight: 5e-3"
REVERSE_KL = "{term: jsd, beta: 1.0, support: vocabulary}"
ARMS = {
    "rkl": "{kind: kd, kd: rkl}",
    "k2": "{kind: kd, kd: {term: k2, baseline: step}}",
    "jsd-0": "{kind: kd, kd: {term: jsd, beta: 0.0, support: vocabulary}}",
    "jsd-0.5": "{kind: kd, kd: {term: jsd, beta: 0.5, support: vocabulary}}",
    "jsd-1": f"{{kind: kd, kd: {REVERSE_KL}}}",
    "k1_loss": "{kind: kd, kd: k1_loss}",
    "grpo": "{kind: grpo}",
    "kdrl-rkl": f"{{kind: kdrl, kd: rkl, {JOINT}}}",
    "kdrl-jsd-1": f"{{kind: kdrl, kd: {REVERSE_KL}, {JOINT}}}",
    "kdrl-k1_loss": f"{{kind: kdrl, kd: k1_loss, {JOINT}}}",
}
NUMBERS = (
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "reverse_kl_exact_nats",
    "reverse_kl_exact_low",
    "reverse_kl_exact_high",
)
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""The 97.5 % quantile of Student's t for 1 to 9 degrees of freedom."""


def main() -> None:
    """Runs the study, or prints the table of one."""
    parser = parser_of(__doc__)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--workspace", type=Path, default=Path("kdpipe-out") / "objectives")
    parser.add_argument("--output", type=Path, help="the JSON lines, which the command goes on with")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=C")
    arguments = parsed(parser, lambda rows: markdown(latest(rows)))
    found = read(arguments.output) if arguments.output is not None else []
    for seed in arguments.seeds:
        run_seed(seed, arguments, found)


def read(path: Path) -> Rows:
    """The lines of a results file; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def latest(rows: Rows) -> Rows:
    """The rows of the same commit and settings as the last one."""
    same = ("commit", "overrides")
    return [row for row in rows if all(row[name] == rows[-1][name] for name in same)]


def overrides_of(arm: str, seed: int) -> list[str]:
    """What makes the base recipe that arm on that seed."""
    overrides = [f"seed={seed}", f"train.objective={ARMS[arm]}"]
    return [*overrides, "reproduce=true"] if "k1_loss" in arm else overrides


# ---------------------------------------------------------------------------------------------------- runs


def run_seed(seed: int, arguments: argparse.Namespace, found: Rows) -> None:
    """Runs the arms of one seed that are not in `found`."""
    version = code_version()
    done = {
        row["arm"]
        for row in found
        if (row["commit"], row["seed"], row["overrides"]) == (version, seed, arguments.overrides)
    }
    left = [arm for arm in arguments.arms if arm not in done]
    if left:
        prepare(seed, arguments)
    for arm in left:
        line = json.dumps(run_arm(arm, seed, arguments), sort_keys=True)
        if code_version() != version:
            sys.exit(f"{ROOT} is no longer {version}: run the study in a worktree that nobody changes")
        print(line, flush=True)
        if arguments.output is not None:
            with arguments.output.open("a") as file:
                file.write(line + "\n")


def prepare(seed: int, arguments: argparse.Namespace) -> None:
    """Makes what the arms of a seed share: both cold starts, and the student's evaluation."""
    before = os.times()
    command = [sys.executable, "-m", "kdpipe.cli.app", "evaluate", str(RECIPE), "--round", "0", "--json"]
    command += ["--workspace", str(arguments.workspace)]
    for override in (f"seed={seed}", *arguments.overrides):
        command += ["--set", override]
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    print(f"seed {seed}: what its arms share took {spent:.0f} CPU seconds", file=sys.stderr)


def run_arm(arm: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One arm on one seed."""
    run = run_recipe(RECIPE, arguments.workspace, [*overrides_of(arm, seed), *arguments.overrides])
    evaluations = run["evaluations"]
    [after] = [summary for label, summary in evaluations.items() if label.startswith("student after")]
    return {
        "arm": arm,
        "seed": seed,
        "commit": code_version(),
        "overrides": arguments.overrides,
        "objective": ARMS[arm],
        "rounds": after["round"],
        "before": {name: evaluations["student before"][name] for name in NUMBERS},
        "after": {name: after[name] for name in NUMBERS},
        "teacher_accuracy": evaluations["teacher"]["accuracy"],
        "cpu_seconds": run["cpu_seconds"],
        "wall_seconds": run["wall_seconds"],
    }


def code_version() -> str:
    """The commit of the checkout, with -dirty when tracked files other than results differ from it."""
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks/results")
    return _git("rev-parse", "HEAD") + ("-dirty" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


# --------------------------------------------------------------------------------------------------- table


def markdown(rows: Rows) -> str:
    """The table of a study: means over seeds, the joint arms compared with grpo seed by seed."""
    lines = [
        ["arm", "seeds", "accuracy, %", "reverse KL, nats", "accuracy less grpo's", "reverse KL less grpo's"],
        ["---"] * 6,
    ]
    if rows:
        first = {row["seed"]: row for row in rows}  # the arms of a seed have the same student before
        lines.append(["student before", *_means(list(first.values()), "before"), "", ""])
        teacher = points([row["teacher_accuracy"] for row in first.values()])
        lines.append(["teacher", str(len(first)), teacher, "0", "", ""])
    for arm in ARMS:
        own = {row["seed"]: row for row in rows if row["arm"] == arm}
        cells = [*_means(list(own.values()), "after"), *_compared(arm, own, rows)]
        lines.append([f"`{arm}`", *(cells if own else ["not yet run", "", "", "", ""])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _means(rows: Rows, when: str) -> list[str]:
    """The number of rows, their accuracy and their reverse KL."""
    if not rows:
        return []
    accuracy, reverse_kl = (
        [row[when][name] for row in rows] for name in ("accuracy", "reverse_kl_exact_nats")
    )
    return [str(len(rows)), points(accuracy), _nats(reverse_kl)]


def _compared(arm: str, own: dict[int, dict[str, Any]], rows: Rows) -> list[str]:
    """The two cells of the differences to grpo on the same seeds."""
    grpo = {row["seed"]: row for row in rows if row["arm"] == "grpo"}
    shared = sorted(own.keys() & grpo.keys())
    if not arm.startswith("kdrl") or not shared:
        return ["", ""]
    accuracy, reverse_kl = (
        [own[seed]["after"][name] - grpo[seed]["after"][name] for seed in shared]
        for name in ("accuracy", "reverse_kl_exact_nats")
    )
    return [points(accuracy, signed=True), _nats(reverse_kl, signed=True)]


def points(fractions: list[float], *, signed: bool = False) -> str:
    return _cell([100 * fraction for fraction in fractions], digits=1, signed=signed)


def _nats(values: list[float], *, signed: bool = False) -> str:
    return _cell(values, digits=3, signed=signed)


def _cell(values: list[float], *, digits: int, signed: bool) -> str:
    """The mean, half the width of its 95 % t-interval, and the smallest and the largest value."""
    sign = "+" if signed else ""
    mean, low, high = (
        f"{value:{sign}.{digits}f}" for value in (statistics.mean(values), min(values), max(values))
    )
    if len(values) == 1:
        return mean
    half = STUDENT_T[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean} ± {half:.{digits}f} ({low} to {high})"


if __name__ == "__main__":
    main()
