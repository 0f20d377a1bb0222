"""Three rounds on a real model with vLLM, the same with a teacher behind a vLLM server, and what the engines agree on.

    python benchmarks/three_engines.py SMOLLM2_FOLDER GSM8K_FOLDER [--output benchmarks/results/three_engines.jsonl]

Runs `recipes/gsm8k-smollm2-cpu.yaml` with engine vllm for every stage; then, in the same workspace and so on the same
rollouts of round 1, with the same model behind `vllm serve` on loopback as teacher; then has engine hf score these
rollouts as well. Prints one JSON line: how far apart the scores of each two engines are, in nats a token, the mismatch
ledger of each round, and the seconds of each step. Needs vLLM.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from study import ROOT, commit, run_recipe

RECIPE = ROOT / "recipes" / "gsm8k-smollm2-cpu.yaml"
SERVED = "shown-the-solution"
ROUNDS = 3
START_SECONDS = 600


def main() -> None:
    """Runs the three, and prints what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--workspace", type=Path, default=Path("kdpipe-out") / "three_engines")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=C")
    arguments = parser.parse_args()
    model = arguments.model.resolve()
    base = [
        f"student.model={model}",
        f"task.data={arguments.data.resolve()}",
        f"rounds={ROUNDS}",
        "rollout.engine=vllm",
        "tracking.enabled=false",
        "runtime.vllm.max_model_len=1024",
        *arguments.overrides,
    ]
    workspace = arguments.workspace
    runs = {"vllm": run_recipe(RECIPE, workspace, [*base, "teacher_score.engine=vllm"])}
    with served(model) as url:
        runs["server"] = run_recipe(RECIPE, workspace, [*base, *behind(url, model)])
    runs["hf"] = run_recipe(RECIPE, workspace, [*base, "teacher_score.engine=hf", "rounds=1"])
    scores = {name: scores_of(workspace / "runs" / run["run"]) for name, run in runs.items()}
    line = {
        "benchmark": "three_engines",
        "commit": commit(),
        "rounds": ROUNDS,
        "completion_tokens": len(scores["hf"]),
        "nats_apart": {
            f"{a}, {b}": {
                "mean": float(np.abs(scores[a] - scores[b]).mean()),
                "max": float(np.abs(scores[a] - scores[b]).max()),
            }
            for a, b in itertools.combinations(scores, 2)
        },
        "mismatch": {name: mismatch(workspace / "runs" / runs[name]["run"]) for name in ("vllm", "server")},
        "seconds": {name: steps(workspace / "runs" / runs[name]["run"]) for name in ("vllm", "server")},
        "evaluations": {name: run["evaluations"] for name, run in runs.items() if name != "hf"},
    }
    print(json.dumps(line, sort_keys=True), flush=True)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(line, sort_keys=True) + "\n")


def behind(url: str, model: Path) -> list[str]:
    """The overrides that put the recipe's teacher behind a server, with its prompt."""
    return [
        "teachers.0.self=null",
        f"teachers.0.server={{urls: ['{url}'], model: {SERVED}, tokenizer: {model}}}",
    ]


@contextlib.contextmanager
def served(model: Path) -> Iterator[str]:
    """The base URL of a vLLM server of the model on loopback, which ends with this."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", SERVED]
    command += ["--dtype", "float32", "--max-model-len", "1024", "--enforce-eager", "--max-logprobs", "128"]
    command += ["--kv-cache-memory-bytes", str(2 << 30), "--no-enable-chunked-prefill"]
    command += ["--max-num-batched-tokens", "2048"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(START_SECONDS):
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"{url}/health", timeout=5)  # noqa: S310 (loopback)
                break
            if server.poll() is not None:
                raise SystemExit(f"the server ended with exit status {server.returncode}")
            time.sleep(1)
        yield f"{url}/v1"
    finally:
        server.terminate()
        server.wait()


def scores_of(run_folder: Path) -> Any:
    """The teacher's log-probs of all completion tokens of round 1, in one row."""
    rows = pq.read_table(run_folder / "round-001" / "teacher-score" / "scores.parquet").to_pylist()
    assert all(all(row["scorable"]) for row in rows)
    return np.concatenate([row["teacher_logprobs"] for row in rows])


def mismatch(run_folder: Path) -> list[dict[str, float]]:
    """Sampler against trainer, of each round."""
    return [
        {name.rpartition("/")[2]: value for name, value in found.items() if "mismatch" in name}
        for number in range(1, ROUNDS + 1)
        if (found := metrics(run_folder / f"round-{number:03d}" / "train"))
    ]


def steps(run_folder: Path) -> dict[str, float]:
    """Wall seconds of each step."""
    return {
        f"{link.name}@{int(link.parent.name[-3:])}": round(value, 1)
        for link in sorted(run_folder.glob("round-*/*"))
        for name, value in metrics(link).items()
        if name.startswith("time/")
    }


def metrics(step_folder: Path) -> dict[str, float]:
    """What a step measured, without the values of single optimizer steps."""
    rows = map(json.loads, (step_folder / "metrics.jsonl").read_text().splitlines())
    return {row["name"]: row["value"] for row in rows if row["optimizer_step"] is None}


if __name__ == "__main__":
    main()
