"""The digests of payloads that show that a change alters no behaviour: benchmarks/digests.py on small artifacts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs.test_objectives_doc import ROOT, study

DIGESTS = study("digests")
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("digests-*.json"))


def artifact(folder: Path, *, seconds: float = 1.0, loss: float = 2.0) -> Path:
    """A step's artifact with one table and metrics."""
    rows = [{"name": "time/train_seconds", "value": seconds}, {"name": "train/loss", "value": loss}]
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rollouts.parquet").write_bytes(b"rows")
    files = [
        {"path": path.name, "bytes": path.stat().st_size, "sha256": DIGESTS.sha256_of(path)}
        for path in folder.iterdir()
    ]
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "value": {"files": files}}))
    return folder


def test_what_a_clock_decides_is_in_no_digest_and_every_other_number_is(tmp_path: Path) -> None:
    first = DIGESTS.digests_of(artifact(tmp_path / "a"))
    assert first.keys() == {"metrics.jsonl", "rollouts.parquet"}
    assert first == DIGESTS.digests_of(artifact(tmp_path / "b", seconds=3.0))
    assert first != DIGESTS.digests_of(artifact(tmp_path / "c", loss=2.1))


def test_a_payload_that_is_damaged_or_missing_is_an_error(tmp_path: Path) -> None:
    folder = artifact(tmp_path / "a")
    (folder / "rollouts.parquet").write_bytes(b"row5")
    with pytest.raises(SystemExit, match=r"rollouts\.parquet: its sha256"):
        DIGESTS.digests_of(folder)
    (folder / "rollouts.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"rollouts\.parquet"):
        DIGESTS.digests_of(folder)


def written(path: Path, document: dict[str, Any]) -> Path:
    path.write_text(json.dumps(document))
    return path


def test_a_digest_that_is_another_or_missing_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads(RESULTS[0].read_text())
    same = written(tmp_path / "same.json", document)
    assert DIGESTS.compare(RESULTS[0], same) == 0
    changed = copy.deepcopy(document)
    changed["digests"]["grpo"]["train@1"]["completions.parquet"] = "0" * 64
    del changed["digests"]["grpo"]["rollout@2"]
    capsys.readouterr()
    assert DIGESTS.compare(same, written(tmp_path / "changed.json", changed)) == 1
    lines = capsys.readouterr().out.splitlines()
    kept = document["digests"]["grpo"]["train@1"]["completions.parquet"][:16]
    assert f"grpo train@1 completions.parquet {kept} {'0' * 16}" in lines
    assert sum(line.startswith("grpo rollout@2 ") and line.endswith(" missing") for line in lines) == 2
    assert lines[-1].startswith("3 of ")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_results_are_of_every_recipe_at_the_commit_they_are_named_after(path: Path) -> None:
    found = json.loads(path.read_text())
    recipes = yaml.safe_load((ROOT / "benchmarks" / "digests.yaml").read_text())["recipes"]
    assert found["digests"].keys() == {"quickstart", *recipes}
    assert found["commit"].startswith(path.stem.removeprefix("digests-"))
    assert not found["commit"].endswith("dirty")
