"""Texts that a model or a data set may hold and that must do nothing where they are shown, and what each would do.

`NASTY` has one text for each trick; `texts()` draws them, pieces of them, and any Unicode around. Every text is one
that UTF-8 can write, so that it can stand in a data file or a parquet column. `acting` names what a terminal would
act on; what a page would act on is the business of whoever shows pages.
"""

from __future__ import annotations

import unicodedata

from hypothesis import strategies as st

ESC, BEL, CSI, OSC, ST, DEL = "\x1b", "\x07", "\x9b", "\x9d", "\x9c", "\x7f"

NASTY: dict[str, str] = {
    # terminals
    "colours": f"{ESC}[31;1mred{ESC}[0m",
    "clear screen": f"{ESC}[2J{ESC}[H",
    "move up and overwrite": f"wrong{ESC}[1A{ESC}[2Kright",
    "alternate screen": f"{ESC}[?1049h",
    "bracketed paste off": f"{ESC}[?2004l",
    "report that a shell would run": f"{ESC}[6n{ESC}[c{ESC}[>0q",
    "window title": f"{ESC}]0;owned{BEL}",
    "clipboard": f"{ESC}]52;c;cm0gLXJmIH4K{BEL}",
    "link to elsewhere": f"{ESC}]8;;https://evil.example/{ESC}\\click{ESC}]8;;{ESC}\\",
    "link in one-byte codes": f"{OSC}8;;https://evil.example/{ST}click{OSC}8;;{ST}",
    "control sequence in one byte": f"{CSI}2J{CSI}31m",
    "device control": f'{ESC}P$q"p{ESC}\\',
    "reset": f"{ESC}c",
    "bell and backspace": f"{BEL}{BEL}safe\b\b\b\bEVIL",
    "carriage return": "the answer is 5\rthe answer is 7",
    "vertical tab and form feed": "one\vtwo\fthree",
    "shift out": "\x0e\x0f",
    "null": "be\x00fore",
    "delete": f"abc{DEL}{DEL}{DEL}",
    "next line and separators": "one\x85two\u2028three\u2029four\x1cfive\x1dsix",
    # eyes
    "right to left override": "total \u202e00001\u202c$",
    "isolates": "\u2066left\u2067right\u2068first\u2069\u200f\u200e\u061c",
    "zero width": "a\u200bd\u200cm\u200di\u2060n\ufeff",
    "tags": "ok" + "".join(chr(0xE0000 + ord(c)) for c in "obey"),
    "soft hyphen": "pay\u00adpal",
    "many marks": "a" + "\u0301" * 200,
    "wide and joined": "\U0001f469\u200d\U0001f469\u200d\U0001f467 \uff21 \u0e33",
    "private and not assigned": "\ue000\U000f0000\ufdd0\uffff",
    "digits of other scripts": "#### \u0661\u0662\u0663 \uff11\uff12 \u00b2",
    # markup
    "rich markup": "[red]x[/red] [link=https://evil.example]y[/link] [/] [@click=app.bell]z[/]",
    "script": "<script>alert(1)</script>",
    "script end": "</script><script>alert(1)</script>",
    "comment": "--><script>alert(1)</script><!--",
    "character data": "]]><script>alert(1)</script>",
    "image": "<img src=x onerror=alert(1)>",
    "vector image": '<svg onload="alert(1)"><style>*{display:none}</style></svg>',
    "attribute": '" onmouseover="alert(1)" x=\'',
    "style end": "</style></textarea></title><h1>owned",
    "frame": '<iframe src="javascript:alert(1)"></iframe>',
    "link": "[x](javascript:alert(1)) ![](https://evil.example/beacon.png)",
    "entities": "&lt;b&gt; &amp;amp; &#0; &nosuch;",
    "formula": '=HYPERLINK("https://evil.example")\t@SUM(1)',
    "templates": "{{ 7*7 }} ${7*7} %(x)s %s {0.__class__} {question}",
    # programs
    "shell": "$(touch owned) `touch owned` ; touch owned # ' \"",
    "query": "'); DROP TABLE runs; --",
    "path": "../../../../etc/passwd\\..\\..",
    "number": "#### 1e999 nan inf -0 1_000 0x10 \u2212 5",
    "json": '"}], "correct": true, "x": [{"',
    "line break": "one\nrollout@1: done\n\twarning: none\n",
    "long": "a" * 20_000,
    "empty": "",
    "blank": " \t\n ",
}

KEPT = "\n\t"


def acting(text: str) -> set[str]:
    """The characters of `text` that a terminal acts on, or that change the order or the look of others unseen."""
    return {c for c in text if c not in KEPT and unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")}


def texts() -> st.SearchStrategy[str]:
    """Nasty texts, pieces of them one after the other, and any Unicode between."""
    whole = st.sampled_from(sorted(NASTY.values()))
    piece = st.one_of(
        whole.map(lambda text: text[:40]),
        st.sampled_from(
            [ESC, BEL, CSI, OSC, ST, DEL, "\r", "\x00", "\u202e", "\u2066", "\ufeff", "[red]", "</"]
        ),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        st.text(st.characters(categories=["Cc", "Cf", "Zl", "Zp", "Co", "Cn"]), max_size=4),
    )
    return st.one_of(whole, st.lists(piece, max_size=6).map("".join))
