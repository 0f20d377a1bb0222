"""A run that ends at any of its changes to the disk is finished by the same command: some here; the study does all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import every_write

ROOT = Path(__file__).resolve().parents[2]


def trials(*arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.every_write", *arguments]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in answer.stdout.splitlines()]
    assert answer.returncode == 0, answer.stderr + str(
        [one for one in found if one["found"] != "as unbroken"]
    )
    return found


@pytest.mark.slow
def test_a_run_ended_early_and_late_ends_as_an_unbroken_one() -> None:
    """The trials are forked from this process, which has imported everything already."""
    with every_write.a_world() as world:
        found = [*every_write.trials(world, first=10, stride=120, twice=False)]
    assert [trial.found for trial in found] == ["as unbroken"] * 4
    assert [trial.ends for trial in found] == [[(at, end)] for at in (10, 130) for end in ("torn", "done")]
    assert [len(trial.doing) for trial in found] == [1] * 4, "each was ended where it was to be"


@pytest.mark.crash
@pytest.mark.parametrize(("arguments", "ends"), [(("--stride", "11"), 1), (("--stride", "23", "--twice"), 2)])
def test_a_run_ended_at_a_durable_write_ends_as_an_unbroken_one(
    arguments: tuple[str, ...], ends: int
) -> None:
    found = trials(*arguments)
    changes = found[0]["changes"]
    assert changes > 100
    assert len(found) >= changes // int(arguments[1]) * 2
    assert {len(trial["ends"]) for trial in found} == {ends}
    what = " ".join(line.split()[1] for trial in found for line in trial["doing"])
    assert {"write", "line", "remove"} <= {*what.split()}


@pytest.mark.crash
@pytest.mark.parametrize(
    ("fault", "first"), [("ENOSPC", "0"), ("EIO", "3"), ("EROFS", "7"), ("EACCES", "11")]
)
def test_a_change_that_the_system_refuses_is_told_and_the_same_command_goes_on(
    fault: str, first: str
) -> None:
    found = trials("--fault", fault, "--first", first, "--stride", "14")
    assert len(found) > 10
    assert all(trial["doing"][0].startswith(f"{fault}: ") for trial in found)
