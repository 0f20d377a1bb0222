"""docs/models.md says what becomes of a model of each of many families; each is tried (slow)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.models.families import FAMILIES, outcome

DOC = Path(__file__).parents[2] / "docs" / "models.md"
STATED = {
    name: kind
    for kind, count, names in re.findall(
        r"^\| (right|right, slowly|refused) \((\d+)\) \| (.*) \|$", DOC.read_text(), re.M
    )
    for name in names.split(", ")
}


def test_the_table_has_each_family_once() -> None:
    rows = re.findall(r"^\| [a-z, ]+ \((\d+)\) \| (.*) \|$", DOC.read_text(), re.M)
    assert [int(count) for count, _ in rows] == [len(names.split(", ")) for _, names in rows]
    assert sum(int(count) for count, _ in rows) == len(STATED)
    assert STATED.keys() == FAMILIES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_what_the_table_says(name: str, tmp_path: Path) -> None:
    assert outcome(name, tmp_path).partition(":")[0] == STATED[name]
