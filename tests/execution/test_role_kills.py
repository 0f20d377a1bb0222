"""Roles in processes of their own, in a real run: whoever is killed, nobody is left, and the next run continues."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.commands import Command, When, cpu_seconds, members, with_group
from tests.worlds import load_tiny, payload_digests, run_near, write_recipe

Victim = Literal["run", "performer", "sampler", "teacher"]
TARGETS = {"performer": "kdpipe.execution.executor:Performer", "role": "kdpipe.engines.remote:Host"}
LOGS = {"performer": "worker.log", "sampler": "sampler.log", "teacher": "teacher-teacher.log"}
WIDE = {"hidden_size": 64, "intermediate_size": 64, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
"""Heads as wide as vLLM wants them on a CPU."""
VLLM: dict[str, Any] = {
    "rounds": 1,
    "student__scratch": WIDE,
    "rollout": {"prompts": 64, "samples": 16, "max_new_tokens": 100, "engine": "vllm"},
    "runtime__part_rows": 16,  # many parts: the kill has to come before the last one
    "evaluate__engine": "hf",
    "runtime__placement": {},
    "runtime__vllm": {"kv_cache_gib": 0.25, "max_num_seqs": 64, "batch_tokens": 64},
}


class Tree:
    """A run with its processes, found by what they serve and by the log that they write to."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        write_recipe(folder, **{"runtime__placement": {"own_process": ["sampler", "teacher"]}, **changes})
        self.command = Command(folder, folder / "out")
        self.before = len(self.command.events())
        self.process: subprocess.Popen[bytes] = self.command.start()

    def wait_for(self, when: When) -> None:
        started = time.monotonic()
        while not any(when.matches(event) for event in self.command.events()[self.before :]):
            assert self.process.poll() is None, self.command.output()
            assert time.monotonic() - started < 400, f"no {when}: {self.command.output()}"
            time.sleep(0.01)

    def pid(self, victim: Victim) -> int:
        if victim == "run":
            return self.process.pid
        target = TARGETS["performer" if victim == "performer" else "role"]
        found = [pid for pid in self.members() if serves(pid, target) and writes_to(pid, LOGS[victim])]
        assert len(found) == 1, (victim, found)
        return found[0]

    def members(self) -> list[int]:
        return members(self.process.pid)

    def assert_gone(self, *, seconds: float) -> None:
        started = time.monotonic()
        while left := self.members():
            assert time.monotonic() - started < seconds, f"{left} are left"
            time.sleep(0.01)

    def end(self) -> None:
        for pid in self.members():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        with_group(self.process.pid, signal.SIGKILL)
        self.process.wait()


def serves(pid: int, target: str) -> bool:
    """Whether the process runs this target, and is no guard, which has closed its log."""
    try:
        return target.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except FileNotFoundError:
        return False


def writes_to(pid: int, log: str) -> bool:
    try:
        return Path(f"/proc/{pid}/fd/2").readlink().name == log
    except FileNotFoundError:
        return False


@pytest.fixture
def trees() -> Iterator[list[Tree]]:
    made: list[Tree] = []
    yield made
    for tree in made:
        tree.end()


KILLS: list[tuple[Victim, When]] = [
    ("sampler", When("part done", "rollout@1")),
    ("performer", When("part done", "rollout@1")),
    ("teacher", When("part done", "teacher-score@1")),
    ("run", When("part done", "teacher-score@1")),
]
MANY_PARTS = {"rounds": 1, "runtime__part_rows": 1}
"""So many that a kill a few parts late still finds one to come."""


@pytest.mark.crash
def test_whoever_is_killed_nobody_is_left_and_the_next_run_ends_as_an_unbroken_one(
    tmp_path: Path, trees: list[Tree]
) -> None:
    run_near(load_tiny(tmp_path, **MANY_PARTS), tmp_path / "unbroken")
    for victim, when in KILLS:
        tree = Tree(tmp_path, **MANY_PARTS)
        trees.append(tree)
        tree.wait_for(when)
        os.kill(tree.pid(victim), signal.SIGKILL)
        code = tree.process.wait(timeout=10)
        assert code == (-9 if victim == "run" else 1)
        tree.assert_gone(seconds=5)
        if victim != "run":
            output = tree.command.output()
            assert "the worker died: signal SIGKILL" in output
            assert f"logs/{LOGS[victim]}" in output
            assert "everything finished is kept; to continue: " in output
    tree = Tree(tmp_path, **MANY_PARTS)
    trees.append(tree)
    tree.wait_for(When("step done", "teacher-score@1"))
    teacher = tree.pid("teacher")
    [guard] = [pid for pid in tree.members() if pid != teacher and os.getpgid(pid) == teacher]
    os.kill(guard, signal.SIGKILL)  # which stops nothing
    assert tree.process.wait(timeout=120) == 0, tree.command.output()
    tree.assert_gone(seconds=5)
    assert payload_digests(tree.command.workspace) == payload_digests(tmp_path / "unbroken")


@pytest.mark.crash
def test_a_signal_stops_a_role_that_samples_for_long_in_time(tmp_path: Path, trees: list[Tree]) -> None:
    long = {"prompts": 64, "samples": 64, "max_new_tokens": 200}
    tree = Tree(tmp_path, rounds=1, rollout=long, runtime__part_rows=512, runtime__sample_tokens=3000)
    trees.append(tree)
    tree.wait_for(When("part started", "rollout@1", 0))
    sampler = tree.pid("sampler")
    started, before = time.monotonic(), cpu_seconds(sampler)
    while cpu_seconds(sampler) - before < 0.5:  # in the middle of the part
        assert time.monotonic() - started < 60
        time.sleep(0.01)
    os.killpg(tree.process.pid, signal.SIGINT)  # as a terminal does
    started = time.monotonic()
    assert tree.process.wait(timeout=8) == 130, tree.command.output()
    tree.assert_gone(seconds=1)
    assert time.monotonic() - started < 8


@pytest.mark.vllm
def test_a_killed_vllm_and_a_killed_process_around_it_leave_nobody_and_the_next_run_continues(
    tmp_path: Path, trees: list[Tree]
) -> None:
    for victim in ("sampler", "vLLM"):
        tree = Tree(tmp_path, **VLLM)
        trees.append(tree)
        tree.wait_for(When("part done", "rollout@1"))
        sampler = tree.pid("sampler")
        children = Path(f"/proc/{sampler}/task/{sampler}/children").read_text().split()
        [core] = [int(pid) for pid in children if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill({"sampler": sampler, "vLLM": core}[victim], signal.SIGKILL)
        assert tree.process.wait(timeout=10) == 1, tree.command.output()
        tree.assert_gone(seconds=5)
        output = tree.command.output()
        assert {"sampler": "the worker died: signal SIGKILL", "vLLM": "engine process died"}[victim] in output
        assert "logs/sampler.log" in output
        assert "everything finished is kept; to continue: " in output
    tree.command.finish()
    [path] = tree.command.workspace.glob("store/train/*/metrics.jsonl")
    metrics = {row["name"]: row["value"] for row in map(json.loads, path.read_text().splitlines())}
    assert 0 < metrics["train/mismatch_nats_max"] < 1e-4
