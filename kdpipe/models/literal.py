"""Special tokens inside data, which are text like any other.

A special token in a text is put into a mark, which no template looks into; when the whole is encoded, what stands in
marks becomes the ids of its letters. A text without special tokens is encoded as the tokenizer does it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Sequence
from typing import NamedTuple

from kdpipe.errors import PreflightError
from kdpipe.models.model_folder import unfit
from kdpipe.models.template import ChatTemplate
from kdpipe.models.tokenizer import Tokenizer, encode

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
"""Two noncharacters of Unicode around the number of a special token."""
_MARK = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
_ANCHORS = ("\n", "a", ".")
_ALLOWED = "set task.allow_special_tokens: true to let data write special tokens, or take these records out"


class Marker(NamedTuple):
    """Puts special tokens of texts into marks: `names`, found by `pattern`; the first is the mark's own."""

    names: tuple[str, ...]
    pattern: re.Pattern[str]

    def mark(self, text: str) -> str:
        """The text with its special tokens in marks."""
        return self.pattern.sub(lambda found: f"{_OPEN}{self.names.index(found[0])}{_CLOSE}", text)

    def encode(self, tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
        """The ids of a text that may hold marks."""
        pieces = _MARK.split(text)
        if len(pieces) == 1:
            return encode(tokenizer, text, add_special_tokens=add_special_tokens)
        whole, data = "", list[range]()
        for number, piece in enumerate(pieces):
            is_mark = number % 2 == 1 and int(piece) < len(self.names)
            shown = self.names[int(piece)] if is_mark else piece
            if is_mark:
                data.append(range(len(whole), len(whole) + len(shown)))
            whole += shown
        return self._ids(tokenizer, whole, data, add_special_tokens=add_special_tokens)

    def encode_plain(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """The ids with the special tokens put before a text (BOS), without those after it (EOS)."""
        bare = self.encode(tokenizer, text, add_special_tokens=False)
        full = self.encode(tokenizer, text, add_special_tokens=True)
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[: start + len(bare)]
        raise PreflightError(
            f"{tokenizer.name_or_path}: adds special tokens inside a text, expected them around it"
        )

    def _ids(
        self, tokenizer: Tokenizer, text: str, data: Sequence[range], *, add_special_tokens: bool
    ) -> list[int]:
        """The ids of the text; special tokens inside the ranges `data` are spelled out."""
        if not tokenizer.is_fast:
            raise PreflightError(
                f"{tokenizer.name_or_path}: cannot tell special tokens of its own from those in data",
                hint=_ALLOWED,
            )
        with unfit(f"{tokenizer.name_or_path}: its tokenizer fails on a text"):
            found = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
        special = {*tokenizer.convert_tokens_to_ids(list(self.names[1:]))}
        ids: list[int] = []
        for token, (start, stop) in zip(found["input_ids"], found["offset_mapping"], strict=True):
            is_data = token in special and any(start < each.stop and stop > each.start for each in data)
            ids += _spelled(tokenizer, text[start:stop], special) if is_data else [token]
        return ids


def _spelled(tokenizer: Tokenizer, text: str, special: set[int]) -> list[int]:
    """The ids of the letters of a special token's text."""
    for pieces in ([text], [text[:1], text[1:]]):
        ids = [token for piece in pieces for token in _inside(tokenizer, piece)]
        if (special - {tokenizer.unk_token_id}).isdisjoint(ids):
            return ids
    raise PreflightError(f"{tokenizer.name_or_path}: cannot spell {text!r} as a text", hint=_ALLOWED)


def _inside(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text that other text stands before."""
    for anchor in _ANCHORS:
        before, ids = (
            tokenizer.encode(each, add_special_tokens=False, split_special_tokens=True)
            for each in (anchor, anchor + text)
        )
        if ids[: len(before)] == before:
            return list(ids[len(before) :])
    raise PreflightError(f"{tokenizer.name_or_path}: cannot spell {text!r} as a text", hint=_ALLOWED)


def marker_of(tokenizer: Tokenizer, template: ChatTemplate | None) -> Marker:
    """The marker of a tokenizer's special tokens, and of those by which a chat template tells turns apart."""
    history = None if template is None else json.dumps(dict(template.arguments), sort_keys=True)
    return _marker(tokenizer, history)


@functools.lru_cache(maxsize=4)
def _marker(tokenizer: Tokenizer, arguments: str | None) -> Marker:
    added = tokenizer.added_tokens_decoder.values()
    names = {token.content for token in added if token.special}
    if arguments is not None:
        with contextlib.suppress(PreflightError):  # what cannot be rendered is told where the prompt is
            turns = ChatTemplate(tokenizer, json.loads(arguments)).history()
            names |= {token.content for token in added if token.content.strip() and token.content in turns}
    ordered = (_OPEN, *sorted(names, key=lambda name: (-len(name), name)))
    return Marker(ordered, re.compile("|".join(map(re.escape, ordered))))


NOTHING = Marker((_OPEN,), re.compile(_OPEN))
"""Marks no special token: in data they are special too."""
