"""Runs without a grader are judged by held-out reverse KL: its words, its intervals, and what it does not say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdpipe.cli.comparison_table import text_lines
from kdpipe.cli.display import change_lines, outcome_lines, round_line
from kdpipe.errors import DataError, RecipeError
from kdpipe.method import statistics
from kdpipe.pipeline.headline import ACCURACY, REVERSE_KL, headline_of
from kdpipe.pipeline.headroom import Distance, headrooms_of
from kdpipe.recipe.schema import Recipe
from kdpipe.results.comparison import compare
from kdpipe.results.contender import Contender
from kdpipe.results.studies import arm_runs
from kdpipe.results.verdict import verdict
from kdpipe.tracking.findings import Findings
from tests.results.told import Told, loaded_of

RECIPE = """
name: prompts
rounds: 2
task: {kind: jsonl, train: a.jsonl, test: b.jsonl, grader: none}
student: {model: s}
teachers: [{model: t}]
"""
CLOSER = "the student came 0.500 nats a token closer to the teacher"
AWAY = "the student went 0.400 nats a token away from the teacher"


loaded = partial(loaded_of, text=RECIPE)


def recipe(folder: Path, *overrides: str) -> Recipe:
    return loaded(folder, *overrides).recipe


def summary(number: int, level: float, change: tuple[float, float, float] | None = None) -> Mapping[str, Any]:
    found: dict[str, Any] = {"model": "student", "round": number, "problems": 90, "samples": 1}
    found |= {"truncated_fraction": 0.0, "reverse_kl_problems": 64}
    found |= {"reverse_kl_exact_nats": level, "reverse_kl_exact_low": level - 0.1}
    found |= {"reverse_kl_exact_high": level + 0.1, "reverse_kl_nats": 9.0, "reverse_kl_low": 8.0}
    found["reverse_kl_high"] = 10.0
    if change is not None:
        names = (
            "reverse_kl_exact_change_nats",
            "reverse_kl_exact_change_low",
            "reverse_kl_exact_change_high",
        )
        found |= dict(zip(names, change, strict=True))
    return found


def told_of(folder: Path, before: float, after: float, interval: tuple[float, float]) -> Any:
    summaries = [summary(0, before), summary(4, after, (after - before, *interval))]
    return Told(recipe(folder, "rounds=4"), summaries, share=(0.5, 0.4, 0.6))


@pytest.mark.parametrize(
    ("after", "interval", "tone", "headline", "chance", "closed"),
    [
        (0.5, (-0.6, -0.4), "good", f"It worked: {CLOSER}.", "chance alone hardly explains", True),
        (1.4, (0.2, 0.6), "bad", f"It did harm: {AWAY}.", "chance alone hardly explains", False),
        (0.9, (-0.3, 0.1), "open", "No clear effect.", "chance alone could explain", False),
        (0.9995, (-6e-4, -4e-4), "open", "No clear effect.", "rounding alone could explain", False),
    ],
)
def test_each_sign_of_a_change_of_reverse_kl_has_its_words(
    tmp_path: Path,
    after: float,
    interval: tuple[float, float],
    tone: str,
    headline: str,
    chance: str,
    closed: bool,
) -> None:
    told = told_of(tmp_path, 1.0, after, interval)
    found = verdict(told)
    assert (found.tone, found.headline) == (tone, headline)
    assert found.sentences[0].startswith(
        f"On the same 64 held-out problems reverse KL went from 1.000 to {after:.3f} nats a token by round 4: "
    )
    assert found.sentences[0].endswith(f"; {chance} it.")
    assert any("of the distance to the teacher" in sentence for sentence in found.sentences) == closed
    assert found.sentences[-2] == "Nothing says whether its answers are good: task.grader is none."
    assert found.sentences[-1].startswith("One seed; no control arm was run: ")
    assert "accura" not in " ".join(found.sentences)
    assert change_lines(told.after, 4)[-1] == headline


def test_a_run_tells_reverse_kl_and_nothing_of_accuracy(tmp_path: Path) -> None:
    told = told_of(tmp_path, 1.0, 0.5, (-0.6, -0.4))
    heading, before, after = outcome_lines([told.before, told.after], lambda text, _style: text)
    assert heading.split() == ["held-out", "reverse", "KL,", "nats", "95", "%", "interval"]
    assert before.split()[-4:] == ["1.000", "0.900", "to", "1.100"]
    assert after.split()[-4:] == ["0.500", "0.400", "to", "0.600"]
    metrics = {
        "score/reverse_kl_nats": 0.5,
        "evaluate/reverse_kl_nats": 9.0,
        "evaluate/reverse_kl_exact_nats": 0.25,
    }
    assert round_line(3, 10, metrics) == "round  3/10  reverse KL  0.500  held out  0.250  0.0 s"


def test_the_headroom_is_the_reverse_kl_before_training(tmp_path: Path) -> None:
    [found] = headrooms_of(recipe(tmp_path), [summary(0, 0.8)])
    assert isinstance(found, Distance)
    assert (found.teacher, found.problems, found.reverse_kl_nats) == ("teacher", 64, 0.8)
    assert "whether the teacher knows the task cannot be told" in found.sentence()
    assert (found.stops, found.is_weak) == (False, False)
    [equal] = headrooms_of(recipe(tmp_path), [summary(0, 0.0005)])
    assert (equal.stops, equal.is_weak) == (False, True)  # up to 0.1 is not excluded
    [none] = headrooms_of(recipe(tmp_path), [summary(0, 0.0) | {"reverse_kl_exact_high": 0.001}])
    assert (none.stops, none.is_weak) == (True, True)
    own = recipe(tmp_path, "teachers=[{self: ema, decay: 0.9}]")
    [moving] = headrooms_of(own, [summary(0, 0.0)])
    assert not moving.stops
    several = recipe(tmp_path, "teachers=[{name: a, model: t}, {name: b, model: u}]")
    assert [one.teacher for one in headrooms_of(several, [summary(0, 0.8)])] == ["a, b"]


def test_tags_and_description_in_mlflow_are_about_reverse_kl(tmp_path: Path) -> None:
    findings = Findings([summary(0, 1.0), summary(2, 1.5, (0.5, 0.4, 0.6))])
    found = findings.tags(recipe(tmp_path))
    assert found["student.before"] == "1.000 nats a token (0.900 to 1.100)"
    assert found["student.after"] == "1.500 nats a token (1.400 to 1.600), round 2"
    assert found["student.gain"] == "+0.500 nats (paired 95% interval +0.400 to +0.600) on 64 problems"
    assert found["result"].startswith("It did harm")
    assert found["headroom"].startswith("headroom 1.000 nats a token")
    assert "teacher.accuracy" not in found
    note = findings.note(recipe(tmp_path))
    assert "Held-out reverse KL, nats: student before 1.000, student after 1.500." in note
    assert "| student after | 1.500 | 1.400 to 1.600 | 0.0% |" in note
    assert "ccuracy" not in note


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("train.objective={kind: grpo}", "train.objective.kind grpo"),
        ("train.objective={kind: kdrl, rl_weight: 0}", "train.objective.kind kdrl"),
        ("train.objective={kind: srpo}", "train.objective.kind srpo"),
        ("train.objective={kind: then, kd_rounds: 1}", "train.objective.kind then"),
        ("train.objective.rl_weight=2", "train.objective.rl_weight 2"),
        ("train.objective.reward_scaling=3", "train.objective.reward_scaling 3"),
        ("train.objective.reward_bias=-0.5", "train.objective.reward_bias -0.5"),
        ("train.objective.truncated=no_reward", "train.objective.truncated no_reward"),
        ("evaluate.samples=4", "evaluate.samples 4"),
        ("evaluate.reverse_kl_problems=0", "evaluate.reverse_kl_problems 0"),
        ("train.control=self_teacher", "train.control self_teacher"),
    ],
)
def test_what_reads_a_reward_is_refused_by_name_where_there_is_none(
    tmp_path: Path, override: str, field: str
) -> None:
    with pytest.raises(RecipeError, match=r"task\.grader none") as caught:
        recipe(tmp_path, override)
    assert field in str(caught.value)


def test_arms_that_need_a_reward_are_refused(tmp_path: Path) -> None:
    for arm in ("rl", "kdrl", "self-teacher"):
        with pytest.raises(RecipeError, match=f"arm {arm}: task.grader is none"):
            arm_runs(loaded(tmp_path), [arm], seeds=1)  # type: ignore[list-item]
    assert len(arm_runs(loaded(tmp_path), ["kd", "shuffled-teacher"], seeds=2)) == 4


def test_no_teacher_is_graded_without_a_grader(tmp_path: Path) -> None:
    assert not recipe(tmp_path).grades_teachers
    assert recipe(tmp_path, "task.grader=number").grades_teachers


# ---------------------------------------------------------------------------------------------- comparison


def contender(
    totals: Mapping[str, tuple[float, float]], *, run: str = "a", seed: int = 1, **settings: str
) -> Contender:
    shares = statistics.ratio_shares(([a for a, _ in totals.values()], [b for _, b in totals.values()]))
    values = dict(zip(totals, shares, strict=True))
    return Contender(run, seed, 3, 1, values, settings, {"train": 2.0}, {"train": 10.0}, totals)


def drawn(seed: int, nats: float, problems: int = 40) -> dict[str, tuple[float, float]]:
    generator = np.random.default_rng(seed)
    counts = generator.integers(1, 60, problems)
    sums = counts * nats + generator.normal(0, 1, problems) * np.sqrt(counts)
    return {
        f"p/{number}": (float(a), float(b)) for number, (a, b) in enumerate(zip(sums, counts, strict=True))
    }


def test_shares_have_the_ratio_for_their_mean_and_its_spread() -> None:
    totals = drawn(1, 0.5, 400)
    columns = ([a for a, _ in totals.values()], [b for _, b in totals.values()])
    shares, found = statistics.ratio_shares(columns), statistics.token_mean(columns)
    assert np.mean(shares) == pytest.approx(sum(columns[0]) / sum(columns[1]), abs=1e-12)
    reach = 1.96 * np.std(shares, ddof=1) / 20
    assert reach == pytest.approx((found.high - found.low) / 2, rel=0.05)


def test_runs_without_a_grader_are_compared_by_the_token_mean_of_the_same_problems() -> None:
    first, second = drawn(1, 1.0), drawn(2, 0.4)
    rows = compare([contender(first, kd="rkl"), contender(second, run="b", kd="k2")])
    columns = [([a for a, _ in one.values()], [b for _, b in one.values()]) for one in (second, first)]
    assert rows[1].level == statistics.token_mean(columns[0])
    assert rows[1].difference is not None
    assert rows[1].difference.interval == statistics.token_mean(*columns)
    assert rows[1].difference.p_value is None
    lines = text_lines(rows)
    assert [line.split("  ")[-1].strip() for line in lines if "held-out" in line] == [
        "held-out reverse KL, nats"
    ] * 2
    assert "accuracy" not in "".join(lines)


def test_several_seeds_without_a_grader_are_one_row() -> None:
    [row] = compare([contender(drawn(seed, 0.5), run=f"r{seed}", seed=seed) for seed in (1, 2, 3)])
    columns = [list(zip(*drawn(seed, 0.5).values(), strict=True)) for seed in (1, 2, 3)]
    levels = [sum(sums) / sum(counts) for sums, counts in columns]
    assert row.level.estimate == pytest.approx(np.mean(levels))
    assert row.level.low < row.level.estimate < row.level.high


def test_a_graded_run_is_not_compared_with_one_that_is_not() -> None:
    graded = replace(contender(drawn(1, 0.5), run="g"), totals=None)
    with pytest.raises(DataError, match="different headlines: a has held-out reverse KL, g has accuracy"):
        compare([contender(drawn(1, 0.5)), graded])


def test_distances_to_other_teachers_are_said_to_be_so() -> None:
    one, other = (
        contender(drawn(n, 0.5), run=str(n), **{"teachers.0.model": name}) for n, name in ((1, "t"), (2, "u"))
    )
    assert any(line.startswith("teachers is not the same") for line in text_lines(compare([one, other])))


def test_which_measure_is_the_headline_is_what_a_summary_has() -> None:
    assert headline_of({"accuracy": 0.5, "reverse_kl_nats": 1.0}) is ACCURACY
    assert headline_of({"reverse_kl_nats": 1.0}) is REVERSE_KL
