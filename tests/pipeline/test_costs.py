"""What a step costs the parent does not grow: counted in files that it opens, looks at and lists, not in seconds.

`benchmarks/parent_cost.py` measures the seconds of a real run.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kdpipe.pipeline.request
from kdpipe.pipeline.project import open_project
from kdpipe.pipeline.request import Perform, Performed
from kdpipe.pipeline.retention import Holdings, Retention
from kdpipe.pipeline.runner import Request, run
from kdpipe.recipe.file import LoadedRecipe
from kdpipe.store.artifacts import Draft, Store
from tests.worlds import SilentMirror, Watcher, load_tiny

LOOKS = ("stat", "lstat", "scandir", "listdir")
EVERY_ROUND: dict[str, Any] = {"teacher": False, "reverse_kl_problems": 0, "every": 1}


class StubWorker:
    """Commits tiny payloads instead of training; the accuracy is highest in round 6."""

    def __init__(self, target: str, talk: Any, *, log: Path, **_settings: Any) -> None: ...

    def call(self, request: Perform, **_settings: Any) -> Performed:
        step, store = request.assignment.step, Store(request.assignment.workspace)
        draft = Draft(store.entry(step), step, note=lambda _kind, _fields: None)
        for kind in ("model", "trainer") if step.stage == "train" else ():
            draft.write(kind, write_weights)
        draft.write_json("summary.json", {"accuracy": 1 / (1 + abs(step.round - 6))})
        draft.metric(f"{step.stage}/number", step.round)
        manifests = {role: store.entry(step).manifest() for role, step in request.assignment.inputs.items()}
        digests = {str(role): manifest.payload_digest for role, manifest in manifests.items() if manifest}
        found = draft.commit(inputs=digests, provenance={})
        return Performed(False, found.payload_digest)

    def kill(self) -> None: ...
    def stop(self, last: Any = None) -> None: ...


def write_weights(folder: Path) -> None:
    folder.mkdir()
    (folder / "weights").write_bytes(b"1234567")


LOOKED: Counter[str] = Counter()
"""What this process has opened, looked at and listed since the last clear."""


class Counts(Watcher):
    """A display that notes at each round's end what this process has looked at since the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.of_round: dict[int, Counter[str]] = {}

    def round_ends(self, number: int, rounds: int, metrics: dict[str, float]) -> None:
        assert metrics["train/number"] == number
        self.of_round[number] = Counter(LOOKED)
        LOOKED.clear()


def heard(event: str, _arguments: Any) -> None:
    if event == "open":
        LOOKED["open"] += 1


sys.addaudithook(heard)


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kdpipe.pipeline.request, "Worker", StubWorker)
    for name in (*LOOKS, "readlink"):
        monkeypatch.setattr(os, name, counting(name, getattr(os, name)))
    yield
    LOOKED.clear()


def counting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def count(*arguments: Any, **settings: Any) -> Any:
        LOOKED[name] += 1
        return real(*arguments, **settings)

    return count


def run_stub(loaded: LoadedRecipe, workspace: Path, *, rounds: int | None = None) -> dict[int, Counter[str]]:
    """What each round cost."""
    display = Counts()
    run_for(loaded, workspace, display, rounds=rounds)
    return display.of_round


def run_for(loaded: LoadedRecipe, workspace: Path, display: Counts, *, rounds: int | None = None) -> None:
    run(
        loaded,
        workspace,
        lambda _project: Request(rounds=rounds),
        display=display,
        open_mirror=lambda _project: SilentMirror(),
    )


def loaded_for(folder: Path, rounds: int, *overrides: str, every: int = 1) -> LoadedRecipe:
    return load_tiny(folder, *overrides, rounds=rounds, evaluate={**EVERY_ROUND, "every": every})


def test_a_round_costs_the_same_however_many_are_done_or_planned(tmp_path: Path) -> None:
    costs = run_stub(loaded_for(tmp_path, 60), tmp_path / "outs")
    assert len({tuple(sorted(costs[number].items())) for number in range(10, 60)}) == 1, costs
    short = run_stub(loaded_for(tmp_path, 20), tmp_path / "short")
    assert short[15] == costs[15]
    assert costs[15]["open"] < 300


@pytest.mark.parametrize("shared", [True, False], ids=["shared entries", "own entries"])
@pytest.mark.slow
def test_a_round_costs_the_same_however_many_runs_the_workspace_has(tmp_path: Path, shared: bool) -> None:
    """Of each other run only the link is read that it could have to an entry of this round, or to a dropped one."""
    place, others = tmp_path / "out", 20
    alone = run_stub(loaded_for(tmp_path, 24), place)
    shutil.rmtree(place)
    run_stub(loaded_for(tmp_path, 12, "train.optimizer.learning_rate=0.5"), place)
    run_stub(loaded_for(tmp_path, 24), place, rounds=12)
    mine = open_project(loaded_for(tmp_path, 24), place).run
    [other] = [path for path in (place / "runs").iterdir() if path.name != mine.name]
    for number in range(others):
        shutil.copytree(mine.path if shared else other, place / "runs" / f"tiny-{number:08x}", symlinks=True)
    costs = run_stub(loaded_for(tmp_path, 24), place)
    for number in range(18, 24):
        own = alone[number].pop("readlink", 0)  # of the links that it makes
        assert costs[number].pop("readlink") - own <= 3 * (others + 1)
        assert costs[number] == alone[number]


def test_weights_that_others_share_and_do_not_keep_are_dropped_without_reading_those_runs_again(
    tmp_path: Path,
) -> None:
    """Another evaluation trains each dropped student again; of a run that shares it only lock and newest are read."""
    other_evaluation, found = loaded_for(tmp_path, 12, "evaluate.problems=3"), list[dict[int, Counter[str]]]()
    for others in (0, 5):
        place = tmp_path / f"out{others}"
        run_stub(loaded_for(tmp_path, 12), place)
        [run_path] = (place / "runs").iterdir()
        for number in range(others):
            shutil.copytree(run_path, place / "runs" / f"tiny-{number:08x}", symlinks=True)
        display = Counts()
        run_for(other_evaluation, place, display)
        assert display.performed.count("train@3") == 1
        found.append(display.of_round)
    alone, shared = found
    for number in range(4, 9):
        assert shared[number]["open"] - alone[number]["open"] <= 10 * 5


def test_what_is_kept_is_what_a_look_at_everything_would_keep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every step of a run beside others that share its entries, what it knows is what is on disk."""
    place = tmp_path / "out"
    run_stub(loaded_for(tmp_path, 9, "name=other"), place, rounds=5)
    run_stub(loaded_for(tmp_path, 9, "name=behind", "runtime.keep.weights=4"), place, rounds=3)
    real, seen = Retention.droppable, list[int]()

    def checked(self: Retention) -> list[tuple[Path, str]]:
        found = real(self)
        fresh = Retention(self._run, self._workspace, self._awaits)
        assert real(fresh) == found
        known, on_disk = self._own, fresh._own
        assert known is not None
        assert on_disk is not None
        assert known.scores == on_disk.scores
        assert known.kept() == on_disk.kept()
        seen.append(len(known.entries))
        return found

    monkeypatch.setattr(Retention, "droppable", checked)
    run_stub(loaded_for(tmp_path, 9), place)
    run_stub(loaded_for(tmp_path, 9, "evaluate.problems=3"), place)
    assert len(seen) > 15


def test_a_run_that_shares_its_students_keeps_those_of_both(tmp_path: Path) -> None:
    """The other run was stopped at round 5 of 9 and keeps two: both of them and the best stay when this one goes on."""
    place = tmp_path / "out"
    run_stub(loaded_for(tmp_path, 9, "name=other", every=2), place, rounds=5)
    run_stub(loaded_for(tmp_path, 9, every=2), place)
    project = open_project(loaded_for(tmp_path, 9, every=2), place)
    dropped = {}
    for number in range(1, 10):
        manifest = project.store.entry(project.plan.step(f"train@{number}")).manifest()
        assert manifest is not None
        dropped[number] = {path.partition("/")[0] for path in manifest.dropped}
    whole = {number for number, names in dropped.items() if not names}
    assert whole == {4, 5, 8, 9}
    assert {number for number, names in dropped.items() if "model" not in names} == {4, 5, 6, 8, 9}


def test_a_run_without_a_readable_recipe_keeps_all_that_it_has() -> None:
    payloads: dict[int, set[str]] = {1: {"model"}, 2: {"trainer"}}
    assert Holdings(None, payloads=payloads).kept() == payloads
