r"""The letter of a choice, A to E: `(B)`, `B.`, `**B**`, `Answer: B`, `\boxed{B}`.

Of an answer that is stated the last statement counts; else the line that begins with a letter, if all that do begin
with one; else the last letter in parentheses or in bold. `A` before a word is an article. An answer that names no
letter but is the text of one option, as the question lists them, is that option's.
"""

from __future__ import annotations

import re

from kdpipe.data.graders.marking import MARK, after_thinking, last_box

_MARKUP = re.compile(r"\\(?:text\w*|math\w+|mbox)\s*|\\[()\[\]]|[*_`${}]")
_DENIED = re.compile(
    r"(?i)(?:\bnot|n't|\brather than|\binstead of)[ \t]+(?:option[ \t]+|choice[ \t]+)?\(?[A-E]\b\)?"
)
_LETTER = (
    r"(?:\(([A-Ea-e])\)|\[([A-Ea-e])\]|([B-E])(?![\w'\u2019&+\-])|"
    r"(A)(?![\w'\u2019&+\-]|[ \t]+(?!because|since|as\b|is\b)[a-z]))"
)
_WHOLE = re.compile(r"[\W_]*([A-Ea-e])[\W_]*")
_STATED = re.compile(
    rf"(?i:\b(?:answer|choice|solution)\b(?:[ \t]+(?:is|would be|must be|should be))?)[ \t:=]*\s*"
    rf"(?i:(?:option|choice|letter)[ \t]+)?(?:{_LETTER}|([a-e])(?=[ \t]*(?:[.;)]|\n|$)))"
)
_NAMED = re.compile(rf"(?i:\b(?:option|choose|pick|select|choice)\b(?:[ \t]+is)?)[ \t:]*{_LETTER}")
_LINE = re.compile(
    r"(?m)^[ \t>\-]*(?:\(([A-Ea-e])\)|([A-E])[.):](?=\s|$)|([A-E])(?:[ \t]*$|[ \t]+(?:because|since)\b))"
)
_FRAMED = re.compile(r"\(([A-E])\)|\*\*\(?([A-E])[).:]*\*\*")
_OPTION = re.compile(r"(?m)^[ \t>*\-]*\(?([A-E])[.):][ \t]+(\S[^\n]*)$")
_SAID = re.compile(
    r"(?i:\b(?:answer|choice|solution)\b(?:[ \t]+(?:is|would be|must be|should be))?)[ \t:=]*\s*([^\n]+)"
)
LETTERS = "ABCDE"


def choice_answer(text: str, question: str = "") -> str | None:
    """The letter that a text answers, a capital; None where it names none, or several lines name several.

    Of a `question` that lists its options, one a line, the text of an option is read as its letter.
    """
    text, options = after_thinking(text), options_of(question)
    parts = (last_box(text), text.rpartition(MARK)[2] if MARK in text else None, text)
    for part in (part for part in parts if part is not None):
        if (letter := _letter(part) or _by_text(part, options)) is not None:
            return letter
    return None


def options_of(question: str) -> list[str]:
    """The texts of the options that a question lists last: one a line, from A on."""
    found: list[str] = []
    for letter, option in _OPTION.findall(question):
        found = [*found, option] if letter == LETTERS[len(found) :][:1] else [option] * (letter == "A")
    return found if len(found) > 1 else []


def letter_of(text: str, options: list[str]) -> str | None:
    """The letter of the one option that has this text, up to case, blanks, and what stands around it."""
    plain = _plain(text)
    found = [
        letter for letter, option in zip(LETTERS, options, strict=False) if plain and _plain(option) == plain
    ]
    return found[0] if len(found) == 1 else None


def _by_text(part: str, options: list[str]) -> str | None:
    said = _SAID.findall(part) if options else []
    return letter_of(part, options) or (letter_of(said[-1], options) if said else None)


def _plain(text: str) -> str:
    return " ".join(_MARKUP.sub("", text).casefold().split()).strip(" .,:;!?\"'")


def reference_letter(expected: str) -> str | None:
    """The letter that a reference is, a capital; None if it is no letter alone."""
    found = _WHOLE.fullmatch(expected)
    return None if found is None else found[1].upper()


def _letter(text: str) -> str | None:
    plain = _DENIED.sub("", _MARKUP.sub("", text))
    if whole := _WHOLE.fullmatch(plain):
        return whole[1].upper()
    for stated in (_STATED.findall(plain), _NAMED.findall(plain)):
        if stated:
            return _one(stated[-1])
    if lines := {_one(found) for found in _LINE.findall(plain)}:
        return lines.pop() if len(lines) == 1 else None
    framed = _FRAMED.findall(_DENIED.sub("", text))
    return _one(framed[-1]) if framed else None


def _one(groups: tuple[str, ...]) -> str:
    """The group of a match that is there."""
    return next(group for group in groups if group).upper()
