import re
import time
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.data.graders.number import (
    extract_expected,
    flexible_answer,
    grade_number,
    parse_number,
    strict_answer,
)

ANSWER_LIKE = st.text(alphabet="0123456789.,$-# a\n", max_size=40)


def oracle(text, pattern, group_select):
    """lm-evaluation-harness 0.4.13, filters/extraction.py, RegexFilter, step by step."""
    match = re.compile(pattern).findall(text)
    if not match:
        return None
    match = match[group_select]
    if isinstance(match, tuple):
        match = [group for group in match if group][0]  # noqa: RUF015
    return match.strip()


def oracle_is_right(answer, reference):
    """lm-evaluation-harness 0.4.13, exact_match with gsm8k's regexes_to_ignore."""
    for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"):
        answer, reference = re.sub(pattern, "", answer), re.sub(pattern, "", reference)
    return answer.lower() == reference.lower()


@given(ANSWER_LIKE)
def test_both_answers_are_those_of_the_gsm8k_filters(text):
    assert strict_answer(text) == oracle(text, r"#### (\-?[0-9\.\,]+)", 0)
    assert flexible_answer(text) == oracle(text, r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1)


@given(ANSWER_LIKE, st.integers(-2000, 2000))
def test_what_exact_match_calls_right_is_right(text, number):
    expected = f"{number:,}"
    for headline, answer in (("strict", strict_answer(text)), ("flexible", flexible_answer(text))):
        if answer is not None and oracle_is_right(answer, f"steps\n#### {expected}"):
            assert grade_number(text, expected, reader=headline).correct


def test_strict_takes_the_first_marked_number_and_flexible_the_last_of_all():
    text = "3 apples\n#### 1,234\n#### 5 and $6."
    assert strict_answer(text) == "1,234"
    assert flexible_answer(text) == "$6."
    assert flexible_answer("a 3, b 47 c") == "47"
    assert flexible_answer("between -12 and -7") == "-7"
    assert strict_answer("####18") is None
    assert strict_answer("#### $18") is None
    assert flexible_answer("no number") is None


@pytest.mark.parametrize(
    "written",
    ["1000", "1,000", "$1,000", "1000.0", "1000.", "1000..", "1,000.00", "$1000$", "01000", "$1,000."],
)
def test_one_number_in_many_writings_is_one_answer(written):
    for expected in ("1000", "1,000", "$1000.00"):
        assert grade_number(f"so {written}", expected, reader="flexible").correct


@pytest.mark.parametrize(
    "written", ["100", "10000", "-1000", "1000.5", "1.000", "1000.0.0", "...", "$,", "-"]
)
def test_other_numbers_and_non_numbers_are_wrong(written):
    assert not grade_number(f"so {written}", "1000", reader="flexible").correct
    assert not grade_number(f"#### {written}", "1000", reader="strict").correct


def test_the_headline_decides_which_answer_counts():
    text = "#### 7\nIn other words 8."
    assert grade_number(text, "7", reader="strict").correct
    assert not grade_number(text, "7", reader="flexible").correct
    assert grade_number(text, "8", reader="flexible").correct
    graded = grade_number(text, "8", reader="strict")
    assert (graded.answer_strict, graded.answer_flexible, graded.correct) == ("7", "8.", False)
    assert (graded.reward, grade_number(text, "7", reader="strict").reward) == (0.0, 1.0)


def test_a_text_without_an_answer_is_wrong_and_has_none():
    graded = grade_number("", "7", reader="strict")
    assert (graded.answer_strict, graded.answer_flexible, graded.correct) == (None, None, False)


def test_a_reference_that_is_no_number_is_an_error_and_never_a_wrong_answer():
    for expected in ("", "seven", "1/2", "nan", "Infinity", "1e5", "٣"):
        with pytest.raises(ValueError, match="expected a number"):
            grade_number("#### 7", expected, reader="strict")


def test_negative_zero_is_zero():
    assert grade_number("#### -0.0", "0", reader="strict").correct


@pytest.mark.parametrize("pattern", ["9", ",", ".", "$", "1.", "-1", "#### ", "####", "-", "1-"])
@pytest.mark.parametrize("end", ["", ".9.9"])
def test_grading_time_grows_with_the_length_of_the_text_only(pattern, end):
    text = "#### " + pattern * (300_000 // len(pattern)) + end
    start = time.process_time()
    grade_number(text, "9", reader="flexible")
    assert time.process_time() - start < 2


def test_numbers_of_any_length_are_compared_exactly():
    long = "9" * 200_000
    assert grade_number(f"#### {long}", long, reader="strict").correct
    assert not grade_number(f"#### {long[:-1]}8", long, reader="strict").correct
    assert grade_number(f"#### {long}.{'0' * 1000}", long, reader="strict").correct
    assert not grade_number(f"#### 1.{'0' * 1000}1", "1", reader="strict").correct


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_a_number_written_with_commas_is_read_back(number):
    assert parse_number(f"{number:,f}") == Decimal(number)


def test_the_expected_answer_stands_after_the_last_mark():
    assert extract_expected("x #### 1\ny\n#### 1,450 \n") == "1,450"
    assert extract_expected("####18") == "18"
    assert extract_expected("18") is None
    assert extract_expected("18\n####  ") is None
