"""docs/cookbook.md: its commands run, in its order, on a small recipe."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kdpipe.pipeline.request
from kdpipe.cli.app import app
from tests.worlds import NearWorker, write_recipe

PAGE = (Path(__file__).parents[2] / "docs/cookbook.md").read_text(encoding="utf-8")
TASKS = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]


def commands() -> list[str]:
    return [line for line in PAGE.splitlines() if line.startswith("kdpipe ")]


def test_there_are_ten_tasks_and_more_each_with_a_command() -> None:
    assert len(TASKS) >= 10
    assert all("\n```\nkdpipe " in task for task in TASKS)
    assert [task.partition(".")[0] for task in TASKS] == [str(number + 1) for number in range(len(TASKS))]


@pytest.mark.slow
def test_every_command_of_the_cookbook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_recipe(tmp_path, rounds=2, rollout__samples=2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kdpipe.pipeline.request, "Worker", NearWorker)
    monkeypatch.setattr(sys, "argv", ["kdpipe", "run", "recipe.yaml"])
    for command in commands():
        _, *args = shlex.split(command)
        result = CliRunner().invoke(app, args)
        assert result.exit_code == 0, (command, result.output)
        assert result.stdout.strip(), command
    names: dict[str, object] = {}
    exec(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1], names)  # type: ignore[index]
    assert {"model", "tokenizer"} <= names.keys()
    assert (tmp_path / "report.html").stat().st_size > 10_000
