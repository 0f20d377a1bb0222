"""A student that teaches itself with the solution before its eyes: one JSON line an arm and seed.

    python benchmarks/privileged.py --output benchmarks/results/privileged.jsonl
    python benchmarks/privileged.py --markdown benchmarks/results/privileged.jsonl
    python benchmarks/privileged.py --prepare kdpipe-out/privileged

`privileged.yaml` as it is (`shown the solution`); with an average of the students in the teacher's place (`average,
shown it`); with the student before, who is shown nothing (`not shown it`); and with the reference solutions as text
(`reference text`). The last command makes the data and the student of seed 1 and runs nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from arms import arms_command, line, table, trained_tokens
from study import ROOT, Rows, run_recipe

RECIPE = ROOT / "benchmarks" / "privileged.yaml"
START = ROOT / "benchmarks" / "privileged_start.yaml"
PROMPT = r'prompt: "{solution}\n{question}"'
ARMS = {
    "shown the solution": [],
    "average, shown it": [f"teachers=[{{self: ema, decay: 0.9, {PROMPT}}}]"],
    "not shown it": ["teachers=[{self: initial}]"],
    "reference text": ["rollout.on_policy_fraction=0", "train.objective.off_policy_term=cross_entropy"],
}


def main() -> None:
    """Runs the study, prints the table of one, or makes what the recipe needs."""
    if "--prepare" not in sys.argv:
        arms_command(
            __doc__, workspace=Path("kdpipe-out") / "privileged", run_seed=run_seed, markdown=markdown
        )
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--prepare", type=Path, metavar="FOLDER")
    prepare(parser.parse_args().prepare, seed=1, overrides=[])


def run_seed(seed: int, workspace: Path, overrides: list[str]) -> Iterator[dict[str, Any]]:
    """All arms on one seed: one student, which is made first."""
    made = prepare(workspace, seed=seed, overrides=overrides)
    for arm, own in ARMS.items():
        run = run_recipe(RECIPE, workspace, [f"seed={seed}", *made, *own, *overrides])
        tokens = trained_tokens(workspace / "runs" / run["run"])
        teacher = run["evaluations"]["teacher"]["accuracy"]
        yield {**line(arm, seed, run, overrides), "teacher": teacher, "tokens": tokens}


def prepare(workspace: Path, *, seed: int, overrides: list[str]) -> list[str]:
    """Makes the data and the student of a seed; returns the overrides that point the recipe to them."""
    data = (workspace / "data").resolve()
    write_data(data)
    write_new_model(data / "new", seed=seed)
    files = [f"task.train={data / 'train.jsonl'}", f"task.test={data / 'test.jsonl'}"]
    start = [
        f"seed={seed}",
        f"task.train={data / 'start.jsonl'}",
        files[1],
        f"student.model={data / 'new'}",
        *[text for text in overrides if text.startswith(("student.sft", "evaluate"))],
    ]
    run = run_recipe(START, workspace, start, rounds=0)
    student = workspace / "student" if seed == 1 else workspace / f"student-{seed}"
    made = workspace / "runs" / run["run"] / "round-000" / "sft-student" / "model"
    student.unlink(missing_ok=True)
    student.symlink_to(made.resolve())
    return [*files, f"student.model={student.resolve()}"]


def write_data(folder: Path) -> None:
    """One-step word problems as JSON lines; `start.jsonl` has each twice, the second time below its solution."""
    from kdpipe.data.tasks.arithmetic import read_problems
    from kdpipe.recipe.task import ArithmeticTask

    folder.mkdir(parents=True, exist_ok=True)
    task = ArithmeticTask(kind="arithmetic", steps=[1], max_operand=12, train_problems=600, test_problems=200)
    train, test = ([(p.question, p.solution) for p in split] for split in read_problems(task))
    hinted = [row for q, a in train for row in ((q, a), (f"{a}\n{q}", a))]
    for name, rows in (("train", train), ("test", test), ("start", hinted)):
        lines = [json.dumps({"question": question, "answer": answer}) for question, answer in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def write_new_model(folder: Path, *, seed: int) -> None:
    """A model that knows nothing, with the tokenizer of the word problems."""
    import torch

    from kdpipe.data.tasks.arithmetic import words
    from kdpipe.models.folder import scratch_model, write_model
    from kdpipe.models.tokenizer import arithmetic_tokenizer, num_ids_in_use
    from kdpipe.recipe.models import Scratch

    tokenizer = arithmetic_tokenizer(words())
    model = scratch_model(
        Scratch(init_std=0.06),
        num_ids=num_ids_in_use(tokenizer),
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        seed=seed,
    )
    write_model(model, tokenizer, folder, dtype=torch.float32)


def markdown(rows: Rows) -> str:
    """The table of the document."""
    return table(rows, list(ARMS), teacher="student before, shown the solution")


if __name__ == "__main__":
    main()
