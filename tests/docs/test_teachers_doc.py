"""docs/teachers.md says what the code has: fields, defaults and origins by the schema, examples by loading them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from kdpipe.engines.server.http import FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS, MAX_RETRY_AFTER_SECONDS
from kdpipe.engines.server.replies import TAIL_FLOOR
from kdpipe.engines.server.signature import SAME_NATS
from kdpipe.recipe.runtime import ServerRuntime
from kdpipe.recipe.schema import Recipe, SelfTeacher
from kdpipe.recipe.section import Section
from kdpipe.recipe.teacher import ABSENT, KINDS, Server
from tests.docs.test_objectives_doc import study
from tests.worlds import load_tiny

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs" / "teachers.md").read_text(encoding="utf-8")


def tables() -> dict[str, list[list[str]]]:
    """The cells of every table by its first heading, without that line; code that is a whole cell is bare."""
    found = {}
    for block in re.findall(r"(?:^\|.*\n)+", DOC, re.MULTILINE):
        lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in block.splitlines()]
        rows = [[re.sub(r"^`([^`]*)`$", r"\1", cell) for cell in line] for line in lines]
        assert len({len(row) for row in rows}) == 1, rows[0]
        found[rows[0][0]] = rows[2:]
    return found


TABLES = tables()


def test_every_field_of_a_teacher_is_there_with_its_default() -> None:
    documented = [(field, yaml.safe_load(default)) for field, default, _ in TABLES["field of a teacher"]]
    assert dict(documented) == ABSENT


def choices(annotation: Any) -> list[str]:
    """The strings that a field may be."""
    found = [arg for arg in get_args(annotation) if isinstance(arg, str)]
    return found + [choice for arg in get_args(annotation) for choice in choices(arg)]


@pytest.mark.parametrize("field", ["self_", "dtype"])
def test_every_choice_of_a_field_is_named_where_the_field_is(field: str) -> None:
    info = SelfTeacher.model_fields[field]
    [row] = [row for row in TABLES["field of a teacher"] if row[0] == (info.alias or field)]
    assert re.findall(r"`(\w+)`", row[2]) == choices(info.annotation)
    assert choices(info.annotation)


@pytest.mark.parametrize(
    ("heading", "section"), [("field of `server`", Server), ("field of `runtime.server`", ServerRuntime)]
)
def test_every_field_of_a_server_is_there_with_its_default(heading: str, section: type[Section]) -> None:
    documented = [(field, yaml.safe_load(default)) for field, default, _ in TABLES[heading]]
    fields = section.model_fields.items()
    assert documented == [(name, None if info.is_required() else info.default) for name, info in fields]


def test_the_limits_of_patience_are_those_of_the_code() -> None:
    assert f"after {FIRST_DELAY_SECONDS}\nseconds, 1, 2 and so on up to {MAX_DELAY_SECONDS:g}" in DOC
    assert f"(at most {MAX_RETRY_AFTER_SECONDS:g})" in DOC
    assert TAIL_FLOOR == 2.0**-23
    assert "no less than 2^-23" in DOC
    assert f"more than {SAME_NATS} nats a\ntoken apart" in DOC


def test_the_origins_are_those_of_the_code() -> None:
    origins = [row[0] for row in TABLES["origin"]]
    assert origins == list(KINDS)
    for origin in origins:
        [row] = [row for row in TABLES["field of a teacher"] if row[0] == origin]
        assert row[2].startswith("origin: ")
    [row] = [row for row in TABLES["origin"] if row[0] == "self"]
    assert all(f"`{choice}`" in row[1] for choice in choices(SelfTeacher.model_fields["self_"].annotation))


def test_the_fields_of_some_kinds_only_are_named() -> None:
    [text] = re.findall(r"Exactly one origin a teacher\. (.*?); a field of another kind", DOC, re.DOTALL)
    kinds: dict[str, set[str]] = {field: set() for field in ABSENT}
    for kind, section in KINDS.items():
        for name, info in section.model_fields.items():
            kinds[info.alias or name].add(kind)
    some = {field: owners for field, owners in kinds.items() if field not in KINDS and owners != set(KINDS)}
    assert set(re.findall(r"`(\w+)`", text)) == {*some, "model", "self", "scratch", "server"}
    assert some == {
        "revision": {"model"},
        "decay": {"self"},
        "quantization": {"model", "scratch"},
        "sft": {"model", "scratch"},
        "dtype": {"model", "scratch", "self"},
    }


EXAMPLES = re.findall(r"```yaml\n(.*?)```", DOC, re.DOTALL)


@pytest.mark.parametrize("text", EXAMPLES)
def test_every_example_is_a_recipe(text: str, tmp_path: Path) -> None:
    recipe = load_tiny(tmp_path, **yaml.safe_load(text)).recipe
    assert isinstance(recipe, Recipe)


def test_there_is_an_example_of_each_way_to_have_several() -> None:
    counts = [len(yaml.safe_load(text).get("teachers", [])) for text in EXAMPLES]
    assert counts.count(2) == 2


@pytest.mark.parametrize("name", ["specialists", "privileged", "sequence_kd"])
def test_the_document_holds_the_table_of_a_study_over_three_seeds(name: str) -> None:
    results = ROOT / "benchmarks" / "results" / f"{name}.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    script = study(name)
    assert not any("dirty" in row["commit"] for row in rows)
    assert {(row["seed"], row["arm"]) for row in rows} == {(s, arm) for s in (1, 2, 3) for arm in script.ARMS}
    marker = f"<!-- study: {results.relative_to(ROOT)} -->\n\n"
    assert DOC.partition(marker)[2].startswith(script.markdown(rows) + "\n")
