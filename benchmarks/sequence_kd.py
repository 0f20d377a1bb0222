"""The student's own samples against the teacher's at equally many completions: one JSON line an arm and seed.

    python benchmarks/sequence_kd.py --output benchmarks/results/sequence_kd.jsonl
    python benchmarks/sequence_kd.py --markdown benchmarks/results/sequence_kd.jsonl

`sequence_kd.yaml` as it is (`on-policy`); with half of a round's prompts answered by the teacher (`half`); with all
of them, learned by cross-entropy (`sequence-level KD`) or by the teacher's whole distribution at each token (`teacher
text, distributions`); and with the reference solutions by cross-entropy (`reference text`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from arms import arms_command, line, table, trained_tokens
from study import ROOT, Rows, run_recipe

RECIPE = ROOT / "benchmarks" / "sequence_kd.yaml"
NONE_SAMPLED = "rollout.on_policy_fraction=0"
TEACHER_TEXT = "rollout.off_policy_text=teacher"
CROSS_ENTROPY = "train.objective.off_policy_term=cross_entropy"
ARMS = {
    "on-policy": [],
    "half": ["rollout.on_policy_fraction=0.5", TEACHER_TEXT],
    "sequence-level KD": [NONE_SAMPLED, TEACHER_TEXT, CROSS_ENTROPY],
    "teacher text, distributions": [NONE_SAMPLED, TEACHER_TEXT],
    "reference text": [NONE_SAMPLED, CROSS_ENTROPY],
}


def main() -> None:
    """Runs the study, or prints the table of one."""
    arms_command(__doc__, workspace=Path("kdpipe-out") / "sequence_kd", run_seed=run_seed, markdown=markdown)


def run_seed(seed: int, workspace: Path, overrides: list[str]) -> Iterator[dict[str, Any]]:
    """All arms on one seed: one student and one teacher."""
    for arm, own in ARMS.items():
        run = run_recipe(RECIPE, workspace, [f"seed={seed}", *own, *overrides])
        tokens = trained_tokens(workspace / "runs" / run["run"])
        teacher = run["evaluations"]["teacher"]["accuracy"]
        yield {**line(arm, seed, run, overrides), "teacher": teacher, "tokens": tokens}


def markdown(rows: Rows) -> str:
    """The table of the document."""
    return table(rows, list(ARMS), teacher="teacher")


if __name__ == "__main__":
    main()
