"""pass@k and maj@k of a run with several samples per problem, computed again from its grades by enumeration."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest

from kdpipe.stages.evaluate import sample_counts
from tests.worlds import load_tiny, run_near

if TYPE_CHECKING:
    from pathlib import Path

SAMPLES = 5


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, pd.DataFrame]]:
    """The summary of student 1, and its grades by problem."""
    folder: Path = tmp_path_factory.mktemp("samples")
    loaded = load_tiny(
        folder,
        rounds=1,
        task__test_problems=32,
        rollout__max_new_tokens=32,
        runtime__checkpoint_steps=300,
        student__sft={"steps": 300, "batch": 16, "optimizer": {"learning_rate": 1e-2}},
        evaluate={"samples": SAMPLES, "temperature": 1.0, "teacher": False, "reverse_kl_problems": 0},
    )
    run_near(loaded, folder / "out")
    [step] = folder.glob("out/runs/*/round-001/evaluate-student")
    grades = pd.read_parquet(step / "grades.parquet")
    summary: dict[str, Any] = json.loads((step / "summary.json").read_text())
    return summary, {str(key): rows for key, rows in grades.groupby("prompt_id")}


def number(answer: str | None) -> Decimal | None:
    try:
        return (
            None
            if not isinstance(answer, str)
            else Decimal(answer.replace(",", "").replace("$", "").rstrip("."))
        )
    except InvalidOperation:
        return None


def majority(rows: pd.DataFrame, k: int) -> float:
    """The chance that a fair draw among the most frequent answers of the first k samples is the right one."""
    first = rows.sort_values("sample").head(k)
    votes = Counter(vote for vote in map(number, first["answer_strict"]) if vote is not None)
    winners = [vote for vote, count in votes.items() if count == max(votes.values())]
    [expected] = {Decimal(value) for value in rows["expected"]}
    return sum(vote == expected for vote in winners) / len(winners) if winners else 0.0


@pytest.mark.slow
def test_pass_at_k_is_the_fraction_of_subsets_with_a_right_sample(evaluation: Any) -> None:
    summary, problems = evaluation
    assert 0 < summary["accuracy"] < 1
    for k in (2, 4, 5):
        subsets = [
            any(subset) for rows in problems.values() for subset in itertools.combinations(rows["correct"], k)
        ]
        assert summary[f"pass_at_{k}"] == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)
    assert summary["pass_at_5"] > summary["pass_at_2"] > summary["accuracy"]


@pytest.mark.slow
def test_maj_at_k_is_the_vote_of_the_first_k_samples(evaluation: Any) -> None:
    summary, problems = evaluation
    for k in (2, 4, 5):
        expected = sum(majority(rows, k) for rows in problems.values()) / len(problems)
        assert summary[f"maj_at_{k}"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.slow
def test_each_has_an_interval_that_counts_problems_and_no_other_k_is_told(evaluation: Any) -> None:
    summary, problems = evaluation
    told = {name for name in summary if name.startswith(("pass_at_", "maj_at_"))}
    assert told == {
        f"{kind}_at_{k}{bound}"
        for kind in ("pass", "maj")
        for k in (2, 4, 5)
        for bound in ("", "_low", "_high")
    }
    z, n = 1.959963984540054, len(problems)
    for name in ("pass_at_5", "maj_at_2"):
        p, low, high = summary[name], summary[f"{name}_low"], summary[f"{name}_high"]
        assert low < p < high
        for bound in (low, high):  # Wilson's bounds are where the score test just rejects
            assert abs(p - bound) == pytest.approx(z * (bound * (1 - bound) / n) ** 0.5, abs=1e-9)


@pytest.mark.parametrize(
    ("samples", "ks"), [(1, []), (2, [2]), (3, [2, 3]), (4, [2, 4]), (8, [2, 4, 8]), (9, [2, 4, 8, 9])]
)
def test_k_doubles_up_to_all_samples(samples: int, ks: list[int]) -> None:
    assert sample_counts(samples) == ks
