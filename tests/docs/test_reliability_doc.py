"""docs/reliability.md has the figures of the committed results, and names tests and studies that are there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests import kills
from tests.docs.test_objectives_doc import study
from tests.pipeline import test_machine_faults

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def results(name: str) -> list[dict[str, Any]]:
    path = ROOT / "benchmarks" / "results" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", ["kills", "every_write", "trials", "load"])
def test_its_table_is_that_of_the_results(name: str) -> None:
    assert f"\n\n{study(name).markdown(results(name))}\n\n" in DOC


def test_so_many_kills_lost_nothing() -> None:
    found = study("kills").totals(results("kills"))
    assert found["kills"] >= 200
    assert found["losses"] == 0
    assert found["at most"] == kills.MAX_KILLS
    [commit] = {row["commit"] for row in results("kills") if "commit" in row}
    assert f"{found['kills']} kills and {found['signals']} signals ended {found['runs']} runs" in DOC
    assert f"(run at `{commit[:7]}`)" in DOC
    assert not commit.endswith("-dirty")


def test_every_change_was_tried_and_lost_nothing() -> None:
    rows = results("every_write")
    assert all(row["not_as_unbroken"] == [] for row in rows)
    ended = rows[0]
    assert (ended["sweep"], ended["stride"]) == ("ended", 1)
    assert ended["trials"] == 2 * ended["changes"]
    assert ended["cpu_seconds_per_trial"] < 2
    assert f"makes {ended['changes']} changes to the disk" in DOC
    [commit] = {row["commit"] for row in rows}
    assert f"run at `{commit[:7]}`" in DOC
    assert not commit.endswith("-dirty")


def test_every_trial_kept_its_promises() -> None:
    rows = results("trials")
    assert sum(row["trials"] for row in rows) >= 600
    assert all(row["failed"] == [] for row in rows)
    assert not any(row["commit"].endswith("-dirty") for row in rows)


def test_five_hundred_rounds_leave_memory_and_files_nearly_as_they_were() -> None:
    [row] = [row for row in results("load") if row["part"] == "long"]
    first, last = row["each"][0], row["each"][-1]
    assert (last["round"], row["failed"]) == (500, [])
    assert last["megabytes"] <= 1.1 * first["megabytes"]
    assert last["open_files"] <= first["open_files"]


def test_its_bounds_are_those_of_the_harness() -> None:
    bounds = (kills.STOP_SECONDS, kills.AT_ONCE_SECONDS, kills.DEAD_WORKER_SECONDS)
    first, second, worker = (f"{bound:.0f}" for bound in bounds)
    assert (
        f"more than {first} seconds ({second} after a second signal, {worker} after a killed worker, " in DOC
    )
    assert f"a process of the command alive {kills.ORPHAN_SECONDS:.0f} seconds after it" in DOC


def test_there_is_a_line_for_each_test_of_the_machine() -> None:
    table = DOC.partition("## Faults of the machine")[2].partition("\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(lines) == sum(name.startswith("test_") for name in vars(test_machine_faults))


def test_what_it_names_is_there() -> None:
    named = set(re.findall(r"`(tests/[\w/]+\.py)`", DOC)) | set(
        re.findall(r"python (benchmarks/\w+\.py)", DOC)
    )
    assert len(named) >= 5
    for path in named:
        assert (ROOT / path).exists(), path
