"""Figures in the README are those of the committed results."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_how_far_apart_three_engines_are() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "three_engines.jsonl").read_text())
    assert not found["commit"].endswith("-dirty")
    assert f"run at\n`{found['commit'][:7]}`" in README
    assert f"the {found['completion_tokens']} completion tokens of round 1" in README
    names = {
        "vllm, hf": "`vllm` and `hf`",
        "server, hf": "server and `hf`",
        "vllm, server": "`vllm` and server",
    }
    for pair, apart in found["nats_apart"].items():
        mean, largest = (shown(apart[name]) for name in ("mean", "max"))
        assert f"| {names[pair]} | {mean} | {largest} |" in README
        assert apart["mean"] < 1e-4
    worst = max(row["mismatch_nats_max"] for run in found["mismatch"].values() for row in run)
    assert f"at most {shown(worst)} nats apart" in README


def shown(value: float) -> str:
    return f"{value:.1e}".replace("e-0", "e-") if value else "0"
