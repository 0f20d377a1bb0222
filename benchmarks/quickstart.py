"""The quickstart recipe on seeds 1, 2 and 3: one JSON line a seed, and whether each meets what is promised.

python benchmarks/quickstart.py > benchmarks/results/quickstart.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from study import ROOT, run_recipe

MAX_CPU_SECONDS = 720


def promises(run: dict[str, Any]) -> dict[str, bool]:
    """Each promise of the README's quickstart section, and whether this run kept it."""
    evaluations = run["evaluations"]
    before, teacher = evaluations["student before"], evaluations["teacher"]
    after = next(summary for label, summary in evaluations.items() if label.startswith("student after"))
    return {
        "teacher at least 85 %": teacher["accuracy"] >= 0.85,
        "student before at most 35 %": before["accuracy"] <= 0.35,
        "student after at least 60 %": after["accuracy"] >= 0.60,
        "at least 25 points up": after["accuracy"] - before["accuracy"] >= 0.25,
        "intervals apart": after["accuracy_low"] > before["accuracy_high"],
        "reverse KL halved": after["reverse_kl_exact_nats"] <= before["reverse_kl_exact_nats"] / 2,
        f"at most {MAX_CPU_SECONDS} CPU seconds": run["cpu_seconds"] <= MAX_CPU_SECONDS,
    }


def main() -> int:
    """Runs the seeds; exit status 1 when a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    arguments = parser.parse_args()
    kept = True
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as workspace:
            run = run_recipe(ROOT / "recipes" / "quickstart.yaml", Path(workspace), [f"seed={seed}"])
        run["promises"] = promises(run)
        kept = kept and all(run["promises"].values())
        print(json.dumps(run, sort_keys=True), flush=True)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
