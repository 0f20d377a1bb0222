"""Tokenizers: opened, made for arithmetic, asked for ids, and compared."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from kdpipe.errors import ModelError, PreflightError
from kdpipe.models.model_folder import require_own_files, unfit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

Tokenizer: TypeAlias = "PreTrainedTokenizerBase"

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


def encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    """The ids of a text."""
    with unfit(f"{tokenizer.name_or_path}: its tokenizer fails on a text"):
        ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return ids


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


def tokens_without_row(tokenizer: Tokenizer, rows: int) -> dict[int, str]:
    """The added tokens that a model of so many rows has none for, such as an image's place, by their ids.

    Raises ModelError where another token has none: tokenizer and weights do not belong together.
    """
    missing = {number: token for token, number in sorted(tokenizer.get_vocab().items()) if number >= rows}
    for number in sorted(missing.keys() - set(tokenizer.get_added_vocab().values())):
        raise ModelError(
            f"{tokenizer.name_or_path}: {len(missing)} of its tokenizer's ids have no row among the model's {rows}, "
            f"and {missing[number]!r}, id {number}, is no added token, which a text could do without",
            hint="take tokenizer and weights of one model, or resize the model's embeddings to its tokenizer",
        )
    return dict(sorted(missing.items()))


def compare_vocabularies(
    student: Tokenizer,
    teacher: Tokenizer,
    *,
    names: tuple[str, str],
    num_ids: tuple[int, int] = (sys.maxsize, sys.maxsize),
) -> Vocabulary:
    """What the two share below `num_ids`; `names` are the student's and the teacher's, for the message.

    Raises PreflightError when an id that both have stands for different strings.
    """
    ours, theirs = (
        {token_id: string for string, token_id in side.get_vocab().items() if token_id < count}
        for side, count in zip((student, teacher), num_ids, strict=True)
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
