"""Chat templates, programs from elsewhere: the text that they write, what they read, how turns end."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from types import FrameType
from typing import TYPE_CHECKING, TypeAlias, cast

from pydantic import JsonValue

from kdpipe.data.rows import Turn
from kdpipe.errors import PreflightError
from kdpipe.models.model_folder import RAISED
from kdpipe.models.tokenizer import Tokenizer, encode

if TYPE_CHECKING:
    from jinja2 import Template

Trace: TypeAlias = "Callable[[FrameType, str, object], Trace | None]"

MAX_TEMPLATE_LINES = 500_000
"""How many lines of Python one prompt's template may take; those of real models take hundreds a turn."""
TODAY = "2024-07-26"
"""The day that Llama 3.1's template names where it has no clock."""
NAME = "chat_template"
"""The argument that names one of several templates."""
_SET_HERE = {
    "messages",
    "add_generation_prompt",
    "strftime_now",
    "raise_exception",
    "namespace",
    "range",
    "dict",
}
"""Names that a template reads and no recipe sets."""
_CORRECT = "correct chat_template in the model's folder, or set task.prompt to plain"
_OTHER_DAY = "1999-12-31"
_QUESTION, _ANSWER = Turn("user", "What is kdqx?"), Turn("assistant", "kdax")


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A tokenizer's chat template with its arguments, told that it is `today`, an ISO date."""

    tokenizer: Tokenizer
    arguments: Mapping[str, JsonValue]
    today: str = TODAY

    @property
    def whose(self) -> str:
        return self.tokenizer.name_or_path or "the tokenizer"

    def render(self, turns: Sequence[Turn], *, asks: bool = True) -> str:
        """The turns as text; one that `asks` goes on to where the answer begins."""
        import jinja2

        try:
            with _limited_lines(self.whose):
                self._require_used()
                self._set_clock()
                text: str = self.tokenizer.apply_chat_template(
                    [{"role": turn.role, "content": turn.content} for turn in turns],
                    add_generation_prompt=asks,
                    tokenize=False,
                    **self.arguments,
                )
        except (jinja2.TemplateError, MemoryError, *RAISED) as error:
            raise PreflightError(
                f"{self.whose}: its chat template cannot render {[turn.role for turn in turns]} "
                f"with arguments {dict(self.arguments)}: {str(error) or type(error).__name__}",
                hint="set task.prompt to plain, or correct the template arguments",
            ) from error
        return text

    def _set_clock(self) -> None:
        """Makes the compiled template, which transformers keeps, ask for the time here: it takes no function."""
        day = datetime.fromisoformat(self.today)
        compiled = _compiled(template_text(self.tokenizer, self.arguments) or "")
        compiled.globals["strftime_now"] = day.strftime

    def _require_used(self) -> None:
        """Raises PreflightError without a template, and on arguments that it does not read."""
        source, names = (
            template_text(self.tokenizer, self.arguments),
            known_arguments(self.tokenizer, self.arguments),
        )
        if source is None:
            raise PreflightError(f"{self.whose}: has no chat template", hint="set task.prompt to plain")
        for argument in self.arguments:
            if argument not in names:
                raise PreflightError(
                    f"{self.whose}: its chat template does not use the argument {argument!r}",
                    hint=f"remove template.{argument} of this model from the recipe",
                )

    def history(self) -> str:
        """A question, its answer and another question, as later turns show them."""
        return self.render([_QUESTION, _ANSWER, _QUESTION], asks=False)

    def turn_end(self) -> tuple[int | None, str]:
        """The id of the token that ends an answer, and all that the template writes after one.

        None where the template ends an answer by text, or not at all.
        """
        after = self.render([_QUESTION, _ANSWER], asks=False).rpartition(_ANSWER.content)[2]
        added = self.tokenizer.added_tokens_decoder
        for token in encode(self.tokenizer, after, add_special_tokens=False):
            if token in added and not added[token].content.isspace():
                return token, after
            if self.tokenizer.decode([token]).strip():
                break
        return None, after

    def faults(self) -> Iterator[str]:
        """What is wrong with the prompts that it makes: each a sentence that says what to set."""
        bare, asked = self.render([_QUESTION], asks=False), self.render([_QUESTION])
        answered = self.render([_QUESTION, _ANSWER], asks=False)
        if bare == asked and not answered.startswith(asked + _ANSWER.content):
            yield (
                "its chat template ignores add_generation_prompt: prompts end before the assistant's turn begins, and "
                f"the model has to write its header first; {_CORRECT}"
            )
        if asked != self.render([_QUESTION]):
            yield f"its chat template writes one question in two ways, so that no result repeats; {_CORRECT}"
        token, after = self.turn_end()
        if token is None:
            shown = f"with the text {after!r}" if after.strip() else "with nothing"
            yield (
                f"its chat template ends an answer {shown}, and no token of its own: completions end where the "
                "tokenizer's end token is drawn; set rollout.stop if the model ends by that text"
            )

    def reads_clock(self) -> bool:
        """Whether what it writes depends on the day."""
        other = replace(self, today=_OTHER_DAY)
        return self.render([_QUESTION]) != other.render([_QUESTION])


def template_text(tokenizer: Tokenizer, arguments: Mapping[str, JsonValue]) -> str | None:
    """The source of the chat template, of several the one named by the arguments; None without one."""
    found = tokenizer.chat_template
    if not isinstance(found, dict):
        return found or None
    name = arguments.get(NAME, "default")
    if not isinstance(name, str) or name not in found:
        said = "none of them called default" if name == "default" else f"none of them called {name!r}"
        raise PreflightError(
            f"{tokenizer.name_or_path}: has {len(found)} chat templates, {', '.join(sorted(found))}, and {said}",
            hint=f"set template.{NAME} of this model to one of the names, or task.prompt to plain",
        )
    return str(found[name])


def known_arguments(tokenizer: Tokenizer, arguments: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Those of `arguments` that the tokenizer's chat template reads; none without a template."""
    source = template_text(tokenizer, arguments)
    if source is None:
        return {}
    names = _names(source) - _SET_HERE | ({NAME} if isinstance(tokenizer.chat_template, dict) else set())
    return {name: value for name, value in arguments.items() if name in names}


def _compiled(source: str) -> Template:
    """The template as transformers compiles and keeps it."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return cast("Template", _compile_jinja_template(source))


@functools.lru_cache(maxsize=8)
def _names(source: str) -> frozenset[str]:
    """The variables that a template reads and does not set itself."""
    import jinja2.meta

    return frozenset(jinja2.meta.find_undeclared_variables(_compiled(source).environment.parse(source)))


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
