"""A record of a user's data: its texts, numbers and conversations, each checked where it is read."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import cast

from kdpipe.data.rows import Turn, TurnRole
from kdpipe.errors import DataError

MAX_ID_LENGTH = 200
RIGHT_LINE = '{"question": "What is 2 + 3?", "answer": "5"}'
RIGHT_TURNS = '{"messages": [{"role": "user", "content": "What is 2 + 3?"}]}'
OPTIONS = ("choices", "options")
ROLES = ("system", "user", "assistant")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class DataRecord:
    """One record of a data file; `place` says where it stands, as messages show it."""

    place: str
    fields: dict[str, object]

    def value(self, field: str) -> object:
        """What `field` holds, None where nothing does.

        `a.b` is b in the object a, unless a field has that name.
        """
        if field in self.fields or "." not in field:
            return self.fields.get(field)
        found: object = self.fields
        for name in field.split("."):
            found = found.get(name) if isinstance(found, dict) else None
        return found

    def text(self, field: str) -> str:
        """The text in `field`; raises DataError when it is missing, not text, blank or not Unicode."""
        return self._checked(field, self._present(field))

    def answer(self, field: str) -> str:
        """The answer in `field`: text, a number, or a conversation's one turn of the assistant."""
        value = self._present(field)
        if isinstance(value, list):
            turns = self.turns(field)
            if [turn.role for turn in turns] != ["assistant"]:
                raise self._refusal(field, f"{len(turns)} turns", "one, of the assistant", RIGHT_LINE)
            return turns[0].content
        if isinstance(value, int | float | Decimal) and not isinstance(value, bool) and _is_finite(value):
            # Not `str`: that writes 1e+20.
            return str(value) if isinstance(value, int) else format(Decimal(str(value)), "f")
        return self._checked(field, value, "text or a number")

    def asked(self, field: str, context: str | None = None) -> tuple[Turn, ...]:
        """The turns that `field` holds: those of a list, or one of the user for a text.

        Under a text stands that of the field `context`, where there is one.
        """
        value = self._present(field)
        if isinstance(value, list):
            return self.turns(field)
        text = self._checked(field, value, "text or a list of turns")
        if re.match(r'\s*\[\s*\{\s*"', text):
            raise self._refusal(field, "a list written as text", "the list itself", RIGHT_TURNS)
        if context is None or self.value(context) in (None, ""):
            return (Turn("user", text),)
        return (Turn("user", f"{text}\n\n{self.text(context)}"),)

    def turns(self, field: str) -> tuple[Turn, ...]:
        """The turns of a list of `{"role": ..., "content": ...}`, a system turn at most as the first."""
        value = self._present(field)
        assert isinstance(value, list)
        turns = tuple(self._turn(f"{field}[{index}]", turn) for index, turn in enumerate(value))
        if any(turn.role == "system" for turn in turns[1:]):
            raise self._refusal(field, "a system turn after others", "one at most, the first", RIGHT_TURNS)
        return turns

    def options(self) -> dict[str, str]:
        """The texts of two to five options in `choices` or `options`, by their labels, if it has any."""
        for name in OPTIONS:
            value = self.value(name)
            if isinstance(value, dict) and isinstance(texts := value.get("text"), list):  # as ARC has them
                labels = value.get("label")
                value = texts
            elif isinstance(value, dict):
                labels, value = list(value), list(value.values())
            else:
                labels = None
            if (
                isinstance(value, list)
                and 2 <= len(value) <= 5
                and all(isinstance(one, str) for one in value)
            ):
                known = (
                    labels if isinstance(labels, list) and len(labels) == len(value) else range(len(value))
                )
                return {str(label): " ".join(one.split()) for label, one in zip(known, value, strict=True)}
        return {}

    def identity(self, field: str) -> str:
        """The record's own id in `field`, text or a whole number; raises DataError on one unfit for logs."""
        value = self._present(field)
        whole = isinstance(value, int) and not isinstance(value, bool)
        text = str(value) if whole else self.text(field)
        if not text.isprintable() or len(text) > MAX_ID_LENGTH:
            raise DataError(
                f"{self.place}: the id in field {field!r} has {len(text)} characters ({text[:40]!a}...), "
                f"expected at most {MAX_ID_LENGTH}, all printable"
            )
        return text

    def others(self, *known: str | None) -> dict[str, str | int | float]:
        """Every text and finite number of the record but those in `known` fields."""
        return {
            name: value
            for name, value in self.fields.items()
            if name not in known
            and (
                (isinstance(value, str) and not _SURROGATE.search(value))
                or (isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value))
            )
        }

    def _present(self, field: str) -> object:
        if (value := self.value(field)) is None and field not in self.fields:
            known = ", ".join(map(repr, self.fields)) or "none"
            raise DataError(
                f"{self.place}: field {field!r} is missing; the record has: {known}",
                hint="task.question_field and task.answer_field name the fields to read",
            )
        return value

    def _checked(self, field: str, value: object, expected: str = "text") -> str:
        if not isinstance(value, str):
            right = f"one right line: {RIGHT_LINE}"
            if isinstance(value, int | float):
                right = "write it in quotes"
            elif isinstance(value, dict) and value:
                right += f"; what is in an object is named with a dot: {field}.{next(iter(value))}"
            raise DataError(
                f"{self.place}: field {field!r} is {kind_of(value)}, expected {expected}", hint=right
            )
        if not value.strip():
            raise DataError(f"{self.place}: field {field!r} is empty", hint="remove the record or fill it in")
        if _SURROGATE.search(value):
            raise DataError(
                f"{self.place}: field {field!r} holds half of a surrogate pair, which is not a character"
            )
        return value

    def _turn(self, name: str, value: object) -> Turn:
        if not isinstance(value, dict):
            raise self._refusal(name, kind_of(value), "a turn with role and content", RIGHT_TURNS)
        # A column of parquet has every key that one of its rows has, null in the others.
        given = {key: inner for key, inner in value.items() if inner is not None}
        if "from" in given and "value" in given:
            found = "a turn of ShareGPT, with 'from' and 'value'"
            raise self._refusal(name, found, "'role' and 'content'", RIGHT_TURNS)
        role, content = given.get("role"), given.get("content")
        if called := next((key for key in ("tool_calls", "function_call") if given.get(key)), None):
            raise self._refusal(name, f"a turn with {called!r}", "turns of text alone", RIGHT_TURNS)
        if role not in ROLES or "content" not in given:
            keys = ", ".join(map(repr, given)) or "nothing"
            found = f"a turn with {keys}" if "role" not in given or role in ROLES else f"a turn of {role!r}"
            raise self._refusal(name, found, f"a role of {', '.join(ROLES)} and a content", RIGHT_TURNS)
        if isinstance(content, list):
            content = "".join(self._part(f"{name}.content[{i}]", part) for i, part in enumerate(content))
        if role == "system" and content == "":
            return Turn("system", "")
        return Turn(cast("TurnRole", role), self._checked(f"{name}.content", content))

    def _part(self, name: str, part: object) -> str:
        """The text of a content part as OpenAI has it."""
        if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
            return str(part["text"])
        kind = (
            f"a part of type {part['type']!r}" if isinstance(part, dict) and "type" in part else kind_of(part)
        )
        raise self._refusal(name, kind, 'parts of text: {"type": "text", "text": ...}', RIGHT_TURNS)

    def _refusal(self, field: str, found: str, expected: str, line: str) -> DataError:
        return DataError(
            f"{self.place}: field {field!r} is {found}, expected {expected}", hint=f"one right line: {line}"
        )


def _is_finite(value: float | Decimal) -> bool:
    """Whether a number is one; of whole numbers, however long, without making them floats."""
    return isinstance(value, int) or math.isfinite(value)


def kind_of(value: object) -> str:
    """What `value` is, in JSON's words."""
    match value:
        case None | bool() | int() | float():
            text = json.dumps(value)
            return text if len(text) <= 40 else f"a number of {len(text)} digits"
        case str():
            return "text"
        case list():
            inner = {
                kind_of(one).partition(" with ")[0] for one in value if isinstance(one, dict | list | str)
            }
            return f"a list of {' and '.join(sorted(inner))}" if inner else "a list"
        case dict():
            return f"an object with {', '.join(map(repr, list(value)[:6])) or 'nothing'}"
    return f"a {type(value).__name__}"
