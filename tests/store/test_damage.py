"""Every kind of file that a workspace holds, damaged in every way: what is named, what is refused, what is made again.

`PROMISES` says of each kind what is promised; a kind that is not in it fails the first test. Damage is done to copies
of one workspace: a run of whole distributions stopped in its third rollout, and one of a top-k support with an average
of the students, stopped between two optimizer steps.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from typer.testing import CliRunner

import kdpipe.pipeline.plan
from kdpipe.cli.app import app
from kdpipe.engines.server.signature import require_same
from kdpipe.errors import ArtifactError, Interrupted
from kdpipe.pipeline.headroom import headrooms
from kdpipe.pipeline.housekeeping import verify
from kdpipe.pipeline.project import Project, open_project, round_metrics
from kdpipe.recipe.file import LoadedRecipe
from kdpipe.results.samples import Choice, choose_samples
from kdpipe.store.artifacts import Entry
from kdpipe.store.sealed import digest_of, seal_value
from kdpipe.tracking.steps import done_steps, metrics
from tests.worlds import Watcher, leftovers, load_tiny, run_near, write_recipe

Damage = Literal["cut", "emptied", "flipped", "replaced", "removed"]
DAMAGES: tuple[Damage, ...] = ("cut", "emptied", "flipped", "replaced", "removed")

SIZES: dict[str, Any] = {
    "rollout": {"prompts": 4, "samples": 2, "max_new_tokens": 8},
    "task__train_problems": 32,
    "task__test_problems": 4,
    "evaluate": {"reverse_kl_problems": 2},
    "train__minibatches": 2,
    "runtime__checkpoint_steps": 1,
    "student__sft": {"steps": 2, "batch": 4},
}
WHOLE: dict[str, Any] = {
    **SIZES,
    "rounds": 3,
    "train__objective": {"kd": {"term": "jsd", "beta": 1.0, "support": "vocabulary"}},
}
TOP_K: dict[str, Any] = {
    **SIZES,
    "name": "top-k",
    "rounds": 2,
    "teachers": [{"name": "average", "self": "ema", "decay": 0.5, "dtype": "float32"}],
    "train__objective": {"kd": {"term": "jsd", "beta": 1.0, "support": {"teacher_top_k": 8}}},
}


# ------------------------------------------------------------------------------------------- promises


@dataclass(frozen=True)
class Vouched:
    """A file of a done step: verify names it, nothing reads it, `--force` of its step makes it again.

    `reader` is who reads it next: a step, or a function of the parent. None: no step ever does.
    """

    step: str
    reader: str | None = None
    run: str = "whole"


@dataclass(frozen=True)
class Piece:
    """A file of a finished piece of a step that is not done: verify names it, the next run makes the piece again."""

    step: str
    run: str = "whole"


@dataclass(frozen=True)
class Mended:
    """A file that follows from the recipe: verify names it, and the next run writes it as it was."""

    step: str
    run: str = "whole"


@dataclass(frozen=True)
class Rewritten:
    """A file for people and the tracker that every run writes anew: no result depends on it, verify leaves it."""


@dataclass(frozen=True)
class Unpromised:
    """A log, or a lock without content: no promise, and no run is disturbed whatever stands in it."""


MODEL = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
TRAINER = ("trainer.json", "trainer.safetensors")
ENTRIES = {
    "sft": "sft:student@0",
    "rollout": "rollout@2",
    "teacher-score": "teacher-score@2",
    "train": "train@2",
    "evaluate": "evaluate:student@0",
}
PROMISES: dict[str, Vouched | Piece | Mended | Rewritten | Unpromised] = {
    "rollout/rollouts.parquet": Vouched("rollout@2", "teacher-score@2"),
    "teacher-score/scores.parquet": Vouched("teacher-score@2", "train@2"),
    "teacher-score/scores.parquet, top-k": Vouched("teacher-score@1", "train@1", "top-k"),
    "teacher-score/hidden.safetensors": Vouched("teacher-score@2", "train@2"),
    "train/completions.parquet": Vouched("train@2", "samples"),
    "evaluate/grades.parquet": Vouched("evaluate:student@0", "evaluate:student@2"),
    "evaluate/reverse_kl.parquet": Vouched("evaluate:student@0", "evaluate:student@2"),
    "evaluate/summary.json": Vouched("evaluate:teacher@0", "headrooms"),
    **{f"sft/model/{name}": Vouched("sft:student@0", "evaluate:student@0") for name in MODEL},
    **{f"sft/trainer/{name}": Vouched("sft:student@0") for name in TRAINER},
    **{f"train/model/{name}": Vouched("train@2", "evaluate:student@2") for name in MODEL},
    **{f"train/trainer/{name}": Vouched("train@1", "train@2") for name in TRAINER},
    **{f"train/ema/{name}": Vouched("train@1", "teacher-score@2", "top-k") for name in MODEL},
    **{f"{stage}/manifest.json": Vouched(step, "run") for stage, step in ENTRIES.items()},
    **{f"{stage}/metrics.jsonl": Vouched(step, "round_metrics") for stage, step in ENTRIES.items()},
    **{f"{stage}/fingerprint.json": Mended(step) for stage, step in ENTRIES.items()},
    "rollout/parts/part-N.parquet": Piece("rollout@3"),
    "rollout/parts/part-N.json": Piece("rollout@3"),
    **{f"train/checkpoints/step-N/model/{name}": Piece("train@2", "top-k") for name in MODEL},
    **{f"train/checkpoints/step-N/trainer/{name}": Piece("train@2", "top-k") for name in TRAINER},
    "train/checkpoints/step-N/proximal.npy": Piece("train@2", "top-k"),
    "train/checkpoints/step-N/metrics.jsonl": Piece("train@2", "top-k"),
    "train/checkpoints/step-N/seal.json": Piece("train@2", "top-k"),
    "runs/link": Rewritten(),
    "runs/recipe.yaml": Rewritten(),
    "runs/resolved.json": Rewritten(),
    "runs/environment.json": Rewritten(),
    "runs/events.jsonl": Unpromised(),
    "runs/.lock": Unpromised(),
    ".lock": Unpromised(),
    **{f"{stage}/.lock": Unpromised() for stage in ENTRIES},
}
"""pins.json, digests.json and servers.json, and MLflow's files, have tests of their own below."""
VOUCHED = {kind: row for kind, row in PROMISES.items() if isinstance(row, Vouched)}
PIECES = {kind: row for kind, row in PROMISES.items() if isinstance(row, Piece)}
MENDED = {kind: row for kind, row in PROMISES.items() if isinstance(row, Mended)}


def kind_of(place: Path) -> str:
    """The kind of a file, from its path inside the workspace: without hashes and numbers."""
    top, *rest = place.parts
    if top == "store":
        return re.sub(r"(part|step)-\d+", r"\1-N", "/".join([rest[0], *rest[2:]]))
    if top == "runs":
        return "runs/link" if rest[1].startswith("round-") else "/".join(["runs", *rest[1:]])
    return str(place)


# -------------------------------------------------------------------------------------------- the world


@functools.cache
def recipe_of(folder: Path, run: str) -> LoadedRecipe:
    """The recipe of one of the two runs, read once in each world: it is opened again after each damage."""
    return load_tiny(folder, **(WHOLE if run == "whole" else TOP_K))


@dataclass(frozen=True)
class World:
    """A folder with the two runs' workspace."""

    folder: Path

    @property
    def workspace(self) -> Path:
        return self.folder / "out"

    def project(self, run: str = "whole") -> Project:
        return open_project(recipe_of(self.folder, run), self.workspace)

    def run(self, run: str = "whole", *, watcher: Watcher | None = None, **request: Any) -> list[str]:
        watcher = watcher or Watcher()
        run_near(recipe_of(self.folder, run), self.workspace, watcher=watcher, **request)
        return watcher.performed

    def digests(self, run: str = "whole") -> dict[str, str | None]:
        return {state.step.id: state.digest for state in self.project(run).survey() if state.done}

    def entry(self, step: str, run: str = "whole") -> Entry:
        project = self.project(run)
        return project.store.entry(project.plan.step(step))

    def file(self, kind: str) -> Path:
        """The file of that kind that is damaged."""
        row = PROMISES[kind]
        if isinstance(row, Rewritten | Unpromised):
            run = self.project().run
            names = {"runs/link": "round-001/train"}
            if kind.startswith("runs/"):
                return run.path / names.get(kind, kind.partition("/")[2])
            place = self.workspace if kind == ".lock" else self.entry(ENTRIES[kind.partition("/")[0]]).folder
            return place / ".lock"
        name = kind.partition(",")[0].partition("/")[2]
        pattern = name.replace("-N", "-*")
        return sorted(self.entry(row.step, row.run).folder.glob(pattern))[0]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Both runs, each stopped in the middle of a step. Never changed: `world` is a copy."""
    world = World(tmp_path_factory.mktemp("stopped"))
    for run, step, unit in (("whole", "rollout@3", "completions"), ("top-k", "train@2", "optimizer steps")):
        watcher = Watcher()

        def stop(at: str, event: dict[str, Any], step: str = step, unit: str = unit) -> None:
            if at == step and event.get("unit") == unit and event.get("done"):
                os.kill(os.getpid(), signal.SIGTERM)

        watcher.on_event = stop
        with pytest.raises(Interrupted):
            world.run(run, watcher=watcher)
    return world


@pytest.fixture(scope="module")
def ended(stopped: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str | None]]:
    """The payload digests of both runs when nothing is damaged, by run."""
    world = copied(stopped, tmp_path_factory.mktemp("ended"))
    for run in ("whole", "top-k"):
        world.run(run)
    return {run: world.digests(run) for run in ("whole", "top-k")}


@pytest.fixture
def world(stopped: World, tmp_path: Path) -> World:
    return copied(stopped, tmp_path)


def copied(world: World, folder: Path) -> World:
    shutil.copytree(world.folder, folder / "world", symlinks=True)
    return World(folder / "world")


def do_damage(path: Path, damage: Damage, world: World) -> None:
    """Damages a file; it is replaced by a valid one of its kind from another entry, or by one of another kind."""
    data = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(data[: 2 * len(data) // 3])
        case "emptied":
            path.write_bytes(b"")
        case "flipped":
            middle = len(data) // 2
            path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
        case "replaced":
            path.write_bytes(other_than(path, world).read_bytes())
        case "removed":
            path.unlink()


def other_than(path: Path, world: World) -> Path:
    """A valid file with other bytes: of the same name in another entry, else of the same suffix, else any."""
    everything = sorted(world.workspace.glob("store/*/*/**/*"))
    for name in (path.name, f"*{path.suffix}", "*"):
        for found in everything:
            if found.match(name) and found.is_file() and found.read_bytes() != path.read_bytes():
                return found
    raise AssertionError(f"nothing to replace {path} by")


def named(project: Project, *, full: bool = True) -> dict[str, str]:
    """What verify names, by step."""
    return {found.step: found.problem for found in verify(project, full=full) if found.problem}


# ----------------------------------------------------------------------------------------------- the table


def test_every_kind_of_file_in_the_workspace_has_a_promise(stopped: World) -> None:
    files = [path for path in stopped.workspace.rglob("*") if path.is_symlink() or path.is_file()]
    found = {kind_of(path.relative_to(stopped.workspace)) for path in files}
    assert found == {kind.partition(",")[0] for kind in PROMISES}


def test_a_whole_workspace_is_verified_without_a_finding(stopped: World) -> None:
    for run in ("whole", "top-k"):
        assert named(stopped.project(run)) == {}
        assert any(
            found.step == ("rollout@3" if run == "whole" else "train@2")
            for found in verify(stopped.project(run), full=True)
        )


@pytest.mark.slow
def test_verify_names_every_damage_of_every_file_that_is_vouched_for(world: World) -> None:
    """270 cases on one copy, each undone; removed manifests and seals are a step and a piece that are not there."""
    assert len(DAMAGES) * len(VOUCHED | PIECES | MENDED) == 270
    for kind, row in (VOUCHED | PIECES | MENDED).items():
        path, project = world.file(kind), world.project(row.run)
        whole = path.read_bytes()
        for damage in DAMAGES:
            do_damage(path, damage, world)
            found = named(project)
            is_mark = path.name in ("manifest.json", "seal.json") or kind.startswith("rollout/parts")
            if damage == "removed" and is_mark:
                assert row.step not in found, (kind, damage)
            else:
                assert row.step in found, (kind, damage)
                assert str(path.parent) in found[row.step], (kind, damage, found)
            path.write_bytes(whole)
    assert named(world.project()) == named(world.project("top-k")) == {}


def test_verify_and_its_advice_on_the_command_line(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(world.folder, **WHOLE)
    do_damage(world.file("train/model/tokenizer.json"), "flipped", world)
    args = ["verify", str(recipe), "--full", "--workspace", str(world.workspace)]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 5
    assert "tokenizer.json: sha256" in result.stderr
    assert "--force train@2" in result.stderr
    assert CliRunner().invoke(app, args[:2] + args[3:]).exit_code == 0, "its size is the same"


READERS: dict[str, Callable[[World, str], object]] = {
    "run": lambda world, run: world.run(run),
    "samples": lambda world, run: choose_samples(
        world.project(run), Choice(2, False, False, False, False, 1)
    ),
    "headrooms": lambda world, run: headrooms(world.project(run)),
    "round_metrics": lambda world, run: [round_metrics(world.project(run), number) for number in range(3)],
}


def read_by(world: World, row: Vouched) -> None:
    """Lets whoever reads a file read it."""
    if row.reader in READERS:
        READERS[row.reader](world, row.run)
    elif row.reader is not None:
        world.run(row.run, force=(row.reader,), rounds=2)


def check_vouched(world: World, kind: str, damage: Damage, ended: dict[str, dict[str, str | None]]) -> None:
    """Nobody reads a damaged file, and forcing its step mends the run."""
    row = VOUCHED[kind]
    path, sizes = world.file(kind), world.file(kind).stat().st_size
    do_damage(path, damage, world)
    is_gone = damage == "removed" and path.name == "manifest.json"  # the step is simply not done any more
    if not is_gone:
        shows = not path.exists() or path.stat().st_size != sizes or path.name == "manifest.json"
        if row.reader is not None or shows:
            with pytest.raises(ArtifactError) as caught:
                read_by(world, row) if row.reader is not None else world.run(row.run)
            assert caught.value.exit_code == 5
            assert str(path.parent) in caught.value.message
            assert f"--force {row.step}" in caught.value.hint or "format" in caught.value.message
    force = () if is_gone else (row.step,)
    assert row.step in world.run(row.run, force=force)
    assert world.digests(row.run) == ended[row.run]
    assert named(world.project(row.run)) == {}


def check_piece(world: World, kind: str, damage: Damage, ended: dict[str, dict[str, str | None]]) -> None:
    """The piece is made again, and said to be, unless it looks as if it had never been finished."""
    row = PIECES[kind]
    path, events = world.file(kind), list[dict[str, Any]]()
    do_damage(path, damage, world)
    watcher = Watcher()
    watcher.on_event = lambda _step, event: events.append(event)
    assert row.step in world.run(row.run, watcher=watcher)
    told = [event["text"] for event in events if event["kind"] == "warning"]
    is_absent = damage == "removed" and (path.name == "seal.json" or "parts" in path.parts)
    assert [str(path.parent) in text for text in told] == [] if is_absent else [True]
    assert world.digests(row.run) == ended[row.run]
    assert leftovers(world.workspace / "store" / row.step.partition("@")[0]) == []


def check_mended(world: World, kind: str, damage: Damage) -> None:
    path, row = world.file(kind), MENDED[kind]
    whole = path.read_bytes()
    do_damage(path, damage, world)
    assert row.step not in world.run(row.run, rounds=2)
    assert path.read_bytes() == whole


CORNERS: list[tuple[str, Damage]] = [
    ("rollout/rollouts.parquet", "replaced"),
    ("teacher-score/scores.parquet, top-k", "cut"),
    ("train/model/tokenizer.json", "flipped"),
    ("evaluate/summary.json", "flipped"),
    ("train/metrics.jsonl", "emptied"),
    ("sft/manifest.json", "removed"),
    ("rollout/parts/part-N.parquet", "flipped"),
    ("train/checkpoints/step-N/trainer/trainer.safetensors", "flipped"),
    ("train/checkpoints/step-N/seal.json", "replaced"),
]


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        pytest.param(kind, damage, id=f"{kind} {damage}", marks=() if number % 2 == 0 else pytest.mark.slow)
        for number, (kind, damage) in enumerate(CORNERS)
    ],
)
def test_what_is_damaged_is_not_used_and_can_be_made_again(
    kind: str, damage: Damage, world: World, ended: dict[str, dict[str, str | None]]
) -> None:
    check_vouched(world, kind, damage, ended) if kind in VOUCHED else check_piece(world, kind, damage, ended)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*VOUCHED, *PIECES])
@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_is_damaged_however_is_not_used_and_can_be_made_again(
    kind: str, damage: Damage, world: World, ended: dict[str, dict[str, str | None]]
) -> None:
    check_vouched(world, kind, damage, ended) if kind in VOUCHED else check_piece(world, kind, damage, ended)


def test_a_damaged_fingerprint_file_is_written_again(world: World) -> None:
    damages = [*DAMAGES, *DAMAGES]
    for kind, damage in zip(MENDED, damages, strict=False):
        check_mended(world, kind, damage)


# -------------------------------------------------------------------------- files of the run and workspace


@pytest.mark.parametrize("damage", ["emptied", "flipped", "removed"])
def test_files_of_a_run_that_no_result_depends_on_disturb_nothing(
    world: World, ended: dict[str, dict[str, str | None]], damage: Damage
) -> None:
    """All of them at once: the run goes on to the same digests, and writes its recipe, environment and links anew."""
    for kind, row in PROMISES.items():
        if isinstance(row, Rewritten) and kind != "runs/link":
            do_damage(world.file(kind), damage, world)
    link = world.file("runs/link")
    link.unlink()
    if damage == "flipped":  # for a link: one that leads elsewhere
        link.symlink_to(os.path.relpath(world.entry("train@2").folder, link.parent))
    log = world.file("runs/events.jsonl")
    log.write_bytes(b"" if damage == "emptied" else log.read_bytes()[:-9] + b'\xff\n5\n[]\n{"time": "x"}\n')
    assert named(world.project()) == {}
    world.run()
    assert world.digests() == ended["whole"]
    run = world.project().run
    assert link.resolve() == world.entry("train@1").folder.resolve()
    assert run.recipe() == world.project().recipe
    assert json.loads((run.path / "environment.json").read_text())["python"]


def test_a_step_linked_in_the_place_of_another_is_not_mirrored_for_it(world: World) -> None:
    run = world.project().run
    link = run.path / "round-001" / "train"
    link.unlink()
    link.symlink_to(os.path.relpath(world.entry("train@2").folder, link.parent))
    names = [step.name for step in done_steps(run.path)]
    assert "round-001/train" not in names
    assert "round-002/train" in names


def test_metrics_that_are_damaged_are_not_mirrored(world: World) -> None:
    do_damage(world.file("train/metrics.jsonl"), "flipped", world)
    [step] = [step for step in done_steps(world.project().run.path) if step.name == "round-002/train"]
    with pytest.raises(ArtifactError, match=r"metrics\.jsonl: sha256"):
        list(metrics(step, several=False))


PINS = seal_value("memory of hub pins", {"someone/student@main": "0" * 40})
FILES: dict[str, tuple[str, bytes | None, str]] = {
    "cut": ("pins.json", json.dumps(PINS).encode()[:-20], "damaged"),
    "emptied": ("pins.json", b"", "damaged"),
    "flipped": ("pins.json", json.dumps(PINS).replace("0000", "0010", 1).encode(), "its own sha256"),
    "another file": (
        "pins.json",
        json.dumps(seal_value("memory of file digests", {})).encode(),
        "another kind",
    ),
    "an older format": ("pins.json", json.dumps({"someone/student@main": "0" * 40}).encode(), "format None"),
    "a newer format": (
        "pins.json",
        json.dumps({**PINS, "format": 2}).encode(),
        "format 2, .* reads format 1",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_damaged_pins_are_refused_and_not_taken_for_no_pins(world: World, case: str) -> None:
    """Taken for none, the next run would train on whatever the hub has by then."""
    name, data, reason = FILES[case]
    assert data is not None
    (world.workspace / name).write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"pins\.json: .*{reason}") as caught:
        world.run()
    assert caught.value.exit_code == 5
    assert "put back a copy" in caught.value.hint
    (world.workspace / name).unlink()
    assert named(world.project()) == {}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_memory_of_digests_is_made_again(tmp_path: Path, damage: Damage, stopped: World) -> None:
    """It only saves reading files: a flipped bit in it must not make another model of the same files."""
    folder, workspace = tmp_path / "model", tmp_path / "out"
    shutil.copytree(stopped.entry("sft:student@0").folder / "model", folder)
    loaded = load_tiny(tmp_path, student={"model": str(folder), "dtype": "float32"})
    before = open_project(loaded, workspace).plan
    path = workspace / "digests.json"
    whole = path.read_bytes()
    do_damage(path, damage, stopped)
    assert open_project(loaded, workspace).plan == before
    assert path.read_bytes() == whole


def test_a_damaged_memory_of_servers_is_refused(tmp_path: Path) -> None:
    require_same(tmp_path, "digest", who="teacher", scores=[-1.0, -2.0])
    path = tmp_path / "servers.json"
    path.write_text(path.read_text().replace("-2.0", "-3.0"))
    with pytest.raises(ArtifactError, match=r"servers\.json: damaged") as caught:
        require_same(tmp_path, "digest", who="teacher", scores=[-1.0, -2.0])
    assert "put back a copy" in caught.value.hint
    path.unlink()
    require_same(tmp_path, "digest", who="teacher", scores=[-1.0, -2.0])


# --------------------------------------------------------------------------------------- other versions


def resealed(path: Path, **changes: Any) -> None:
    """Changes a manifest or a seal, and its own sha256 with it."""
    document = {**json.loads(path.read_text()), **changes}
    document.pop("self_sha256")
    path.write_text(json.dumps({**document, "self_sha256": digest_of(document)}))


@pytest.mark.parametrize("number", [0, 2, "1"])
def test_a_manifest_of_another_format_is_refused_with_a_sentence(world: World, number: Any) -> None:
    resealed(world.file("rollout/manifest.json"), format=number)
    with pytest.raises(ArtifactError, match=f"format {number}, and this kdpipe reads format 1") as caught:
        world.run()
    assert (caught.value.exit_code, "--workspace" in caught.value.hint) == (5, True)


def test_a_checkpoint_of_another_format_is_named_and_not_gone_on_from(
    world: World, ended: dict[str, dict[str, str | None]]
) -> None:
    resealed(world.file("train/checkpoints/step-N/seal.json"), format=2)
    found = named(world.project("top-k"))["train@2"]
    assert "a finished piece of format 2, and this kdpipe reads format 1" in found
    world.run("top-k")
    assert world.digests("top-k") == ended["top-k"]


def test_state_of_another_version_of_a_stage_is_stale_and_plan_says_so(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer's state, or anything else that a stage leaves, is behind a fingerprint that holds its format."""
    number = kdpipe.pipeline.plan.FORMATS["train"]
    monkeypatch.setitem(kdpipe.pipeline.plan.FORMATS, "train", number + 1)
    states = {state.step.id: state for state in world.project().survey()}
    assert (states["train@1"].verdict, states["train@1"].why) == (
        "stale",
        f"format: {number} -> {number + 1} (made by another version of kdpipe)",
    )
    assert states["rollout@1"].done
    assert not states["rollout@2"].done
