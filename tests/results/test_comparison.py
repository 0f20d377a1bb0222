"""kdpipe compare: its intervals by closed form, a published example and simulation, and its table from real runs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
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
from kdpipe.results.comparison import compare
from kdpipe.results.contender import Contender
from kdpipe.results.table import notes_on, tables_of
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
    assert paired.interval.estimate == pytest.approx(apart.estimate)
    assert paired.interval.high - paired.interval.low < (apart.high - apart.low) / 5


def test_unpaired_differences_have_newcombes_published_bounds() -> None:
    """Newcombe 1998, table II, (a): 56/70 against 48/80 by method 10 is 0.0524 to 0.3339."""
    first = contender([1] * 48 + [0] * 32)
    second = Contender("b", 1, 3, 1, {f"q/{n}": float(n < 56) for n in range(70)}, {"kd": "k2"}, {}, {})
    row = compare([first, second])[1]
    assert row.difference is not None
    assert not row.difference.is_paired
    assert row.difference.p_value is None
    assert (row.difference.interval.low, row.difference.interval.high) == pytest.approx(
        (0.0524, 0.3339), abs=5e-5
    )


@pytest.mark.parametrize("right", [0, 1])
def test_runs_that_are_all_right_or_all_wrong_have_no_interval_of_width_zero(right: int) -> None:
    runs = [
        contender([right] * 40, run=f"{kd}{seed}", seed=seed, kd=kd)
        for kd in ("rkl", "k2")
        for seed in (1, 2, 3)
    ]
    rows = [row for row in compare(runs) if not row.is_before]
    for row in rows:
        assert row.level.high - row.level.low == pytest.approx(0.0876, abs=1e-4)  # Wilson's for 0 of 40
        assert 0 <= row.level.low < row.level.high <= 1
    found = rows[1].difference
    assert found is not None
    assert found.interval.low == -found.interval.high < -0.05


def test_notes_say_what_seeds_the_intervals_are_for() -> None:
    def told(*seeds: tuple[str, int]) -> str:
        runs = [contender([0, 1, 1, 0], run=f"{kd}{seed}", seed=seed, kd=kd) for kd, seed in seeds]
        return " ".join(notes_on(compare(runs)))

    both = told(("rkl", 1), ("k2", 1), ("k2", 2))
    assert "for these runs only; against several seeds it is taken to vary as they do" in both
    assert "two seeds cannot tell how far seeds spread" in both
    one = told(("rkl", 1), ("k2", 1))
    assert "for these runs only" in one
    assert "several seeds" not in one
    three = told(*((kd, seed) for kd in ("rkl", "k2") for seed in (1, 2, 3)))
    assert "several seeds: mean" in three
    assert "only" not in three
    assert "two seeds" not in three


def test_two_runs_are_paired_problem_by_problem_and_p_belongs_to_the_interval() -> None:
    first, second = (
        contender([1, 1, 0, 0, 0, 0, 0, 0, 1, 0]),
        contender([1, 1, 1, 1, 1, 1, 1, 0, 0, 1], kd="k2"),
    )
    row = compare([first, second])[1]
    assert row.difference is not None
    assert row.difference.interval.estimate == pytest.approx(0.5)
    assert row.difference.p_value == pytest.approx(2 * stats.norm.sf(4 / 7**0.5))  # 6 gained, 1 lost


def test_another_headline_is_refused_and_other_sampling_is_told() -> None:
    strict = contender([0, 1, 1], run="b", **{"task.headline": "strict"})
    with pytest.raises(DataError, match="different headlines: a by flexible, b by strict"):
        compare([contender([0, 1, 1], **{"task.headline": "flexible"}), strict])
    warm, greedy = (contender([0, 1, 1], **{"evaluate.temperature": value}) for value in ("1.0", "0.0"))
    assert any("evaluate.temperature is not the same" in line for line in text_lines(compare([greedy, warm])))
    assert not any("not the same" in line for line in text_lines(compare([greedy, greedy])))


def test_rows_are_called_by_the_fields_that_differ() -> None:
    found = [
        contender([0, 1], run=f"{kd}-{seed}", seed=seed, kd=kd) for kd in ("rkl", "k2") for seed in (1, 2)
    ]
    assert [row.label for row in compare(found)] == ["kd=rkl", "kd=k2"]


def test_a_lone_run_is_called_by_its_name_and_its_fields_stand_below() -> None:
    lone, *several = (contender([0, 1], run=f"tiny-{n}", seed=n, kd="k2" if n else "rkl") for n in range(3))
    assert [row.label for row in compare([lone])] == ["tiny-0"]
    assert [row.label for row in compare(several)] == ["tiny"]
    rows = compare([lone, *several])
    assert [row.label for row in rows] == ["tiny-0", "kd=k2"]
    assert "tiny-0: kd=rkl" in text_lines(rows)


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
    labels = [row.fields for row in compare([contender([0, 1], **each) for each in settings])]
    assert labels == ["z=kd, a5=off", "z=grpo, a5=off", "z=kdrl, a5=off", "z=kdrl, a5=on"]
    several = [dict.fromkeys(names, value) | {"z": value} for value in ("x", "y")]
    labels = [row.fields for row in compare([contender([0, 1], **each) for each in several])]
    assert labels == ["a0=x, a1=x, a2=x, a3=x and 3 more", "a0=y, a1=y, a2=y, a3=y and 3 more"]


def test_fields_that_only_some_have_tell_apart_what_nothing_else_does() -> None:
    labels = [row.fields for row in compare([contender([0, 1]), contender([1, 1], gamma="1")])]
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


def table(workspace: Path, run: str, number: int, file: str) -> Any:
    return pd.read_parquet(workspace / "runs" / run / f"round-{number:03d}/evaluate-student" / file)


def reverse_kl(found: Any) -> float:
    """The token mean of the whole distributions' divergence."""
    return float(np.concatenate(found.reverse_kl_nats).mean(dtype=np.float64))


def test_the_table_is_that_of_the_grades_and_metrics_on_disk(workspace: Path) -> None:
    names = [named(workspace, term, seed) for term in ("rkl", "k2") for seed in (1, 2)]
    document = json.loads(invoke(workspace, *names, "--json").stdout)
    before, *rows = document["rows"]
    assert any(note.startswith("several seeds") for note in document["notes"])
    assert [row["label"] for row in rows] == ["train.objective.kd.term=rkl", "train.objective.kd.term=k2"]
    assert (before["label"], before["before"]) == ("student before", True)
    for row in (before, *rows):
        for metric, file, mean in (
            ("accuracy", "grades.parquet", lambda found: found["correct"].mean()),
            ("reverse_kl_nats", "reverse_kl.parquet", reverse_kl),
        ):
            level = np.mean([mean(table(workspace, one["run"], one["round"], file)) for one in row["runs"]])
            assert row[metric]["estimate"] == pytest.approx(level)
            for kind, other in (("change", before), ("difference", rows[0])):
                if row is before or row is other:
                    assert row[metric][kind] is None
                else:
                    difference = row[metric]["estimate"] - other[metric]["estimate"]
                    assert row[metric][kind]["estimate"] == pytest.approx(difference, abs=1e-12)
                    assert row[metric][kind]["paired"] is True
    for row in rows:
        seconds = [
            json.loads(line)["value"]
            for run in row["runs"]
            for path in (workspace / "runs" / run["run"]).glob("round-*/*/metrics.jsonl")
            for line in path.read_text().splitlines()
            if '"time/' in line
        ]
        assert row["seconds"] == pytest.approx(sum(seconds) / 2)
        assert row["tokens"] > 100
    assert 0 < before["tokens"] < rows[0]["tokens"]


def test_text_and_markdown_hold_the_same_cells_in_80_columns(workspace: Path) -> None:
    names = [named(workspace, term, seed) for term in ("rkl", "k2") for seed in (1, 2)]
    for chosen in (names[:1], names[1:3], names):
        text = invoke(workspace, *chosen).stdout
        assert all(len(line) <= 80 for line in text.splitlines())
        lines = invoke(workspace, *chosen, "--markdown").stdout.splitlines()
        cells = [cell.strip() for line in lines if line.startswith("| ") for cell in line.split("|")[1:-1]]
        assert len(cells) > 20
        assert all(cell in text for cell in cells)
        assert "student before" in cells


# ------------------------------------------------------------------------------------------- students before


def student(
    correct: Sequence[float], nats: Sequence[float] | None, *, seed: int = 1, run: str = "a", **settings: str
) -> Contender:
    """A student of some problems of ten tokens each."""
    found = contender(correct, run=run, seed=seed, **settings)
    if nats is None:
        return found
    totals = {f"p/{number}": (10 * value, 10.0) for number, value in enumerate(nats)}
    values = {key: total / 10 for key, (total, _) in totals.items()}
    return replace(found, beside=replace(found, values=values, totals=totals))


def trained(
    before: Contender, correct: Sequence[float], nats: Sequence[float] | None, **settings: str
) -> Contender:
    return student(correct, nats, seed=before.seed, run=f"b{before.seed}", **settings).since(
        replace(before, round=0)
    )


def test_reverse_kl_stands_beside_accuracy_with_its_change_and_difference() -> None:
    before = student([0, 0, 1, 0], [2.0, 1.0, 1.5, 1.5])
    rows = compare([trained(before, [0, 0, 1, 0], [1.0, 0.5, 0.5, 1.0], kd=kd) for kd in ("rkl", "k2")])
    start, first, second = rows
    assert (start.label, start.is_before, start.change, start.difference) == (
        "student before",
        True,
        None,
        None,
    )
    assert [one.beside.level.estimate for one in rows if one.beside] == [1.5, 0.75, 0.75]
    assert first.beside is not None
    assert first.beside.change is not None
    assert first.beside.change.interval.estimate == -0.75
    assert first.beside.change.interval.low < -0.75 < first.beside.change.interval.high < 0
    assert first.difference is first.beside.difference is None
    assert second.beside is not None
    assert second.beside.difference is not None
    assert second.beside.difference.interval.estimate == 0.0
    levels, changes, differences, _ = tables_of(rows)
    assert levels.columns == ["", "accuracy", "held-out reverse KL, nats"]
    assert levels.rows[0][2].startswith("1.500 (")
    assert changes.columns == ["since before", "accuracy, points", "p", "held-out reverse KL, nats"]
    assert changes.rows[0][3].startswith("-0.750 (")
    assert [row[0] for row in differences.rows] == ["b1"]


def test_students_before_are_one_row_unless_runs_of_a_seed_began_with_others() -> None:
    one, other = student([0, 1], [1.0, 2.0]), student([0, 1], [1.0, 3.0])
    seed2 = student([1, 1], [1.0, 3.0], seed=2)
    shared = [trained(one, [1, 1], [1, 1], kd="x"), trained(seed2, [1, 1], [1, 1], kd="x")]
    rows = compare([*shared, trained(one, [1, 1], [1, 1], kd="y")])
    assert [(row.label, len(row.contenders)) for row in rows] == [
        ("student before", 2),
        ("kd=x", 2),
        ("b1", 1),
    ]
    rows = compare([*shared, trained(other, [1, 1], [1, 1], kd="y")])
    assert [row.label for row in rows] == ["student before, kd=x", "student before, b1", "kd=x", "b1"]
    unmeasured = student([0, 1], None)  # such as that of an arm without a teacher
    rows = compare([trained(unmeasured, [1, 1], None, kd="y"), *shared])
    assert [row.label for row in rows] == ["student before", "b1", "kd=x"]
    assert rows[0].beside is not None
    assert rows[1].beside is None


def test_a_reverse_kl_that_was_not_measured_is_a_dash_with_the_field_to_set() -> None:
    before = student([0, 1, 0, 0], None)
    rows = compare([trained(before, [1, 1, 0, 0], None, kd=kd) for kd in ("x", "y")])
    levels, changes, differences, _ = tables_of(rows)
    assert {row[-1] for found in (levels, changes, differences) for row in found.rows} == {"-"}
    assert any("evaluate.reverse_kl_problems" in note for note in notes_on(rows))
    measured = student([0, 1, 0, 0], [1.0, 1.0, 2.0, 1.0])
    rows = compare([trained(measured, [1, 1, 0, 0], [1.0, 1.0, 1.0, 0.5], kd=kd) for kd in ("x", "y")])
    assert not any("evaluate.reverse_kl_problems" in note for note in notes_on(rows))


def test_distances_that_are_not_one_measure_are_said_to_be_so_beside_accuracy() -> None:
    before = student([0, 1], [1.0, 2.0])
    for field in ("teachers.0.model", "rollout.temperature", "rollout.top_p", "rollout.max_new_tokens"):
        ends = [trained(before, [1, 1], [1.0, 0.5], **{field: value}) for value in ("1", "2")]
        told = [note for note in notes_on(compare(ends)) if "part of a difference" in note]
        assert len(told) == 1
        assert told[0].startswith(field.partition(".0")[0])
        assert told[0].endswith("in held-out reverse KL may be that")


def test_a_teacher_to_whom_no_distance_was_measured_is_not_said_to_be_another() -> None:
    rows = compare(
        [
            trained(student([0, 1], [1.0, 2.0]), [1, 1], [1.0, 0.5], **{"teachers.0.model": "t"}),
            trained(student([0, 1], None), [1, 1], None, **{"teachers.0.self": "current"}),
        ]
    )
    assert not any("part of a difference" in note for note in notes_on(rows))


def test_long_labels_have_lines_of_their_own_and_nothing_is_cut() -> None:
    label = "train.optimizer.learning_rate=0.00001, train.objective.kd.term=rkl, rollout.temperature=0.7"
    before = student([0] * 9 + [1], [12.3456] * 9 + [1.0])
    rows = [replace(row, label=label) for row in compare([trained(before, [1] * 10, [2.0] * 9 + [1.0])])]
    lines = text_lines(rows)
    assert max(map(len, lines)) <= 80
    assert " ".join(line.strip() for line in lines).count(label) == 4
    assert all(cell in " ".join(lines) for found in tables_of(rows) for row in found.rows for cell in row[1:])


def test_a_page_is_written_beside_the_table_or_in_its_place(workspace: Path, tmp_path: Path) -> None:
    runs = [named(workspace, term, seed) for term in ("rkl", "k2") for seed in (1, 2)]
    target = tmp_path / "page.html"
    assert invoke(workspace, *runs, "-o", str(target)).stdout == invoke(workspace, *runs).stdout
    page = target.read_text()
    assert all(f">{run}<" in page for run in runs)
    assert f"kdpipe compare {' '.join(runs)} --workspace" in page
    assert re.search(r"train\.objective\.kd\.term</th><td[^>]*>rkl</td><td[^>]*>k2</td>", page)
    assert invoke(workspace, *runs, "-o", "-").stdout == page
    assert json.loads(invoke(workspace, *runs, "-o", str(target), "--json").stdout)["rows"][0]["before"]
    assert "both go to stdout" in invoke(workspace, *runs, "-o", "-", "--json", code=2).stderr
    assert "is a folder" in invoke(workspace, *runs, "-o", str(tmp_path), code=2).stderr


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
        [contender([1, 0]), contender([1, 1], run="b", **{"task.instruction": f"before {nasty} after"})],
        named=lambda group, fields: fields,
    )
    bare = [re.sub(r"\\[\\`*\[\]|~]", "", line) for line in markdown_lines(rows)]
    told = [line for line in bare if line.startswith("| task.instruction=before")]
    assert [line.count("|") for line in told] == [4, 5, 6]
    for line in told:
        assert "after |" in line
        assert line.isprintable()
        assert not set("<`*[]~\\") & set(line)
    assert all(line.isprintable() for line in text_lines(rows))
