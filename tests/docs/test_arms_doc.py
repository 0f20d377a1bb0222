"""Figures in docs/arms.md are those of the committed study."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.docs.test_objectives_doc import study as script

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "arms.md").read_text(encoding="utf-8")
STUDY = json.loads((ROOT / "benchmarks" / "results" / "arms.json").read_text())
TABLES = script("control_arms").tables(STUDY["rows"])


def test_the_tables_are_the_studys() -> None:
    assert TABLES in PAGE


def test_what_the_text_says_of_the_study_is_in_its_tables() -> None:
    _, text = PAGE.split(TABLES)
    told = set(re.findall(r"[+-]\d+\.\d+", text))
    assert told
    assert told <= set(re.findall(r"[+-]\d+\.\d+", TABLES))


def test_the_page_names_the_command_and_the_commit() -> None:
    assert STUDY["command"] in PAGE
    assert f"`{STUDY['commit'][:7]}`" in PAGE
    assert {len(row["runs"]) for row in STUDY["rows"]} == {3}


@pytest.mark.parametrize("label", ["kd", "kdrl"])
def test_arms_are_held_against_those_with_one_source_less(label: str) -> None:
    from kdpipe.results.studies import PAIRS

    [row] = [row for row in STUDY["rows"] if row["label"] == label]
    assert set(row["accuracy"]["pairs"]) == set(PAIRS[label])


@pytest.mark.parametrize(
    ("sweep", "rates"),
    [("rl_rates", ["1e-4", "3e-4", "1e-3"]), ("constant_rates", ["1e-5", "1e-4", "3e-4"])],
)
def test_the_sentences_on_rates_have_the_sweeps_figures(sweep: str, rates: list[str]) -> None:
    found = STUDY[sweep]
    text = " ".join(PAGE.split())
    assert found["command"] in text
    assert f"`{found['commit'][:7]}`" in text
    figures = [
        f"{100 * row['accuracy']['estimate']:.1f} % at {rate}"
        for row, rate in zip(found["rows"], rates, strict=True)
    ]
    assert f"{figures[0]}, {figures[1]} and {figures[2]}" in text
    assert [float(row["label"].partition("=")[2]) for row in found["rows"]] == [float(rate) for rate in rates]


def test_what_the_text_says_of_a_fixed_length_is_its_runs() -> None:
    found = STUDY["constant_fixed"]
    assert (found["accuracy"], found["completion_tokens_mean"]["8"]) == (0, 1)
    assert "to completions of the end token alone by round 8, and 0 %" in PAGE
