"""A model's side of the text: its tokenizer, how it renders prompts, and which ids end and count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdpipe.data.tasks.arithmetic import words
from kdpipe.models.prompting import (
    PromptStyle,
    Tokenizer,
    arithmetic_tokenizer,
    end_ids,
    num_ids_in_use,
    open_tokenizer,
    render_prompt,
)

if TYPE_CHECKING:
    from pathlib import Path

    from kdpipe.data.rows import Problem


@dataclass(frozen=True, slots=True)
class Text:
    """A model's tokenizer and prompt style, its `end_ids`, and `num_ids`, the number of ids in use."""

    tokenizer: Tokenizer
    style: PromptStyle
    end_ids: tuple[int, ...]
    num_ids: int

    @property
    def end_id(self) -> int:
        """The end id that reference completions are taught with: the tokenizer's own."""
        own: int | None = self.tokenizer.eos_token_id
        return self.end_ids[0] if own is None else own

    def prompt(self, problem: Problem) -> list[int]:
        """The prompt's token ids."""
        return render_prompt(self.tokenizer, self.style, problem)


def open_text(folder: Path | None, style: PromptStyle, *, trust: bool) -> Text:
    """The text side of the model in `folder`; None is a scratch model, with the task's own tokenizer."""
    if folder is None:
        tokenizer = arithmetic_tokenizer(words())
        return Text(tokenizer, style, (tokenizer.eos_token_id,), num_ids_in_use(tokenizer))
    tokenizer = open_tokenizer(folder, trust_remote_code=trust)
    return Text(tokenizer, style, end_ids(folder, tokenizer), num_ids_in_use(tokenizer))
