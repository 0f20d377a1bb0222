import time

import pytest

from kdpipe.data.graders import UNGRADED, grade
from kdpipe.data.graders.choice import choice_answer, options_of
from kdpipe.data.tasks import read_problems
from kdpipe.errors import DataError
from kdpipe.recipe.task import JsonlTask

B = (
    "B", "(B)", "B.", "B)", "b", "(b)", "[B]", "**B**", "**(B)**", "**B.** Paris", "**B) Paris**", "`B`", "B\n",
    "Answer: B", "Answer: **B**", "**Answer:** B", "**Answer: B**", "Answer:\nB", "Answer: $B$", "ANSWER: B",
    "answer = B", "The answer is B.", "The answer is (B).", "The answer is: B", "the answer is b.",
    "The correct answer is B) Paris", "The answer is option B", "The correct option is B", "The best choice is (B)",
    r"\boxed{B}", r"\boxed{\text{B}}", r"\boxed{(B)}", r"\boxed{A}, no: \boxed{B}", "#### B", "#### (B)", "B. Paris",
    "(B) Paris", "B: Paris", "B) Paris\nbecause it is the capital", "Option B is right", "I choose B", "So it is (B)",
    "It is **B**", "Let me see.\nB", "B because it is", "<think>A</think>B", "<think>Answer: A</think>\nAnswer: B",
    "Answer: A\nNo, wait.\nAnswer: B", "The answer is B, since option A is wrong", "Answer: B, not A",
    "A. x\nB. y\nC. z\nAnswer: B", "not A but (B)",
)  # fmt: skip
NONE = (
    "", "A dog is an animal", "A cat sat on the mat.", "The answer is a dog", "It is a cat", "no letter", "Answer: F",
    "A. x\nB. y\nC. z", "I", "<think>B</think>", "<think>B", "Plan B failed", "not B", "It isn't (B)", "AB", "B-52",
    "ABBA", "vitamin C", "Grade A+", "C'est la vie", "E = mc^2", "I got a C in maths",
)  # fmt: skip


def test_a_choice_is_read_in_each_of_its_writings():
    assert [(text, choice_answer(text)) for text in B if choice_answer(text) != "B"] == []


def test_an_article_a_list_of_the_options_and_a_word_are_no_choice():
    assert [(text, choice_answer(text)) for text in NONE if choice_answer(text) is not None] == []
    assert [choice_answer(text) for text in ("A", "A.", "Answer: A", "Answer: A because", "(A)")] == ["A"] * 5


def test_a_choice_is_compared_by_its_letter():
    for expected in ("B", "b", "(B)", "B."):
        assert grade("so (B)", expected, grader="choice", reader=None).correct
        assert not grade("so (C)", expected, grader="choice", reader=None).correct
    graded = grade("no idea", "B", grader="choice", reader=None)
    assert (graded.answer, graded.correct, graded.reward) == (None, False, 0.0)


QUESTION = "What is the capital of France?\n\nA) Rome\nB) Paris\nC) New York\nD) the A train"
BY_TEXT = (
    "Paris", "paris.", "**Paris**", r"\boxed{Paris}", r"\boxed{\text{Paris}}", "#### Paris", "The answer is Paris.",
    "Rome is in Italy.\nAnswer: Paris", "Answer: **Paris**", "<think>Rome</think>Paris", "Answer: Rome\nAnswer: Paris",
)  # fmt: skip


def test_the_text_of_an_option_that_the_question_lists_is_its_letter():
    for text in BY_TEXT:
        assert grade(text, "B", grader="choice", reader=None, question=QUESTION).correct, text
        assert not grade(text, "B", grader="choice", reader=None).correct, text
    for text, letter in (("(A) Paris", "A"), ("Answer: C", "C"), ("new  york", "C"), ("the A train", "D")):
        assert choice_answer(text, QUESTION) == letter
    for text in ("I know Paris well", "Paris or Rome", "London", "", "<think>Paris"):
        assert choice_answer(text, QUESTION) is None
    assert choice_answer("same", "A) same\nB) same") is None


def test_options_are_what_a_question_lists_last_from_a_on():
    assert options_of(QUESTION) == ["Rome", "Paris", "New York", "the A train"]
    assert options_of("(A) x y\n(B) z") == ["x y", "z"]
    five = "A. 1\nB. 2\nC. 3\nD. 4\nE. 5\n"
    assert options_of(f"Example:\n{five}Now:\n{five.replace('1', '6')}") == ["6", "2", "3", "4", "5"]
    for text in ("", "A) alone", "B) x\nC) y", "I like A) x and B) y"):
        assert options_of(text) == []


@pytest.mark.parametrize("pattern", ["B", "(", "A ", "Answer: ", "**", "B.\n", "_"])
def test_the_time_of_a_choice_grows_with_the_length_of_the_text_only(pattern):
    start = time.process_time()
    choice_answer(pattern * (60_000 // len(pattern)) + "x1", QUESTION)
    options_of(pattern * (60_000 // len(pattern)))
    assert time.process_time() - start < 1


def test_an_exact_answer_is_equal_up_to_blanks_and_minds_case():
    for text in (
        "New  York",
        " New\nYork ",
        r"so \boxed{New York}",
        "I think\n#### New York",
        "<think>Rome</think>New York",
    ):
        assert grade(text, "New York ", grader="exact", reader=None).correct
    for text in ("new york", "New York.", "", "NewYork", "It is New York", "<think>New York"):
        assert not grade(text, "New York", grader="exact", reader=None).correct
    assert grade("cafe\u0301", "caf\u00e9", grader="exact", reader=None).correct


def test_without_a_grader_there_is_neither_answer_nor_reward():
    assert grade("#### 7", None, grader="none", reader=None) == UNGRADED
    assert UNGRADED.correct is UNGRADED.reward is UNGRADED.answer is None


@pytest.mark.parametrize(
    ("grader", "answer", "expected"),
    [
        ("choice", "F", "a letter from A to E"),
        ("choice", "2", "a letter from A to E"),
        ("number", "x", "a number"),
    ],
)
def test_a_reference_that_the_grader_cannot_compare_with_is_refused_where_it_stands(
    grader, answer, expected, tmp_path
):
    for name, own in (("train", answer), ("test", "B" if grader == "choice" else "3")):
        (tmp_path / name).with_suffix(".jsonl").write_text(f'{{"question": "q", "answer": "{own}"}}\n')
    task = JsonlTask(kind="jsonl", train="train.jsonl", test="test.jsonl", grader=grader)
    with pytest.raises(DataError, match=rf"train\.jsonl:1: .*'{answer}', expected {expected}") as caught:
        read_problems(task, tmp_path)
    assert f"task.grader: {grader}" in str(caught.value)
    with pytest.raises(ValueError, match=expected):
        grade("B 3", answer, grader=grader, reader="strict")
