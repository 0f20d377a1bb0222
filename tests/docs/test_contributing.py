"""CONTRIBUTING.md: the files and functions that it names are there, and its table counts what it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import kdpipe
from tests.test_house import ORDER

PACKAGE = Path(kdpipe.__file__).parent
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
NEW = {"data/tasks/KIND.py", "stages/NAME.py", "data/graders/NAME.py", "engines/NAME"}
"""What one adds: no such file is there yet."""
STEPS = re.findall(r"^\d\. `(\S+)`, (.+?):", PAGE, re.MULTILINE)
ROWS = re.findall(r"^\| ([^|]+) \| ([^|]+) \| (\d) \|$", PAGE, re.MULTILINE)
MOST = {"KD loss": 3, "task": 2, "grader": 3, "engine": 3, "stage": 4, "recipe field": 2}


def test_the_files_of_the_page_are_there() -> None:
    named = set(re.findall(r"`((?:\w+/)+\w+(?:\.py)?)[`,]", PAGE)) - NEW
    assert len(named) > 30
    assert {name for name in named if not ((PACKAGE / name).exists() or (ROOT / name).exists())} == set()


def test_the_packages_of_the_page_are_those_of_the_line() -> None:
    assert re.findall(r"^\| `(\w+?)(?:\.py)?` \|", PAGE, re.MULTILINE) == ORDER


@pytest.mark.parametrize(("file", "names"), STEPS)
def test_a_step_of_a_path_names_what_its_file_defines(file: str, names: str) -> None:
    text = (PACKAGE / file).read_text(encoding="utf-8")
    for name in re.findall(r"`([\w.]+)`", names):
        assert re.search(rf"^ *(def|class) {name.rpartition('.')[2]}\b|^{name} = ", text, re.MULTILINE), name


def test_each_path_has_at_most_six_files() -> None:
    assert len(STEPS) == 12
    assert len({file for file, _ in STEPS}) == 12


def test_the_table_counts_the_files_that_it_names() -> None:
    rows = {
        kind: (set(re.findall(r"`(\w+/[\w/]+(?:\.py)?)`", files)), int(count)) for kind, files, count in ROWS
    }
    assert {kind: len(files) for kind, (files, _) in rows.items()} == MOST
    assert {kind: count for kind, (_, count) in rows.items()} == MOST
