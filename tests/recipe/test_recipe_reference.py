"""docs/recipe.md and the schema's descriptions: every field of every section, and none that is gone."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from kdpipe.cli.app import app
from kdpipe.recipe.models import Optimizer, SftOptimizer
from kdpipe.recipe.reference import described_schema, field_texts, reference
from kdpipe.recipe.schema import Recipe, SelfTeacher
from kdpipe.recipe.section import Section

PAGE = Path(__file__).parents[2] / "docs/recipe.md"


def sections() -> list[type[Section]]:
    """The classes that stand in a recipe: those without sections derived from them."""
    found, todo = [], [Section]
    while todo:
        derived = todo.pop().__subclasses__()
        found += [each for each in derived if not each.__subclasses__()]
        todo += derived
    return found


def fields() -> list[tuple[str, str]]:
    return [
        (section.__name__, field.alias or name)
        for section in sections()
        for name, field in section.model_fields.items()
    ]


def test_every_field_has_a_text_of_whole_sentences() -> None:
    assert len(fields()) > 200
    texts = {section.__name__: field_texts(section) for section in sections()}
    assert {(section, name) for section in texts for name in texts[section]} == set(fields())
    sentences = [text for section in texts.values() for text in section.values()]
    assert all(text.endswith(".") and len(text) < 200 for text in sentences)


def test_a_field_has_the_text_below_it_or_below_the_field_that_it_is_derived_from() -> None:
    rounds, cold_start = field_texts(Optimizer), field_texts(SftOptimizer)
    assert rounds["betas"] == cold_start["betas"] == "Adam's decays of the first and second moment."
    assert rounds["schedule"] == "How the rate falls after warm-up."
    assert cold_start["schedule"] == "How the rate falls after warm-up, over `steps`."
    assert field_texts(SelfTeacher)["self"].startswith("The student before round 1, ")


def test_the_page_is_what_the_command_prints() -> None:
    printed = CliRunner().invoke(app, ["schema", "--markdown"])
    assert printed.exit_code == 0
    assert printed.stdout == reference()
    assert PAGE.read_text(encoding="utf-8") == reference(), "run: kdpipe schema --markdown > docs/recipe.md"


def test_the_page_has_a_table_for_every_section_and_a_row_for_every_field() -> None:
    tables = list(reference().split("\n## ")[1:])
    assert len(tables) == len(sections())
    rows = sum(line.startswith("| `") for line in reference().splitlines())
    assert rows == len(fields())


def test_the_schema_describes_every_field_and_still_takes_what_it_took() -> None:
    plain, described = Recipe.model_json_schema(by_alias=True), described_schema()
    for section in described["$defs"].values():
        for value in section.get("properties", {}).values():
            assert value.pop("description")
    for value in described["properties"].values():
        assert value.pop("description")
    assert described == without_titles(plain)
    json.dumps(described)


def without_titles(schema: dict[str, object]) -> dict[str, object]:
    document = json.loads(json.dumps(schema))
    for section in (document, *document["$defs"].values()):
        for value in section.get("properties", {}).values():
            value.pop("title", None)
    return document
