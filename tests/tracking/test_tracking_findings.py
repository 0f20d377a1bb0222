"""What a run came to, as tags and as the description of its MLflow run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from kdpipe.tracking.findings import Findings
from kdpipe.tracking.memory import database_uri, read_memory, write_memory
from tests.mirrored import SUMMARY, World, make_world

NOTE = "mlflow.note.content"


@pytest.fixture
def world(mlflow_database: Path, tmp_path: Path) -> World:
    shutil.copy(mlflow_database, tmp_path / "mlflow.db")
    return make_world(tmp_path)


def run_id(world: World) -> str:
    memory = read_memory(world.run.path)
    assert memory is not None
    assert memory.run_id is not None
    return memory.run_id


def test_a_run_is_tagged_with_what_its_evaluations_came_to_as_soon_as_they_are_there(world: World) -> None:
    world.sync()
    tags = world.tags()
    assert (tags["task"], tags["objective"]) == ("arithmetic", "kd")
    assert NOTE not in tags
    world.finish("evaluate:student@0", accuracy=0.31, accuracy_low=0.25, accuracy_high=0.38)
    world.finish("evaluate:teacher@0", accuracy=0.995, accuracy_low=0.97, accuracy_high=0.999)
    world.sync()
    tags = world.tags()
    assert tags["student.before"] == "31.0% (25.0% to 38.0%)"
    assert tags["teacher.accuracy"] == "99.5% (97.0% to 99.9%)"
    assert not {"student.after", "student.gain", "result"} & tags.keys()
    world.finish("evaluate:student@1", accuracy=0.4, accuracy_change_low=-0.01)
    world.sync()
    assert world.tags()["result"] == "No clear change in accuracy so far; round 1 of 2."
    world.finish(
        "evaluate:student@2", accuracy=0.435, reverse_kl_nats=0.25, reverse_kl_low=0.2, reverse_kl_high=0.3
    )
    world.sync()
    tags = world.tags()
    assert tags["result"] == "It worked: the student gained 12.5 points."
    assert tags["student.after"] == "43.5% (43.0% to 57.0%), round 2"
    assert tags["student.gain"] == (
        "+12.5 points (paired 95% interval +3.0 to +22.0, p = 0.004) on 200 problems"
    )
    note = tags[NOTE].splitlines()
    assert note[0] == f"**It worked: the student gained 12.5 points.** {tags['student.gain']}."
    assert note[2] == "Accuracy: student before 31.0%, student after 43.5%, teacher 99.5%."
    assert "| student after | 43.5% | 43.0% to 57.0% | 0.250 | 0.0% |" in note
    assert "| teacher | 99.5% | 97.0% to 99.9% |  | 0.0% |" in note


def test_a_run_that_an_earlier_version_mirrored_is_told_of_when_it_is_opened_again(world: World) -> None:
    world.finish("evaluate:student@0", accuracy=0.25)
    world.sync()
    client, run = MlflowClient(database_uri(world.workspace / "mlflow.db")), run_id(world)
    for name in ("student.before", NOTE, "kdpipe.note"):
        client.delete_tag(run, name)
    memory = read_memory(world.run.path)
    assert memory is not None
    del memory.sent["findings"]
    write_memory(world.run.path, memory)
    world.sync()
    assert world.tags()["student.before"].startswith("25.0%")
    assert NOTE in world.tags()


def test_a_description_that_a_user_wrote_stays(world: World) -> None:
    client = MlflowClient(database_uri(world.workspace / "mlflow.db"))
    world.finish("evaluate:student@0", accuracy=0.25)
    world.sync()
    world.finish("evaluate:student@1", accuracy=0.5)
    world.sync()
    assert "| student after | 50.0% |" in world.tags()[NOTE]  # our own is written anew
    client.set_tag(run_id(world), NOTE, "compare with Tuesday's")
    world.finish("evaluate:student@2", accuracy=0.75)
    world.sync()
    assert world.tags()[NOTE] == "compare with Tuesday's"
    assert world.tags()["student.after"].startswith("75.0%")


def test_a_kill_after_the_description_leaves_it_ours(world: World) -> None:
    world.sync()
    before = (world.run.path / "mlflow.json").read_bytes()
    world.finish("evaluate:student@0", accuracy=0.25)
    world.sync()
    (world.run.path / "mlflow.json").write_bytes(before)
    world.finish("evaluate:student@1", accuracy=0.5)
    world.sync()
    assert "| student after | 50.0% |" in world.tags()[NOTE]


def test_a_damaged_summary_tells_nothing(world: World) -> None:
    world.finish("evaluate:student@0", accuracy=0.25)
    world.finish("evaluate:student@2", accuracy=0.75)
    world.sync()
    world.finish("evaluate:student@1", accuracy=0.5)
    [summary] = [
        path for path in world.workspace.glob("store/evaluate/*/summary.json") if "0.75" in path.read_text()
    ]
    summary.write_text(summary.read_text().replace("0.75", "0.95"))
    world.sync()
    assert world.tags()["student.after"].startswith("50.0%")
    assert "95.0%" not in world.tags()[NOTE]


def test_several_teachers_have_a_tag_each_and_are_rows_of_the_description(world: World) -> None:
    recipe = world.loaded.recipe
    teachers = tuple(recipe.teachers[0].model_copy(update={"name": name}) for name in ("a|b", "c"))
    recipe = recipe.model_copy(update={"teachers": teachers})
    summaries = [{**SUMMARY, "model": name, "round": 0} for name in ("a|b", "c", "student")]
    found = Findings(summaries)
    assert {name for name in found.tags(recipe) if "." in name} == {
        "student.before",
        "teacher.accuracy.a|b",
        "headroom.a|b",
        "teacher.accuracy.c",
        "headroom.c",
        *(f"interval.teacher.{of}.{name}" for name in ("a|b", "c") for of in ("accuracy", "accuracy_change")),
    }
    assert "| a/b | 50.0% |" in found.note(recipe)
