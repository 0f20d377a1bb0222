"""The page of a comparison: the numbers of its rows, what tells recipes apart, texts that are inert."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from kdpipe.pipeline.headline import ACCURACY, REVERSE_KL
from kdpipe.report.comparison_page import render_comparison
from kdpipe.report.comparison_tables import cost_table, field_table, forests_of
from kdpipe.results.comparison import compare
from kdpipe.results.contender import Contender
from kdpipe.results.studies import arm_rows
from kdpipe.results.table import difference_cell, level_cell
from kdpipe.results.visible_text import visible
from tests.mirrored import make_world
from tests.reports import NASTY, Outline


def contender(run: str, right: int, nats: float = 0.5, **settings: str) -> Contender:
    """One of 40 problems, of which it gets `right` right, and before training 10."""

    def by_accuracy(count: int) -> Contender:
        values = {f"p/{number}": float(number < count) for number in range(40)}
        return Contender(run, 1, 3, 1, values, settings, {"train": 90.0, "rollout": 30.0}, {"train": 1e6})

    def by_nats(level: float) -> Contender:
        totals = {f"p/{number}": (level * (8 + number % 3), 8.0) for number in range(40)}
        values = {key: total / count for key, (total, count) in totals.items()}
        return replace(by_accuracy(0), values=values, totals=totals)

    before = replace(by_accuracy(10), round=0, beside=replace(by_nats(1.0), round=0))
    return replace(by_accuracy(right), beside=by_nats(nats)).since(before)


def test_a_forest_for_each_measure_has_the_numbers_of_its_rows() -> None:
    rows = arm_rows(
        [("kd", contender("a-1", 30)), ("rl", contender("b-2", 20, 2.0)), ("kdrl", contender("c-3", 34))]
    )
    found = {forest.title: forest.table for forest in forests_of(rows)}
    assert list(found) == [
        "Accuracy (more is better)",
        "Change of accuracy, points, since the student before training",
        "Difference in accuracy, points, of one to another",
        "Held-out reverse KL, nats (less is better)",
        "Change of held-out reverse KL, nats, since the student before training",
        "Difference in held-out reverse KL, nats, of one to another",
    ]
    levels = found["Accuracy (more is better)"].rows
    assert [row[2] for row in levels] == [level_cell(row, ACCURACY) for row in rows]
    changes = found["Change of held-out reverse KL, nats, since the student before training"].rows
    expected = [row.beside.change for row in rows if row.beside and row.beside.change]
    assert [row[2] for row in changes] == [
        difference_cell(one, REVERSE_KL).replace("-", "−") for one in expected
    ]
    pairs = found["Difference in accuracy, points, of one to another"].rows
    assert [row[0] for row in pairs] == ["kdrl less kd", "kdrl less rl"]
    assert all(row[1].startswith("<svg") and 'class="axis"' in row[1] for row in pairs)


def test_a_comparison_with_the_first_is_drawn_below_its_name() -> None:
    rows = compare([contender("a-1", 30, x="1"), contender("b-2", 20, x="2")])
    [table] = [one.table for one in forests_of(rows) if one.title == "Difference in accuracy, points, to a-1"]
    assert rows[-1].difference is not None
    assert [row[0] for row in table.rows] == ["b-2"]
    assert table.rows[0][2] == difference_cell(rows[-1].difference, ACCURACY).replace("-", "−")
    assert table.rows[0][3] == f"{rows[-1].difference.p_value:.2g}"


def test_fields_that_differ_have_a_column_for_each_recipe() -> None:
    table = field_table({"one": {"a": "1", "b": "2"}, "two": {"a": "1", "b": "3", "c": "4"}})
    assert table is not None
    assert (table.columns, table.rows) == (
        ["field", "one", "two"],
        [["b", "2", "3"], ["c", "not there", "4"]],
    )
    assert field_table({"one": {"a": "1"}, "two": {"a": "1"}}) is None


def test_costs_are_those_of_a_run_by_stage() -> None:
    table = cost_table(compare([contender("a-1", 30, x="1"), contender("b-2", 20, x="2")]))
    assert table.columns[1:] == ["seeds", "round", "tokens", "seconds", "rollout, time", "train, time"]
    assert list(table.rows[0]) == ["a-1", "1", "3", "1,000,000", "120", "30.0 s", "1 min 30 s"]
    longer = replace(contender("a-2", 30, x="1"), seed=2, seconds={"train": 30.0, "rollout": 90.0})
    [of_two] = cost_table(compare([contender("a-1", 30, x="1"), longer])).rows
    assert list(of_two)[-3:] == ["120", "1 min 00 s", "1 min 00 s"]


@pytest.mark.slow
def test_nasty_texts_make_no_element_of_the_page(tmp_path: Path) -> None:
    runs = [make_world(tmp_path, "tiny", overrides=(f"seed={seed}",)).run.name for seed in (1, 2)]

    def page_with(texts: Sequence[str]) -> str:
        rows = compare([contender(run, 20 + at, x=str(at)) for at, run in enumerate(runs)])
        named = [replace(row, label=text) for row, text in zip(rows, texts, strict=False)]
        return render_comparison(named, tmp_path, title=texts[0], commands=texts, missing=texts)

    plain = [tag for tag, _ in Outline(page_with(["one", "two", "three"])).elements]
    for start in range(0, len(NASTY), 3):
        texts = [*NASTY[start : start + 3], *NASTY[:3]][:3]
        page = page_with(texts)
        assert [tag for tag, _ in Outline(page).elements] == plain
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", page)
        for text in texts:
            assert visible(text) in "".join(Outline(page).of("pre"))
            assert visible(text) in "".join(Outline(page).of("span"))
