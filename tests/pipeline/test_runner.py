"""Running, repeating, changing and forcing: which steps are performed, and that results do not depend on how."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import kdpipe.execution.executor
import kdpipe.models.devices
import kdpipe.training.local
from kdpipe.engines.hf.engine import HfEngine
from kdpipe.engines.protocol import TokenScores
from kdpipe.errors import ArtifactError, Interrupted, LockError, PreflightError, RecipeError
from kdpipe.pipeline import requirements
from kdpipe.pipeline.project import Project, open_project
from kdpipe.pipeline.requirements import key_uses
from kdpipe.pipeline.signals import PATIENCE_SECONDS, signals
from kdpipe.results.contender import read_contender
from kdpipe.store.locks import run_lock
from tests.worlds import (
    SMALLEST,
    NearWorker,
    SilentMirror,
    Watcher,
    events_of,
    leftovers,
    load_tiny,
    payload_digests,
    run_near,
)

ROUND_0 = ["sft:student@0", "sft:teacher@0", "evaluate:student@0", "evaluate:teacher@0"]
ROUND = ["rollout@{0}", "teacher-score@{0}", "train@{0}", "evaluate:student@{0}"]


def round_steps(*numbers: int) -> list[str]:
    return [name.format(number) for number in numbers for name in ROUND]


@dataclass(frozen=True)
class World:
    """A folder with a recipe and a workspace; `run` runs it with changes and says what was performed."""

    folder: Path

    @property
    def workspace(self) -> Path:
        return self.folder / "out"

    def project(self, *overrides: str, **changes: Any) -> Project:
        return open_project(load_tiny(self.folder, *overrides, **changes), self.workspace)

    def run(
        self, *overrides: str, force: tuple[str, ...] = (), rounds: int | None = None, **changes: Any
    ) -> list[str]:
        watcher = Watcher()
        loaded = load_tiny(self.folder, *overrides, **changes)
        run_near(loaded, self.workspace, watcher=watcher, force=force, rounds=rounds)
        return watcher.performed

    def digests(self, *overrides: str, **changes: Any) -> dict[str, str | None]:
        return {state.step.id: state.digest for state in self.project(*overrides, **changes).survey()}

    def states(self, *overrides: str, **changes: Any) -> dict[str, tuple[str, str]]:
        return {s.step.id: (s.verdict, s.why) for s in self.project(*overrides, **changes).survey()}

    def file(self, step_id: str, name: str) -> Path:
        project = self.project()
        return project.store.entry(project.plan.step(step_id)).folder / name

    def dropped(self, step_id: str) -> set[str]:
        project = self.project()
        manifest = project.store.entry(project.plan.step(step_id)).manifest()
        assert manifest is not None
        return {path.partition("/")[0] for path in manifest.dropped}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Three rounds, done. Never changed: `world` is a copy."""
    world = World(tmp_path_factory.mktemp("finished"))
    assert world.run() == ROUND_0 + round_steps(1, 2, 3)
    return world


@pytest.fixture
def world(finished: World, tmp_path: Path) -> World:
    shutil.copytree(finished.folder, tmp_path / "world", symlinks=True)
    return World(tmp_path / "world")


@pytest.fixture
def forgetful() -> Iterator[None]:
    NearWorker.forgetful = True
    yield
    NearWorker.forgetful = False


def test_a_run_leaves_every_step_done_and_linked(finished: World) -> None:
    project = finished.project()
    assert all(state.done for state in project.survey())
    assert leftovers(finished.workspace) == []
    for step in project.plan.steps:
        link = project.run.path / f"round-{step.round:03d}" / step.link_name
        assert link.resolve() == project.store.entry(step).folder.resolve()
    for name in ("recipe.yaml", "resolved.json", "environment.json", "events.jsonl"):
        assert (project.run.path / name).stat().st_size > 0
    assert not (project.run.path / "holder.json").exists()


def test_events_name_each_step_once_and_parts_once(finished: World) -> None:
    events = events_of(finished.workspace)
    started = [event["step"] for event in events if event["event"] == "step started"]
    assert started == ROUND_0 + round_steps(1, 2, 3)
    assert started == [event["step"] for event in events if event["event"] == "step done"]
    parts = [(event["step"], event["part"]) for event in events if event["event"] == "part done"]
    assert len(parts) == len(set(parts))
    assert [part for step, part in parts if step == "rollout@1"] == [0, 1, 2, 3]


def test_repeating_a_finished_run_does_nothing(world: World) -> None:
    events, started, mirror = events_of(world.workspace), NearWorker.started, SilentMirror()
    watcher = Watcher()
    run_near(load_tiny(world.folder), world.workspace, watcher=watcher, mirror=mirror)
    assert (watcher.performed, watcher.todo, watcher.rounds) == ([], 0, [])
    assert NearWorker.started == started, "no worker was started"
    assert events_of(world.workspace) == events
    assert mirror.status == "FINISHED"


def test_another_learning_rate_reuses_all_that_does_not_depend_on_it(world: World) -> None:
    changed = "train.optimizer.learning_rate=0.002"
    states = world.states(changed)
    reused = [*ROUND_0, "rollout@1", "teacher-score@1"]
    assert [step for step, (verdict, _) in states.items() if verdict == "done"] == reused
    assert states["train@1"] == ("stale", "train.optimizer.learning_rate: 0.001 -> 0.002")
    assert states["evaluate:student@1"] == ("stale", "train@1 changes")
    assert states["rollout@2"] == ("stale", "train@1 changes")
    before = world.digests()
    assert world.run(changed, rounds=1) == ["train@1", "evaluate:student@1"]
    after = world.digests(changed)
    assert {step: after[step] for step in reused} == {step: before[step] for step in reused}
    assert after["train@1"] != before["train@1"]
    assert world.digests() == before, "the first run still has its own"


def test_more_rounds_keep_every_earlier_fingerprint(world: World) -> None:
    before = {step.id: step.fingerprint for step in world.project().plan.steps}
    after = {step.id: step.fingerprint for step in world.project(rounds=4).plan.steps}
    assert {step: after[step] for step in before} == before
    assert world.run(rounds=4) == []  # the first four rounds of a plan of three
    assert world.run("rounds=4") == round_steps(4)


def test_runs_share_their_entries(world: World) -> None:
    entries = sorted(world.workspace.glob("store/*/*"))
    assert world.run(name="other") == []
    assert sorted(world.workspace.glob("store/*/*")) == entries
    other = world.project(name="other").run
    assert other.name.startswith("other-")
    assert {link.target for link in other.links()} == {link.target for link in world.project().run.links()}


def test_forcing_a_step_performs_it_and_equal_results_keep_what_follows(world: World) -> None:
    before = world.digests()
    assert world.run(force=("rollout@1",)) == ["rollout@1"]
    assert world.digests() == before
    assert world.run() == []


@pytest.mark.parametrize("name", ["rollout@9", "nonsense", "rollout"])
def test_forcing_a_step_that_is_not_in_the_plan_is_refused(world: World, name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        world.run(force=(name,))
    assert caught.value.exit_code == 2


@pytest.mark.slow
def test_a_run_that_goes_on_where_auto_is_another_dtype_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warnings(flags: tuple[str, ...], rounds: int, dtype: str = "auto") -> list[str]:
        monkeypatch.setattr(kdpipe.models.devices, "_CPU_BFLOAT16_FLAGS", flags)
        watcher, told = Watcher(), list[str]()
        watcher.on_event = lambda _step, event: told.append(event.get("text", ""))
        loaded = load_tiny(tmp_path, **SMALLEST, rounds=2, student__dtype=dtype)
        project = run_near(loaded, tmp_path / "out", watcher=watcher, rounds=rounds)
        dtypes.append(read_contender(project.run).settings["student.dtype"])
        return [line for line in told if "was computed in" in line]

    dtypes = list[str]()
    without, with_it = ("no such flag",), ("processor",)
    assert warnings(without, 1, "float32") == []
    assert warnings(without, 1) == []
    [line] = warnings(with_it, 2)
    assert line.startswith("train@1 was computed in float32, ")
    assert "auto is bfloat16 on this one" in line
    assert "--set student.dtype=float32" in line
    assert warnings(with_it, 2, "float32") == []
    assert dtypes == ["float32", "auto (float32)", "auto (bfloat16, float32)", "float32"]


def test_forcing_a_step_that_the_command_leaves_out_is_refused(world: World) -> None:
    with pytest.raises(RecipeError, match="does not run that step"):
        world.run(force=("rollout@3",), rounds=1)


def test_a_forced_step_that_differs_makes_all_that_follows_stale(
    world: World, monkeypatch: pytest.MonkeyPatch, forgetful: None
) -> None:
    """Each step is as cold as a new process, so weights that retention dropped too early would be missed."""
    before = world.digests()
    monkeypatch.setattr(kdpipe.training.local, "learning_rate", lambda *_, **__: 3e-3)
    performed = world.run(force=("sft:teacher@0",))
    monkeypatch.undo()
    teacher_free = {"sft:student@0", "rollout@1"}
    assert performed == [step for step in ROUND_0 + round_steps(1, 2, 3) if step not in teacher_free]
    after = world.digests()
    assert {step for step in before if before[step] == after[step]} == teacher_free
    assert world.dropped("train@1") == {"model", "trainer"}
    assert world.dropped("train@2") == world.dropped("train@3") == set()


# ------------------------------------------------------------------------------------------ retention


def test_weights_of_the_last_two_rounds_stay(finished: World) -> None:
    assert finished.dropped("train@1") == {"model", "trainer"}
    assert finished.dropped("train@2") == finished.dropped("train@3") == set()
    assert finished.file("train@1", "completions.parquet").exists()
    assert not finished.file("train@1", "model").exists()


def test_a_step_that_needs_dropped_weights_has_them_trained_again_alike(
    world: World, forgetful: None
) -> None:
    before = world.digests()
    assert world.run(force=("evaluate:student@1",)) == ["train@1", "evaluate:student@1"]
    assert world.digests() == before
    assert world.dropped("train@1") == {"model", "trainer"}, "used, and dropped again"


def test_another_evaluation_has_dropped_weights_trained_again(world: World, forgetful: None) -> None:
    changed = "evaluate.problems=4"
    before = world.digests()
    performed = world.run(changed)
    evaluations = [f"evaluate:student@{number}" for number in (1, 2, 3)]
    assert performed == ["evaluate:student@0", "evaluate:teacher@0", "train@1", *evaluations]
    assert {step: digest for step, digest in world.digests(changed).items() if "evaluate" not in step} == {
        step: digest for step, digest in before.items() if "evaluate" not in step
    }


def test_a_stale_step_that_needs_dropped_weights_has_them_trained_again(
    world: World, monkeypatch: pytest.MonkeyPatch, forgetful: None
) -> None:
    """Nobody can foresee that the forced scores differ, nor that train@2 will therefore open train@1."""
    before = world.digests()
    original = HfEngine.score

    def lower(self: HfEngine, *args: Any, **kwargs: Any) -> list[TokenScores]:
        return [replace(scores, logprobs=scores.logprobs - 1) for scores in original(self, *args, **kwargs)]

    monkeypatch.setattr(HfEngine, "score", lower)
    performed = world.run(force=("teacher-score@2",), rounds=2)
    monkeypatch.undo()
    assert performed == ["teacher-score@2", "train@1", "train@2", "evaluate:student@2"]
    after = world.digests()
    assert after["train@1"] == before["train@1"]
    assert after["train@2"] != before["train@2"]


# --------------------------------------------------------------------------------------------- damage


def flip_last_byte(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_a_damaged_input_is_refused_and_forcing_it_mends_the_run(world: World) -> None:
    before = world.digests()
    flip_last_byte(world.file("sft:teacher@0", "model/model.safetensors"))
    with pytest.raises(ArtifactError, match=r"model\.safetensors: sha256") as caught:
        world.run("rounds=4")
    assert caught.value.exit_code == 5
    assert "--force sft:teacher@0" in caught.value.hint
    done = world.run("rounds=4", force=("sft:teacher@0",))
    assert done == ["sft:teacher@0", *round_steps(4)[1:]], "rollout@4 was there already"
    assert {step: world.digests()[step] for step in before} == before


@pytest.mark.parametrize("damage", ["cut", "emptied manifest"])
def test_damage_that_sizes_show_stops_the_run_and_forcing_performs_that_step_only(
    world: World, damage: str
) -> None:
    before = world.digests()
    name = "rollouts.parquet" if damage == "cut" else "manifest.json"
    path = world.file("rollout@1", name)
    path.write_bytes(path.read_bytes()[:-100] if damage == "cut" else b"")
    assert world.states()["rollout@1"][0] == "damaged"
    with pytest.raises(ArtifactError, match=name) as caught:
        world.run()
    assert "--force rollout@1" in caught.value.hint
    assert world.run(force=("rollout@1",)) == ["rollout@1"]
    assert world.digests() == before


def test_a_missing_payload_file_is_damage(world: World) -> None:
    world.file("teacher-score@2", "scores.parquet").unlink()
    with pytest.raises(ArtifactError, match="is missing") as caught:
        world.run()
    assert "--force teacher-score@2" in caught.value.hint


# -------------------------------------------------------------------------------- gate, locks, signals


def test_a_teacher_that_is_clearly_no_better_stops_the_run_before_round_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path)
    found = {"high": 0.0}
    known = requirements.headrooms
    monkeypatch.setattr(
        requirements, "headrooms", lambda project: [replace(one, **found) for one in known(project)]
    )
    with pytest.raises(PreflightError, match="not better than the student") as caught:
        world.run("runtime.allow_weak_teacher=false", rounds=1)
    assert caught.value.exit_code == 4
    assert "allow_weak_teacher" in caught.value.hint
    assert set(payload_digests(world.workspace)) == set(ROUND_0)
    found["high"] = 0.01
    watcher = Watcher()
    loaded = load_tiny(world.folder, "runtime.allow_weak_teacher=false")
    run_near(loaded, world.workspace, watcher=watcher, rounds=1)
    assert watcher.performed == round_steps(1)
    assert any("is not clearly better than the student: accuracy" in line for line in watcher.warnings)


def test_a_run_that_another_process_holds_is_refused(world: World) -> None:
    with run_lock(world.project().run.path), pytest.raises(LockError, match=str(os.getpid())):
        world.run()


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(one, marks=pytest.mark.slow) for one in (signal.SIGINT, signal.SIGHUP))],
)
def test_a_signal_stops_at_a_safe_point_and_the_next_command_goes_on(
    finished: World, tmp_path: Path, number: signal.Signals
) -> None:
    world, watcher, mirror = World(tmp_path), Watcher(), SilentMirror()
    handler = signal.getsignal(number)

    def on_event(step: str, event: dict[str, Any]) -> None:
        if step == "rollout@1" and event.get("done") == 4:  # after the first part
            os.kill(os.getpid(), number)

    watcher.on_event = on_event
    with pytest.raises(Interrupted) as caught:
        run_near(load_tiny(world.folder), world.workspace, watcher=watcher, mirror=mirror)
    assert caught.value.exit_code == 128 + number
    assert mirror.status == "KILLED"
    assert signal.getsignal(number) is handler
    assert world.states()["rollout@1"][0] == "to do"
    assert "finished parts" in world.states()["rollout@1"][1]
    assert world.run(rounds=1) == round_steps(1)
    parts = [
        e["part"]
        for e in events_of(world.workspace)
        if e["event"] == "part started" and e["step"] == "rollout@1"
    ]
    assert parts == [0, 1, 2, 3]
    reference = finished.digests()
    assert payload_digests(world.workspace) == {step: reference[step] for step in ROUND_0 + round_steps(1)}


def test_a_run_says_which_secret_goes_to_which_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")
    server = {"urls": ["https://a.example:8000/v1"], "model": "m", "tokenizer": "t", "api_key_env": "FAR_KEY"}
    recipe = load_tiny(
        tmp_path, teachers=[{"server": server}], tracking={"uri": "https://b.example/mlflow"}
    ).recipe
    assert key_uses(recipe) == [
        "teacher 'teacher': the key in FAR_KEY goes to https://a.example:8000",
        "MLflow: MLFLOW_TRACKING_TOKEN goes to https://b.example",
    ]
    assert key_uses(load_tiny(tmp_path).recipe) == []


def test_a_signal_shortens_the_patience_with_mlflow_and_a_second_one_ends_it() -> None:
    with signals() as stop:
        assert stop.patience() == math.inf
        signal.raise_signal(signal.SIGTERM)
        assert stop.patience() == PATIENCE_SECONDS
        with pytest.raises(Interrupted, match="at once"):
            signal.raise_signal(signal.SIGINT)
        assert stop.patience() == 0


def test_a_signal_that_is_ignored_as_by_nohup_stops_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.asked()
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(Interrupted, match=r"^by SIGTERM at train@1$"):
                stop.check("train@1")
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("kind", ["kd", pytest.param("grpo", marks=pytest.mark.slow)])
def test_a_signal_in_training_leaves_a_checkpoint(finished: World, tmp_path: Path, kind: str) -> None:
    world, watcher = World(tmp_path), Watcher()
    objective = f"train.objective.kind={kind}"

    def on_event(step: str, event: dict[str, Any]) -> None:
        if step == "train@1" and event.get("unit") == "optimizer steps" and event["done"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    watcher.on_event = on_event
    with pytest.raises(Interrupted):
        run_near(load_tiny(world.folder, objective), world.workspace, watcher=watcher)
    assert world.states(objective)["train@1"] == ("to do", "goes on from optimizer step 1")
    world.run(objective, rounds=1)
    if kind == "kd":
        assert payload_digests(world.workspace)["train@1"] == finished.digests()["train@1"]
    [path] = world.workspace.glob("store/train/*/metrics.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    names = [(row["name"], row["optimizer_step"]) for row in rows]
    assert len(names) == len(set(names)), "no metric is there twice"
    assert [row["optimizer_step"] for row in rows if row["name"] == "train/loss"] == [1, 2, 3, 4]


# ----------------------------------------------------------------------------------------- check-loss

K1_LOSS = "train.objective.kd=k1_loss"


@pytest.mark.parametrize("request_", [{}, {"rounds": 0}])
def test_an_objective_that_check_loss_fails_is_refused_before_any_step(
    tmp_path: Path, request_: dict[str, Any]
) -> None:
    watcher, mirror = Watcher(), SilentMirror()
    with pytest.raises(PreflightError) as caught:
        run_near(load_tiny(tmp_path, K1_LOSS), tmp_path / "out", watcher=watcher, mirror=mirror, **request_)
    assert caught.value.exit_code == 4
    assert [f"property {number}: " in caught.value.message for number in (1, 2, 3, 4)] == [
        *[True] * 3,
        False,
    ]
    assert "reproduce=true" in caught.value.hint
    assert mirror.status == "FAILED"
    assert watcher.performed == ["sft:student@0"], "the first step began, and wrote nothing"
    assert not [path for path in (tmp_path / "out" / "store").rglob("*") if path.is_file()]


def test_reproduce_runs_it_with_a_warning_that_names_the_properties(world: World) -> None:
    watcher, mirror = Watcher(), SilentMirror()
    events: list[dict[str, Any]] = []
    watcher.on_event = lambda _step, event: events.append(event)
    loaded = load_tiny(world.folder, K1_LOSS, "reproduce=true")
    run_near(loaded, world.workspace, watcher=watcher, mirror=mirror, rounds=1)
    assert watcher.performed == ["train@1", "evaluate:student@1"]
    [warning] = [event["text"] for event in events if event["kind"] == "warning"]
    assert all(f"property {number}: " in warning for number in (1, 2, 3))
    assert mirror.status == "FINISHED"


def test_a_sound_objective_is_checked_once_a_command_and_a_finished_run_not_at_all(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[str] = []
    monkeypatch.setattr(
        kdpipe.execution.executor, "unsound", lambda recipe: checked.append(recipe.name) or []
    )
    assert world.run() == []
    assert checked == []
    assert world.run("train.optimizer.learning_rate=0.002", rounds=2)[0] == "train@1"
    assert checked == ["tiny"]


# ------------------------------------------------------------------------------------- the same results


def test_rounds_run_one_by_one_end_as_in_one_go(finished: World, tmp_path: Path, forgetful: None) -> None:
    world = World(tmp_path)
    for number in (0, 1, 2):
        world.run(rounds=number)
    world.run()
    assert world.digests() == finished.digests()


@pytest.mark.slow
def test_another_order_of_runs_in_another_workspace_ends_the_same(finished: World, tmp_path: Path) -> None:
    world = World(tmp_path)
    world.run("train.optimizer.learning_rate=0.002", rounds=1, name="first")
    world.run(rounds=1)
    reference = finished.digests()
    found = world.digests()
    assert {step: found[step] for step in ROUND_0 + round_steps(1)} == {
        step: reference[step] for step in ROUND_0 + round_steps(1)
    }
