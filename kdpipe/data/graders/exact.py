"""Exact answers: the text that is asked for, letter by letter, up to blanks."""

from __future__ import annotations

import unicodedata

from kdpipe.data.graders.marking import answer_part


def exact_answer(text: str) -> str | None:
    """The answer with single blanks, composed as Unicode composes it; None of an empty one."""
    return " ".join(unicodedata.normalize("NFC", answer_part(text)).split()) or None
