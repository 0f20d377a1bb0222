"""Graders: what a text answers, and whether that is right. The grader of a task is `task.grader`."""

from __future__ import annotations

from collections.abc import Hashable

from kdpipe.data.graders.choice import choice_answer, reference_letter
from kdpipe.data.graders.exact import exact_answer
from kdpipe.data.graders.number import grade_number, number_of, reference_number
from kdpipe.data.rows import Graded
from kdpipe.recipe.task import AnyGrader, NumberReader, PythonGrader

UNGRADED = Graded(answer=None, correct=None, reward=None)


def grade(
    text: str, expected: str | None, *, grader: AnyGrader, reader: NumberReader | None, question: str = ""
) -> Graded:
    """What `text` answers, and whether that is `expected`; `reader` is there where numbers are graded.

    Of a `question` that lists its options a choice is read by its text too. Raises ValueError where the grader cannot
    compare with `expected`: the task readers let no such problem through.
    """
    if grader == "none":
        return UNGRADED
    wanted = unfit_reference(expected, grader)
    if expected is None or wanted is not None:
        raise ValueError(f"the reference answer is {expected!r}, expected {wanted}")
    match grader:
        case "number":
            assert reader is not None
            return grade_number(text, expected, reader=reader)
        case "exact":
            return _compared(exact_answer(text), exact_answer(expected))
        case "choice":
            return _compared(choice_answer(text, question), reference_letter(expected))
        case _:
            raise ValueError("a judge grades by math-verify and by a user's code")


def unfit_reference(expected: str | None, grader: AnyGrader) -> str | None:
    """What a grader expects in the place of a reference that it cannot compare with; None of a fit one."""
    match grader:
        case "number":
            return None if expected and reference_number(expected) is not None else "a number"
        case "choice":
            return None if expected and reference_letter(expected) else "a letter from A to E"
        case "exact":
            return None if expected and exact_answer(expected) else "some text"
        case "math":
            return None if expected else "a formula"
        case "none" | PythonGrader():
            return None


def is_judged(grader: AnyGrader) -> bool:
    """Whether a `Judge` grades, in a process of its own, and not `grade`."""
    return grader == "math" or isinstance(grader, PythonGrader)


def vote(answer: str | None, *, reader: NumberReader | None) -> Hashable | None:
    """What an answer votes for where samples are counted: equal votes are one answer, None is no vote."""
    return answer if answer is None or reader is None else number_of(answer, reader=reader)


def _compared(answer: str | None, expected: str | None) -> Graded:
    correct = answer is not None and answer == expected
    return Graded(answer, correct, float(correct))
