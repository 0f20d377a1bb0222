"""A recipe whose models and data are on the hub, by real commands: met, moved, broken off, filled up, offline."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.hub import Hub, hub_stand_in
from tests.pipeline.test_machine_faults import mounted
from tests.stages.test_from_files import write_model
from tests.worlds import write_recipe

pytestmark = pytest.mark.slow

LARGE = 24_000_000
"""Bytes of which the client keeps the first tens of millions when a transfer breaks off."""
TOKEN = "hf_secretOfSomebody"


@dataclass
class World:
    """A recipe and commands on it, which meet the hub with a cache of their own."""

    folder: Path
    hub: Hub
    model: dict[str, bytes]
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def recipe(self, **changes: Any) -> None:
        settings: dict[str, Any] = {
            "rounds": 1,
            "task": {"kind": "gsm8k", "prompt": "plain", "instruction": ""},
            "student": {"model": "someone/student", "dtype": "float32"},
            "teachers": [{"model": "someone/teacher", "revision": "v2", "dtype": "float32"}],
            "rollout": {"prompts": 4, "samples": 2, "max_new_tokens": 8},
        }
        write_recipe(self.folder, **{**settings, **changes})

    def start(self, *words: str, **more: Any) -> subprocess.Popen[str]:
        command, *rest = words
        line = [sys.executable, "-m", "kdpipe", command, "recipe.yaml", *rest]
        environment = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
        environment |= self.hub.environment(self.home) | self.environment
        settings: dict[str, Any] = {
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
            **more,
        }
        return subprocess.Popen(line, cwd=self.folder, env=environment, **settings)

    def answer(self, *words: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        process = self.start(*words)
        out, err = process.communicate(timeout=240)
        assert "Traceback" not in err, err
        assert "hf_" not in out + err
        return process.returncode, out, err

    def blobs(self) -> list[Path]:
        """The whole files of the student in the cache."""
        return sorted(self.home.glob("hub/models--someone--student/blobs/*"))

    def unfinished(self) -> list[Path]:
        return sorted(self.home.rglob("*.incomplete"))


def parquet(folder: Path, count: int) -> bytes:
    rows = [{"question": f"Tom has {n} apples", "answer": f"#### {n % 4}"} for n in range(count)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return (folder / "rows.parquet").read_bytes()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    write_model(tmp_path / "model", hidden=8, layers=1, seed=0)
    model = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    model |= {"pytorch_model.bin": b"pickle" * 100, "README.md": b"-"}
    with hub_stand_in() as hub:
        hub.add("models", "someone/student", model)
        hub.add("models", "someone/teacher", model, ref="v2")
        main = {f"main/{split}-00000-of-00001.parquet": parquet(tmp_path, 8) for split in ("train", "test")}
        hub.add("datasets", "openai/gsm8k", {"README.md": b"-", "socratic/train.parquet": b"-", **main})
        world = World(tmp_path, hub, model)
        world.recipe()
        yield world


def test_a_run_from_the_hub_is_pinned_and_goes_on_without_it(world: World) -> None:
    code, out, _ = world.answer("plan")
    assert code == 0
    assert out.count("unresolved until the first run fetches and pins it: ") == 3
    assert world.hub.asked == []
    code, out, err = world.answer("run")
    assert code == 0, err
    assert "model.safetensors" in world.hub.fetched()
    assert not {"pytorch_model.bin", "README.md", "train.parquet"} & set(world.hub.fetched())
    commits = {name: list(one.refs.values()) for (_, name), one in world.hub.repositories.items()}
    for (kind, name), one in list(world.hub.repositories.items()):  # every branch moves
        world.hub.add(kind, name, {"config.json": b"other"}, ref=next(iter(one.refs)))
    world.hub.asked.clear()
    code, out, _ = world.answer("plan", "--json")
    assert json.loads(out)["unresolved"] == []
    found = {name.removeprefix("datasets/"): pins for name, pins in json.loads(out)["pinned"].items()}
    assert found == commits
    code, _, err = world.answer("run")
    assert (code, "0 steps to do" in err) == (0, True)
    world.environment["HF_HUB_OFFLINE"] = "1"
    assert world.answer("run", "--set", "seed=2", "--rounds", "0")[0] == 0
    assert world.answer("run", "--set", "seed=2", "--workspace", "new", "--rounds", "0")[0] == 0
    assert [one.path for one in world.hub.asked] == []


def test_what_is_not_in_the_cache_is_said_offline(world: World) -> None:
    world.environment["HF_HUB_OFFLINE"] = "1"
    code, _, err = world.answer("run")
    assert code == 1
    assert "model someone/student: HF_HUB_OFFLINE is set, and the cache has not all of it" in err
    assert str(world.home) in err
    assert len(err.splitlines()) == 3


@pytest.mark.parametrize("command", ["run", "doctor", "sft"])
def test_a_gated_model_is_one_sentence_whichever_command_asks(world: World, command: str) -> None:
    world.hub.repositories["models", "someone/student"].access = "gated"
    world.environment["HF_TOKEN"] = TOKEN
    world.hub.tokens[TOKEN] = False
    code, _, err = world.answer(command)
    assert code == 4
    assert (
        f"ask for access at {world.hub.url}/someone/student, with the account of the token in HF_TOKEN" in err
    )
    assert len(err.splitlines()) == 2


def dataset(**changes: Any) -> dict[str, Any]:
    task = {"kind": "dataset", "path": "someone/sums", "config": "sums", "revision": "v1", "prompt": "plain"}
    return {**task, **changes}


def test_a_data_set_of_the_hub_is_read_by_its_own_library_and_pinned(world: World) -> None:
    files = {
        "README.md": b"---\nconfigs:\n- {config_name: sums, data_files: sums/*.parquet}\n"
        b"- {config_name: other, data_files: other/*.csv}\n---\n",
        "sums/train-00000-of-00001.parquet": parquet(world.folder, 12),
        "other/rows.csv": b"question,answer\nWhat?,no number\n",
        "script.py": b"raise SystemExit",
    }
    commit = world.hub.add("datasets", "someone/sums", files, ref="v1")
    split = {"train": "train[:8]", "test": "train[8:]"}
    world.recipe(task=dataset(split=split))
    code, _, err = world.answer("run", "--rounds", "0")
    assert code == 0, err
    assert "script.py" not in world.hub.fetched()
    _, out, _ = world.answer("plan", "--json")
    assert json.loads(out)["pinned"]["datasets/someone/sums"] == [commit]
    world.hub.add("datasets", "someone/sums", {"README.md": b"moved"}, ref="v1")
    world.environment["HF_HUB_OFFLINE"] = "1"
    assert "8 train, 4 test problems; first prompt: Tom has 0 apples" in world.answer("check")[1]
    assert world.answer("run")[0] == 0


def test_a_gated_data_set_and_one_without_that_config_are_said(world: World) -> None:
    world.hub.add("datasets", "someone/sums", {"sums/train.parquet": parquet(world.folder, 8)}, ref="v1")
    world.recipe(task=dataset())
    code, _, err = world.answer("run")
    assert (code, "someone/sums, config sums, split 'train'" in err) == (2, True), err
    world.recipe(task=dataset(revision="v9"))
    code, _, err = world.answer("run")
    assert (code, "dataset someone/sums at v9: the hub has it, but not that revision" in err) == (2, True)
    world.hub.repositories["datasets", "someone/sums"].access = "gated"
    world.hub.add("datasets", "someone/sums", {"sums/train.parquet": parquet(world.folder, 9)}, ref="v2")
    world.recipe(task=dataset(revision="v2"))
    code, _, err = world.answer("run")
    assert code == 4
    assert f"ask for access at {world.hub.url}/datasets/someone/sums, make a token at" in err


def test_a_transfer_that_breaks_off_is_resumed_where_it_was(world: World) -> None:
    world.hub.add("models", "someone/student", world.model | {"large.txt": bytes(LARGE)})
    world.hub.cuts["large.txt"] = [LARGE - 1000]
    code, _, err = world.answer("run", "--rounds", "0")
    assert code == 0, err
    ranges = [one.range for one in world.hub.asked if one.path.endswith("large.txt") and one.method == "GET"]
    assert ranges == [None, "bytes=20971520-"]
    assert "hub: Error while downloading from" in err
    assert "Trying to resume download" in err
    assert f"model someone/student: fetched into {world.home}/hub" in err


def test_after_a_download_that_ended_the_same_command_fetches_only_what_lacks(world: World) -> None:
    world.hub.add("models", "someone/student", world.model | {"large.txt": bytes(LARGE)})
    world.hub.cuts["large.txt"] = [1000] * 6
    code, _, err = world.answer("run", "--rounds", "0")
    assert code == 1, err
    assert "model someone/student at " in err
    assert "no whole answer from" in err
    assert "files that are whole are kept" in err
    assert "to continue: kdpipe run recipe.yaml --rounds 0" in err
    assert world.unfinished() == []
    kept = world.blobs()
    assert kept
    world.hub.asked.clear()
    assert world.answer("run", "--rounds", "0")[0] == 0
    student = world.hub.repositories["models", "someone/student"].refs["main"]
    again = [
        one.path
        for one in world.hub.asked
        if student in one.path and one.method == "GET" and "/api/" not in one.path
    ]
    assert [path.rpartition("/")[2] for path in again] == ["large.txt"]
    assert set(kept) < set(world.blobs())


def test_a_download_that_fills_the_disk_is_a_sentence_and_leaves_nothing_half_used(world: World) -> None:
    world.hub.add("models", "someone/student", world.model | {"large.txt": bytes(LARGE)})
    with mounted(world.home, "-t", "tmpfs", "-o", "size=16m", "tmpfs"):
        code, _, err = world.answer("run", "--rounds", "0")
        assert code == 1, err
        assert f"{world.home}/hub: cannot be written: No space left on device" in err
        assert "free some space" in err
        assert "HF_HOME names another place" in err
        assert world.unfinished() == []
        subprocess.run(["mount", "-o", "remount,size=64m", str(world.home)], check=True)
        assert world.answer("run", "--rounds", "0")[0] == 0


def test_a_disk_that_a_data_set_fills_when_it_is_opened_is_no_fault_of_the_data(world: World) -> None:
    world.hub.add("datasets", "someone/sums", {"sums/train.parquet": parquet(world.folder, 20_000)}, ref="v1")
    world.recipe(task=dataset(config=None, split={"train": "train[:8]", "test": "train[-8:]"}))
    disk = world.folder / "disk"
    world.environment["HF_DATASETS_CACHE"] = str(disk)
    with mounted(disk, "-t", "tmpfs", "-o", "size=64k", "tmpfs"):
        code, _, err = world.answer("run", "--rounds", "0")
        assert code == 1, err
        assert f"{disk}: cannot be written: " in err
        assert "No space left on device" in err
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert world.answer("run", "--rounds", "0")[0] == 0


def test_a_signal_ends_a_download_at_its_next_piece(world: World) -> None:
    world.hub.add("models", "someone/student", world.model | {"large.txt": bytes(2 * LARGE)})
    world.hub.stalls["large.txt"] = threading.Event()
    process = world.start("run")
    assert process.stderr is not None
    assert process.stderr.readline() == f"model someone/student: fetched into {world.home}/hub\n"
    process.send_signal(signal.SIGINT)
    world.hub.stalls["large.txt"].set()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopped: by SIGINT at the download of model someone/student" in err
    assert "to continue: kdpipe run recipe.yaml" in err
    assert world.unfinished() == []
    assert world.answer("run", "--rounds", "0")[0] == 0


def test_a_terminal_sees_a_bar(world: World) -> None:
    world.hub.add("models", "someone/student", world.model | {"large.txt": bytes(LARGE)})
    world.hub.cuts["large.txt"] = [LARGE - 1000]  # the client waits a second before it resumes
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (24, 80))
    process = world.start("run", "--rounds", "0", stderr=theirs, stdout=subprocess.DEVNULL)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 65536)
        except OSError:
            break
    os.close(ours)
    assert process.wait(timeout=60) == 0, shown.decode()
    # Whether the client draws its last state too is up to its clock.
    assert max(map(int, re.findall(rb"model someone/student: +(\d+)%", shown))) >= 90
    assert b"/24.0M [" in shown
    assert b"\xe2\x96\x88" in shown  # a block of the bar
    assert b"fetched" not in shown
