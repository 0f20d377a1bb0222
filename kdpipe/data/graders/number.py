"""Numbers: what a text answers, by several readers, and whether that is the reference number.

The strict and the flexible answer are read as the gsm8k filters of lm-evaluation-harness (task version 3) read them.
Answers are stored as read; right or wrong is decided by comparing numbers, so `1,000`, `1000` and `$1000.0` are one.
"""

from __future__ import annotations

import re
from decimal import Decimal

from kdpipe.data.graders.marking import MARK
from kdpipe.data.graders.robust import robust_answer, robust_value
from kdpipe.data.rows import Graded
from kdpipe.recipe.task import NumberReader

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
# The optional part begins with a dot, so that a long run of digits is tried once and not once per digit.
_NUMBER = re.compile(r"-?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)")


def grade_number(text: str, expected: str | None, *, reader: NumberReader) -> Graded:
    """The answers in `text`, and whether the reader's is the number `expected`.

    A text without an answer, or with one that is not a number, is wrong. Raises ValueError when
    `expected` is not a number: the task readers let no such problem through.
    """
    strict, flexible = strict_answer(text), flexible_answer(text)
    match reader:
        case "strict":
            answer = strict
        case "flexible":
            answer = flexible
        case "robust":
            answer = robust_answer(text)
    correct = is_number(answer, expected, reader=reader)
    return Graded(answer, correct, float(correct), strict, flexible)


def is_number(answer: str | None, expected: str | None, *, reader: NumberReader) -> bool:
    """Whether a reader's answer is the number `expected`; raises ValueError when that is none."""
    wanted = None if expected is None else parse_number(expected)
    if wanted is None:
        raise ValueError(f"the reference answer is {expected!r}, expected a number")
    return answer is not None and number_of(answer, reader=reader) == wanted


def number_of(answer: str, *, reader: NumberReader) -> Decimal | None:
    """The number that a reader takes its answer for; None if it is none."""
    return robust_value(answer) if reader == "robust" else parse_number(answer)


def strict_answer(text: str) -> str | None:
    """The number after the first `#### ` that one follows, as written; None where lm-eval says [invalid]."""
    match = _STRICT.search(text)
    return match[1].strip() if match else None


def flexible_answer(text: str) -> str | None:
    """The last thing in `text` that looks like a number, as written; None where lm-eval says [invalid]."""
    numbers = [match[0] for match in _FLEXIBLE.finditer(text)]
    return numbers[-1].strip() if numbers else None


def parse_number(answer: str) -> Decimal | None:
    """The number in `answer`, less `$`, thousands commas and trailing dots; None if it is none."""
    plain = answer.strip().replace("$", "").replace(",", "").rstrip(".")
    return Decimal(plain) if _NUMBER.fullmatch(plain) else None


def reference_number(answer: str) -> Decimal | None:
    """The number of a reference answer, whose thousands are groups of three digits; None if it is none.

    `1,5` and `1.000,50` are numbers elsewhere, and other ones than they would be read as here.
    """
    plain = answer.strip().replace("$", "").rstrip(".")
    is_grouped = "," not in plain or re.fullmatch(r"-?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?", plain) is not None
    return parse_number(plain) if is_grouped else None


def extract_expected(solution: str) -> str | None:
    """What stands after the last `####` of a reference solution; None without it or if nothing does."""
    _, mark, after = solution.rpartition(MARK)
    return after.strip() or None if mark else None
