"""A run is given by its name wherever a recipe is: it means what it was given, overrides included."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kdpipe.cli.app import app
from kdpipe.pipeline.plan import FORMATS
from kdpipe.pipeline.project import Project, read_project
from kdpipe.store.stage import Stage
from tests.worlds import SMALLEST, load_tiny, run_near

RATE = "train.optimizer.learning_rate=0.002"


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A finished run that the file of its recipe does not mean without its override."""
    folder = tmp_path_factory.mktemp("named")
    return run_near(load_tiny(folder, RATE, rounds=1, **SMALLEST), folder / "out")


def invoke(*args: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, list(args))
    assert result.exit_code == code, result.output
    return result


def test_commands_take_the_name_and_mean_the_run_with_its_overrides(changed: Project, tmp_path: Path) -> None:
    name, place = changed.run.name, ["--workspace", str(changed.workspace)]
    assert json.loads(invoke("check", name, *place, "--json").stdout)["resolved"]["train"]["optimizer"][
        "learning_rate"
    ] == pytest.approx(0.002)
    invoke("status", name, "--check", *place)
    assert "sha256 compared" in invoke("verify", name, "--full", *place).stdout
    assert json.loads(invoke("samples", name, "--json", *place).stdout)
    page = tmp_path / "page.html"
    invoke("report", name, "-o", str(page), "--against", name, *place)
    text = page.read_text(encoding="utf-8")
    assert f"kdpipe run {changed.loaded.path} --set {RATE} --workspace" in text
    assert 'id="against"' in text
    invoke("status", str(changed.loaded.path), "--check", *place, code=6)  # the file alone is another run


def test_what_a_message_says_to_type_means_this_run(changed: Project, tmp_path: Path) -> None:
    place = ["--workspace", str(changed.workspace)]
    result = invoke("samples", str(changed.loaded.path), "--set", RATE, "--round", "7", *place, code=2)
    assert f"kdpipe run {changed.run.name}" in result.stderr
    never = [str(changed.loaded.path), str(tmp_path / "out"), "--round", "1"]
    result = invoke("export", *never, *place, code=2)
    assert f"kdpipe run {changed.loaded.path}" in result.stderr  # nothing was run of the file alone


def test_a_name_with_a_change_is_another_run_that_differs_by_it(changed: Project) -> None:
    place = ["--workspace", str(changed.workspace)]
    by_name = json.loads(invoke("plan", changed.run.name, "--set", "rounds=2", *place, "--json").stdout)
    by_file = ["--set", RATE, "--set", "rounds=2"]
    assert by_name == json.loads(invoke("plan", str(changed.loaded.path), *by_file, *place, "--json").stdout)
    result = invoke("plan", changed.run.name, "--set", "train.optimizer.learning_rte=1", *place, code=2)
    assert "did you mean 'learning_rate'?" in result.stderr


def test_the_name_works_from_another_folder_and_without_the_recipes_file(
    changed: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(changed.workspace, tmp_path / "out", symlinks=True)
    monkeypatch.chdir(tmp_path)
    moved = changed.loaded.path.rename(changed.loaded.path.with_name("moved.yaml"))
    try:
        invoke("status", changed.run.name, "--check", "--workspace", "out")
    finally:
        moved.rename(changed.loaded.path)


def test_an_unknown_name_is_told_with_those_there_are(changed: Project) -> None:
    result = invoke("status", "tiny-00000000", "--workspace", str(changed.workspace), code=2)
    assert changed.run.name in result.stderr
    assert "quickstart" in result.stderr


@pytest.mark.parametrize("name", ["recipe.yaml", "resolved.json"])
def test_a_damaged_recipe_of_a_run_is_named_with_5(changed: Project, tmp_path: Path, name: str) -> None:
    workspace = tmp_path / "out"
    shutil.copytree(changed.workspace, workspace, symlinks=True)
    (workspace / "runs" / changed.run.name / name).write_bytes(b"\xff{")
    result = invoke("status", changed.run.name, "--workspace", str(workspace), code=5)
    assert changed.run.name in result.stderr
    assert "run its recipe again" in result.stderr


def test_the_shell_completes_the_names_of_runs(changed: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(changed.workspace.parent)
    changed.workspace.rename("kdpipe-out")
    try:
        words = "kdpipe status tiny-"
        asked = {"_KDPIPE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "2"}
        assert CliRunner().invoke(app, prog_name="kdpipe", env=asked).stdout.split() == [changed.run.name]
    finally:
        Path("kdpipe-out").rename(changed.workspace)


def test_a_run_of_an_older_kdpipe_is_read_as_that_one_made_it_and_would_run_again(
    changed: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stage in Stage:
        monkeypatch.setitem(FORMATS, stage, FORMATS[stage] + 1)
    name, place = changed.run.name, ["--workspace", str(changed.workspace)]
    page, weights = str(tmp_path / "page.html"), str(tmp_path / "weights")
    for command in (
        ["status", name, "--check"],
        ["verify", name, "--full"],
        ["samples", name],
        ["report", name, "-o", page],
        ["export", name, weights],
    ):
        result = invoke(*command, *place)
        assert f"{name}: made by an older kdpipe" in result.stderr, command
    assert (Path(weights) / "model.safetensors").exists()
    planned = json.loads(invoke("plan", name, *place, "--json").stdout)["steps"]
    assert {step["state"] for step in planned} == {"stale"}
    assert all("made by another version of kdpipe" in step["why"] for step in planned)


def test_a_run_that_this_kdpipe_goes_on_with_is_no_older_one(
    changed: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMATS, Stage.TRAIN, FORMATS[Stage.TRAIN] + 1)
    project = read_project(changed.loaded, changed.workspace)
    states = {state.step.id: state.verdict for state in project.survey()}
    assert not project.is_older
    assert (states["rollout@1"], states["train@1"]) == ("done", "stale")
