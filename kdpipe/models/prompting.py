"""Between problems and token ids: prompts, references, and completions as text.

Importing this module is cheap: transformers is imported by the functions that need it.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Literal

from pydantic import JsonValue

from kdpipe.data.rows import Problem, Turn
from kdpipe.data.tasks import arithmetic
from kdpipe.errors import DataError, ModelError, PreflightError, RecipeError
from kdpipe.models.config import left_out, rows_of
from kdpipe.models.literal import NOTHING, Marker, marker_of
from kdpipe.models.model_folder import unfit
from kdpipe.models.template import TODAY, ChatTemplate
from kdpipe.models.tokenizer import (
    Tokenizer,
    arithmetic_tokenizer,
    num_ids_in_use,
    open_tokenizer,
    tokens_without_row,
)
from kdpipe.recipe.section import PromptStyleName
from kdpipe.recipe.task import QuestionTask, Task
from kdpipe.recipe.teacher import PROMPT_PIECE

_SHOWN = 5
_LOST = {"system": "a system turn", "assistant": "an earlier answer", "user": "an earlier question"}
ANSWERS_HINT = "give its record an answer, or let only what the student samples be trained on"


@dataclass(frozen=True, slots=True)
class PromptStyle:
    """How a question becomes a prompt.

    `examples` are the first `few_shot` + 1 train problems of different texts. Each prompt shows the first `few_shot`
    of them that do not ask what it asks, so that no prompt holds its own solution and every train problem
    stays usable. `template_arguments` go to the chat template, which is told that it is `today`; `system` is the first
    turn of problems that have no system turn of their own. With `allows_special` the problems' texts may hold special
    tokens. With `fuses` texts around a special token that is left out are read as one.
    """

    kind: Literal["chat", "plain"]
    instruction: str
    few_shot: int
    examples: tuple[Problem, ...]
    template_arguments: dict[str, JsonValue]
    system: str | None = None
    today: str = TODAY
    allows_special: bool = False
    fuses: bool = False

    def template(self, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The chat template as this style asks it; None for plain prompts."""
        return ChatTemplate(tokenizer, self.template_arguments, self.today) if self.kind == "chat" else None

    def marker(self, tokenizer: Tokenizer) -> Marker:
        """What keeps special tokens inside the problems' texts from being read as such."""
        return NOTHING if self.allows_special else marker_of(tokenizer, self.template(tokenizer))


def prompt_style(
    task: Task,
    train_problems: Sequence[Problem],
    template_arguments: dict[str, JsonValue],
    own: PromptStyleName = "student",
) -> PromptStyle:
    """The style that `task` asks for, or a teacher's own; generated problems are plain and bare.

    Raises RecipeError on template arguments that no chat template would get, and DataError when train
    has too few problems for the examples.
    """
    if isinstance(task, QuestionTask):
        examples = _unlike(train_problems, task.few_shot + 1) if task.few_shot else ()
        style = PromptStyle(
            kind=task.prompt if own == "student" else own,
            instruction=task.instruction,
            few_shot=task.few_shot,
            examples=examples,
            template_arguments=template_arguments,
            system=task.system,
            today=task.today,
            allows_special=task.allow_special_tokens,
        )
    else:
        # Their tokenizer's special tokens are padding and unknown words: none ends a number.
        kind = "plain" if own == "student" else own
        style = PromptStyle(kind, "", 0, (), template_arguments, fuses=True)
    if template_arguments and style.kind == "plain":
        raise RecipeError(
            f"template: {', '.join(template_arguments)}: arguments of a chat template, but prompts are plain",
            hint="remove them, or set task.prompt (of a teacher: prompt_style) to chat",
        )
    if unsolved := next((example for example in style.examples if example.solution is None), None):
        raise DataError(
            f"task.few_shot is {style.few_shot}, but {unsolved.prompt_id} has no answer to show",
            hint="set task.few_shot to 0, or give every record of train an answer",
        )
    if style.few_shot and len(style.examples) <= style.few_shot:
        raise DataError(
            f"task.few_shot is {style.few_shot}; train holds {len(style.examples)} problems of different texts, "
            f"expected at least {style.few_shot + 1}: a problem is no example for itself"
        )
    return style


def _unlike(problems: Sequence[Problem], count: int) -> tuple[Problem, ...]:
    """The first `count` problems that ask different things."""
    found: dict[tuple[str, ...], Problem] = {}
    for problem in problems:
        found.setdefault(problem.normalized, problem)
        if len(found) == count:
            break
    return tuple(found.values())


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt's token ids, up to where the answer begins; the template does not show the `lost` turns."""

    ids: list[int]
    lost: tuple[Turn, ...] = ()


def render_prompt(
    tokenizer: Tokenizer, style: PromptStyle, problem: Problem, own: str | None = None
) -> list[int]:
    """The ids of a problem's prompt, as `prompt_of` makes it."""
    return prompt_of(tokenizer, style, problem, own).ids


def prompt_of(tokenizer: Tokenizer, style: PromptStyle, problem: Problem, own: str | None = None) -> Prompt:
    """A problem's prompt; with `own`, that is the whole user text.

    chat: a system turn, the examples, the problem's earlier turns and the question as turns of the tokenizer's chat
    template, the instruction before the first question (so that all prompts share their beginning). plain: the same
    as lines, ending in a newline.
    In `own`, {name} is replaced by that field of the record, once and literally; {{ and }} are braces, and so is any
    other brace. Raises PreflightError where the text that asks is not in the prompt.
    """
    marker = style.marker(tokenizer)
    turns = [*_opening(style, problem, marker), *_asked(style, problem, marker, own)]
    template = style.template(tokenizer)
    if template is None:
        ends = {"system": "\n\n", "user": "\n", "assistant": "\n\n"}
        shown = "".join(turn.content + ends[turn.role] for turn in turns[:-1])
        text = shown + turns[-1].content.removesuffix("\n") + "\n"
        return Prompt(marker.encode_plain(tokenizer, text))
    text = template.render(turns)
    spaced = " ".join(text.split())
    lost = tuple(turn for turn in turns if " ".join(turn.content.split()) not in spaced)
    if turns[-1] in lost:
        raise PreflightError(
            f"{template.whose}: its chat template does not show the question of {problem.prompt_id}: a prompt of "
            f"{len(text)} characters that it is not in",
            hint="correct chat_template in the model's folder, or set task.prompt to plain",
        )
    # A rendered template holds its own special tokens.
    return Prompt(marker.encode(tokenizer, text, add_special_tokens=False), lost)


def lost_turns(prompts: Sequence[Prompt]) -> list[str]:
    """Sentences on turns that prompts do not show as they were given, with the number of prompts."""
    counts = Counter(role for prompt in prompts for role in {turn.role for turn in prompt.lost})
    return [
        f"the chat template shows {_LOST[role]} changed or not at all in {count} of {len(prompts)} prompts"
        for role, count in sorted(counts.items())
    ]


def require_unlike(problems: Sequence[Problem], prompts: Sequence[Sequence[int]]) -> None:
    """Raises PreflightError where two problems that ask different things have the same prompt."""
    seen: dict[tuple[int, ...], Problem] = {}
    for problem, ids in zip(problems, prompts, strict=bool(problems)):
        other = seen.setdefault(tuple(ids), problem)
        if (other.turns, other.question) != (problem.turns, problem.question):
            raise PreflightError(
                f"{other.prompt_id} and {problem.prompt_id} ask different things and have the same prompt of "
                f"{len(ids)} tokens",
                hint="take a tokenizer that knows the letters of these problems, or correct chat_template",
            )


def _asked(style: PromptStyle, problem: Problem, marker: Marker, own: str | None) -> list[Turn]:
    """The turns from the first example or earlier turn to the one that asks."""
    earlier = _earlier(problem, marker)
    if own is not None:
        values = prompt_values(problem)
        text = PROMPT_PIECE.sub(
            lambda piece: marker.mark(str(values[piece[1]])) if piece[1] else piece[0][0], own
        )
        return [*earlier, Turn("user", text)]
    others = [example for example in style.examples if example.normalized != problem.normalized]
    turns = [turn for example in others[: style.few_shot] for turn in _example(example, marker)]
    turns += [*earlier, Turn("user", marker.mark(problem.question))]
    if style.instruction:
        first = next(index for index, turn in enumerate(turns) if turn.role == "user")
        turns[first] = Turn("user", f"{style.instruction}\n\n{turns[first].content}")
    return turns


def _opening(style: PromptStyle, problem: Problem, marker: Marker) -> list[Turn]:
    """The system turn: the problem's own, or else that of the task."""
    own = [Turn("system", marker.mark(turn.content)) for turn in problem.turns if turn.role == "system"]
    return own or ([] if style.system is None else [Turn("system", style.system)])


def _earlier(problem: Problem, marker: Marker) -> list[Turn]:
    return [Turn(turn.role, marker.mark(turn.content)) for turn in problem.turns if turn.role != "system"]


def _example(problem: Problem, marker: Marker) -> list[Turn]:
    """A problem as a prompt shows it to another: with its solution."""
    assert problem.solution is not None
    asked = Turn("user", marker.mark(problem.question))
    return [*_earlier(problem, marker), asked, Turn("assistant", marker.mark(problem.solution))]


def prompt_values(problem: Problem) -> dict[str, str | int | float]:
    """What a teacher's prompt may name; `question` and `solution` are never a field of the record."""
    solution = {} if problem.solution is None else {"solution": problem.solution}
    return {**problem.fields, "question": problem.question, **solution}


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
    """A model's tokenizer and prompt style, its `end_ids`, and `num_ids`, the number of ids in use.

    `turn_end` is the id with which its chat template ends an answer, None for plain prompts and where there is none;
    `notes` and `warnings` say what a user of the model and its template should know.
    """

    tokenizer: Tokenizer
    style: PromptStyle
    end_ids: tuple[int, ...]
    num_ids: int
    turn_end: int | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def end_id(self) -> int:
        """The end id that reference completions are taught with: the template's, or else the tokenizer's own."""
        own: int | None = self.tokenizer.eos_token_id if self.turn_end is None else self.turn_end
        return self.end_ids[0] if own is None or own >= self.num_ids else own

    def prompt(self, problem: Problem, own: str | None = None) -> list[int]:
        return self._known(render_prompt(self.tokenizer, self.style, problem, own), problem)

    def rendered(self, problem: Problem, own: str | None = None) -> Prompt:
        """The problem's prompt, with what the template leaves out of it."""
        return prompt_of(self.tokenizer, self.style, problem, own)

    def reference(self, problem: Problem) -> list[int]:
        """The reference solution as a completion of the prompt: its token ids and the end token."""
        if problem.solution is None:
            raise DataError(f"{problem.prompt_id}: has no answer to be taught", hint=ANSWERS_HINT)
        marker = self.style.marker(self.tokenizer)
        text = marker.mark(problem.solution)
        solution = marker.encode(self.tokenizer, text, add_special_tokens=False)
        return [*self._known(solution, problem), self.end_id]

    def _known(self, ids: list[int], problem: Problem) -> list[int]:
        if (largest := max(ids, default=0)) >= self.num_ids:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise PreflightError(
                f"{problem.prompt_id}: holds {token!r}, id {largest}, for which the model has no row: it has "
                f"{self.num_ids}",
                hint="take it out of the problem, the instruction or the template",
            )
        return ids

    def completion(self, token_ids: Sequence[int], *, stop: Sequence[str]) -> str:
        """The text of a completion without its end, cut before the first stop string.

        Special tokens are left out; texts on the two sides of one stand on lines of their own.
        """
        kept = list(token_ids[:-1] if token_ids and token_ids[-1] in self.end_ids else token_ids)
        added = self.tokenizer.added_tokens_decoder
        special = {token for token in added.keys() & set(kept) if added[token].special}
        pieces = [kept]
        if special and not self.style.fuses:
            groups = groupby(kept, special.__contains__)
            pieces = [list(group) for is_special, group in groups if not is_special]
        with unfit(f"{self.tokenizer.name_or_path}: its tokenizer fails on token ids"):
            decoded = [
                self.tokenizer.decode(piece, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                for piece in pieces
            ]
        text = "\n".join(filter(None, decoded))
        return text[: min((text.index(string) for string in stop if string in text), default=len(text))]


def open_text(folder: Path | None, style: PromptStyle, *, trust: bool) -> Text:
    """The text side of the model in `folder`; None is a scratch model, with the task's own tokenizer."""
    if folder is None:
        tokenizer = arithmetic_tokenizer(arithmetic.words())
        return Text(tokenizer, style, (tokenizer.eos_token_id,), num_ids_in_use(tokenizer))
    tokenizer = open_tokenizer(folder, trust_remote_code=trust)
    text = _with_rows(
        Text(tokenizer, style, end_ids(folder, tokenizer), num_ids_in_use(tokenizer)), folder, trust=trust
    )
    with contextlib.suppress(PreflightError):  # what cannot be rendered is told where a prompt is
        return with_turn_end(text)
    return text


def _with_rows(text: Text, folder: Path, *, trust: bool) -> Text:
    """The text with the ids that the model in a folder has rows for; notes say what is not used of it."""
    notes, num_ids = list(text.notes), text.num_ids
    kind, others = left_out(folder)
    if others:
        notes.append(f"{kind}: its text model alone is used, {len(others)} other weights are left out")
    rows = rows_of(folder, trust_remote_code=trust)
    if rows is not None and (missing := tokens_without_row(text.tokenizer, rows)):
        shown = ", ".join(map(repr, islice(missing.values(), _SHOWN)))
        notes.append(f"the model has no row for {len(missing)} of its tokenizer's ids: {shown}")
        num_ids = rows
    ends = tuple(number for number in text.end_ids if number < num_ids)
    if not ends:
        raise ModelError(
            f"{folder}: the model has {num_ids} rows, and none for {text.end_ids}, which end a completion"
        )
    return replace(text, end_ids=ends, num_ids=num_ids, notes=tuple(notes))


def with_turn_end(text: Text) -> Text:
    """The text whose completions also end where its template ends an answer, with its remarks."""
    template = text.style.template(text.tokenizer)
    if template is None:
        return text
    token, _ = template.turn_end()
    notes, ends = list(text.notes), text.end_ids
    if template.reads_clock():
        notes.append(
            f"its chat template reads the clock: it is told that today is {template.today} (task.today)"
        )
    if token is not None and token not in ends:
        ends = tuple(sorted({*ends, token}))
        notes.append(
            f"its chat template ends an answer with {text.tokenizer.decode([token])!r} (id {token}), which the model's "
            "files do not name as an end: completions end there too"
        )
    warnings = tuple(template.faults())
    return replace(text, end_ids=ends, turn_end=token, notes=tuple(notes), warnings=warnings)
