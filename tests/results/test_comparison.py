"""kdpipe compare: its intervals by closed form, a published example and simulation, and its table from real runs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from typer.testing import CliRunner

from kdpipe.cli.app import app
from kdpipe.cli.comparison_table import markdown_lines, text_lines
from kdpipe.errors import DataError
from kdpipe.method.statistics import pooled_difference
from kdpipe.pipeline.headline import ACCURACY
from kdpipe.results.comparison import Contender, compare, header_of
from tests.nasty_texts import NASTY
from tests.worlds import load_tiny, run_near


def contender(correct: Sequence[float], *, run: str = "a", seed: int = 1, **settings: str) -> Contender:
    problems = {f"p/{number}": value for number, value in enumerate(correct)}
    return Contender(run, seed, 3, 1, problems, {"rounds": "3", **settings}, {"train": 2.0}, {"train": 10.0})


# ---------------------------------------------------------------------------------------------- intervals


def test_pairing_by_seed_takes_out_what_seeds_have_in_common() -> None:
    generator = np.random.default_rng(2)
    seeds = generator.normal(0, 0.3, (3, 1))
    first = 0.5 + seeds + generator.normal(0, 0.05, (3, 30))
    second = 0.6 + seeds + generator.normal(0, 0.05, (3, 30))
    rows = compare(
        [
            contender(list(values), run=f"{name}{seed}", seed=seed, kd=name)
            for name, matrix in (("x", first), ("y", second))
            for seed, values in enumerate(matrix)
        ]
    )
    paired = rows[1].difference
    assert paired is not None
    apart = pooled_difference(second, first)
    assert paired.estimate == pytest.approx(apart.estimate)
    assert paired.high - paired.low < (apart.high - apart.low) / 5


def test_unpaired_differences_have_newcombes_published_bounds() -> None:
    """Newcombe 1998, table II, (a): 56/70 against 48/80 by method 10 is 0.0524 to 0.3339."""
    first = contender([1] * 48 + [0] * 32)
    second = Contender("b", 1, 3, 1, {f"q/{n}": float(n < 56) for n in range(70)}, {"kd": "k2"}, {}, {})
    row = compare([first, second])[1]
    assert row.difference is not None
    assert not row.is_paired
    assert row.p_value is None
    assert (row.difference.low, row.difference.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_two_runs_are_paired_problem_by_problem_with_mcnemars_p() -> None:
    first, second = (
        contender([1, 1, 0, 0, 0, 0, 0, 0, 1, 0]),
        contender([1, 1, 1, 1, 1, 1, 1, 0, 0, 1], kd="k2"),
    )
    row = compare([first, second])[1]
    assert row.difference is not None
    assert row.difference.estimate == pytest.approx(0.5)
    assert row.p_value == pytest.approx(stats.binomtest(6, 7, 0.5).pvalue)  # 6 gained, 1 lost


def test_another_headline_is_refused_and_other_sampling_is_told() -> None:
    from kdpipe.cli.comparison_table import text_lines

    strict = contender([0, 1, 1], run="b", **{"task.headline": "strict"})
    with pytest.raises(DataError, match="different headlines: a by flexible, b by strict"):
        compare([contender([0, 1, 1], **{"task.headline": "flexible"}), strict])
    warm, greedy = (contender([0, 1, 1], **{"evaluate.temperature": value}) for value in ("1.0", "0.0"))
    assert any("evaluate.temperature is not the same" in line for line in text_lines(compare([greedy, warm])))
    assert not any("not the same" in line for line in text_lines(compare([greedy, greedy])))


def test_rows_are_called_by_the_fields_that_differ() -> None:
    labels = [row.label for row in compare([contender([0, 1], kd="rkl"), contender([1, 1], kd="k2")])]
    assert labels == ["kd=rkl", "kd=k2"]
    assert [row.label for row in compare([contender([0, 1]), contender([1, 1], seed=2)])] == ["the recipe"]


def test_no_two_labels_are_the_same_however_many_fields_differ() -> None:
    """The field that tells rows apart is the last of the alphabet; the others differ in one row alone."""
    names = [f"a{number}" for number in range(6)]
    settings = [
        {**dict.fromkeys(names, "off"), **({name: "on"} if name else {}), "z": z, **own}
        for name, z, own in (
            (None, "kd", {}),
            (None, "grpo", {"rate": "1"}),
            (None, "kdrl", {}),
            ("a5", "kdrl", {}),
        )
    ]
    labels = [row.label for row in compare([contender([0, 1], **each) for each in settings])]
    assert labels == ["z=kd, a5=off", "z=grpo, a5=off", "z=kdrl, a5=off", "z=kdrl, a5=on"]
    several = [dict.fromkeys(names, value) | {"z": value} for value in ("x", "y")]
    labels = [row.label for row in compare([contender([0, 1], **each) for each in several])]
    assert labels == ["a0=x, a1=x, a2=x, a3=x and 3 more", "a0=y, a1=y, a2=y, a3=y and 3 more"]


def test_fields_that_only_some_have_tell_apart_what_nothing_else_does() -> None:
    labels = [row.label for row in compare([contender([0, 1]), contender([1, 1], gamma="1")])]
    assert labels == ["gamma=none", "gamma=1"]


# -------------------------------------------------------------------------------------------- real runs


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of one recipe and two of the same with another KD term, one round each."""
    folder: Path = tmp_path_factory.mktemp("compare")
    for term in ("rkl", "k2"):
        for seed in (1, 2):
            run_near(load_tiny(folder, rounds=1, seed=seed, train__objective={"kd": term}), folder / "out")
    return folder / "out"


def named(workspace: Path, term: str, seed: int) -> str:
    for run in (workspace / "runs").iterdir():
        recipe = json.loads((run / "resolved.json").read_text())["recipe"]
        if (recipe["train"]["objective"]["kd"]["term"], recipe["seed"]) == (term, seed):
            return run.name
    raise AssertionError


def invoke(workspace: Path, *args: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["compare", *args, "--workspace", str(workspace)])
    assert result.exit_code == code, result.output
    return result


def test_the_table_is_that_of_the_grades_and_metrics_on_disk(workspace: Path) -> None:
    names = [named(workspace, term, seed) for term in ("rkl", "k2") for seed in (1, 2)]
    rows = json.loads(invoke(workspace, *names, "--json").stdout)
    assert [row["label"] for row in rows] == ["train.objective.kd.term=rkl", "train.objective.kd.term=k2"]
    means = []
    for row in rows:
        grades = [
            pd.read_parquet(workspace / "runs" / run["run"] / "round-001/evaluate-student/grades.parquet")
            for run in row["runs"]
        ]
        means.append(np.mean([table["correct"].mean() for table in grades]))
        assert row["accuracy"]["estimate"] == pytest.approx(means[-1])
        seconds = [
            json.loads(line)["value"]
            for run in row["runs"]
            for path in (workspace / "runs" / run["run"]).glob("round-*/*/metrics.jsonl")
            for line in path.read_text().splitlines()
            if '"time/' in line
        ]
        assert row["seconds"] == pytest.approx(sum(seconds) / 2)
        assert row["tokens"] > 100
    assert rows[0]["difference"] is None
    assert rows[1]["difference"]["estimate"] == pytest.approx(means[1] - means[0])
    assert rows[1]["paired"] is True


def test_text_and_markdown_hold_the_same_cells(workspace: Path) -> None:
    names = [named(workspace, term, 1) for term in ("rkl", "k2")]
    text = invoke(workspace, *names).stdout
    table = invoke(workspace, *names, "--markdown").stdout
    assert all(len(line) <= 160 for line in text.splitlines())
    cells = [cell.strip() for cell in table.splitlines()[3].split("|")[1:-1]]
    assert len(cells) == len(comparison_header())
    assert all(cell in text for cell in cells)


def comparison_header() -> tuple[str, ...]:
    return header_of(ACCURACY)


def test_a_run_that_is_not_there_is_told_with_those_that_are(workspace: Path) -> None:
    result = invoke(workspace, "tiny-00000000", code=2)
    assert named(workspace, "k2", 2) in result.stderr
    assert result.stdout == ""


def test_a_damaged_table_is_not_compared(workspace: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "out"
    shutil.copytree(workspace, copy, symlinks=True)
    name = named(copy, "k2", 1)
    path = (copy / "runs" / name / "round-001/evaluate-student/grades.parquet").resolve()
    path.write_bytes(path.read_bytes()[:-9] + b"123456789")
    result = invoke(copy, name, code=5)
    assert "evaluate:student@1" in result.stderr


@pytest.mark.parametrize(
    "nasty", [*NASTY.values(), "a | b\n| c", "\\|", "![](http://x/y.png)", "<img src=x>", "`*~"]
)
def test_a_label_stays_one_cell_and_does_nothing_in_markdown(nasty: str) -> None:
    rows = compare(
        [contender([1, 0]), contender([1, 1], run="b", **{"task.instruction": f"before {nasty} after"})]
    )
    lines = markdown_lines(rows)
    assert len(lines) == 4
    bare = [re.sub(r"\\[\\`*\[\]|~]", "", line) for line in lines]
    assert {line.count("|") for line in bare} == {10}
    for line in (bare[3], text_lines(rows)[2]):
        assert "before" in line
        assert "after" in line
        assert line.isprintable()
    assert not set("<`*[]~\\") & set(bare[3])
