"""The noise of each KD term's gradient, with and without a baseline, on the same completions: one JSON line each.

    python benchmarks/variance.py --output benchmarks/results/variance.jsonl
    python benchmarks/variance.py --markdown benchmarks/results/variance.jsonl

One round of `objectives.yaml`'s student, large and scored once with the teacher's hidden states kept, is trained on by
each term at a learning rate that changes nothing: in one step, and in STEPS steps of the study's size. With g the
gradient of one of n steps and G that of them all, E|g|^2 - E|G|^2 is (1 - 1/n) times the variance of g, summed over
the weights.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from study import ROOT, commit, parsed, parser_of

RECIPE = ROOT / "benchmarks" / "objectives.yaml"
STEPS = 16
WHOLE = "support: vocabulary"
TERMS = {
    "rkl": "rkl",
    "rkl, baseline step": "{term: rkl, baseline: step}",
    "rkl, baseline group": "{term: rkl, baseline: group}",
    "rkl, baseline exact": f"{{term: rkl, baseline: exact, {WHOLE}}}",
    "rkl, gamma 1": "{term: rkl, gamma: 1.0}",
    "rkl, gamma 1, baseline step": "{term: rkl, gamma: 1.0, baseline: step}",
    "k3": "k3",
    "k3, baseline step": "{term: k3, baseline: step}",
    "jsd, beta 1": f"{{term: jsd, beta: 1.0, {WHOLE}}}",
}
SHARED = [
    "rollout.prompts=512",  # STEPS times the 32 prompts of a step
    "teacher_score.keep=hidden",
    "train.optimizer.learning_rate=1e-30",
    "train.optimizer.schedule=constant",
    "runtime.keep.weights=1000",
    "runtime.keep.optimizer=1000",
]


def main() -> None:
    """Measures, or prints the table of what was measured."""
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--workspace", type=Path, default=Path("kdpipe-out") / "variance")
    parser.add_argument("--output", type=Path, help="where the JSON lines go as well")
    arguments = parsed(parser, markdown)
    lines = []
    for seed in arguments.seeds:
        for name in TERMS:
            lines.append(json.dumps(measured(name, seed, arguments.workspace), sort_keys=True))
            print(lines[-1], flush=True)
    if arguments.output is not None:
        arguments.output.write_text("\n".join(lines) + "\n")


def measured(name: str, seed: int, workspace: Path) -> dict[str, Any]:
    """Variance and mean of a term's gradient, as squared norms."""
    [whole] = squared_norms(name, seed, workspace, steps=1)
    each = squared_norms(name, seed, workspace, steps=STEPS)
    variance = (statistics.mean(each) - whole) * STEPS / (STEPS - 1)
    return {
        "term": name,
        "kd": TERMS[name],
        "seed": seed,
        "commit": commit(),
        "steps": STEPS,
        "variance": variance,
        "squared_mean": whole - variance / STEPS,
    }


def squared_norms(name: str, seed: int, workspace: Path, *, steps: int) -> list[float]:
    """The squared gradient norm of each optimizer step of round 1."""
    command = [sys.executable, "-m", "kdpipe.cli.app", "train", str(RECIPE), "--round", "1", "--json"]
    command += ["--workspace", str(workspace)]
    own = [f"seed={seed}", f"train.objective={{kind: kd, kd: {TERMS[name]}}}", f"train.minibatches={steps}"]
    for override in [*SHARED, *own]:
        command += ["--set", override]
    answer = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    folder = Path(json.loads(answer.stdout.splitlines()[-1])["folder"])
    rows = [json.loads(line) for line in (folder / "round-001/train/metrics.jsonl").read_text().splitlines()]
    norms = [row["value"] for row in rows if row["name"] == "train/grad_norm" and row["optimizer_step"]]
    assert len(norms) == steps
    return [norm**2 for norm in norms]


def markdown(rows: list[dict[str, Any]]) -> str:
    """Means over seeds (smallest to largest): noise against that of `rkl`, and against the term's own signal."""
    lines = [["term", "variance, of rkl's", "variance over squared mean"], ["---"] * 3]
    plain = {row["seed"]: row["variance"] for row in rows if row["term"] == "rkl"}
    for name in TERMS:
        own = [row for row in rows if row["term"] == name]
        relative = [row["variance"] / plain[row["seed"]] for row in own]
        noise = [row["variance"] / row["squared_mean"] for row in own]
        lines.append([name, _cell(relative), _cell(noise)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(values: list[float]) -> str:
    return f"{statistics.mean(values):.3g} ({min(values):.3g} to {max(values):.3g})"


if __name__ == "__main__":
    main()
