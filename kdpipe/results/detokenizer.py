"""Token ids to the text that each token adds, by a model folder's tokenizer.json.

A token of byte-level BPE may hold a part of a character only: its piece is then empty, and the token that completes the
character has all of it. Pieces of a completion, joined, are its decoded text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kdpipe.errors import ArtifactError
from kdpipe.models.model_folder import unfit

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Kind = Literal["text", "special", "part", "id"]
"""`part`: bytes of a character that a later token completes; `id`: no text is known of it."""
MAX_WAIT = 8
"""How many tokens may wait for the rest of a character; one of UTF-8 has four bytes at most."""
CONTEXT = 4
"""How many tokens before an alternative decide about its spaces."""
LOST = "\ufffd"


@dataclass(frozen=True, slots=True)
class TokenText:
    """What one token adds to a text."""

    text: str
    kind: Kind


class Detokenizer:
    """Token ids to pieces of text; without a tokenizer.json ids stand for themselves."""

    def __init__(self, path: Path | None) -> None:
        self._tokenizer = None if path is None else _open(path)
        added = {} if self._tokenizer is None else self._tokenizer.get_added_tokens_decoder()
        self._special = {number: token.content for number, token in added.items() if token.special}

    @property
    def num_ids(self) -> int:
        """One more than the largest id in use; 0 without a tokenizer."""
        if self._tokenizer is None:
            return 0
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def of(self, ids: Sequence[int]) -> list[TokenText]:
        """The piece of every token of a completion."""
        if self._tokenizer is None:
            return [TokenText(f"[{number}]", "id") for number in ids]
        # Special tokens are no part of the text, which goes on after them as if they were not there.
        plain = iter(self._pieces([number for number in ids if number not in self._special]))
        return [
            TokenText(self._special[number], "special") if number in self._special else next(plain)
            for number in ids
        ]

    def after(self, ids: Sequence[int], number: int) -> str:
        """The text that a token would have added after these, as an alternative is shown."""
        if self._tokenizer is None:
            return f"[{number}]"
        if number in self._special:
            return self._special[number]
        before = [one for one in ids[-CONTEXT:] if one not in self._special]
        context, longer = self._decode(before), self._decode([*before, number])
        added = longer[len(context) :] if longer.startswith(context) else ""
        if added and LOST not in added:
            return added
        # A part of a character is shown as the vocabulary has it.
        raw: str | None = self._tokenizer.id_to_token(number)
        return raw or f"[{number}]"

    def text(self, ids: Sequence[int]) -> str:
        """The decoded text without special tokens."""
        return "".join(piece.text for piece in self.of(ids) if piece.kind == "text")

    def _pieces(self, ids: Sequence[int]) -> list[TokenText]:
        """Those of ids none of which is special: what each makes the decoded text grow by."""
        pieces: list[TokenText] = []
        before = done = 0  # ids[before:done] is the context in which ids[done:] are decoded
        for index in range(len(ids)):
            context = self._decode(ids[before:done])
            longer = self._decode(ids[before : index + 1])
            waits = longer.endswith(LOST) and index + 1 < len(ids) and index - done < MAX_WAIT
            if waits:
                pieces.append(TokenText("", "part"))
                continue
            grown = longer.startswith(context)
            own = longer[len(context) :] if grown else self._decode(ids[done : index + 1])
            pieces.append(TokenText(own, "text"))
            before, done = done, index + 1
        return pieces

    def _decode(self, ids: Sequence[int]) -> str:
        assert self._tokenizer is not None
        with unfit("a model's tokenizer fails on its token ids"):
            text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text


def _open(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ArtifactError(f"{path}: cannot be read as a tokenizer: {error}") from error
