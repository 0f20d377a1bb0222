"""A command with nothing to do reads little: counted in manifests, digests and writes, not in seconds.

`benchmarks/finished_run.py` measures the seconds of the real commands.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kdpipe.pipeline.runner
import kdpipe.store.artifacts
from kdpipe.errors import DataError
from kdpipe.pipeline.project import open_project
from tests.worlds import NearWorker, Watcher, load_tiny, run_near

CHANGES: dict[str, Any] = {"rounds": 4, "evaluate": {"teacher": False, "reverse_kl_problems": 0, "every": 2}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    run_near(load_tiny(folder, **CHANGES), folder / "out")
    return folder


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many manifests were parsed, files hashed and files written durably."""
    found: Counter[str] = Counter()

    def counted(name: str) -> None:
        real: Callable[..., Any] = getattr(kdpipe.store.artifacts, name)

        def count(*arguments: Any, **settings: Any) -> Any:
            found[name] += 1
            return real(*arguments, **settings)

        monkeypatch.setattr(kdpipe.store.artifacts, name, count)

    for name in ("parse_manifest", "file_digest", "write_durably"):
        counted(name)
    return found


def test_a_finished_run_hashes_nothing_and_starts_no_worker(finished: Path, counts: Counter[str]) -> None:
    loaded, started = load_tiny(finished, **CHANGES), NearWorker.started
    counts.clear()
    watcher = Watcher()
    project = run_near(loaded, finished / "out", watcher=watcher)
    assert watcher.performed == []
    assert NearWorker.started == started
    assert counts["file_digest"] == 0
    steps = len(project.plan.steps)
    assert steps <= counts["parse_manifest"] <= 8 * steps
    assert counts["write_durably"] <= 8  # the run's own files, whatever the number of steps


def test_problems_are_read_only_where_something_is_to_be_done(
    finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: Any) -> None:
        raise DataError("read")

    monkeypatch.setattr(kdpipe.pipeline.runner, "open_data", refuse)
    loaded = load_tiny(finished, **CHANGES)
    run_near(loaded, finished / "out")
    longer = load_tiny(finished, **{**CHANGES, "rounds": 9})
    run_near(longer, finished / "out", rounds=0)
    with pytest.raises(DataError, match="read"):
        run_near(longer, finished / "out", rounds=5)
    with pytest.raises(DataError, match="read"):
        run_near(loaded, tmp_path)


def test_a_plan_costs_the_same_whatever_else_is_in_the_store(
    finished: Path, counts: Counter[str], tmp_path: Path
) -> None:
    world = Path(shutil.copytree(finished, tmp_path / "world", symlinks=True))
    loaded = load_tiny(world, **CHANGES)

    def parsed() -> int:
        counts.clear()
        project = open_project(loaded, world / "out")
        assert all(state.done for state in project.survey())
        assert counts["file_digest"] == counts["write_durably"] == 0
        return counts["parse_manifest"]

    before = parsed()
    [entry] = list((world / "out").glob("store/rollout/*"))[:1]
    for number in range(200):
        shutil.copytree(entry, entry.parent / f"{number:016x}")
    assert parsed() == before == len(open_project(loaded, world / "out").plan.steps)
