"""docs/doctor.md says what the code has: probes, what they catch, whose they are, which `run` makes, and limits."""

from __future__ import annotations

import re
from pathlib import Path

from kdpipe.doctor.case import NEW_TOKENS, PROMPTS
from kdpipe.doctor.engine import BETTER_THAN_GUESSING, FLOORS, TIMES_NOISE, UNMEASURED
from kdpipe.doctor.finding import CATCHES
from kdpipe.doctor.student import MOST_MOVED
from kdpipe.doctor.teacher import TOP_K
from tests.clinic import examined, load_world, write_world

DOC = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """The cells of the table with that first heading, code marks stripped."""
    [block] = re.findall(rf"^\| {heading} \|.*\n\|[-|]+\|\n((?:^\|.*\n)+)", DOC, re.MULTILINE)
    return [[cell.strip().strip("`") for cell in line.strip("|").split(" | ")] for line in block.splitlines()]


def test_every_probe_is_there_with_what_it_catches() -> None:
    assert {row[0]: row[3].rstrip(" |") for row in rows("probe")} == CATCHES


def test_the_limits_are_those_of_the_code() -> None:
    documented = {row[0]: (float(row[1]), float(row[2])) for row in rows("dtype")}
    assert documented == {name: (floor, floor / 4) for name, floor in FLOORS.items()}
    assert f"may be {TIMES_NOISE:g} x that noise" in DOC
    assert f"may be {UNMEASURED.largest:g} nat apart at most, and {UNMEASURED.p99:g} at the" in DOC
    assert f"at most {MOST_MOVED:g} nats" in DOC
    assert f"or {TOP_K}. It" in DOC
    assert f"needs {BETTER_THAN_GUESSING} nats" in DOC


def test_whose_a_probe_is_and_whether_run_makes_it_is_as_documented(tmp_path: Path) -> None:
    loaded = load_world(write_world(tmp_path))
    quick, full = examined(loaded, depth="quick"), examined(loaded)
    for probe, of, in_run, _ in rows("probe"):
        found = {"teacher": "teacher", "student": "student"}
        patients = {about for name, about in full if name == probe}
        assert patients == (set(found) if of == "both" else {of}), probe
        assert {about for name, about in quick if name == probe} == (patients if in_run == "yes" else set())


def test_the_size_of_the_quick_examination_is_as_documented() -> None:
    assert f"with {PROMPTS['quick']} prompts and {NEW_TOKENS['quick']} new tokens" in DOC
