"""Every command that starts processes, from a working folder whose files have the names of common modules.

The folder of a recipe is data: nothing of it is run, and a user's own `random.py` disturbs nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdpipe.tracking.page import free_port
from tests.auditing import audited, noted
from tests.worlds import write_recipe

MODULES = [
    *("queue", "random", "types", "enum", "secrets", "calendar", "this"),
    *("pydantic", "typer", "yaml", "numpy", "tokenizers", "safetensors", "sqlalchemy", "uvicorn", "fastapi"),
]
PACKAGES = ["torch", "transformers", "datasets", "mlflow", "vllm", "pyarrow", "graphene"]
KDPIPE = [
    sys.executable,
    "-P",
    "-m",
    "kdpipe",
]  # as the console script: the working folder is not on the path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with a recipe, hostile modules and packages, and a clone of kdpipe."""
    folder = tmp_path / "here"
    places = [folder / f"{name}.py" for name in MODULES]
    places += [folder / name / "__init__.py" for name in PACKAGES]
    places += [folder / "kdpipe" / "kdpipe" / "__init__.py", folder / "kdpipe" / "cli" / "app.py"]
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("x = 1\n")
    write_recipe(folder, rounds=1, tracking={"enabled": True}, runtime__preflight=True)
    return folder


@pytest.fixture
def environment(tmp_path: Path, folder: Path) -> dict[str, str]:
    return {**os.environ, **audited(tmp_path / "audit", watched=folder)}


def test_the_trap_catches(tmp_path: Path, folder: Path, environment: dict[str, str]) -> None:
    subprocess.run([sys.executable, "-c", "import this"], cwd=folder, env=environment, check=True)
    assert ("exec", str(folder / "this.py")) in {(one.event, one.name) for one in noted(tmp_path / "audit")}


@pytest.mark.slow
def test_no_command_runs_a_module_of_its_working_folder(
    tmp_path: Path, folder: Path, environment: dict[str, str]
) -> None:
    for command in (
        ["run", "recipe.yaml"],
        ["doctor", "recipe.yaml"],
        ["check-loss", "recipe.yaml"],
        ["report", "recipe.yaml", "-o", "page.html"],
        ["export", "recipe.yaml", "student"],
    ):
        done = subprocess.run(
            [*KDPIPE, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (command, done.stderr)
        assert "warning: MLflow" not in done.stderr
    for page in pages(folder, environment):
        assert page
    ran = [one for one in noted(tmp_path / "audit") if one.event == "exec"]
    assert ran == []
    assert len({tuple(one.argv) for one in noted(tmp_path / "audit")}) > 5, "the audit saw the processes"


def pages(folder: Path, environment: dict[str, str]) -> Iterator[bytes]:
    """Pages of a real `kdpipe ui`."""
    port = free_port("127.0.0.1", 25000)
    server = subprocess.Popen([*KDPIPE, "ui", "--port", str(port)], cwd=folder, env=environment)
    try:
        for path in ("health", "", "version"):
            for _ in range(600):
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=5) as answer:
                        yield answer.read()
                    break
                except OSError:
                    assert server.poll() is None
                    time.sleep(0.2)
    finally:
        server.terminate()
        assert server.wait(timeout=20) == 0
