"""Graders: what a text answers, and whether that is right. The grader of a task is `task.grader`."""

from __future__ import annotations

from collections.abc import Hashable

from kdpipe.data.graders.number import grade_number, number_of
from kdpipe.data.rows import Graded
from kdpipe.recipe.task import GraderName, NumberReader

UNGRADED = Graded(answer=None, correct=None, reward=None)


def grade(text: str, expected: str | None, *, grader: GraderName, reader: NumberReader | None) -> Graded:
    """What `text` answers, and whether that is `expected`; `reader` is there where numbers are graded."""
    if grader == "none":
        return UNGRADED
    assert reader is not None
    return grade_number(text, expected, reader=reader)


def vote(answer: str | None, *, reader: NumberReader | None) -> Hashable | None:
    """What an answer votes for where samples are counted: equal votes are one answer, None is no vote."""
    return answer if answer is None or reader is None else number_of(answer, reader=reader)
