"""Code that comes with models is announced, and runs only where somebody said so, once in a workspace."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kdpipe.cli.app import app
from kdpipe.cli.trust import TRUSTED, require_trust
from kdpipe.errors import RecipeError
from kdpipe.recipe.file import LoadedRecipe
from tests.worlds import load_tiny


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedRecipe:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    code = {"trust_remote_code": True}
    return load_tiny(
        tmp_path,
        student={"model": "./model", **code},
        teachers=[{"model": "far/away", "revision": "v1", **code}],
    )


def test_code_runs_once_it_is_trusted_and_is_not_asked_about_again(
    loaded: LoadedRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = tmp_path / "out"
    with pytest.raises(RecipeError) as caught:
        require_trust(loaded, workspace, trusts=False)
    assert "--trust" in caught.value.hint
    assert not workspace.exists()
    assert f"comes with {tmp_path / 'model'} and far/away@v1 is to run" in capsys.readouterr().err
    require_trust(loaded, workspace, trusts=True)
    assert "is to run" in capsys.readouterr().err
    require_trust(loaded, workspace, trusts=False)
    assert capsys.readouterr().err == ""
    other = load_tiny(
        tmp_path, student={"model": "other/model", "trust_remote_code": True}, teachers=[{"self": "initial"}]
    )
    with pytest.raises(RecipeError):
        require_trust(other, workspace, trusts=False)


@pytest.mark.parametrize("kind", ["copied", "of another folder", "garbage"])
def test_a_file_that_came_with_a_folder_trusts_nothing(
    kind: str, loaded: LoadedRecipe, tmp_path: Path
) -> None:
    require_trust(loaded, tmp_path / "out", trusts=True)
    found = json.loads((tmp_path / "out" / TRUSTED).read_text())
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    if kind != "copied":
        text = json.dumps({**found, "folder": 1}) if kind == "of another folder" else "[[["
        (tmp_path / "copy" / TRUSTED).write_text(text)
    with pytest.raises(RecipeError):
        require_trust(loaded, tmp_path / "copy", trusts=False)


def test_a_recipe_without_code_is_asked_nothing(tmp_path: Path) -> None:
    require_trust(load_tiny(tmp_path), tmp_path / "out", trusts=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["run", "sft", "rollout", "doctor", "arms", "export"])
def test_every_command_that_opens_models_asks(command: str, loaded: LoadedRecipe, tmp_path: Path) -> None:
    more = [str(tmp_path / "exported")] if command == "export" else []
    place = ["--workspace", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [command, str(loaded.path), *more, *place])
    assert "the code was not trusted" in result.stderr
    assert result.exit_code == (1 if command == "arms" else 2)  # of which each run says it


def test_code_that_grades_is_asked_about_as_code_of_models_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.py").write_text("def grade(text, problem): ...\n")
    files = {"train": "train.jsonl", "test": "test.jsonl"}
    task = {"kind": "jsonl", **files, "grader": {"python": "own.py:grade"}}
    loaded = load_tiny(tmp_path, task=task, student={"model": "far/away"}, teachers=[{"self": "initial"}])
    with pytest.raises(RecipeError, match=r"task\.grader: the code was not trusted") as caught:
        require_trust(loaded, tmp_path / "out", trusts=False)
    assert "--trust" in caught.value.hint
    assert f"task.grader: the Python code in {tmp_path / 'own.py'} is to run" in capsys.readouterr().err
    require_trust(loaded, tmp_path / "out", trusts=True)
    capsys.readouterr()
    require_trust(loaded, tmp_path / "out", trusts=False)
    assert capsys.readouterr().err == ""
