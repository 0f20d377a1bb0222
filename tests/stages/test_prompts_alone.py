"""A task of prompts without answers, from its recipe to its report: no accuracy is said or stored anywhere."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from kdpipe.cli.app import app
from kdpipe.cli.display import outcome_lines
from kdpipe.cli.overview import overview, status_lines
from kdpipe.cli.study import table_text
from kdpipe.cli.terminal import painter
from kdpipe.errors import RecipeError
from kdpipe.pipeline.headroom import headrooms
from kdpipe.pipeline.project import Project
from kdpipe.report.writing import write_report
from kdpipe.results.comparison import compare
from kdpipe.results.contender import read_contender
from kdpipe.results.evaluations import Evaluations, summaries_of
from kdpipe.results.samples import Choice, choose_samples
from kdpipe.tracking.findings import Findings, table_of
from kdpipe.tracking.steps import done_steps
from tests.stages.test_from_files import write_model, write_problems
from tests.worlds import Watcher, load_tiny, run_near

pytestmark = pytest.mark.slow
FORBIDDEN = re.compile(r"accura|\bright\b|\bwrong\b|McNemar|reward", re.IGNORECASE)


def write_prompts(path: Path, count: int) -> None:
    write_problems(path, count)
    questions = [json.loads(line)["question"] for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in questions))


def load(folder: Path, **changes: Any) -> Any:
    if not (folder / "student").exists():
        write_model(folder / "student", hidden=16, layers=1, seed=1)
        for number, name in enumerate(("teacher", "other")):
            write_model(folder / name, hidden=24, layers=2, seed=2 + number)
        write_prompts(folder / "train.jsonl", 48)
        write_prompts(folder / "test.jsonl", 12)
    given: dict[str, Any] = {
        "rounds": 2,
        "task": {
            "kind": "jsonl",
            "train": "train.jsonl",
            "test": "test.jsonl",
            "prompt": "plain",
            "grader": "none",
        },
        "student": {"model": "./student", "dtype": "float32"},
        "teachers": [{"model": "./teacher", "dtype": "float32"}],
        "rollout": {"prompts": 16, "max_new_tokens": 6},
        "train": {"objective": {"kd": {"term": "jsd", "beta": 1.0, "support": "vocabulary"}}},
        "train__optimizer": {"learning_rate": 5e-3},
        "evaluate": {"reverse_kl_problems": 10},
    }
    return load_tiny(folder, **{**given, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prompts")


@pytest.fixture(scope="module")
def watcher() -> Watcher:
    return Watcher()


@pytest.fixture(scope="module")
def project(folder: Path, watcher: Watcher) -> Project:
    return run_near(load(folder), folder / "out", watcher=watcher)


def test_nothing_is_graded_and_reverse_kl_is_what_is_stored(project: Project, watcher: Watcher) -> None:
    assert "evaluate:teacher@0" not in {step.id for step in project.plan.steps}
    assert any(note.startswith("evaluate.teacher: task.grader is none") for note in watcher.notes)
    for number, stage, file in (
        (1, "rollout", "rollouts.parquet"),
        (2, "evaluate-student", "grades.parquet"),
    ):
        rows = pd.read_parquet(project.run.path / f"round-{number:03d}" / stage / file)
        for column in ("expected", "answer", "correct", "reward"):
            assert rows[column].isna().all(), column
        assert rows.text.str.len().sum() > 0
    for step in project.plan.steps:
        entry = project.store.entry(step)
        assert not [row.name for row in entry.metrics() if "accuracy" in row.name or "reward" in row.name]
    found = summaries_of(project, project.plan.steps)
    assert [one["reverse_kl_problems"] for one in found] == [10, 10, 10]
    assert not [name for one in found for name in one if re.search("accuracy|pass_at|maj_at", name)]


def test_the_table_has_the_reverse_kl_of_the_stored_rows(project: Project) -> None:
    evaluated = Evaluations(summaries_of(project, project.plan.steps))
    assert evaluated.after is not None
    rows = pd.read_parquet(project.run.path / "round-002/evaluate-student/reverse_kl.parquet")
    total = sum(values.astype("float64").sum() for values in rows.reverse_kl_nats)
    assert evaluated.after.level.estimate == pytest.approx(
        total / rows.reverse_kl_nats.str.len().sum(), rel=1e-6
    )
    assert evaluated.after.change is not None
    _, row = compare([read_contender(project.run)])
    assert row.level == evaluated.after.level
    assert row.change is not None
    assert row.change.interval == evaluated.after.change
    [headroom] = headrooms(project)
    assert evaluated.before is not None
    assert headroom.low == evaluated.before.level.low


def test_whatever_tells_of_the_run_says_reverse_kl_and_no_accuracy(project: Project, folder: Path) -> None:
    other = run_near(load(folder, seed=2), folder / "out")
    plain = painter(sys.stdout)
    evaluated = Evaluations(summaries_of(project, project.plan.steps))
    texts = {
        "run": outcome_lines(evaluated.shown, plain),
        "status": status_lines(overview(project), plain),
        "compare": [
            table_text(compare([read_contender(one.run) for one in (project, other)]), markdown=True)
        ],
        "mlflow": [Findings(one.summary for one in evaluated.evaluations).note(project.recipe)],
    }
    for name, lines in texts.items():
        text = "\n".join(lines)
        assert "everse KL" in text, name
        assert not FORBIDDEN.search(text), name
    write_report(project, folder / "report.html", commands=["kdpipe run"], others=[other.run])
    page = (folder / "report.html").read_text()
    body = re.sub(r"<(script|style).*?</\1>", "", page, flags=re.DOTALL)
    assert not FORBIDDEN.search(body)
    assert "held-out reverse KL, nats" in body
    assert re.findall(r'data-filter="(\w+)"', body) == ["all", "truncated"]
    items = json.loads(re.findall(r'id="token-data">(.*?)</script>', page, re.DOTALL)[0])["sets"][0]["items"]
    assert {item["ok"] for item in items} == {None}
    assert all(item["was"] is None and item["after"] is not None for item in items if "was" in item)


def test_samples_are_shown_without_a_grade_and_not_chosen_by_one(project: Project, folder: Path) -> None:
    for flag in ("wrong", "flipped"):
        choice = Choice(None, flag == "wrong", flag == "flipped", False, False, 5)
        with pytest.raises(RecipeError, match=f"--{flag}: task.grader is none"):
            choose_samples(project, choice)
    out = CliRunner().invoke(
        app, ["samples", project.run.name, "--workspace", str(folder / "out"), "--held-out"]
    )
    assert out.exit_code == 0
    assert "answer at first" in out.stdout
    assert not FORBIDDEN.search(out.stdout)


def test_tables_in_mlflow_have_no_empty_columns_of_grades(project: Project) -> None:
    found = [step for step in done_steps(project.run.path) if step.stage in ("rollout", "evaluate")]
    for step in found:
        columns = json.loads(table_of(step)[0])["columns"]
        assert columns[:2] == ["question", "completion"]
        assert not {"answer", "correct", "reward", "expected"} & {*columns}


def test_several_teachers_are_one_distance_to_their_mixture(folder: Path) -> None:
    teachers = [{"name": name, "model": f"./{name}", "dtype": "float32"} for name in ("teacher", "other")]
    project = run_near(load(folder, rounds=1, teachers=teachers), folder / "out")
    [found] = headrooms(project)
    assert found.teacher == "teacher, other"
    assert found.low > 0
    assert read_contender(project.run).totals is not None


def test_the_doctor_examines_a_teacher_without_solutions(folder: Path) -> None:
    load(folder)
    result = CliRunner().invoke(
        app, ["doctor", str(folder / "recipe.yaml"), "--workspace", str(folder / "out"), "--json"]
    )
    assert result.exit_code == 0, result.output
    found = {one["probe"]: one["verdict"] for one in json.loads(result.stdout)["findings"]}
    assert found["knows the task"] == "skipped"
    assert {found[name] for name in ("reload", "shift", "not constant", "same twice", "own weights")} == {
        "ok"
    }
