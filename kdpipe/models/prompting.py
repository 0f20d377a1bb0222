"""Between problems and token ids: prompts, references, and completions as text.

Importing this module is cheap: transformers is imported by the functions that need it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import JsonValue

from kdpipe.data.rows import Problem, Turn
from kdpipe.data.tasks import arithmetic
from kdpipe.errors import DataError, ModelError, PreflightError, RecipeError
from kdpipe.models.model_folder import unfit
from kdpipe.models.template import render_chat
from kdpipe.models.tokenizer import (
    Tokenizer,
    arithmetic_tokenizer,
    encode,
    encode_plain,
    num_ids_in_use,
    open_tokenizer,
)
from kdpipe.recipe.task import QuestionTask, Task
from kdpipe.recipe.teacher import PROMPT_PIECE

ANSWERS_HINT = "give its record an answer, or let only what the student samples be trained on"


@dataclass(frozen=True, slots=True)
class PromptStyle:
    """How a question becomes a prompt.

    `examples` are the first `few_shot` + 1 train problems. Each prompt shows the first `few_shot` of
    them that are not its own problem, so that no prompt holds its own solution and every train problem
    stays usable. `template_arguments` go to the chat template, `system` is the first turn of problems that have
    no system turn of their own.
    """

    kind: Literal["chat", "plain"]
    instruction: str
    few_shot: int
    examples: tuple[Problem, ...]
    template_arguments: dict[str, JsonValue]
    system: str | None = None


def prompt_style(
    task: Task, train_problems: Sequence[Problem], template_arguments: dict[str, JsonValue]
) -> PromptStyle:
    """The style that `task` asks for; generated problems are plain, without instruction and examples.

    Raises RecipeError on template arguments that no chat template would get, and DataError when train
    has too few problems for the examples.
    """
    if isinstance(task, QuestionTask):
        examples = tuple(train_problems[: task.few_shot + 1]) if task.few_shot else ()
        style = PromptStyle(
            task.prompt, task.instruction, task.few_shot, examples, template_arguments, task.system
        )
    else:
        style = PromptStyle("plain", "", 0, (), template_arguments)
    if template_arguments and style.kind == "plain":
        raise RecipeError(
            f"template: {', '.join(template_arguments)}: arguments of a chat template, but prompts are plain",
            hint="remove them, or set task.prompt to chat",
        )
    if unsolved := next((example for example in style.examples if example.solution is None), None):
        raise DataError(
            f"task.few_shot is {style.few_shot}, but {unsolved.prompt_id} has no answer to show",
            hint="set task.few_shot to 0, or give every record of train an answer",
        )
    if style.few_shot and len(style.examples) <= style.few_shot:
        raise DataError(
            f"task.few_shot is {style.few_shot}; train holds {len(train_problems)} problems, "
            f"expected at least {style.few_shot + 1}: a problem is no example for itself"
        )
    return style


def render_prompt(
    tokenizer: Tokenizer, style: PromptStyle, problem: Problem, own: str | None = None
) -> list[int]:
    """The prompt's token ids, up to where the answer begins; with `own`, that is the whole user text.

    chat: a system turn, the examples, the problem's earlier turns and the question as turns of the tokenizer's chat
    template, the instruction before the first question (so that all prompts share their beginning). plain: the same
    as lines, ending in a newline.
    In `own`, {name} is replaced by that field of the record, once and literally; {{ and }} are braces, and so is any
    other brace.
    """
    if own is not None:
        values = prompt_values(problem)
        text = PROMPT_PIECE.sub(lambda piece: str(values[piece[1]]) if piece[1] else piece[0][0], own)
        return _render(tokenizer, style, [*_opening(style, problem), *_earlier(problem), Turn("user", text)])
    others = [example for example in style.examples if example.prompt_id != problem.prompt_id]
    turns = [turn for example in others[: style.few_shot] for turn in _example(example)]
    turns += [*_earlier(problem), Turn("user", problem.question)]
    if style.instruction:
        first = next(index for index, turn in enumerate(turns) if turn.role == "user")
        turns[first] = Turn("user", f"{style.instruction}\n\n{turns[first].content}")
    return _render(tokenizer, style, [*_opening(style, problem), *turns])


def _opening(style: PromptStyle, problem: Problem) -> list[Turn]:
    """The system turn: the problem's own, or else that of the task."""
    own = [turn for turn in problem.turns if turn.role == "system"]
    return own or ([] if style.system is None else [Turn("system", style.system)])


def _earlier(problem: Problem) -> list[Turn]:
    return [turn for turn in problem.turns if turn.role != "system"]


def _example(problem: Problem) -> list[Turn]:
    """A problem as a prompt shows it to another: with its solution."""
    assert problem.solution is not None
    return [*_earlier(problem), Turn("user", problem.question), Turn("assistant", problem.solution)]


def prompt_values(problem: Problem) -> dict[str, str | int | float]:
    """What a teacher's prompt may name; `question` and `solution` are never a field of the record."""
    solution = {} if problem.solution is None else {"solution": problem.solution}
    return {**problem.fields, "question": problem.question, **solution}


def _render(tokenizer: Tokenizer, style: PromptStyle, turns: list[Turn]) -> list[int]:
    """Token ids of turns, the last of which asks."""
    if style.kind == "chat":
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        # A rendered template holds its own special tokens.
        return encode(
            tokenizer, render_chat(tokenizer, style.template_arguments, messages), add_special_tokens=False
        )
    ends = {"system": "\n\n", "user": "\n", "assistant": "\n\n"}
    shown = "".join(turn.content + ends[turn.role] for turn in turns[:-1])
    return encode_plain(tokenizer, shown + turns[-1].content.removesuffix("\n") + "\n")


def end_ids(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """All ids that end a completion, sorted: of generation_config.json, config.json and the tokenizer."""
    found = {tokenizer.eos_token_id} - {None}
    for path in (folder / "generation_config.json", folder / "config.json"):
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        value = config.get("eos_token_id") if isinstance(config, dict) else None
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(token_id) is not int or token_id < 0 for token_id in ids):
            raise ModelError(f"{path}: eos_token_id is {value!r}, expected a token id or a list of them")
        found |= set(ids)
    if not found:
        raise PreflightError(
            f"{folder}: no end-of-sequence id in generation_config.json, config.json or the tokenizer",
            hint="write eos_token_id into generation_config.json; without it no completion ends",
        )
    return tuple(sorted(found))


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

    def prompt(self, problem: Problem, own: str | None = None) -> list[int]:
        return render_prompt(self.tokenizer, self.style, problem, own)

    def reference(self, problem: Problem) -> list[int]:
        """The reference solution as a completion of the prompt: its token ids and the end token."""
        if problem.solution is None:
            raise DataError(f"{problem.prompt_id}: has no answer to be taught", hint=ANSWERS_HINT)
        return [*encode(self.tokenizer, problem.solution, add_special_tokens=False), self.end_id]

    def completion(self, token_ids: Sequence[int], *, stop: Sequence[str]) -> str:
        """The text of a completion without end and special tokens, cut before the first stop string."""
        kept = list(token_ids[:-1] if token_ids and token_ids[-1] in self.end_ids else token_ids)
        with unfit(f"{self.tokenizer.name_or_path}: its tokenizer fails on token ids"):
            text: str = self.tokenizer.decode(
                kept, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        return text[: min((text.index(string) for string in stop if string in text), default=len(text))]


def open_text(folder: Path | None, style: PromptStyle, *, trust: bool) -> Text:
    """The text side of the model in `folder`; None is a scratch model, with the task's own tokenizer."""
    if folder is None:
        tokenizer = arithmetic_tokenizer(arithmetic.words())
        return Text(tokenizer, style, (tokenizer.eos_token_id,), num_ids_in_use(tokenizer))
    tokenizer = open_tokenizer(folder, trust_remote_code=trust)
    return Text(tokenizer, style, end_ids(folder, tokenizer), num_ids_in_use(tokenizer))
