"""Between text and token ids: tokenizers, prompts, ends of completions, shared vocabularies.

Importing this module is cheap: transformers is imported by the functions that need it.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal, TypeAlias

from pydantic import JsonValue

from kdpipe.data.rows import Problem
from kdpipe.data.tasks import arithmetic
from kdpipe.errors import DataError, ModelError, PreflightError, RecipeError
from kdpipe.models.model_folder import RAISED, require_own_files, unfit
from kdpipe.recipe.task import QuestionTask, Task
from kdpipe.recipe.teacher import PROMPT_PIECE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

Tokenizer: TypeAlias = "PreTrainedTokenizerBase"
Trace: TypeAlias = "Callable[[FrameType, str, object], Trace | None]"

MAX_TEMPLATE_LINES = 500_000
"""How many lines of Python one prompt's template may take; those of real models take hundreds a turn."""
MAX_GROWTH = 1000
"""How many times as long a tokenizer's replacements may make a text; those of real ones do not."""


def open_tokenizer(folder: Path, *, trust_remote_code: bool) -> Tokenizer:
    """The tokenizer saved in a model folder; never looks on the network."""
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise ModelError(f"{folder}: no such model folder")
    require_own_files(folder)
    _require_bounded_growth(folder / "tokenizer.json")
    hint = "a model folder holds tokenizer.json and tokenizer_config.json beside its weights"
    with unfit(f"{folder}: its tokenizer cannot be opened", hint=hint):
        return AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, local_files_only=True
        )


def _require_bounded_growth(path: Path) -> None:
    """Raises ModelError where a tokenizer.json replaces pieces of text by longer ones again and again."""
    if not path.is_file():
        return
    with unfit(f"{path.parent}: its tokenizer cannot be opened"):
        value = json.loads(path.read_bytes())
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        growth, rest = 1.0, [value.get(part) if isinstance(value, dict) else None]
        while rest:
            found = rest.pop()
            if isinstance(found, list):
                rest += found
            elif isinstance(found, dict):
                rest += [inner for inner in found.values() if isinstance(inner, list)]
                if found.get("type") == "Replace":
                    plain = found["pattern"].get("String") if isinstance(found.get("pattern"), dict) else None
                    growth *= max(1.0, len(str(found.get("content"))) / (len(plain or "") or 1))
        if growth > MAX_GROWTH:
            raise ModelError(
                f"{path}: its {part} makes a text up to {growth:.3g} times as long, expected {MAX_GROWTH} at most",
                hint="take the tokenizer only from whom you trust",
            )


def arithmetic_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one id per word, digit, sign and newline, after `<pad>` 0, `<eos>` 1, `<unk>` 2.

    Decoding joins neighbouring digits to a number and puts one space between words, none before `.` or
    `?` and none around a newline, so that texts written that way come back as they were.
    """
    import tokenizers
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: token_id for token_id, word in enumerate(("<pad>", "<eos>", "<unk>", *words))}
    if len(vocabulary) != len(words) + 3:
        raise ValueError("words must be distinct, and none of <pad>, <eos>, <unk>")
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split(Regex(r"[0-9\n.?]"), "isolated")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix=" ", cleanup=False),  # a space before every token but the first
            decoders.Fuse(),
            decoders.Replace(Regex(r"(?<=[0-9]) (?=[0-9])| (?=[.?\n])|(?<=\n) "), ""),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",  # noqa: S106
        eos_token="<eos>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True, slots=True)
class PromptStyle:
    """How a question becomes a prompt.

    `examples` are the first `few_shot` + 1 train problems. Each prompt shows the first `few_shot` of
    them that are not its own problem, so that no prompt holds its own solution and every train problem
    stays usable. `template_arguments` go to the chat template.
    """

    kind: Literal["chat", "plain"]
    instruction: str
    few_shot: int
    examples: tuple[Problem, ...]
    template_arguments: dict[str, JsonValue]


def prompt_style(
    task: Task, train_problems: Sequence[Problem], template_arguments: dict[str, JsonValue]
) -> PromptStyle:
    """The style that `task` asks for; generated problems are plain, without instruction and examples.

    Raises RecipeError on template arguments that no chat template would get, and DataError when train
    has too few problems for the examples.
    """
    if isinstance(task, QuestionTask):
        examples = tuple(train_problems[: task.few_shot + 1]) if task.few_shot else ()
        style = PromptStyle(task.prompt, task.instruction, task.few_shot, examples, template_arguments)
    else:
        style = PromptStyle("plain", "", 0, (), template_arguments)
    if template_arguments and style.kind == "plain":
        raise RecipeError(
            f"template: {', '.join(template_arguments)}: arguments of a chat template, but prompts are plain",
            hint="remove them, or set task.prompt to chat",
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

    chat: the examples and the question as turns of the tokenizer's chat template, the instruction before the
    first question (so that all prompts share their beginning). plain: the same as lines, ending in a newline.
    In `own`, {name} is replaced by that field of the record, once and literally; {{ and }} are braces, and so is any
    other brace.
    """
    if own is not None:
        values = prompt_values(problem)
        text = PROMPT_PIECE.sub(lambda piece: str(values[piece[1]]) if piece[1] else piece[0][0], own)
        return _render(tokenizer, style, [text], [])
    others = [example for example in style.examples if example.prompt_id != problem.prompt_id]
    examples = others[: style.few_shot]
    questions = [*(example.question for example in examples), problem.question]
    if style.instruction:
        questions[0] = f"{style.instruction}\n\n{questions[0]}"
    return _render(tokenizer, style, questions, [example.solution for example in examples])


def prompt_values(problem: Problem) -> dict[str, str | int | float]:
    """What a teacher's prompt may name; `question` and `solution` are never a field of the record."""
    return {**problem.fields, "question": problem.question, "solution": problem.solution}


def _render(
    tokenizer: Tokenizer, style: PromptStyle, questions: list[str], solutions: list[str]
) -> list[int]:
    """Token ids of questions and solutions in turns; the last question has no solution yet."""
    if style.kind == "chat":
        messages = [{"role": "user", "content": questions[0]}]
        for solution, question in zip(solutions, questions[1:], strict=True):
            messages += [{"role": "assistant", "content": solution}, {"role": "user", "content": question}]
        # A rendered template holds its own special tokens.
        return _encoded(tokenizer, _chat_text(tokenizer, style, messages), add_special_tokens=False)
    shown = [
        f"{question}\n{solution}\n\n" for question, solution in zip(questions[:-1], solutions, strict=True)
    ]
    return _plain_ids(tokenizer, "".join(shown) + questions[-1].removesuffix("\n") + "\n")


def _chat_text(tokenizer: Tokenizer, style: PromptStyle, messages: list[dict[str, str]]) -> str:
    import jinja2

    name = tokenizer.name_or_path or "the tokenizer"
    if not tokenizer.chat_template:
        raise PreflightError(f"{name}: has no chat template", hint="set task.prompt to plain")
    try:
        used = used_arguments(tokenizer, style.template_arguments)
        for argument in style.template_arguments:
            if argument not in used:
                raise PreflightError(
                    f"{name}: its chat template does not use the argument {argument!r}",
                    hint=f"remove template.{argument} of this model from the recipe",
                )
        with _limited_lines(name):
            text: str = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, **style.template_arguments
            )
    except (jinja2.TemplateError, MemoryError, *RAISED) as error:
        raise PreflightError(
            f"{name}: its chat template cannot render {[message['role'] for message in messages]} "
            f"with arguments {style.template_arguments}: {str(error) or type(error).__name__}",
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


def _plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """`text` with the special tokens the tokenizer puts before it (BOS), without those after it (EOS)."""
    bare = _encoded(tokenizer, text, add_special_tokens=False)
    full = _encoded(tokenizer, text, add_special_tokens=True)
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[: start + len(bare)]
    raise PreflightError(
        f"{tokenizer.name_or_path}: adds special tokens inside a text, expected them around it"
    )


def _encoded(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    with unfit(f"{tokenizer.name_or_path}: its tokenizer fails on a text"):
        ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return ids


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
class Vocabulary:
    """What student and teacher share. `student_ids` and `teacher_ids` are the numbers of ids in use.

    An id of the student is scorable when it stands for the same string in the teacher; `unscorable` holds
    the others below `student_ids`.
    """

    student_ids: int
    teacher_ids: int
    unscorable: frozenset[int]


def num_ids_in_use(tokenizer: Tokenizer) -> int:
    """One more than the highest id with a string; rows of the model from there on are padding."""
    return int(max(tokenizer.get_vocab().values())) + 1


def compare_vocabularies(student: Tokenizer, teacher: Tokenizer, *, names: tuple[str, str]) -> Vocabulary:
    """What the two share; `names` are the student's and the teacher's, for the message.

    Raises PreflightError when an id that both have stands for different strings.
    """
    ours, theirs = (
        {token_id: string for string, token_id in side.get_vocab().items()} for side in (student, teacher)
    )
    shared = ours.keys() & theirs.keys()
    differing = sorted(token_id for token_id in shared if ours[token_id] != theirs[token_id])
    if differing:
        shown = "; ".join(
            f"id {token_id} is {ours[token_id]!r} in {names[0]} and {theirs[token_id]!r} in {names[1]}"
            for token_id in differing[:3]
        )
        raise PreflightError(
            f"{names[0]} and {names[1]} have different vocabularies: "
            f"{len(differing)} of {len(shared)} shared ids stand for different strings; {shown}",
            hint="take a teacher with the student's tokenizer",
        )
    student_ids = max(ours) + 1
    return Vocabulary(student_ids, max(theirs) + 1, frozenset(range(student_ids)) - shared)


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
        return [*_encoded(self.tokenizer, problem.solution, add_special_tokens=False), self.end_id]

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
