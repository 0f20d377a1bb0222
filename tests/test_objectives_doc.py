"""docs/objectives.md says what the code has: names and defaults of its tables against the schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from kdpipe.recipe import KdTerm, Objective

DOC = (Path(__file__).parents[1] / "docs" / "objectives.md").read_text(encoding="utf-8")
TERMS: dict[str, type[BaseModel]] = {
    get_args(term.model_fields["term"].annotation)[0]: term for term in get_args(get_args(KdTerm)[0])
}


def table(*heading: str) -> list[list[str]]:
    """The cells of the table with these headings, without the headings."""
    lines = DOC.splitlines()
    start = lines.index("| " + " | ".join(heading) + " |") + 2
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip().strip("`") for cell in line.strip("|").split(" | ")])
    return rows


def said(default: Any) -> Any:
    """A default as the tables say it: sections with a discriminating field by its value alone."""
    if isinstance(default, BaseModel):
        given = default.model_dump(mode="json", exclude_unset=True)
        for name in ("term", "control", "kind"):
            if name in type(default).model_fields:
                return getattr(default, name)
        return given
    return default


def test_the_terms_are_those_of_the_code() -> None:
    documented = table("`term`", "per token", "its expected gradient is that of", "source")
    assert [row[0] for row in documented] == list(TERMS)


def test_every_parameter_of_a_term_is_there_with_its_default() -> None:
    documented = {}
    for field, terms, default, _ in table("field", "terms", "default", "meaning"):
        for term in terms.split(", "):
            documented[term, field] = yaml.safe_load(default)
    expected = {
        (name, field): said(info.default)
        for name, term in TERMS.items()
        for field, info in term.model_fields.items()
        if field != "term"
    }
    assert documented == expected


def test_every_field_of_an_objective_is_there_with_its_default() -> None:
    documented = {
        field: yaml.safe_load(default) for field, default, _ in table("field", "default", "meaning")
    }
    assert documented == {name: said(info.default) for name, info in Objective.model_fields.items()}


@pytest.mark.parametrize("field", ["kind"])
def test_the_kinds_are_those_of_the_code(field: str) -> None:
    documented = [row[0] for row in table("`kind`", "per token")]
    assert documented == list(get_args(Objective.model_fields[field].annotation))


@pytest.mark.parametrize("field", ["mask", "group_normalization", "normalization", "truncated", "end_token"])
def test_every_choice_of_a_field_is_named(field: str) -> None:
    [row] = [row for row in table("field", "default", "meaning") if row[0] == field]
    for choice in get_args(Objective.model_fields[field].annotation):
        assert choice in " ".join(row), choice
