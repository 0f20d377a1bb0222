"""docs/statistics.md has the figures of the committed results, and these keep what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kdpipe.method.statistics import score_difference
from kdpipe.pipeline.headline import ACCURACY, REVERSE_KL
from tests.docs.test_objectives_doc import study

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs" / "statistics.md").read_text(encoding="utf-8")
PATH = ROOT / "benchmarks" / "results" / "coverage.jsonl"
ROWS: list[dict[str, Any]] = [json.loads(line) for line in PATH.read_text(encoding="utf-8").splitlines()]


def test_its_tables_are_those_of_the_results() -> None:
    tables = study("coverage").markdown(ROWS).split("\n\n")
    assert len(tables) == 5
    assert all(f"\n\n{table}\n" in DOC for table in tables)
    [commit] = {row["commit"] for row in ROWS}
    assert not commit.endswith("-dirty")
    assert f"at `{commit[:7]}`" in DOC


def test_chance_is_called_an_effect_in_at_most_5_percent_at_every_number_of_problems() -> None:
    errors = {row["problems"]: row["error"] for row in ROWS if row["of"] == "null"}
    assert [*range(1, 201), 300, 500, 1000, 1319] == sorted(errors)
    assert max(errors.values()) <= 0.05
    assert [n for n, error in errors.items() if error == 0] == list(range(1, ACCURACY.fewest))
    several = [row["coverage"] for row in ROWS if row.get("effect") == "none"]
    totals = [row["change"]["coverage"] for row in ROWS if row.get("factor") == 1]
    assert min(several + totals) >= 0.95
    assert (len(several), len(totals)) == (36, 10)


def test_paired_intervals_hold_the_truth_at_least_as_often_as_they_say() -> None:
    assert min(row["coverage"] for row in ROWS if row["of"] == "one sample") >= 0.95
    assert min(row["coverage"] for row in ROWS if row["of"] == "several samples") >= 0.94


def test_its_floors_and_examples_are_those_of_the_code() -> None:
    assert (
        f"fewer than {ACCURACY.fewest} graded problems ({REVERSE_KL.fewest} for held-out reverse KL)" in DOC
    )
    for n in (32, 200):
        assert f"±{100 * score_difference(0, 0, n).high:.1f}" in DOC
