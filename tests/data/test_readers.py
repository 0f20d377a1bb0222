import time
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.data.graders import vote
from kdpipe.data.graders.number import grade_number, number_of, robust_answer
from kdpipe.data.graders.robust import robust_value
from kdpipe.recipe.task import ArithmeticTask, Gsm8kTask
from tests.data.nasty_answers import OF_18, OF_OTHERS

READERS = ("strict", "flexible", "robust")
ROWS = [(text, "18", who) for who, texts in OF_18.items() for text in texts] + list(OF_OTHERS)


@pytest.mark.parametrize("reader", READERS)
def test_each_reader_gives_its_verdict_on_nasty_answers(reader):
    assert len(ROWS) > 190
    assert len({text for text, expected, _ in ROWS if expected == "18"}) == len(ROWS) - len(OF_OTHERS)
    differ = [
        (text, expected)
        for text, expected, who in ROWS
        if grade_number(text, expected, reader=reader).correct != (reader in who.split())
    ]
    assert differ == []


def test_the_answer_that_is_kept_is_the_one_in_use_beside_the_two_that_are_compared():
    graded = grade_number("#### 7\nIn other words \\boxed{8}, or 9.", "8", reader="robust")
    assert (graded.answer, graded.correct, graded.reward) == ("8", True, 1.0)
    assert (graded.answer_strict, graded.answer_flexible) == ("7", "9.")
    assert grade_number("It is −8", "-8", reader="robust").answer == "-8"


def test_accuracy_is_read_as_others_read_it_and_the_reward_is_not():
    task = Gsm8kTask(kind="gsm8k")
    assert (task.headline, task.reward) == ("flexible", "robust")
    generated = ArithmeticTask(kind="arithmetic")
    assert (generated.headline, generated.reward) == ("strict", "strict")


def test_writings_of_one_number_vote_for_one_answer():
    written = ("18", "18.0", "$18", "36/2", "1800%", "1.8e1")
    assert {number_of(answer, reader="robust") for answer in written} == {18}
    assert number_of("2/6", reader="robust") == number_of("10/30", reader="robust") != 0
    assert {vote(answer, reader="robust") for answer in written} == {18}
    assert [vote(answer, reader=None) for answer in ("18", "18.0", None)] == ["18", "18.0", None]


@given(st.text(alphabet="0123456789.,$-#/%:^x(){}\\boxed \n−", max_size=60))
def test_any_text_has_a_robust_answer_with_a_digit_or_none(text):
    answer = robust_answer(text)
    if answer is not None:
        assert any(character.isdigit() for character in answer)
        assert robust_value(answer) is None or robust_value(answer).is_finite()


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_a_number_in_any_frame_is_read_back_exactly(number):
    for frame in ("#### {}", "so \\boxed{{{}}} of 7", "7 is not it: {}", "**{}**", "$ {} $"):
        answer = robust_answer(frame.format(f"{number:,f}"))
        assert answer is not None
        assert robust_value(answer) == number


def test_long_numbers_are_compared_exactly():
    long = "9" * 200_000
    for expected, right in ((long, True), (long[:-1] + "8", False)):
        assert grade_number(f"#### {long}/1", expected, reader="robust").correct is right
    assert not grade_number(f"#### 1.{'0' * 1000}1", "1", reader="robust").correct
    assert robust_value("1/3") != Decimal("0.3333333333333333333333333333")


@pytest.mark.parametrize("pattern", ["9", "#### ", "(1", "\\boxed{", "1 111 ", "= "])
def test_reading_time_grows_with_the_length_of_the_text_only(pattern):
    text = "#### " + pattern * (60_000 // len(pattern)) + "x1"
    start = time.process_time()
    grade_number(text, "9", reader="robust")
    assert time.process_time() - start < 1
