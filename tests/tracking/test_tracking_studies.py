"""Studies in MLflow: one parent of their runs, found again, true in its status, with the comparison."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kdpipe.recipe.runtime import Tracking
from kdpipe.results.studies import COMPARISON, Study, all_studies, make_study
from kdpipe.store.locks import run_lock
from kdpipe.tracking.memory import MEMORY, MirrorRequest, Status, read_memory
from kdpipe.tracking.mirror import begin_study, settle
from kdpipe.tracking.pending import is_finished, unsettled
from tests.mirrored import World, make_world, mirror


def bounded(estimate: float, low: float, high: float) -> dict[str, Any]:
    return {"estimate": estimate, "low": low, "high": high}


ROWS: list[Any] = [
    {
        "label": "student before",
        "headline": "accuracy",
        "accuracy": bounded(0.25, 0.2, 0.3) | {"change": None, "difference": None, "pairs": {}},
    },
    {
        "label": "kd=k2",
        "headline": "accuracy",
        "accuracy": bounded(0.5, 0.45, 0.55)
        | {
            "change": bounded(0.25, 0.1, 0.4),
            "difference": None,
            "pairs": {"self-teacher": bounded(0.4, 0.3, 0.5)},
        },
        "reverse_kl_nats": bounded(0.7, 0.6, 0.8)
        | {"change": bounded(-0.5, -0.7, -0.3), "difference": bounded(0.1, -0.1, 0.2), "pairs": {}},
    },
]


@pytest.fixture
def workspace(mlflow_database: Path, tmp_path: Path) -> Path:
    shutil.copy(mlflow_database, tmp_path / "mlflow.db")
    return tmp_path


@pytest.fixture
def worlds(workspace: Path) -> list[World]:
    return [make_world(workspace, overrides=(f"seed={seed}",)) for seed in (1, 2, 3)]


def study_of(worlds: list[World]) -> Study:
    runs = {world.run.name: f"kd, seed {world.loaded.recipe.seed}" for world in worlds}
    study = make_study(worlds[0].workspace, "arms", recipe="tiny", runs=runs)
    begin_study(study, Tracking())
    return study


def order(study: Study, status: Status) -> MirrorRequest:
    return MirrorRequest("study", study.path, Tracking(), status)


def sync(study: Study, status: Status = "FINISHED") -> None:
    """Mirrors the study as a fresh process would."""
    mirror(order(study, status))


def rows(world: World) -> dict[str, tuple[str, str | None]]:
    """Of each MLflow run by its name: status, and the name of its parent."""
    found = world.query("select run_uuid, name, status from runs")
    names = {run: name for run, name, _ in found}
    told = world.query("select run_uuid, value from tags where key = 'mlflow.parentRunId'")
    parents = {run: names[value] for run, value in told}
    return {name: (status, parents.get(run)) for run, name, status in found}


def test_runs_are_nested_while_their_study_goes_on(worlds: list[World]) -> None:
    study = study_of(worlds[:2])
    with run_lock(study.path):
        worlds[0].sync()
        assert rows(worlds[0]) == {
            study.name: ("RUNNING", None),
            worlds[0].run.name: ("RUNNING", study.name),
        }
        worlds[0].sync("FINISHED")
        worlds[1].sync("FINISHED")
        worlds[2].sync("FINISHED")
    sync(study)
    assert rows(worlds[0]) == {
        study.name: ("FINISHED", None),
        worlds[0].run.name: ("FINISHED", study.name),
        worlds[1].run.name: ("FINISHED", study.name),
        worlds[2].run.name: ("FINISHED", None),
    }


def test_a_run_that_was_mirrored_before_its_study_becomes_its_child(worlds: list[World]) -> None:
    worlds[0].sync("FINISHED")
    study = study_of(worlds[:2])
    sync(study)
    assert rows(worlds[0])[worlds[0].run.name] == ("FINISHED", study.name)
    worlds[1].sync("FINISHED")  # delivered later than its study
    assert rows(worlds[0])[worlds[1].run.name] == ("FINISHED", study.name)


def test_a_kill_at_any_note_leaves_one_parent_with_every_metric_once(worlds: list[World]) -> None:
    study = study_of(worlds[:1])
    memory = study.path / MEMORY
    begun = memory.read_bytes()
    study.keep(ROWS, ["| a table |"], [])
    worlds[0].sync()
    opened = memory.read_bytes()
    sync(study)
    metrics = worlds[0].metrics()
    assert {name: value for name, _, value in metrics} == {
        "study/student before/accuracy": 0.25,
        "study/kd_k2/accuracy": 0.5,
        "study/kd_k2/accuracy_change": 0.25,
        "study/kd_k2/accuracy_less_self-teacher": 0.4,
        "study/kd_k2/reverse_kl_nats": 0.7,
        "study/kd_k2/reverse_kl_nats_change": -0.5,
        "study/kd_k2/reverse_kl_nats_difference": 0.1,
    }
    for note in (begun, opened, b"torn"):
        memory.write_bytes(note)
        sync(study)
        assert worlds[0].metrics() == metrics
        assert sorted(rows(worlds[0])) == sorted([study.name, worlds[0].run.name])


def test_the_parent_shows_the_comparison_and_what_failed(worlds: list[World]) -> None:
    study = study_of(worlds[:2])
    study.keep(ROWS, ["| a table |"], ["kd, seed 2"])
    sync(study, "FAILED")
    tags = worlds[0].tags()
    assert (tags["study"], tags["study.runs"], tags["study.failed"]) == ("arms", "2", "kd, seed 2")
    assert tags["study.student before"] == "accuracy 25.0% (20.0% to 30.0%)"
    assert tags["study.kd_k2"] == (
        "accuracy 50.0% (45.0% to 55.0%), +25.0 points (+10.0 to +40.0) since before, "
        "+40.0 points (+30.0 to +50.0) against self-teacher, "
        "held-out reverse KL 0.700 nats a token (0.600 to 0.800), -0.500 nats (-0.700 to -0.300) since before, "
        "+0.100 nats (-0.100 to +0.200) against the first"
    )
    [folder] = worlds[0].workspace.glob("mlartifacts/*/artifacts")
    assert {path.name for path in folder.iterdir()} == {"comparison.json", "comparison.md"}
    table = (folder / "comparison.md").read_text()
    assert "| a table |" in table
    assert f"* kd, seed 1: `{worlds[0].run.name}`" in table
    assert "Failed: kd, seed 2." in table
    assert tags["mlflow.note.content"] == table


def test_a_study_that_was_killed_is_settled_by_whoever_sees_its_lock_free(worlds: list[World]) -> None:
    study = study_of(worlds[:1])
    study.event("study started")
    with run_lock(study.path):
        worlds[0].sync("FINISHED")
        assert unsettled(study.path.parents[1]) == []
    [request] = unsettled(study.path.parents[1])
    assert (request.subject, request.folder, request.status) == ("study", study.path, "KILLED")
    mirror(request)
    assert rows(worlds[0])[study.name] == ("KILLED", None)
    assert settle(study.path.parents[1]) == []
    begin_study(study, Tracking())  # the same command again
    worlds[0].sync("FINISHED")
    assert rows(worlds[0])[study.name] == ("RUNNING", None)
    sync(study)
    assert rows(worlds[0])[study.name] == ("FINISHED", None)


def test_a_finished_study_that_is_repeated_needs_nothing_of_mlflow(worlds: list[World]) -> None:
    study = study_of(worlds[:1])
    study.keep(ROWS, [], [])
    worlds[0].sync("FINISHED")
    sync(study)
    again = study_of(worlds[:1])
    assert again == study
    study.keep(ROWS, [], [])
    assert is_finished(order(study, "FINISHED"))
    study.keep(ROWS[:1], [], [])
    assert not is_finished(order(study, "FINISHED"))


def test_other_runs_are_another_study_which_takes_over_those_it_shares(worlds: list[World]) -> None:
    first = study_of(worlds[:2])
    for world in worlds:
        world.sync("FINISHED")
    sync(first)
    second = study_of(worlds)
    assert second.path != first.path
    sync(second)
    sync(first)  # whoever settles it later changes nothing
    found = rows(worlds[0])
    assert [found[world.run.name][1] for world in worlds] == [second.name] * 3


def test_a_study_that_cannot_be_read_keeps_no_run_back(worlds: list[World]) -> None:
    study = study_of(worlds[:1])
    (study.path / "study.json").write_text("torn")
    assert all_studies(worlds[0].workspace) == []
    worlds[0].sync("FINISHED")
    assert rows(worlds[0]) == {worlds[0].run.name: ("FINISHED", None)}


def test_an_untracked_study_leaves_no_note(worlds: list[World]) -> None:
    study = make_study(worlds[0].workspace, "sweep", recipe="tiny", runs={"tiny-1": "a=1"})
    begin_study(study, Tracking(enabled=False))
    assert read_memory(study.path) is None


def test_a_study_is_named_by_its_set_of_runs(tmp_path: Path) -> None:
    made = [
        make_study(tmp_path, "sweep", recipe="tiny", runs=runs).name
        for runs in ({"a": "x", "b": "y"}, {"b": "other", "a": "x"}, {"a": "x"})
    ]
    assert made[0] == made[1] != made[2]
    assert made[0].startswith("tiny-sweep-")


def test_an_unchanged_comparison_keeps_its_time(tmp_path: Path) -> None:
    study = make_study(tmp_path, "sweep", recipe="tiny", runs={"a": "x"})
    study.keep(ROWS, [], [])
    before = (study.path / COMPARISON).read_bytes()
    study.keep(ROWS, [], [])
    assert (study.path / COMPARISON).read_bytes() == before
    study.keep(ROWS, [], ["x"])
    assert json.loads((study.path / COMPARISON).read_bytes())["failed"] == ["x"]
