"""Answers and accuracy against lm-evaluation-harness, in an environment whose interpreter KDPIPE_PEER_PYTHON names.

The harness's own gsm8k.yaml is read, its filters are built from it by its own function, and its own metric grades.
It compares strings and we compare numbers, so the texts are of two kinds: those whose numbers are written as the
references are, where accuracies must be equal, and those written otherwise (`18.00` for `18`), where every
difference must be one number in two writings.
"""

from __future__ import annotations

import json
import random
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import pytest

from kdpipe.data.graders.number import grade_number, parse_number
from tests.data.nasty_answers import OF_18
from tests.peer import peer_python

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.peer

THEIRS = """
import json, pathlib, sys
import lm_eval, numpy, yaml
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import exact_match_fn
from lm_eval.filters import build_filter_ensemble

task = yaml.safe_load(pathlib.Path(lm_eval.__file__).with_name("tasks").joinpath("gsm8k/gsm8k.yaml").read_text())
assert task["metadata"]["version"] == 3.0, task["metadata"]
(metric,) = task["metric_list"]
settings = {key: metric[key] for key in ("ignore_case", "ignore_punctuation", "regexes_to_ignore")}
rows = json.load(open(sys.argv[1]))
instances = [
    Instance(request_type="generate_until", doc={}, arguments=("", {}), idx=0, resps=[row["text"]]) for row in rows
]
found = {}
for each in task["filter_list"]:
    steps = [(step.pop("function"), step) for step in each["filter"]]
    ensemble = build_filter_ensemble(each["name"], steps)
    ensemble.apply(instances)
    answers = [instance.filtered_resps[each["name"]] for instance in instances]
    right = [
        bool(exact_match_fn(predictions=[answer], references=[row["target"]], **settings)["exact_match"])
        for answer, row in zip(answers, rows, strict=True)
    ]
    found[each["name"]] = {"answers": answers, "right": right}
json.dump(found, open(sys.argv[2], "w"))
"""
NASTY = [
    "", " ", "####", "#### ", "####18", "####  18", "#### $18", "#### 18 dollars", "#### -", "#### .",
    "#### ,,,", "$", "$$$", "...", ".,", "-", "--5", "no number at all", "#### eighteen", "18#### 19",
    "#### 1\n#### 2", "#### 1 #### 2", "#### 18.", "#### 18..", "#### 1.8.", "$18.", "-$18", "$-18", "- 18",
    "1e5", "#### 1e5", "１８", "٣", "#### ٣", "18½", "1/2", "50%", "#### 50%", "18\u2212", "\u221218", "1 000",
    "1\u00a0000", "1_000", "0x12", "#### 0018", "18\x00", "#### 18\r\n", "**18**", "\\boxed{18}",
    "**Answer: \\$18 per day.**", "<<9*2=18>>18", "The answer is 18", "a 3, b 47 c", "18,", "18, ", ",18",
    "#### ,18", "1,8", "#### -18", "-18", "-18.5", "9" * 5000, "#### " + "9" * 5000,
    "#### 18\n\nQuestion: what is 2 + 2?\nAnswer: 4\n#### 4", "#### 18\ttail 7", "\n#### 18", "#### 18\u2028 9",
    "### 18", "##### 18", "#### #### 18",
]  # fmt: skip
WRITINGS_OF_STRINGS = (
    "{n}",
    "{n:,}",
    "${n:,}",
    "{n}.",
    "${n}.",
    "{n:,}.",
)  # what the harness takes for equal
WRITINGS_OF_NUMBERS = ("{n}.0", "{n:,}.00", "${n}.00", "0{n}", "{n}..", "{n},")
SHAPES = (
    "#### {a}",
    "He pays 3 * 4 = 12.\n#### {a}",
    "So the answer is {a}",
    "First 12, then {b}.\nThe answer is {a}\nfor {b} people",
    "#### {b}\nNo, wait.\n#### {a}",
    "#### {a}\n#### {b}",
    "{a} and not {b}",
    "steps #### {a} of {b}",
    "####{a}",
    "**{a}**",
    "It is {a}!",
)


@dataclass(frozen=True)
class Case:
    """A completion, its reference number and the last line of the reference solution as the harness reads it."""

    text: str
    expected: str

    @property
    def row(self) -> dict[str, str]:
        return {"text": self.text, "target": f"He pays <<3*4=12>>12.\n#### {self.expected}"}


@dataclass(frozen=True)
class Both:
    """One filter's answer to a case by the harness and by us, and whether each calls it right."""

    case: Case
    their_answer: str
    our_answer: str | None
    we: bool
    they: bool


def drawn(count: int, writings: tuple[str, ...], *, seed: int) -> list[Case]:
    dice = random.Random(seed)

    def number() -> int:
        return dice.choice([dice.randint(-40, 120), dice.randint(100, 99_999), dice.randint(10**6, 10**9)])

    cases = []
    for _ in range(count):
        n, other = number(), number()
        a, b = (dice.choice(writings).format(n=each) for each in (n, other))
        expected = (
            f"{dice.choice([n, n, other]):,}" if dice.random() < 0.5 else str(dice.choice([n, n, other]))
        )
        cases.append(Case(dice.choice(SHAPES).format(a=a, b=b), expected))
    return cases


def compare(cases: list[Case], folder: Path) -> dict[str, list[Both]]:
    """What both make of the cases, for each of the two filters."""
    (folder / "given.json").write_text(json.dumps([case.row for case in cases]))
    done = subprocess.run(
        [peer_python(), "-c", THEIRS, folder / "given.json", folder / "found.json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "found.json").read_text())
    return {
        f"{headline}-{filtering}": [
            Both(case, answer, *ours(case, headline), they)
            for case, answer, they in zip(
                cases,
                found[f"{headline}-{filtering}"]["answers"],
                found[f"{headline}-{filtering}"]["right"],
                strict=True,
            )
        ]
        for headline, filtering in (("strict", "match"), ("flexible", "extract"))
    }


def ours(case: Case, headline: Literal["strict", "flexible"]) -> tuple[str | None, bool]:
    graded = grade_number(case.text, case.expected, reader=headline)
    answer = graded.answer_strict if headline == "strict" else graded.answer_flexible
    return answer, graded.correct


def assert_same_answers(both: list[Both]) -> None:
    different = [each for each in both if (each.our_answer or "[invalid]") != each.their_answer]
    assert not different, different[:3]


def assert_differ_only_by_writing(unequal: list[Both]) -> None:
    """Wherever they disagree it is we who say right, and the two strings are one number."""
    assert all(each.we and same_number(each) for each in unequal), unequal[:3]


def test_accuracies_are_the_harnesss_on_thousands_of_answers(tmp_path: Path) -> None:
    for name, both in compare(drawn(4000, WRITINGS_OF_STRINGS, seed=1), tmp_path).items():
        assert_same_answers(both)
        assert [each.we for each in both] == [each.they for each in both]
        assert 0.1 < sum(each.they for each in both) / len(both) < 0.9, name


def test_nasty_texts_are_read_as_the_harness_reads_them(tmp_path: Path) -> None:
    cases = [Case(text, expected) for text in NASTY for expected in ("18", "1,000", "-18")]
    for both in compare(cases, tmp_path).values():
        assert_same_answers(both)
        unequal = [each for each in both if each.we != each.they]
        assert_differ_only_by_writing(unequal)
        assert {each.case.text for each in unequal} <= {
            "#### 18..",
            "#### 0018",
            ",18",
            "18, ",
            "18,",
            "#### ,18",
        }


def test_the_table_of_nasty_answers_says_what_the_harness_says(tmp_path: Path) -> None:
    for both in compare([Case(text, "18") for texts in OF_18.values() for text in texts], tmp_path).values():
        assert_same_answers(both)
        assert_differ_only_by_writing([each for each in both if each.we != each.they])


def test_where_accuracies_differ_it_is_one_number_in_two_writings(tmp_path: Path) -> None:
    for both in compare(drawn(2000, WRITINGS_OF_NUMBERS, seed=2), tmp_path).values():
        assert_same_answers(both)
        unequal = [each for each in both if each.we != each.they]
        assert unequal
        assert_differ_only_by_writing(unequal)


def same_number(both: Both) -> bool:
    return both.our_answer is not None and parse_number(both.our_answer) == parse_number(both.case.expected)
