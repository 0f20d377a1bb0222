"""The pages' templates, and how whatever they show is escaped.

The policy in a page's head lets nothing run or apply but its own script and style, named by their digests, so that
markup that slipped in somewhere would do nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from kdpipe import __version__
from kdpipe.report.comparison_tables import cost_table, forests_of
from kdpipe.report.terms import explained
from kdpipe.results.table import notes_on
from kdpipe.results.visible_text import visible


def template(name: str) -> Template:
    """The template of `page` or `comparison`."""
    return _environment().get_template(f"{name}.html.j2")


@cache
def _environment() -> Environment:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, Markup) else visible(str(value)),
        loader=PackageLoader("kdpipe.report", ""),
    )
    environment.filters["embedded"] = embedded
    style, script = _resource("style.css"), _resource("script.js")
    environment.globals |= {
        "cost_table": cost_table,
        "forests_of": forests_of,
        "explained": explained,
        "notes_on": notes_on,
        "policy": f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; "
        "base-uri 'none'; form-action 'none'",
        "script": script,
        "style": style,
        "version": __version__,
        "zip": zip,
    }
    return environment


def _resource(name: str) -> Markup:
    return Markup((files("kdpipe.report") / name).read_text(encoding="utf-8"))  # noqa: S704 (our own file)


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def embedded(value: object) -> Markup:
    """JSON that can stand inside a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # noqa: S704 (escaped above, as a script element needs it)
