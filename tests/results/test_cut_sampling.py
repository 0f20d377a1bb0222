"""What top-p and top-k do to a reverse KL of sampled tokens, by enumeration of all completions in float64."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from kdpipe.cli.round_line import round_line
from kdpipe.data.divergence import exact_totals, sampled_totals
from kdpipe.engines.hf.sampling import truncated
from kdpipe.method.statistics import Floats
from kdpipe.pipeline.headline import own_reverse_kl
from kdpipe.results.comparison import compare
from kdpipe.results.contender import Contender, Divergence, read_contender
from kdpipe.results.measures import Measures
from kdpipe.results.table import notes_on
from tests.worlds import load_tiny, run_near

V, TOKENS = 5, 2
DRAWN = np.random.default_rng(3).normal(0, 1.5, (3, 1 + V, V))
"""Logits of the first token, and of the second after each first one: of the student and two teachers."""


def log_softmax(logits: Floats) -> Floats:
    return np.asarray(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))


def cut(logits: Floats, top_k: int, top_p: float) -> Floats:
    with np.errstate(divide="ignore"):
        kept = truncated(torch.from_numpy(logits), top_k=top_k, top_p=top_p).numpy()
        return log_softmax(kept)


def kl(first: Floats, second: Floats) -> Floats:
    mass = np.exp(first)
    return np.where(mass > 0, mass * (np.where(mass > 0, first, 0.0) - second), 0.0).sum(-1)


class Expected:
    """Expectations over all completions of two tokens that the cut sampler draws."""

    def __init__(self, p: Floats, q: Floats, *, top_k: int, top_p: float) -> None:
        b = cut(p, top_k, top_p)
        prefix_mass = np.concatenate([[1.0], np.exp(b[0])])
        self.of_cut, self.of_whole, self.to_whole = (
            float(prefix_mass @ kl(first, second)) / TOKENS for first, second in ((b, q), (p, q), (b, p))
        )
        self.sampled = self.mismatch = self.exact = 0.0
        for first, second in itertools.product(range(V), repeat=TOKENS):
            rows = ((0, first), (1 + first, second))
            own, trained, taught = (np.array([table[at] for at in rows]) for table in (b, p, q))
            if (mass := float(np.exp(own.sum()))) == 0:
                continue
            row = {
                "sampler_logprobs": own,
                "teacher_logprobs": taught,
                "scorable": [True] * TOKENS,
                "reverse_kl_nats": [float(kl(p[at], q[at])) for at, _ in rows],
            }
            [nats], [count] = sampled_totals([row])
            exact = exact_totals([row])
            assert exact is not None
            self.sampled += mass * nats / count
            self.exact += mass * exact[0][0] / exact[1][0]
            self.mismatch += mass * float((own - trained).mean())

    @property
    def own(self) -> float:
        """What is shown of a round's own samples."""
        metrics = {
            "score/reverse_kl_nats": self.sampled,
            "rollout/kept_mass_mean": 0.9,
            "train/mismatch_nats_mean": self.mismatch,
        }
        found = own_reverse_kl(metrics)
        assert found is not None
        assert round_line(1, 3, metrics) == f"round 1/3  reverse KL {found:6.3f}  0.0 s"
        return found


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.8), (2, 0.9)])
def test_the_mean_of_sampled_tokens_is_the_cut_distributions_reverse_kl(top_k: int, top_p: float) -> None:
    student, teacher, _ = log_softmax(DRAWN)
    found = Expected(student, teacher, top_k=top_k, top_p=top_p)
    assert found.sampled == pytest.approx(found.of_cut, abs=1e-12)
    assert abs(found.sampled - found.of_whole) > 0.01
    assert found.exact == pytest.approx(found.of_whole, abs=1e-12)  # whole distributions at the same prefixes


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.8), (2, 0.9)])
def test_a_rounds_reverse_kl_is_without_what_the_cut_adds(top_k: int, top_p: float) -> None:
    """What it adds is the reverse KL of the cut distribution to the whole one: minus the log of the kept mass."""
    student, teacher, _ = log_softmax(DRAWN)
    found = Expected(student, teacher, top_k=top_k, top_p=top_p)
    assert found.mismatch == pytest.approx(found.to_whole, abs=1e-12)
    assert found.own == pytest.approx(found.of_cut - found.to_whole, abs=1e-12)
    same = Expected(student, student, top_k=top_k, top_p=top_p)
    assert same.sampled > 0.01
    assert same.own == pytest.approx(0.0, abs=1e-12)


def test_no_weight_of_sampled_tokens_gives_the_whole_reverse_kl() -> None:
    """Two teachers that differ only beyond the cut: the same tokens and scores, another reverse KL."""
    student, teacher, _ = log_softmax(DRAWN)
    other = teacher.copy()
    beyond = ~np.isfinite(cut(student, 3, 1.0))  # two ids of each row
    for number, row in enumerate(beyond):
        mass = np.exp(teacher[number][row]).sum()
        other[number][row] = np.log(mass * np.array([0.999, 0.001]))
    found = [Expected(student, each, top_k=3, top_p=1.0) for each in (teacher, other)]
    assert found[0].sampled == found[1].sampled
    assert abs(found[0].of_whole - found[1].of_whole) > 0.05


def test_without_a_cut_nothing_is_taken_off() -> None:
    assert own_reverse_kl({"score/reverse_kl_nats": 0.5, "train/mismatch_nats_mean": 0.1}) == 0.5
    assert own_reverse_kl({"rollout/kept_mass_mean": 0.9}) is None


def test_a_comparison_says_what_its_reverse_kl_is_of() -> None:
    kinds: tuple[Divergence, ...] = ("exact", "sampled", "cut")
    whole, tokens, cut_ones = (measured(run=kind, divergence=kind, kd=kind) for kind in kinds)
    told = [notes_on(compare(ends)) for ends in ([whole], [tokens], [cut_ones], [whole, cut_ones])]
    about = [[note for note in notes if note.startswith("held-out reverse KL is")] for notes in told]
    assert about[:2] == [[], []]
    assert [len(found) for found in about[2:]] == [1, 1]
    assert "top_p or top_k cut" in about[2][0]
    assert "not one measure: of whole distributions in exact; of sampled tokens and" in about[3][0]
    assert about[3][0].endswith("in cut")


def measured(*, run: str, divergence: Divergence, kd: str) -> Contender:
    totals = {f"p/{number}": (float(number), 10.0) for number in range(4)}
    values = {key: nats / 10 for key, (nats, _) in totals.items()}
    return Contender(run, 1, 3, 1, values, {"kd": kd}, {}, {}, totals, divergence)


@pytest.mark.slow
def test_a_real_round_is_shown_by_what_its_trainer_thinks_of_the_sampled_tokens(tmp_path: Path) -> None:
    rollout = {"prompts": 8, "samples": 2, "max_new_tokens": 12, "top_p": 0.8}
    project = run_near(load_tiny(tmp_path, rounds=1, rollout=rollout), tmp_path / "out")
    folder = project.run.path / "round-001"
    rows = pd.read_parquet(folder / "teacher-score/scores.parquet").merge(
        pd.read_parquet(folder / "train/completions.parquet"), on=["prompt_id", "sample"]
    )
    found = np.concatenate(rows.proximal_logprobs).astype(float) - np.concatenate(rows.teacher_logprobs)
    measures = Measures(project)
    assert measures.own_reverse_kl()[1] == pytest.approx(found.mean(), abs=1e-5)
    assert measures.by_round("score/reverse_kl_nats")[1] > found.mean() + 0.1
    assert read_contender(project.run).measured[-1].divergence == "exact"
