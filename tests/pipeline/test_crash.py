"""Killed at any point, the same command ends with the payload digests of an unbroken run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import (
    Command,
    How,
    When,
    assert_metrics_are_there_once,
    assert_nothing_was_done_twice,
)
from tests.worlds import leftovers, load_tiny, payload_digests, run_near, write_recipe

IN_EVERY_STAGE_AND_BETWEEN = [
    When("checkpoint", "sft:student@0"),
    When("step done", "sft:student@0"),
    When("checkpoint", "sft:teacher@0"),
    When("part started", "evaluate:student@0", 1),
    When("part started", "evaluate:student@0", 2),  # reverse KL
    When("step started", "evaluate:teacher@0"),
    When("step started", "rollout@1"),
    When("part started", "rollout@1", 1),
    When("part done", "teacher-score@1", 1),
    When("step started", "train@1"),
    When("checkpoint", "train@1"),
    When("step done", "train@1"),
    When("part done", "rollout@2", 3),
    When("checkpoint", "train@2"),
    When("part started", "evaluate:student@2", 0),
    When("step done", "teacher-score@3"),
    When("checkpoint", "train@3"),
    When("step done", "train@3"),
]


def run_chain(folder: Path, kills: list[tuple[When, How]], *, rounds: int) -> None:
    """Kills the command at each event in turn, lets it finish, and compares with an unbroken run."""
    run_near(load_tiny(folder, rounds=rounds), folder / "unbroken")
    write_recipe(folder, rounds=rounds)
    command = Command(folder, folder / "out")
    for when, how in kills:
        command.kill(when, how)
    command.finish()
    assert payload_digests(command.workspace) == payload_digests(folder / "unbroken")
    assert leftovers(command.workspace) == []
    assert_nothing_was_done_twice(command.events(), command.kills)
    assert_metrics_are_there_once(command.workspace)


@pytest.mark.crash
def test_a_run_killed_twice_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    kills: list[tuple[When, How]] = [
        (When("part started", "rollout@1", 1), "group"),
        (When("checkpoint", "train@1"), "parent"),
    ]
    run_chain(tmp_path, kills, rounds=1)


@pytest.mark.crash
@pytest.mark.parametrize("how", ["group", "parent"])
def test_a_run_killed_in_every_stage_and_between_ends_as_an_unbroken_one(tmp_path: Path, how: How) -> None:
    run_chain(tmp_path, [(when, how) for when in IN_EVERY_STAGE_AND_BETWEEN], rounds=3)


@pytest.mark.crash
def test_a_run_stopped_by_signals_exits_in_time_and_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    kills: list[tuple[When, How]] = [
        (When("step started", "sft:student@0"), "SIGINT to the group"),  # the worker is still importing
        (When("checkpoint", "sft:teacher@0"), "SIGTERM"),
        (When("part started", "rollout@1", 0), "SIGINT"),
        (When("step started", "teacher-score@1"), "SIGTERM"),
        (When("step started", "train@1"), "SIGINT to the group"),
        (When("part started", "rollout@2", 1), "SIGHUP to the group"),  # the terminal is closed
        (When("part started", "evaluate:student@2", 1), "SIGTERM"),
    ]
    run_chain(tmp_path, kills, rounds=2)
