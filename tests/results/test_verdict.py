"""What is said of a result: a headline for every sign of both measures, and the sentences below it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kdpipe.cli.display import change_lines
from kdpipe.pipeline.headline import ACCURACY, REVERSE_KL
from kdpipe.pipeline.runs import RunEvent
from kdpipe.results.effect import BY_ACCURACY, BY_REVERSE_KL, Way, effect_of, way_of
from kdpipe.results.verdict import Verdict, _engines, verdict
from kdpipe.store.locks import run_lock
from kdpipe.tracking.findings import Findings
from tests.results.told import DOWN, UNCLEAR, UP, Bounds, Told, graded, named, recipe_of

GAINED, LOST = "the student gained 10.0 points", "the student lost 10.0 points"
AWAY = "went 0.100 nats a token away from the teacher"
TABLE = {
    # accuracy, reverse KL: tone, headline
    ("up", "down"): ("good", f"It worked: {GAINED} and came closer to the teacher."),
    ("up", "unclear"): ("good", f"It worked: {GAINED}."),
    ("up", "up"): ("open", f"Mixed: {GAINED}, but {AWAY}."),
    ("up", "few"): ("good", f"It worked: {GAINED}."),
    ("up", "none"): ("good", f"It worked: {GAINED}."),
    ("unclear", "down"): ("open", "Closer to the teacher, but no clear change in accuracy."),
    ("unclear", "unclear"): ("open", "No clear effect."),
    ("unclear", "up"): (
        "bad",
        "Further from the teacher by 0.100 nats a token, and no clear change in accuracy.",
    ),
    ("unclear", "few"): ("open", "No clear change in accuracy."),
    ("unclear", "none"): ("open", "No clear change in accuracy."),
    ("down", "down"): ("bad", f"It did harm: {LOST}, though it came closer to the teacher."),
    ("down", "unclear"): ("bad", f"It did harm: {LOST}."),
    ("down", "up"): ("bad", f"It did harm: {LOST} and {AWAY}."),
    ("down", "few"): ("bad", f"It did harm: {LOST}."),
    ("down", "none"): ("bad", f"It did harm: {LOST}."),
    ("few", "down"): ("open", "Closer to the teacher, but too few problems to tell about accuracy."),
    ("few", "unclear"): ("open", "Too few problems to tell."),
    ("few", "up"): (
        "bad",
        "Further from the teacher by 0.100 nats a token, and too few problems to tell about accuracy.",
    ),
    ("few", "few"): ("open", "Too few problems to tell."),
    ("few", "none"): ("open", "Too few problems to tell."),
}
BOUNDS: dict[str, Bounds | None] = {"up": UP, "unclear": UNCLEAR, "down": DOWN, "few": UP, "none": None}


def told_of(folder: Path, accuracy: str, kl: str, *overrides: str, **more: Any) -> Told:
    after = graded(
        4,
        BOUNDS[accuracy],
        BOUNDS[kl],
        problems=1 if accuracy == "few" else 200,
        scored=1 if kl == "few" else 64,
    )
    return Told(recipe_of(folder, *overrides), [graded(0), after], **more)


@pytest.mark.parametrize(("accuracy", "kl"), TABLE)
def test_every_sign_of_both_measures_has_its_headline_everywhere(
    tmp_path: Path, accuracy: str, kl: str
) -> None:
    told: Any = told_of(tmp_path, accuracy, kl)
    found = verdict(told)
    assert (found.tone, found.headline) == TABLE[accuracy, kl]
    assert change_lines(told.after, 4)[-1] == found.headline
    findings = Findings([one.summary for one in told.evaluations])
    assert findings.tags(told.project.recipe)["result"] == found.headline
    assert found.headline in findings.note(told.project.recipe)


def test_no_sign_is_without_a_headline() -> None:
    ways = [way for way in Way if way is not Way.UNKNOWN]
    assert set(BY_ACCURACY) == {(accuracy, kl) for accuracy in ways for kl in Way}
    assert set(BY_REVERSE_KL) == set(ways)
    assert len(TABLE) == len(BY_ACCURACY)


@pytest.mark.parametrize(
    ("accuracy", "said"),
    [
        ("up", "p = 0.03; chance alone hardly explains it."),
        ("unclear", "p = 0.03; chance alone could explain it."),
        ("down", "p = 0.03; chance alone hardly explains it."),
        ("few", "p = 0.03; too few problems to tell."),
    ],
)
def test_chance_is_said_to_explain_what_it_could(tmp_path: Path, accuracy: str, said: str) -> None:
    told: Any = told_of(tmp_path, accuracy, "unclear")
    sentences = verdict(told).sentences
    assert sentences[0].endswith(said)
    assert sentences[1] == "Answered right only now: 30; only before: 10."
    many = "held-out problem " if accuracy == "few" else "200 held-out problems "
    assert sentences[0].startswith(f"On the same {many}accuracy went from 50.0% to 50.0% by round 4: ")


def test_what_may_be_rounding_is_no_way_to_or_from_the_teacher() -> None:
    tiny = graded(4, UNCLEAR, (-6e-4, -9e-4, -4e-4))
    assert way_of(REVERSE_KL, tiny) is Way.UNCLEAR
    assert way_of(REVERSE_KL, graded(4, UNCLEAR, (6e-4, 4e-4, 9e-4))) is Way.UNCLEAR
    least = graded(4, UP, None, problems=ACCURACY.fewest)
    assert way_of(ACCURACY, least) is Way.BETTER
    assert way_of(ACCURACY, {**least, "problems": ACCURACY.fewest - 1}) is Way.FEW


def test_exact_reverse_kl_is_told_where_there_is_one() -> None:
    both = {**graded(4, UNCLEAR, DOWN), **named("reverse_kl_exact_change", UP, unit="_nats")}
    found = effect_of(both)
    assert found is not None
    assert found.headline.startswith("Further from the teacher by 0.100")


# ----------------------------------------------------------------------------------------------- how far it got


def ended(kind: str, step: str) -> RunEvent:
    return RunEvent(0.0, kind, step)


@pytest.mark.parametrize(
    ("events", "then"),
    [
        ([ended("step started", "train@3"), ended("step done", "train@3")], ""),
        ([ended("step done", "train@3"), ended("step started", "train@4")], ", then it broke off in train@4"),
        (
            [ended("step started", "train@4"), ended("step stopped", "train@4")],
            ", then it was stopped in train@4",
        ),
        ([ended("step started", "evaluate-student@2")], ""),  # done since, by another run
    ],
)
def test_a_run_that_is_not_finished_says_so_in_its_headline(
    tmp_path: Path, events: list[RunEvent], then: str
) -> None:
    summaries = [graded(0), graded(3, UP, UNCLEAR)]
    told: Any = Told(recipe_of(tmp_path), summaries, left=["train@4"], events=events)
    assert verdict(told).headline == f"It worked so far: {GAINED}; round 3 of 4{then}."
    assert change_lines(told.after, 4)[-1] == f"It worked so far: {GAINED}; round 3 of 4."


def test_a_run_that_somebody_runs_now_did_not_break_off(tmp_path: Path) -> None:
    events = [ended("step started", "train@4")]
    told: Any = Told(
        recipe_of(tmp_path), [graded(0), graded(3, UP)], folder=tmp_path, left=["train@4"], events=events
    )
    assert verdict(told).headline.endswith("round 3 of 4, then it broke off in train@4.")
    with run_lock(told.project.run.path):
        assert verdict(told).headline.endswith("round 3 of 4.")


@pytest.mark.parametrize("key", TABLE)
def test_every_headline_can_be_said_so_far(tmp_path: Path, key: tuple[str, str]) -> None:
    told: Any = told_of(tmp_path, *key, "rounds=48")
    headline = verdict(told).headline
    assert headline.count(" so far") == 1
    assert headline.replace(" so far", "") == TABLE[key][1][:-1] + "; round 4 of 48."


def test_a_run_without_an_evaluated_student_says_how_far_it_is(tmp_path: Path) -> None:
    broke = [ended("step started", "train@1")]
    told: Any = Told(recipe_of(tmp_path), [graded(0)], left=["train@1"], events=broke)
    found = verdict(told)
    assert found.headline == "No verdict yet; 0 of 4 rounds are trained, then it broke off in train@1."
    alone: Any = Told(recipe_of(tmp_path), [graded(3)])
    assert (
        verdict(alone).headline == "The student answers 50.0% of the held-out problems so far; round 3 of 4."
    )


# --------------------------------------------------------------------------------- what a gain can be put down to


def said(found: Verdict) -> str:
    return " ".join(found.sentences)


@pytest.mark.parametrize(
    ("overrides", "whose"),
    [
        ((), "the teacher"),
        (("train.objective.kind=kdrl", "rollout.samples=2"), "the teacher, and how much to the reward,"),
        (("train.objective.kind=srpo", "rollout.samples=2"), "the teacher, and how much to the reward,"),
    ],
)
def test_no_gain_is_called_the_teachers_before_a_control_arm_was_run(
    tmp_path: Path, overrides: tuple[str, ...], whose: str
) -> None:
    told: Any = told_of(tmp_path, "up", "down", *overrides)
    alone = f"One seed; no control arm was run: how much of this is due to {whose} is not known"
    assert verdict(told).sentences[-1] == f"{alone} (kdpipe arms shows it)."


def test_a_run_without_a_teacher_is_told_of_its_seed_alone(tmp_path: Path) -> None:
    told: Any = told_of(tmp_path, "up", "none", "train.objective.kind=grpo", "rollout.samples=2")
    assert verdict(told).sentences[-1] == "One seed: another one may do better or worse."


def test_a_share_of_the_gap_has_its_interval_and_is_left_out_without_one(tmp_path: Path) -> None:
    teacher = graded(0, UP, model="teacher")
    summaries = [graded(0), graded(4, UP, DOWN), teacher]
    told: Any = Told(recipe_of(tmp_path), summaries, lead=(0.2, 0.1, 0.3), share=(0.834, 0.7, 1.012))
    closed = "83% (95% interval 70 to 101%)"
    ahead = "the teacher is still 20.0 points ahead (paired 95% interval +10.0 to +30.0)."
    assert f"That closes {closed} of the gap to the teacher: {ahead}" in said(verdict(told))
    assert f"; that closes {closed} of the distance to the teacher." in said(verdict(told))
    unclear: Any = Told(recipe_of(tmp_path), summaries, lead=(0.2, 0.1, 0.3))
    assert f"Against the teacher: {ahead}" in said(verdict(unclear))
    assert "%" not in said(verdict(unclear)).partition("Held-out reverse KL")[2].replace("95%", "")
    lost: Any = Told(
        recipe_of(tmp_path), [graded(0), graded(4, DOWN, UP), teacher], lead=(0.2, 0.1, 0.3), share=UP
    )
    assert "closes" not in said(verdict(lost))


def test_a_control_arm_is_told_to_be_one(tmp_path: Path) -> None:
    told: Any = told_of(tmp_path, "up", "down", "train.control=shuffled_teacher")
    assert (
        verdict(told).sentences[-1]
        == "One seed. This run is itself a control arm: train.control shuffled_teacher."
    )


# ------------------------------------------------------------------------------------------------------ warnings


@pytest.mark.parametrize(
    ("dtypes", "p99", "limit"),
    [
        (["float32"], 0.003, "float32 explains 0.002"),
        (["float32"], 0.001, None),
        (["float16"], 0.04, None),
        (["bfloat16"], 0.15, None),
        (["bfloat16"], 0.3, "bfloat16 explains 0.2"),
        (["bfloat16", "float32"], 0.15, None),
    ],
)
def test_a_mismatch_is_a_fault_beyond_what_rounding_explains(
    tmp_path: Path, dtypes: list[str], p99: float, limit: str | None
) -> None:
    rounds = {"train/mismatch_nats_p99": {1: 1e-5, 2: p99}}
    told: Any = Told(recipe_of(tmp_path), [graded(0)], rounds=rounds, made={"dtype": dtypes})
    found = [line for line in _engines(told) if "disagree" in line]
    assert [f"p99 of {p99:g} nats in round 2, and rounding in {limit}" in line for line in found] == (
        [] if limit is None else [True]
    )
