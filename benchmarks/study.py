"""What the studies share: their arguments, and to run a recipe through the command line and measure the whole of it.

A study prints one JSON line for each run, with the commit that it ran on; what is committed under
`benchmarks/results/` was made by these commands.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
Rows = list[dict[str, Any]]


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows the description line by line."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def parsed(parser: argparse.ArgumentParser, markdown: Callable[[Rows], str]) -> argparse.Namespace:
    """The arguments; where they name results with --markdown, their table is printed and the program ends."""
    parser.add_argument("--markdown", type=Path, metavar="RESULTS.jsonl", help="print its table, run nothing")
    arguments = parser.parse_args()
    if arguments.markdown is None:
        return arguments
    print(markdown([json.loads(line) for line in arguments.markdown.read_text().splitlines()]))
    sys.exit(0)


def commit() -> str:
    """The commit of the checkout, with -dirty when tracked files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def run_recipe(
    recipe: Path, workspace: Path, overrides: list[str], *, rounds: int | None = None
) -> dict[str, Any]:
    """Runs `kdpipe run` (its first `rounds`); its evaluations, and CPU seconds (user and system of every process)."""
    command = [
        sys.executable,
        "-m",
        "kdpipe.cli.app",
        "run",
        str(recipe),
        "--json",
        "--workspace",
        str(workspace),
    ]
    for override in overrides:
        command += ["--set", override]
    if rounds is not None:
        command += ["--rounds", str(rounds)]
    before, started = os.times(), time.monotonic()
    answer = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    after = os.times()
    end = json.loads(answer.stdout.splitlines()[-1])
    return {
        "recipe": recipe.name,
        "run": end["run"],
        "overrides": overrides,
        "commit": commit(),
        "cpu_seconds": round(
            after.children_user + after.children_system - before.children_user - before.children_system, 1
        ),
        "wall_seconds": round(time.monotonic() - started, 1),
        "evaluations": end["evaluations"],
        "seconds_by_stage": seconds_by_stage(Path(end["folder"])),
    }


def seconds_by_stage(run_folder: Path) -> dict[str, float]:
    """Wall seconds of each stage, from the metrics of the run's steps."""
    totals: dict[str, float] = {}
    for link in sorted(run_folder.glob("round-*/*")):
        for line in (link / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            if row["name"].startswith("time/"):
                stage = row["name"].removeprefix("time/").removesuffix("_seconds")
                totals[stage] = round(totals.get(stage, 0.0) + row["value"], 1)
    return totals
