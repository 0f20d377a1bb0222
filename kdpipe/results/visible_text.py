"""Model and data text as it is shown: what does not print is written out."""

from __future__ import annotations


def visible(text: str) -> str:
    """The text with characters that do not print, such as bidi controls, written out; newlines stay."""
    if text.isprintable():
        return text
    return "".join(
        character
        if character.isprintable() or character in "\n\t"
        else f"\\x{ord(character):02x}"
        if ord(character) < 256
        else f"\\u{ord(character):04x}"
        for character in text
    )
