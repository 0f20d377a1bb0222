"""gsm8k-smollm2-cpu.yaml on the real model and the real problems, both local; one JSON line.

    python benchmarks/smollm2.py MODEL_FOLDER GSM8K_FOLDER > benchmarks/results/smollm2.jsonl

MODEL_FOLDER is SmolLM2-135M-Instruct as a Hugging Face folder, GSM8K_FOLDER holds train.jsonl and test.jsonl. The
workspace is kept beside the output, so that the command goes on when it is repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from study import ROOT, run_recipe


def main() -> int:
    """Runs the recipe; exit status 1 when held-out reverse KL did not fall beyond its paired interval."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--workspace", type=Path, default=Path("kdpipe-out"))
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    arguments = parser.parse_args()
    overrides = [f"student.model={arguments.model.resolve()}", f"task.data={arguments.data.resolve()}"]
    overrides += arguments.overrides
    run = run_recipe(ROOT / "recipes" / "gsm8k-smollm2-cpu.yaml", arguments.workspace, overrides)
    run["overrides"] = arguments.overrides  # the two paths belong to the machine, not to the result
    print(json.dumps(run, sort_keys=True))
    after = next(
        summary for label, summary in run["evaluations"].items() if label.startswith("student after")
    )
    return 0 if after["reverse_kl_exact_change_high"] < 0 else 1


if __name__ == "__main__":
    sys.exit(main())
