"""Texts and grades as MLflow tables: as `log_table` writes them, whole, bounded, each once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from kdpipe.errors import ArtifactError
from kdpipe.tracking import run as opened
from kdpipe.tracking.findings import MAX_GRADES, MAX_SAMPLES, MAX_TEXT
from kdpipe.tracking.memory import database_uri, read_memory
from kdpipe.tracking.pending import is_finished
from tests.mirrored import Grade, World, make_world, sample

LISTED = "mlflow.loggedArtifacts"


@pytest.fixture
def world(mlflow_database: Path, tmp_path: Path) -> World:
    shutil.copy(mlflow_database, tmp_path / "mlflow.db")
    return make_world(tmp_path)


def client_of(world: World) -> tuple[MlflowClient, str, str]:
    memory = read_memory(world.run.path)
    assert memory is not None
    assert memory.run_id is not None
    client = MlflowClient(database_uri(world.workspace / "mlflow.db"))
    return client, memory.run_id, client.get_run(memory.run_id).info.experiment_id


def table(world: World, name: str) -> dict[str, Any]:
    (path,) = world.workspace.glob(f"mlartifacts/*/artifacts/tables/{name}.json")
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def listed(world: World) -> list[str]:
    return [one["path"] for one in json.loads(world.tags()[LISTED])]


def test_mlflow_loads_the_tables_that_it_is_told_of(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "MLFLOW_TRACKING_URI", database_uri(world.workspace / "mlflow.db")
    )  # what load_table searches
    grades = [Grade("p/0", text="#### 3", answer="3", correct=False), Grade("p/1")]
    world.finish("evaluate:student@1", texts=grades)
    world.finish("rollout@2", texts=[sample("4 #### 4")])
    world.sync()
    client, run_id, experiment = client_of(world)
    assert listed(world) == ["tables/evaluate-round-001.json", "tables/samples-round-002.json"]
    frame = client.load_table(experiment, "tables/evaluate-round-001.json", run_ids=[run_id])
    assert frame[["round", "prompt_id", "completion", "answer", "correct"]].values.tolist() == [
        [1, "p/0", "#### 3", 3, False],
        [1, "p/1", "#### 2", 2, True],
    ]
    frame = client.load_table(experiment, "tables/samples-round-002.json", run_ids=[run_id])
    assert frame[["completion", "reward", "source"]].values.tolist() == [["4 #### 4", 1.0, "student"]]


def test_a_table_is_as_log_table_writes_it(world: World) -> None:
    world.finish("evaluate:student@0", texts=[Grade("p/0"), Grade("p/1", answer=None)])
    world.sync()
    ours = table(world, "evaluate-round-000")
    client, run_id, _ = client_of(world)
    rows = {name: list(column) for name, *column in zip(ours["columns"], *ours["data"], strict=True)}
    client.log_table(run_id, rows, "tables/theirs.json")
    assert table(world, "theirs") == ours
    world.finish("evaluate:student@1")
    world.sync()
    assert "tables/theirs.json" not in listed(world)  # the folder is ours
    client.log_table(run_id, rows, "mine.json")
    world.finish("evaluate:student@2")
    world.sync()
    assert listed(world)[0] == "mine.json"


def test_the_page_puts_answers_to_a_question_side_by_side(world: World) -> None:
    world.finish("evaluate:student@0")
    world.finish("rollout@1")
    world.sync()
    for name in ("evaluate-round-000", "samples-round-001"):
        assert table(world, name)["columns"][:2] == ["question", "completion"]


def test_a_table_is_there_once_after_a_kill_and_anew_when_its_step_was_performed_again(world: World) -> None:
    world.sync()
    before = (world.run.path / "mlflow.json").read_bytes()
    world.finish("evaluate:student@0", texts=[Grade("p/0")])
    world.sync()
    (world.run.path / "mlflow.json").write_bytes(before)
    world.sync()
    assert len(table(world, "evaluate-round-000")["data"]) == 1
    assert listed(world) == ["tables/evaluate-round-000.json"]
    world.finish("evaluate:student@0", texts=[Grade("p/7")], after=60)
    world.sync()
    assert "p/7" in table(world, "evaluate-round-000")["data"][0]


def test_a_run_is_not_finished_in_mlflow_before_its_tables_are(world: World) -> None:
    world.finish("evaluate:student@0")
    world.sync("FINISHED")
    assert is_finished(world.request())
    memory = world.run.path / "mlflow.json"
    document = json.loads(memory.read_text())
    del document["sent"]["tables/evaluate-round-000.json"]
    memory.write_text(json.dumps(document))
    assert not is_finished(world.request())


def test_tables_are_bounded_and_say_so(world: World) -> None:
    world.finish("evaluate:student@0", texts=[Grade(f"p/{number}") for number in range(MAX_GRADES + 3)])
    world.finish("rollout@1", texts=[sample("x" * 9999, f"p/{number}") for number in range(MAX_SAMPLES + 1)])
    world.finish("rollout@2", texts=[sample()])
    world.sync()
    assert len(table(world, "evaluate-round-000")["data"]) == MAX_GRADES
    samples = table(world, "samples-round-001")
    assert len(samples["data"]) == MAX_SAMPLES
    assert {len(row[samples["columns"].index("completion")]) for row in samples["data"]} == {MAX_TEXT}
    tags = world.tags()
    assert tags["tables.evaluate"] == f"the first {MAX_GRADES} of {MAX_GRADES + 3}, round 0"
    assert tags["tables.samples"] == f"the first {MAX_SAMPLES} of {MAX_SAMPLES + 1}, round 1"


def test_text_in_a_table_is_inert(world: World) -> None:
    world.finish("evaluate:student@0", texts=[Grade(text="\x1b[2Jred\u202e\n#### 2")])
    world.sync()
    (row,) = table(world, "evaluate-round-000")["data"]
    assert "\\x1b[2Jred\\u202e\n#### 2" in row


def test_a_damaged_table_is_not_shown_and_keeps_nothing_else_back(world: World) -> None:
    world.finish("evaluate:student@0", ("evaluate/accuracy", 0.5, None))
    world.finish("evaluate:student@1", texts=[Grade("p/9")])
    first, second = (
        path.with_name("grades.parquet")
        for path in sorted(
            world.workspace.glob("store/evaluate/*/fingerprint.json"),
            key=lambda path: json.loads(path.read_text())["round"],
        )
    )
    shutil.copy(second, first)  # a table, and not the one that its manifest vouches for
    with pytest.raises(ArtifactError, match=r"grades\.parquet: sha256"):
        world.sync("FINISHED")
    assert listed(world) == ["tables/evaluate-round-001.json"]
    assert world.statuses() == ["FINISHED"]


def test_more_tables_than_a_tag_holds_list_the_late_rounds(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opened, "MAX_TAG", 130)
    for step_id in ("rollout@1", "rollout@2", "evaluate:student@0"):
        world.finish(step_id)
    world.sync()
    assert listed(world) == ["tables/evaluate-round-000.json", "tables/samples-round-002.json"]
    assert len(list(world.workspace.glob("mlartifacts/*/artifacts/tables/*"))) == 3
