"""The recipe's schema with a sentence for every field, as JSON Schema and as `kdpipe docs recipe`."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import json
import re
import sys
from collections.abc import Iterator

from pydantic.json_schema import JsonSchemaValue as Schema

from kdpipe.recipe.schema import Recipe
from kdpipe.recipe.section import Section

SCALARS = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "`true`, `false`",
    "null": "null",
    "object": "mapping",
}
TITLE = """# Every field of a recipe

Made by `kdpipe schema --markdown` from the schema itself. `--set a.b=c` changes any field from the command line;
`kdpipe check RECIPE` says what is wrong with one, and `kdpipe schema` prints the JSON Schema that editors complete
from. A field without a default must be given. Everything but `runtime` and `tracking` is part of the fingerprint of
some step.
"""


def described_schema() -> Schema:
    """The JSON Schema of a recipe, each field with the text below it in the source as `description`."""
    schema = Recipe.model_json_schema(by_alias=True)
    sections = _sections(schema)
    for kind in _classes(Section):
        for field, text in field_texts(kind).items() if kind.__name__ in sections else ():
            value = sections[kind.__name__]["properties"][field]
            value["description"] = text
            value.pop("title", None)  # pydantic's own is the field's name in capitals
    return schema


def field_texts(kind: type[Section]) -> dict[str, str]:
    """What each field of a section means, by its name in a recipe: the text below it in the source.

    Read from the source when asked: pydantic's `use_attribute_docstrings` would cost every command 31 ms.
    """
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if issubclass(base, Section):
            texts |= _texts_of_module(base.__module__)[base.__name__]
    return {info.alias or name: texts[name] for name, info in kind.model_fields.items()}


@functools.cache
def _texts_of_module(module: str) -> dict[str, dict[str, str]]:
    """The text below each field, by class and field."""
    texts: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        if isinstance(node, ast.ClassDef):
            own = texts[node.name] = {}
            for pair in itertools.pairwise(node.body):
                match pair:
                    case ast.AnnAssign(target=ast.Name(id=field)), ast.Expr(
                        value=ast.Constant(value=str(text))
                    ):
                        own[field] = " ".join(text.split())
    return texts


def _classes(kind: type[Section]) -> Iterator[type[Section]]:
    """The class and all that are derived from it."""
    yield kind
    for each in kind.__subclasses__():
        yield from _classes(each)


def reference() -> str:
    """The page `kdpipe docs recipe`: a table for each section, in the order of a recipe."""
    sections = _sections(described_schema())
    places: dict[str, str] = {}
    _walk(sections, "Recipe", "The recipe", places)
    pages = [TITLE]
    for name, place in places.items():
        text = sections[name]["description"].strip()
        pages.append(f"## {place}\n\n{text}\n\n{_table(sections[name], sections)}\n")
    return "\n".join(pages)


def _sections(schema: Schema) -> dict[str, Schema]:
    """Every section by the name of its class."""
    objects = {name: each for name, each in schema["$defs"].items() if each.get("type") == "object"}
    return {"Recipe": schema, **objects}


def _walk(sections: dict[str, Schema], name: str, place: str, places: dict[str, str]) -> None:
    """Notes the place where this section and those inside it are first met, depth first."""
    if name in places:
        return
    places[name] = place
    for field, value in sections[name].get("properties", {}).items():
        inside = _inside(value, sections)
        for each in inside:
            path = field if name == "Recipe" else f"{place.partition(' ')[0]}.{field}"
            path += "[]" if value.get("type") == "array" else ""
            kind = _discriminator(sections[each])
            _walk(sections, each, f"{path} ({kind})" if kind and len(inside) > 1 else path, places)


def _inside(value: Schema, sections: dict[str, Schema]) -> list[str]:
    """The sections that a field may hold, in order."""
    references = re.findall(r'"\$ref": "#/\$defs/(\w+)"', json.dumps(value))
    return [name for name in references if name in sections]


def _discriminator(section: Schema) -> str | None:
    """What chooses this section among several: its `kind` or `term`, or the one field it must have."""
    properties, required = section.get("properties", {}), section.get("required", [])
    consts = (properties[key]["const"] for key in ("kind", "term") if "const" in properties.get(key, {}))
    return next(consts, required[0] if len(required) == 1 else None)


def _table(section: Schema, sections: dict[str, Schema]) -> str:
    rows = ["| field | value | default | what it is |", "|---|---|---|---|"]
    required = section.get("required", [])
    for field, value in sorted(section["properties"].items(), key=lambda item: item[0] not in required):
        default = value.get("default")
        is_told = field not in required and not (isinstance(default, dict) and _inside(value, sections))
        literal = default if isinstance(default, str) and default else json.dumps(default)
        shown = f"`{literal}`" if is_told else ""
        cells = (f"`{field}`", _kind(value, sections), shown, value["description"])
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def _kind(value: Schema, sections: dict[str, Schema]) -> str:
    """The values that a field takes, in words."""
    match value:
        case {"$ref": reference}:
            words = "section" if reference.rpartition("/")[2] in sections else "any"
        case {"const": only}:
            words = f"`{only}`"
        case {"enum": choices}:
            words = ", ".join(f"`{choice}`" for choice in choices)
        case {"anyOf": choices} | {"oneOf": choices}:
            words = " or ".join(dict.fromkeys(_kind(choice, sections) for choice in choices))
        case {"type": "array", "prefixItems": items}:
            words = f"{len(items)} numbers"
        case {"type": "array", "items": item}:
            words = f"list of: {_kind(item, sections)}"
        case {"type": name}:
            words = SCALARS[name] + _bounds(value)
        case _:
            words = "any"
    return words


def _bounds(value: Schema) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {value[key]:g}" for key, sign in signs.items() if key in value and value[key] != 2**31]
    return f" {', '.join(bounds)}" if bounds else ""
