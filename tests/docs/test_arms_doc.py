"""Figures in docs/arms.md are those of the committed study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "arms.md").read_text(encoding="utf-8")
STUDY = json.loads((ROOT / "benchmarks" / "results" / "arms.json").read_text())


def line(row: dict[str, Any]) -> str:
    runs = row["runs"]
    each = ", ".join(f"{100 * run['accuracy']:.1f}" for run in runs)
    gain = row["difference"]
    change = (
        ""
        if gain is None
        else f"{100 * gain['estimate']:+.1f} ({100 * gain['low']:+.1f} to {100 * gain['high']:+.1f})"
    )
    tokens = f"{row['tokens'] / 1e6:.2f}"
    return f"| {row['label']} | {100 * row['accuracy']['estimate']:.1f} | {each} | {change} | {tokens} |"


@pytest.mark.parametrize("row", STUDY["rows"], ids=lambda row: str(row["label"]))
def test_every_line_of_the_table_is_the_studys(row: dict[str, Any]) -> None:
    assert line(row) in PAGE


def test_the_page_names_the_command_and_the_commit() -> None:
    assert STUDY["command"] in PAGE
    assert f"`{STUDY['commit'][:7]}`" in PAGE
    assert {len(row["runs"]) for row in STUDY["rows"]} == {3}


def test_the_sentence_on_rates_has_the_sweeps_figures() -> None:
    found = STUDY["rl_rates"]
    text = " ".join(PAGE.split())
    assert found["command"] in text
    figures = [
        f"{100 * row['accuracy']['estimate']:.1f} % at {rate}"
        for row, rate in zip(found["rows"], ("1e-4", "3e-4", "1e-3"), strict=True)
    ]
    assert f"{figures[0]}, {figures[1]} and {figures[2]}" in text
    assert [float(row["label"].partition("=")[2]) for row in found["rows"]] == [1e-4, 3e-4, 1e-3]
