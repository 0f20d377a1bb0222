"""Pages with known completions: some of each kind, with texts that would do harm where they are not inert."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import numpy as np

from kdpipe.data.tables import Scores
from kdpipe.pipeline.project import Project
from kdpipe.report.page import render
from kdpipe.report.tokens_data import Titled
from kdpipe.results.completions import Change, CompletionRow, CompletionTable, TableKind, TokenColumns
from kdpipe.results.detokenizer import Detokenizer, TokenText
from kdpipe.results.measures import Measures
from kdpipe.store.step import Step
from tests import nasty_texts

HIT = (
    "</script><script>window.hit=1</script>",
    '<img src=x onerror="window.hit=2">',
    "<svg/onload=window.hit=3>",
    "javascript:window.hit=4",
    "{{constructor.constructor('window.hit=5')()}} ${window.hit=6}",
    "half \ud83d surrogate",
)
"""Texts beside those of nasty_texts.py that a test can see act; and one that UTF-8 cannot write."""
NASTY = (*nasty_texts.NASTY.values(), *HIT)


class Words(Detokenizer):
    """Token texts that are known by their ids: the nasty texts themselves."""

    def __init__(self) -> None:
        super().__init__(None)

    def of(self, ids: Any) -> list[TokenText]:
        return [TokenText(NASTY[number], "text") for number in ids]

    def after(self, ids: Any, number: int) -> str:
        return NASTY[number]


def completions(kind: TableKind, *, scored: bool = True, flips: bool = False) -> CompletionTable:
    """One completion for each nasty text: every third is right, every fourth cut, every fifth flipped."""
    count = len(NASTY)
    rows = [
        CompletionRow(
            prompt_id=f"p/{index}",
            sample=0,
            source="student",
            question=NASTY[index],
            expected=str(index),
            text=NASTY[index],
            answer=NASTY[index],
            is_right=index % 3 == 0,
            is_truncated=index % 4 == 0,
        )
        for index in range(count)
    ]
    ids = [np.array([index, (index + 1) % count, 0]) for index in range(count)]
    student: list[Any] = [np.array([-0.25, -1.5, -0.0625 * index]) for index in range(count)]
    teacher: list[Any] = [np.array([-0.5, -0.5 - index, np.nan]) for index in range(count)]
    nothing: list[Any] = [None] * count
    columns = TokenColumns(ids, student if scored else nothing, teacher if scored else nothing, nothing)
    scores = {index: _scores(index) for index in range(count)} if scored else {}
    changes = {
        (f"p/{index}", 0): Change(index % 5 == 0, False, NASTY[index], NASTY[-index])
        for index in range(count)
    }
    step = Step("rollout@2", "rollout", 2, "", 0, {}, {}, "")
    places = dict.fromkeys(range(count), 0)
    return CompletionTable(kind, step, rows, columns, Words(), scores, places, None, changes if flips else {})


def _scores(index: int) -> Scores:
    top = np.array([[index, 0, -1]] * 3, np.int32)
    logprobs = np.array([[-0.5, -1.25, -np.inf]] * 3, np.float32)
    no_prompt: list[int] = []
    values, mask = np.zeros(3, np.float32), np.ones(3, np.bool_)
    return Scores(f"p/{index}", 0, "teacher", no_prompt, values, mask, top, logprobs, np.zeros(3, np.float32))


def story() -> list[Titled]:
    """A scored table with pairs of graded answers, one without, and one that nobody scored."""
    return [
        Titled("one", "Held out", "A note.", completions("held-out", flips=True)),
        Titled("two", "Training", "Another.", completions("rollout")),
        Titled("three", "Graded", "A third.", completions("answers", scored=False, flips=True)),
    ]


def page_of(project: Project, sets: list[Titled]) -> str:
    """The page of a project with these completions in place of its own."""
    return render(Measures(project), sets, stamp="0", commands=["kdpipe run"])


class Outline(HTMLParser):
    """Every element of a page with its attributes, and the text of each script, style and paragraph."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open = [""]
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        self.texts.append((self._open[-1], data))

    def of(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]
