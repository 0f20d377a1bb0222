"""YAML text -> plain values that remember their lines. PyYAML's safe loader with three repairs.

Duplicate keys are errors; `1e-5` is a number (YAML 1.1 reads a string); numbers with a leading zero are
refused (YAML 1.1 reads `010` as 8), and so are those with colons (it reads `1:30` as 90). Aliases and tags
are refused: an alias of an alias of an alias is how a small text becomes a huge one. The spelling of every
scalar is kept, so that a message can show what was written.
"""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass, field, replace
from typing import Any

import yaml
from pydantic import JsonValue

from kdpipe.errors import RecipeError

Path = tuple[int | str, ...]
MAX_DEPTH = 50
"""Levels of a recipe; PyYAML's time grows with the square of the levels, until Python's stack is full."""


MAX_VALUES = 10_000
"""Values of a recipe: PyYAML reads some 40,000 in a second."""


def dotted(path: Path) -> str:
    """A path as a recipe's reader writes it, `a.b.0`."""
    return ".".join(map(str, path))


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-5` as a float and refuses aliases, tags and too many levels."""

    _depth = _values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None) is not None:  # of an alias, it is the name of its anchor
            found = "anchors and aliases"
        elif getattr(event, "tag", None) is not None:
            found = "tags"
        elif self._depth == MAX_DEPTH:
            found = f"more than {MAX_DEPTH} levels"
        elif self._values == MAX_VALUES:
            found = f"more than {MAX_VALUES:,} values"
        else:
            self._values += 1
            self._depth += 1
            node: yaml.Node | None = super().compose_node(parent, index)
            self._depth -= 1
            return node
        raise yaml.composer.ComposerError(None, None, f"{found} are not used here", event.start_mark)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


_CONSTRUCTOR = _Loader("")
MAX_NUMBER = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed YAML mapping; `origins` maps a path inside it to `file:line`, `spellings` to the text."""

    value: dict[str, JsonValue]
    name: str
    origins: dict[Path, str] = field(default_factory=dict)
    spellings: dict[Path, str] = field(default_factory=dict)

    def where(self, path: Path) -> str:
        """`file:line` of `path`, or of the nearest thing around it."""
        around = (path[:length] for length in range(len(path), -1, -1))
        return next((self.origins[each] for each in around if each in self.origins), self.name)

    def own_path(self, location: Path) -> Path:
        """`location` without the parts that are not keys of this document (names of union members).

        The last part is kept when it is a key that is missing here.
        """
        path: Path = ()
        value: Any = self.value
        for depth, part in enumerate(location, 1):
            indices = range(len(value)) if isinstance(value, list) else ()
            if part in (value if isinstance(value, dict) else indices):
                path, value = (*path, part), value[part]
            elif depth == len(location) and isinstance(value, dict) and re.fullmatch(r"[a-z_]+", str(part)):
                path = (*path, part)
        return path

    def with_value(self, path: tuple[str, ...], text: str, origin: str) -> Document:
        """This document with the value that `text` means at `path`; `origin` is what messages name.

        Mappings on the way are made, list items must exist.
        """
        value, added = parse_value(text, origin)
        root = copy.deepcopy(self.value)
        node: Any = root
        place: Path = ()
        for depth, part in enumerate(path, 1):
            key: int | str = part
            if isinstance(node, list):
                if not re.fullmatch("[0-9]{1,9}", part) or int(part) >= len(node):
                    raise RecipeError(
                        f"{origin}: {dotted(place)} is a list of {len(node)}; {part!r} is not an index of it"
                    )
                key = int(part)
            elif not isinstance(node, dict):
                raise RecipeError(f"{origin}: {dotted(place)} is not a mapping")
            place = (*place, key)
            if depth == len(path):
                node[key] = value
            elif isinstance(node, dict) and not isinstance(node.get(key), (dict, list)):
                node[key] = {}
            node = node[key]
        outside = {known: text for known, text in self.origins.items() if known[: len(place)] != place}
        spellings = {known: text for known, text in self.spellings.items() if known[: len(place)] != place}
        spellings |= {(*place, *inside): spelling for inside, spelling in added.items()}
        return replace(self, value=root, origins={**outside, place: origin}, spellings=spellings)


def read_yaml(text: str, name: str) -> Document:
    """The mapping in `text`; raises RecipeError with line and column on anything that is not one."""
    node = _compose(text, name)
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(
            f"{name}: a recipe is a mapping of sections", hint="kdpipe recipes quickstart  shows one"
        )
    document = Document(value={}, name=name)
    value = _construct(node, (), document)
    assert isinstance(value, dict)
    return replace(document, value=value)


def split_list(text: str, origin: str) -> list[str]:
    """The items of the YAML list `[text]` as they are written; raises RecipeError for no such list."""
    whole = f"[{text}]"
    node = _compose(whole, origin)
    if node is None or node.end_mark.index < len(whole) or text.rstrip().endswith(","):
        raise RecipeError(f"{origin}: expected values with single commas between them")
    return [whole[item.start_mark.index : item.end_mark.index].strip() for item in node.value]


def parse_value(text: str, origin: str) -> tuple[JsonValue, dict[Path, str]]:
    """The YAML value in `text`, as after `--set key=`, and the spellings of its scalars."""
    node = _compose(text, origin)
    document = Document(value={}, name=origin)
    return (None if node is None else _construct(node, (), document)), document.spellings


def _compose(text: str, name: str) -> yaml.Node | None:
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{name}:{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: not valid YAML: {str(error).splitlines()[0]}") from None
    return node


def _construct(node: yaml.Node, path: Path, document: Document) -> JsonValue:
    line = node.start_mark.line + 1
    origin = f"{document.name}:{line}"
    document.origins.setdefault(path, origin)
    if isinstance(node, yaml.ScalarNode):
        document.spellings[path] = node.value
        return _scalar(node, origin)
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, (*path, index), document) for index, item in enumerate(node.value)]
    mapping: dict[str, JsonValue] = {}
    for key_node, value_node in node.value:
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
        here = f"{document.name}:{key_node.start_mark.line + 1}"
        if not isinstance(key, str) or key_node.tag == "tag:yaml.org,2002:merge":
            raise RecipeError(f"{here}: keys are plain words; merges and complex keys are not used here")
        _require_text(key, here)
        if key in mapping:
            raise RecipeError(f"{here}: {dotted((*path, key))}: this key stands here twice")
        document.origins[(*path, key)] = here
        mapping[key] = _construct(value_node, (*path, key), document)
    return mapping


def _require_text(text: str, origin: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecipeError(
            f"{origin}: \\u{ord(text[error.start]):04x} is half of a character, which is no text",
            hint="write the character itself, or \\U and its 8 digits",
        ) from None


def _scalar(node: yaml.ScalarNode, origin: str) -> JsonValue:
    text, kind = node.value, node.tag.removeprefix("tag:yaml.org,2002:")
    _require_text(text, origin)
    if node.style is None and re.fullmatch(r"[-+]?0[\d_]+", text):
        raise RecipeError(
            f"{origin}: {text}: a leading zero means octal in YAML; write it without, or in quotes"
        )
    if kind in ("str", "timestamp"):
        return str(text)
    if node.tag not in _Loader.yaml_constructors:
        raise RecipeError(f"{origin}: the YAML tag {node.tag} is not used here")
    if ":" in text:
        raise RecipeError(f"{origin}: {text}: means a number of base 60 in YAML; write it in quotes")
    try:
        value: JsonValue = _Loader.yaml_constructors[node.tag](_CONSTRUCTOR, node)
    except (ValueError, KeyError):  # numbers of thousands of digits, and `0x_`
        raise RecipeError(f"{origin}: {text[:40]}: not a number that can be read") from None
    if isinstance(value, int) and abs(value) > MAX_NUMBER:
        raise RecipeError(f"{origin}: {text[:40]}: a number beyond 64 bits")
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{origin}: {text}: a number must be finite")
    return value
