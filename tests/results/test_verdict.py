"""The verdict goes by paired intervals."""

from __future__ import annotations

from typing import Any

import pytest

from kdpipe.results.evaluations import Evaluation
from kdpipe.results.verdict import verdict


class Told:
    """Measures with known evaluations."""

    def __init__(self, change: tuple[float, float, float], kl: tuple[float, float, float]) -> None:
        summary = {"accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6, "problems": 200, "samples": 1}
        after = dict(
            zip(("accuracy_change", "accuracy_change_low", "accuracy_change_high"), change, strict=True)
        )
        after |= {"accuracy_change_p_value": 0.03, "reverse_kl_nats": 0.1, "reverse_kl_low": 0.0}
        after |= {"reverse_kl_high": 0.2, "truncated_fraction": 0.0}
        names = ("reverse_kl_change_nats", "reverse_kl_change_low", "reverse_kl_change_high")
        after |= dict(zip(names, kl, strict=True))
        self.before = Evaluation({**summary, "model": "student", "round": 0})
        self.after = Evaluation({**summary, **after, "model": "student", "round": 4})
        self.teachers: list[Evaluation] = []

    def flips(self, _first: Evaluation, _second: Evaluation) -> tuple[int, int]:
        return 30, 10


@pytest.mark.parametrize(
    ("change", "kl", "tone", "headline"),
    [
        ((0.1, 0.02, 0.2), (-0.1, -0.2, -0.05), "good", "It worked: the student gained 10.0 points."),
        ((-0.1, -0.2, -0.02), (-0.1, -0.2, -0.05), "bad", "It did harm: the student lost 10.0 points."),
        (
            (0.1, -0.02, 0.2),
            (-0.1, -0.2, -0.05),
            "open",
            "Closer to the teacher, but no clear change in accuracy.",
        ),
        ((0.1, 0.0, 0.2), (-0.1, -0.2, 0.05), "open", "No clear effect."),
    ],
)
def test_the_verdict_goes_by_the_paired_interval(
    change: tuple[float, float, float], kl: tuple[float, float, float], tone: str, headline: str
) -> None:
    told: Any = Told(change, kl)
    found = verdict(told)
    assert (found.tone, found.headline) == (tone, headline)
    crosses = change[1] <= 0 <= change[2]
    assert ("chance alone would explain it" in found.sentences[0]) == crosses
    assert "p = 0.03" in found.sentences[0]
    assert found.sentences[1] == "30 problems are right now that were wrong, 10 the other way round."
