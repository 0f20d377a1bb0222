"""docs/artifacts.md: its columns are those of the tables, and its examples run and give what the run itself says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pytest

from kdpipe.data import tables
from tests.worlds import load_tiny, run_near

PAGE = (Path(__file__).parents[2] / "docs/artifacts.md").read_text(encoding="utf-8")
SCHEMAS = {
    "rollouts": tables.ROLLOUTS.names,
    "scores": tables.topk_schema("float32").names,
    "completions": tables.COMPLETIONS.names,
    "grades": tables.GRADES.names,
    "reverse_kl": tables.REVERSE_KL.names,
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished run of two rounds, and the variables that the page's Python leaves."""
    folder: Path = tmp_path_factory.mktemp("artifacts")
    run_near(load_tiny(folder, rounds=2), folder / "kdpipe-out")
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec("\n".join(blocks("python")), names)
    return folder, names


def metric(folder: Path, number: int, name: str) -> float:
    lines = [
        json.loads(line)
        for path in folder.glob(f"kdpipe-out/runs/*/round-{number:03d}/*/metrics.jsonl")
        for line in path.read_text().splitlines()
    ]
    [value] = [line["value"] for line in lines if line["name"] == name and line["optimizer_step"] is None]
    return float(value)


def test_the_columns_are_those_of_the_tables() -> None:
    told = re.findall(r"^\| `[\w-]+/(\w+)\.parquet` \| (.+) \|$", PAGE, re.MULTILINE)
    assert {name: re.findall(r"`(\w+)`", columns) for name, columns in told} == SCHEMAS


def test_reverse_kl_of_the_example_is_the_metric(world: tuple[Path, dict[str, Any]]) -> None:
    folder, names = world
    assert names["reverse_kl"] == pytest.approx(metric(folder, 1, "score/reverse_kl_nats"), abs=1e-6)
    assert abs(names["reverse_kl"]) > 1e-3


def test_the_metrics_of_the_example_are_those_of_every_round(world: tuple[Path, dict[str, Any]]) -> None:
    folder, names = world
    for number in (1, 2):
        for name in ("rollout/reward_mean", "train/mismatch_nats_max", "evaluate/accuracy"):
            assert names["metrics"].loc[number, name] == metric(folder, number, name)


def test_lost_problems_of_the_example_are_those_that_were_right_before(
    world: tuple[Path, dict[str, Any]],
) -> None:
    folder, names = world
    grades = [
        {row["prompt_id"]: row for row in pd.read_parquet(path).to_dict("records")}
        for path in sorted(folder.glob("kdpipe-out/runs/*/round-*/evaluate-student/grades.parquet"))
    ]
    first, last = grades[0], grades[-1]
    lost = [last[key]["text"] for key in last if first[key]["correct"] and not last[key]["correct"]]
    assert sorted(names["lost"]["text"]) == sorted(lost)


def test_the_sql_examples_run_and_agree_with_the_metrics(
    world: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, names = world
    monkeypatch.chdir(folder)
    by_round, disagreement = (duckdb.sql(query).df() for query in blocks("sql"))
    assert list(by_round["round"]) == [1, 2]
    for row in by_round.to_dict("records"):
        assert row["truncated"] == pytest.approx(metric(folder, row["round"], "rollout/truncated_fraction"))
        assert row["reward"] == pytest.approx(metric(folder, row["round"], "rollout/reward_mean"))
        assert row["tokens"] == pytest.approx(metric(folder, row["round"], "rollout/completion_tokens_mean"))
    gaps = (names["tokens"].sampler_logprobs - names["tokens"].teacher_logprobs).abs()
    assert disagreement["nats"].abs().max() == pytest.approx(gaps.max(), abs=1e-6)
    assert len(disagreement) == min(20, len(gaps))
