"""The doctor over real vLLM engines: the reload of tied weights included, nothing is found where nothing is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clinic import examined, load_world, verdicts, write_world

TOP5 = {"kd": {"term": "jsd", "beta": 1.0, "support": {"teacher_top_k": 5}}}


@pytest.mark.vllm
def test_a_healthy_world_on_vllm_passes_every_probe(tmp_path: Path) -> None:
    folder = write_world(tmp_path, student="wide", teacher="wide")
    rollout = {"prompts": 8, "max_new_tokens": 16, "temperature": 1.0, "engine": "vllm"}
    loaded = load_world(
        folder,
        rollout=rollout,
        teacher_score={"engine": "vllm"},
        train__objective=TOP5,
        runtime__vllm={"kv_cache_gib": 0.5, "max_num_seqs": 16},
    )
    findings = examined(loaded)
    assert set(verdicts(findings, about="student").values()) == {"ok"}, findings
    ailing = {probe: verdict for probe, verdict in verdicts(findings).items() if verdict != "ok"}
    assert ailing == dict.fromkeys(("prompt", "own prompt", "hidden states"), "skipped"), findings
