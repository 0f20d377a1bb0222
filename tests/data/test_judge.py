"""Grading in a process of its own: a user's function, and math-verify."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from kdpipe.data.graders import judge as judging
from kdpipe.data.graders.judge import Code, Judge, require_function
from kdpipe.data.rows import Problem, Turn
from kdpipe.errors import DataError, RecipeError, StepError

PROBLEM = Problem("p/1", "which?", "B", "B", {"level": 0.5}, (Turn("system", "short"),))
OWN = """
from __future__ import annotations
import dataclasses, os, time

@dataclasses.dataclass
class Case:
    text: str

def grade(text, problem):
    print("a model's text is no message")
    match Case(text).text:
        case "raise": raise KeyError("boo")
        case "exit": os._exit(3)
        case "hang": time.sleep(1000)
        case "odd": return "yes"
        case "none": return None
        case "two": return 2
        case "nan": return float("nan")
        case "half": return problem.fields["level"]
        case "secrets": return "MY_TOKEN" not in os.environ
        case "pid": return 1 / os.getpid()
    return text == problem.expected and problem.turns[0].content == "short" and problem.question == "which?"
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def test_a_function_of_the_user_grades_in_another_process_that_knows_no_secret(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "secret")
    judge = Judge(Code(str(own), "grade"), log=tmp_path / "log")
    try:
        graded = [judge.grade(text, PROBLEM) for text in ("B", "C", "half", "secrets")]
        assert [(one.reward, one.correct) for one in graded] == [
            (1, True),
            (0, False),
            (0.5, False),
            (1, True),
        ]
        assert {one.answer for one in graded} == {None}
        assert round(1 / (judge.grade("pid", PROBLEM).reward or 0)) != os.getpid()
        for text, said in (
            ("odd", "'yes'"),
            ("two", "2"),
            ("nan", "nan"),
            ("none", "None"),
            ("raise", "KeyError: 'boo'"),
        ):
            with pytest.raises(StepError, match=rf"{re.escape(str(own))}:grade: problem p/1: .*{said}"):
                judge.grade(text, PROBLEM)
            if text == "odd":
                assert judge.grade("B", PROBLEM).correct
    finally:
        judge.close()


@pytest.mark.slow
def test_a_function_that_ends_its_process_or_hangs_is_named_and_the_next_text_is_graded(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "CODE_SECONDS", 1.0)
    judge = Judge(Code(str(own), "grade"), log=tmp_path / "log")
    try:
        with pytest.raises(StepError, match="grade: problem p/1: the worker died: exit status 3"):
            judge.grade("exit", PROBLEM)
        with pytest.raises(StepError, match="grade: problem p/1: took longer than 1 s"):
            judge.grade("hang", PROBLEM)
        assert judge.grade("B", PROBLEM).correct
    finally:
        judge.close()


def test_a_file_without_the_function_is_refused_before_anything_of_it_runs(own: Path, tmp_path: Path) -> None:
    for text, said in ((OWN, "no function 'grades'; it has .*grade"), ("def (", "not Python")):
        own.write_text(text)
        with pytest.raises(RecipeError, match=said):
            require_function(own, "grades")
    with pytest.raises(RecipeError, match="no such file"):
        require_function(tmp_path / "other.py", "grade")
    own.write_text("open('touched', 'w')\nraise SystemExit\ndef grade(text, problem): ...\n")
    require_function(own, "grade")
    assert not Path("touched").exists()


def formulas(*references: str) -> list[Problem]:
    return [Problem(f"p/{n}", "?", reference, reference) for n, reference in enumerate(references)]


@pytest.mark.slow
def test_references_are_read_beforehand_and_one_that_is_no_formula_is_refused_by_its_problem(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = "4 of 4 different references read by math-verify, each a formula"
    assert judging.read_formulas(formulas("1", r"\frac{1}{2}", "x^2", "1", "[0,1)")) == said
    for broken in ("?", r"\frac{1}{", "="):
        with pytest.raises(DataError, match=r"problem p/1: the reference answer is .*, expected a formula"):
            judging.read_formulas(formulas("1", broken))
    monkeypatch.setattr(judging, "FORMULAS", 3)
    assert judging.read_formulas(formulas(*map(str, range(7)))).startswith("3 of 7 different references")

    def unfinished(judge: Judge, _text: str, _problem: Problem) -> None:
        judge.unfinished += 1

    monkeypatch.setattr(Judge, "grade", unfinished)
    with pytest.raises(DataError, match="problem p/0: it does not finish the reference answer, '7',"):
        judging.read_formulas(formulas("7"))


@pytest.mark.slow
def test_formulas_are_compared_and_one_that_never_ends_is_wrong_and_counted(tmp_path: Path) -> None:
    judge = Judge(Code(), log=tmp_path / "log")

    def graded(text: str, expected: str) -> bool | None:
        return judge.grade(text, Problem("p/1", "?", expected, expected)).correct

    try:
        for text, expected in (
            (r"so \boxed{0.5}", r"\frac{1}{2}"),
            (r"It is $\frac{2}{4}$", "1/2"),
            ("#### 1/2", "0.5"),
            (r"\boxed{1+x^2}", "x^2 + 1"),
            (r"\boxed{\{2,1\}}", r"\{1,2\}"),
            (r"\boxed{[0,1)}", "[0,1)"),
        ):
            assert graded(text, expected), text
        for text in (
            "no",
            "",
            r"\boxed{\frac{1}{3}}",
            r"<think>\boxed{0.5}</think>",
            r"\boxed{0.5} no, \boxed{2}",
        ):
            assert not graded(text, r"\frac{1}{2}"), text
        start = time.monotonic()
        assert not graded(r"\boxed{100000000!}", "100000001!")
        assert judge.unfinished == 1
        assert time.monotonic() - start < 60
        assert graded(r"\boxed{2}", "2")
        with pytest.raises(DataError, match="problem p/1: the reference answer is '', expected a formula"):
            graded("2", "")
    finally:
        judge.close()
