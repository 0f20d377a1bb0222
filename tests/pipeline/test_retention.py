"""What retention may drop, over made-up runs of every shape; what a real run drops and trains again."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import kdpipe.store.artifacts
from kdpipe.cli.app import app
from kdpipe.pipeline.housekeeping import garbage
from kdpipe.pipeline.project import Project, open_project
from kdpipe.pipeline.retention import Retention, holdings
from kdpipe.pipeline.runs import RunFolder
from kdpipe.store.artifacts import Draft, Store, linked_entry
from kdpipe.store.sealed import digest_of
from kdpipe.store.step import Step
from tests.worlds import Watcher, load_tiny, payload_digests, run_near

KINDS = ("model", "trainer")
UNFINISHED = "unfinished"
DAMAGED = "damaged"
WHOLE = "whole"


# --------------------------------------------------------------------------------------- made-up runs


@dataclass(frozen=True)
class Made:
    """A run whose train steps and evaluations are made by hand: real entries, manifests and links, tiny files."""

    folder: Path
    name: str = "tiny-00000000"
    weights: int = 2
    optimizer: int = 2

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.folder / "runs" / self.name)

    def begin(self) -> Made:
        keep = (f"runtime.keep.weights={self.weights}", f"runtime.keep.optimizer={self.optimizer}")
        self.run.write_recipe(load_tiny(self.folder, *keep, rounds=9))
        return self

    def train(self, number: int, state: str = WHOLE) -> Path:
        """Links student `number`, shared with every run that has the same one; returns its entry's folder."""
        step, entry = make("train", number)(self.folder)
        self.run.link(step, entry)
        if entry.manifest() is not None:
            return entry.folder
        draft = Draft(entry, step, note=lambda _kind, _fields: None)
        if state == UNFINISHED:
            return entry.folder
        for kind in KINDS:
            draft.write(kind, write_weights)
        draft.commit(inputs={}, provenance={"finished": float(number)})
        if state == DAMAGED:
            (entry.folder / "model" / "weights").write_bytes(b"12")
        return entry.folder

    def evaluate(self, number: int, value: float, measure: str = "accuracy") -> Path:
        step, entry = make("evaluate", number)(self.folder)
        self.run.link(step, entry)
        draft = Draft(entry, step, note=lambda _kind, _fields: None)
        draft.write_json("summary.json", {measure: value})
        draft.commit(inputs={}, provenance={"finished": float(number)})
        return entry.folder

    def kept(self) -> dict[int, set[str]]:
        """What the run keeps, by round."""
        return {number: kinds & set(KINDS) for number, kinds in holdings(self.run).kept().items()}

    def droppable(self) -> set[tuple[int, str]]:
        return {
            (linked_entry(target)[1]["round"], kind)
            for target, kind in Retention(self.run, self.folder).droppable()
            if kind in KINDS
        }


def write_weights(folder: Path) -> None:
    folder.mkdir()
    (folder / "weights").write_bytes(b"1234567")


def make(stage: Any, number: int) -> Any:
    """A step of that round, and its entry in a workspace."""
    subject = "student" if stage == "evaluate" else ""
    document: dict[str, Any] = {"stage": stage, "subject": subject, "round": number, "fields": {}}
    step_id = f"{stage}:{subject}@{number}" if subject else f"{stage}@{number}"
    step = Step(step_id, stage, number, subject, 1, {}, document, digest_of(document))
    return lambda workspace: (step, Store(workspace).entry(step))


def test_the_best_and_the_last_evaluated_round_keep_their_weights(tmp_path: Path) -> None:
    made = Made(tmp_path, weights=1, optimizer=2).begin()
    for number in range(1, 7):
        made.train(number)
    for number, accuracy in {0: 0.05, 1: 0.1, 2: 0.6, 3: 0.2, 4: 0.3}.items():
        made.evaluate(number, accuracy)
    assert {number: kinds for number, kinds in made.kept().items() if kinds} == {
        2: {"model"},
        4: {"model"},
        5: {"trainer"},
        6: {"model", "trainer"},
    }


def test_the_best_round_without_a_grader_has_the_lowest_reverse_kl(tmp_path: Path) -> None:
    made = Made(tmp_path, weights=1, optimizer=1).begin()
    for number in range(1, 5):
        made.train(number)
    for number, nats in {0: 1.5, 1: 0.9, 2: 0.2, 3: 0.4}.items():
        made.evaluate(number, nats, "reverse_kl_nats")
    assert {number for number, kinds in made.kept().items() if "model" in kinds} == {2, 3, 4}


def test_what_is_unfinished_or_damaged_does_not_count_as_the_newest(tmp_path: Path) -> None:
    made = Made(tmp_path, weights=1, optimizer=1).begin()
    states = {1: WHOLE, 2: WHOLE, 3: DAMAGED, 4: UNFINISHED}
    for number, state in states.items():
        made.train(number, state)
    assert made.droppable() == {(1, "model"), (1, "trainer")}


def test_an_evaluation_that_cannot_be_read_may_be_the_best(tmp_path: Path) -> None:
    made = Made(tmp_path, weights=1, optimizer=1).begin()
    for number in range(1, 6):
        made.train(number)
    folders = {
        number: made.evaluate(number, accuracy) for number, accuracy in {1: 0.5, 2: 0.1, 3: 0.2}.items()
    }
    path = folders[2] / "summary.json"
    path.write_text(path.read_text().replace("0.1", "0.0"))
    assert {number for number, kind in made.droppable() if kind == "model"} == {4}


Round = st.tuples(
    st.sampled_from([WHOLE, WHOLE, WHOLE, DAMAGED, UNFINISHED]), st.none() | st.sampled_from([0.1, 0.5, 0.9])
)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    rounds=st.lists(Round, min_size=1, max_size=6),
    keep=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    other=st.tuples(st.integers(0, 6), st.integers(1, 3), st.integers(1, 3)),
)
def test_nothing_that_a_run_goes_on_from_is_ever_dropped(
    tmp_path_factory: pytest.TempPathFactory,
    rounds: list[tuple[str, float | None]],
    keep: tuple[int, int],
    other: tuple[int, int, int],
) -> None:
    """Two runs that share their students, one of them some rounds behind: what each counts on stays."""
    folder = tmp_path_factory.mktemp("made")
    mine = Made(folder, weights=keep[0], optimizer=keep[1]).begin()
    behind = Made(folder, "other-11111111", weights=other[1], optimizer=other[2]).begin()
    for number, (state, accuracy) in enumerate(rounds, 1):
        mine.train(number, state)
        if accuracy is not None and state == WHOLE:
            mine.evaluate(number, accuracy)
        if number <= other[0]:
            behind.train(number, state)
    dropped = mine.droppable()
    whole = [number for number, (state, _) in enumerate(rounds, 1) if state == WHOLE]
    reached = {mine: whole, behind: [number for number in whole if number <= other[0]]}
    for run, numbers in reached.items():
        for kind, count in (("model", run.weights), ("trainer", run.optimizer)):
            assert not {(number, kind) for number in numbers[-count:]} & dropped
    scores = {
        n: accuracy
        for n, (state, accuracy) in enumerate(rounds, 1)
        if accuracy is not None and state == WHOLE
    }
    if scores:
        best = max(scores, key=lambda number: (scores[number], number))
        assert not {(best, "model"), (max(scores), "model")} & dropped
        must_stay = {best, max(scores)}
    else:
        must_stay = set[int]()
    # And what nobody counts on does go: every run that has it has enough that are newer.
    for number in sorted(set(whole) - must_stay):
        newer = [
            (run, sum(n > number for n in numbers)) for run, numbers in reached.items() if number in numbers
        ]
        if all(count >= run.weights for run, count in newer):
            assert (number, "model") in dropped


# ------------------------------------------------------------------------------------------ a real run

SIZES: dict[str, Any] = {
    "rounds": 4,
    "rollout": {"prompts": 4, "samples": 2, "max_new_tokens": 8},
    "task__train_problems": 32,
    "task__test_problems": 4,
    "evaluate": {"reverse_kl_problems": 2, "every": 4},
    "train__minibatches": 2,
    "student__sft": {"steps": 2, "batch": 4},
    "runtime__keep": {"weights": 1, "optimizer": 1},
}


class Killed(BaseException):
    """What stands in for SIGKILL: nothing of kdpipe catches it."""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four rounds that keep the weights of one; evaluated after the last."""
    folder = tmp_path_factory.mktemp("unbroken")
    run_near(load_tiny(folder, **SIZES), folder / "out")
    return folder


def opened(folder: Path) -> Project:
    return open_project(load_tiny(folder, **SIZES), folder / "out")


def dropped(folder: Path, number: int) -> set[str]:
    project = opened(folder)
    manifest = project.store.entry(project.plan.step(f"train@{number}")).manifest()
    assert manifest is not None
    return {path.partition("/")[0] for path in manifest.dropped}


def test_a_dropped_student_is_trained_again_from_the_nearest_one_to_the_same_digest(
    unbroken: Path, tmp_path: Path
) -> None:
    """Rounds 1 to 3 are dropped: an evaluation of the second has the first two trained again, from the cold start."""
    folder = tmp_path / "copy"
    shutil.copytree(unbroken, folder, symlinks=True)
    assert [dropped(folder, number) for number in range(1, 5)] == [{"model", "trainer"}] * 3 + [set()]
    before, watcher = payload_digests(folder / "out"), Watcher()
    often = {**SIZES, "evaluate": {**SIZES["evaluate"], "every": 2}}
    run_near(load_tiny(folder, **often), folder / "out", watcher=watcher, rounds=2)
    assert watcher.performed == ["train@1", "train@2", "evaluate:student@2"]
    after = payload_digests(folder / "out")
    assert {step: after[step] for step in before} == before


@pytest.mark.parametrize(
    "moment", ["before the manifest says so", pytest.param("before the files go", marks=pytest.mark.slow)]
)
def test_a_kill_while_weights_are_dropped_loses_none_that_count(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """At each drop of the run in turn, before and after its manifest is written: the newest student is always there."""
    write, remove, drops = kdpipe.store.durable.write_json, kdpipe.store.durable.remove, list[str]()

    def note(path: Path) -> None:
        if len(drops) < 3 and str(path) not in drops:
            drops.append(str(path))
            raise Killed

    def write_json(path: Path, value: Any) -> None:
        if moment == "before the manifest says so" and path.name == "manifest.json" and value["dropped"]:
            note(path)
        write(path, value)

    def removed(path: Path) -> None:
        if (
            moment == "before the files go"
            and path.name == "model"
            and (path.parent / "manifest.json").exists()
        ):
            note(path)
        remove(path)

    monkeypatch.setattr(kdpipe.store.artifacts, "write_json", write_json)
    monkeypatch.setattr(kdpipe.store.artifacts, "remove", removed)
    for _ in range(20):
        try:
            run_near(load_tiny(tmp_path, **SIZES), tmp_path / "out")
        except Killed:
            require_newest_student(tmp_path)
            continue
        break
    assert len(drops) == 3
    assert payload_digests(tmp_path / "out") == payload_digests(unbroken / "out")
    assert [dropped(tmp_path, number) for number in range(1, 5)] == [{"model", "trainer"}] * 3 + [set()]
    for number in range(1, 4):
        step = opened(tmp_path).plan.step(f"train@{number}")
        assert not (opened(tmp_path).store.entry(step).folder / "model").exists()


def require_newest_student(folder: Path) -> None:
    """The last student that was trained is whole, with its optimizer."""
    project = opened(folder)
    done = [state.step for state in project.survey() if state.done and state.step.stage == "train"]
    entry = project.store.entry(done[-1])
    entry.opened("model", "trainer")
    assert dropped(folder, done[-1].round) == set()


def test_gc_says_and_removes_what_no_run_links_and_nothing_else(unbroken: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(unbroken, folder, symlinks=True)
    other = {**SIZES, "name": "other", "train__optimizer": {"learning_rate": 2e-3}}
    run_near(load_tiny(folder, **other), folder / "out", rounds=1)
    workspace = folder / "out"
    assert garbage(workspace) == []
    [run] = [path for path in (workspace / "runs").iterdir() if path.name.startswith("other-")]
    (run / "resolved.json").unlink()
    assert garbage(workspace) == [], "a run that lost its recipe still has its links"
    shutil.rmtree(run)
    found = {item.folder for item in garbage(workspace)}
    assert {path.parent.name for path in found} == {"train", "evaluate"} or {
        path.parent.name for path in found
    } == {"train"}
    result = CliRunner().invoke(app, ["gc", "--workspace", str(workspace)])
    assert (result.exit_code, all(path.exists() for path in found)) == (0, True), "it only says so"
    assert all(path.name in result.stdout for path in found)
    before = payload_digests(unbroken / "out")
    assert CliRunner().invoke(app, ["gc", "--delete", "--workspace", str(workspace)]).exit_code == 0
    assert not any(path.exists() for path in found)
    assert payload_digests(workspace) == before
    watcher = Watcher()
    run_near(load_tiny(folder, **SIZES), workspace, watcher=watcher)
    assert watcher.performed == []
