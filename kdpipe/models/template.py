"""Chat templates: programs from elsewhere that write a conversation as text, and what they read."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TypeAlias

from pydantic import JsonValue

from kdpipe.errors import PreflightError
from kdpipe.models.model_folder import RAISED
from kdpipe.models.tokenizer import Tokenizer

Trace: TypeAlias = "Callable[[FrameType, str, object], Trace | None]"

MAX_TEMPLATE_LINES = 500_000
"""How many lines of Python one prompt's template may take; those of real models take hundreds a turn."""


def render_chat(tokenizer: Tokenizer, arguments: dict[str, JsonValue], messages: list[dict[str, str]]) -> str:
    """The conversation as the tokenizer's chat template writes it, up to where the answer begins."""
    import jinja2

    name = tokenizer.name_or_path or "the tokenizer"
    if not tokenizer.chat_template:
        raise PreflightError(f"{name}: has no chat template", hint="set task.prompt to plain")
    try:
        used = used_arguments(tokenizer, arguments)
        for argument in arguments:
            if argument not in used:
                raise PreflightError(
                    f"{name}: its chat template does not use the argument {argument!r}",
                    hint=f"remove template.{argument} of this model from the recipe",
                )
        with _limited_lines(name):
            text: str = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, **arguments
            )
    except (jinja2.TemplateError, MemoryError, *RAISED) as error:
        raise PreflightError(
            f"{name}: its chat template cannot render {[message['role'] for message in messages]} "
            f"with arguments {arguments}: {str(error) or type(error).__name__}",
            hint="set task.prompt to plain, or correct the template arguments",
        ) from error
    return text


@contextlib.contextmanager
def _limited_lines(name: str) -> Iterator[None]:
    """Raises PreflightError when a template, a program from elsewhere in a sandbox, runs for too long.

    The sandbox limits each of its ranges, and not ranges within ranges. Lines are counted, so that no clock decides.
    """
    left = MAX_TEMPLATE_LINES

    def count(_frame: FrameType, event: str, _argument: object) -> Trace | None:
        nonlocal left
        left -= event == "line"
        if left < 0:
            raise PreflightError(
                f"{name}: its chat template runs on and on: {MAX_TEMPLATE_LINES} lines and no end",
                hint="take another tokenizer, or set task.prompt to plain",
            )
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)


def used_arguments(tokenizer: Tokenizer, arguments: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Those of `arguments` that the tokenizer's chat template names; none without a template."""
    template = str(tokenizer.get_chat_template()) if tokenizer.chat_template else ""
    return {
        name: value for name, value in arguments.items() if re.search(rf"\b{re.escape(name)}\b", template)
    }
