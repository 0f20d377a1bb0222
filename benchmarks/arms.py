"""What the studies of teachers share: one run for each arm and seed, a JSON line each, and their table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from objectives import points
from study import Rows, parsed, parser_of

NUMBERS = ("accuracy", "accuracy_low", "accuracy_high", "reverse_kl_exact_nats")


def arms_command(
    description: str | None,
    *,
    workspace: Path,
    run_seed: Callable[[int, Path, list[str]], Iterator[dict[str, Any]]],
    markdown: Callable[[Rows], str],
) -> None:
    """Runs every arm on every seed and prints a JSON line each, or prints the table of a study that was run."""
    parser = parser_of(description)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--workspace", type=Path, default=workspace)
    parser.add_argument("--output", type=Path, help="where the JSON lines go as well")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=C")
    arguments = parsed(parser, markdown)
    lines = []
    for seed in arguments.seeds:
        for row in run_seed(seed, arguments.workspace, arguments.overrides):
            lines.append(json.dumps(row, sort_keys=True))
            print(lines[-1], flush=True)
            if arguments.output is not None:
                arguments.output.write_text("\n".join(lines) + "\n")


def line(arm: str, seed: int, run: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """What is kept of a run."""
    evaluations = run["evaluations"]
    [after] = [summary for label, summary in evaluations.items() if label.startswith("student after")]
    return {
        "arm": arm,
        "seed": seed,
        "commit": run["commit"],
        "overrides": overrides,
        "before": {name: evaluations["student before"][name] for name in NUMBERS},
        "after": {name: after[name] for name in NUMBERS},
        "cpu_seconds": run["cpu_seconds"],
    }


def trained_tokens(run_folder: Path) -> int:
    """Completion tokens that the optimizer steps of a run were made of."""
    rows = (
        json.loads(text)
        for path in run_folder.glob("round-*/train/metrics.jsonl")
        for text in path.read_text().splitlines()
    )
    return int(sum(row["value"] for row in rows if row["name"] == "train/tokens"))


def table(rows: Rows, arms: Sequence[str], *, teacher: str) -> str:
    """Means over seeds, ± half their 95 % t-interval (smallest to largest), and differences to the first arm by seed.

    `teacher` is what the line of the teacher is called.
    """
    first = {row["seed"]: row for row in rows if row["arm"] == arms[0]}
    lines = [["arm", "seeds", "accuracy, %", f"{arms[0]} less this arm", "tokens trained on"], ["---"] * 5]
    for label, found in (
        ("student before", [row["before"]["accuracy"] for row in first.values()]),
        (teacher, [row["teacher"] for row in first.values()]),
    ):
        lines.append([label, str(len(found)), points(found), "", ""])
    for arm in arms:
        own = [row for row in rows if row["arm"] == arm]
        ahead = [first[row["seed"]]["after"]["accuracy"] - row["after"]["accuracy"] for row in own]
        compared = "" if arm == arms[0] else points(ahead, signed=True)
        tokens = f"{sum(row['tokens'] for row in own) / len(own):,.0f}"
        lines.append(
            [arm, str(len(own)), points([row["after"]["accuracy"] for row in own]), compared, tokens]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
