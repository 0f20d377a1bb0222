"""HTML and SVG from values: whatever is not already markup is escaped, so model text cannot become any."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from kdpipe.results.visible_text import visible

Attributes: TypeAlias = Mapping[str, str | float | bool | None]
VOID = frozenset({"meta", "input", "br", "path", "line", "circle", "rect", "polyline", "polygon"})


@dataclass(frozen=True, slots=True)
class Html:
    """Markup that was made here, as opposed to text."""

    text: str


Child: TypeAlias = Html | str | None


def element(name: str, attributes: Attributes | None = None, *children: Child) -> Html:
    """`<name attributes>children</name>`; an attribute that is True stands alone, None or False is left out."""
    written = "".join(
        f" {key}" if value is True else f' {key}="{html.escape(_plain(value))}"'
        for key, value in (attributes or {}).items()
        if value is not None and value is not False
    )
    if name in VOID and not children:
        return Html(f"<{name}{written}/>")
    return Html(f"<{name}{written}>{joined(children).text}</{name}>")


def joined(children: Sequence[Child]) -> Html:
    """The children one after another."""
    return Html("".join(_markup(child) for child in children))


def section(name: str, title: str, *children: Html | None) -> Html:
    """A part of the page under a heading."""
    heading = element("h2", {"id": f"{name}-title"}, title)
    return element("section", {"id": name, "aria-labelledby": f"{name}-title"}, heading, *children)


def paragraph(text: str, name: str | None = None) -> Html:
    """A paragraph of the class `name`."""
    return element("p", {"class": name}, text)


def table(columns: Sequence[str], rows: Sequence[Sequence[Child]]) -> Html:
    """A table whose first column names its rows."""
    head = element("tr", None, *(element("th", {"scope": "col"}, name) for name in columns))
    lines = [
        element(
            "tr",
            None,
            element("th", {"scope": "row"}, first),
            *(element("td", None, cell) for cell in others),
        )
        for first, *others in rows
    ]
    return element("table", None, element("thead", None, head), element("tbody", None, *lines))


def _markup(child: Child) -> str:
    if child is None:
        return ""
    return child.text if isinstance(child, Html) else html.escape(visible(child), quote=False)


def _plain(value: str | float | bool) -> str:
    """An attribute's value; coordinates need no more than a hundredth of a pixel."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else visible(str(value))


def embedded(value: Any) -> str:
    """JSON that can stand inside a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
