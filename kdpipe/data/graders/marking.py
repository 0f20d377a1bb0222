r"""Where in a text its answer stands: after the thinking, in `\boxed{...}`, after `####`."""

from __future__ import annotations

import re

MARK = "####"

_THOUGHT = re.compile(r"(?is).*</(?:think|thinking|reasoning)>")
_THINKING = re.compile(r"(?i)<(?:think|thinking|reasoning)>")
_BRACES = re.compile(r"(\\(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)


def after_thinking(text: str) -> str:
    """The text without its thinking; of thinking that never ends nothing is left."""
    if (thought := _THOUGHT.match(text)) is not None:
        text = text[thought.end() :]
    return _THINKING.split(text, maxsplit=1)[0]


def last_box(text: str) -> str | None:
    """What stands in the last box that is closed; braces inside are matched."""
    opened: list[int | None] = []
    found = None
    for match in _BRACES.finditer(text):
        if match[0].endswith("{") and (match[1] or match[0] == "{"):
            opened.append(match.end() if match[1] else None)
        elif match[0] == "}" and opened and (start := opened.pop()) is not None:
            found = text[start : match.start()]
    return found


def answer_part(text: str) -> str:
    """What answers in a text: the last box, else what follows the last mark, else all of it."""
    text = after_thinking(text)
    return last_box(text) or text.rpartition(MARK)[2]
