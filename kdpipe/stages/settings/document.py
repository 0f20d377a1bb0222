"""Settings as the JSON that is hashed: every field under its name in the recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pydantic import JsonValue

from kdpipe.recipe.section import Section
from kdpipe.stages.settings.model import TaskSettings
from kdpipe.store.step import Fields

NAME = "name"


def document(settings: Any) -> Fields:
    """Every field of a frozen dataclass of settings, and of those inside it, as JSON."""
    return {
        field.metadata.get(NAME, field.name.rstrip("_")): _json(getattr(settings, field.name))
        for field in fields(settings)
    }


def named(path: str) -> dict[str, str]:
    """The metadata of a field that the recipe has under another name."""
    return {NAME: path}


def _json(value: Any) -> JsonValue:
    match value:
        case None | str() | int() | float():
            plain: JsonValue = value
            return plain
        case TaskSettings():
            return _json({**value.problems, **value.grading})
        case Section():  # a dump of pydantic's would build a serializer for each section first
            known = type(value).model_fields.items()
            return {info.alias or name: _json(getattr(value, name)) for name, info in known}
        case Mapping():
            return {str(name): _json(item) for name, item in value.items()}
        case list() | tuple():
            return [_json(item) for item in value]
    return document(value)
