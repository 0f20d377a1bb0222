"""Ranges, identities and supports of the divergences on random distributions, in float64.

Each test draws 200 examples of 64 pairs of distributions: 12,800 random cases apiece.
"""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdpipe.method import losses
from kdpipe.models.logprobs import support_of

ROWS, V = 64, 7
SEEDS = st.integers(0, 2**31 - 1)
SHARPNESS = st.sampled_from([0.01, 1.0, 5.0, 40.0, 300.0])
"""Scale of the logits: from nearly uniform to masses below the smallest float64."""
SHARES = st.one_of(st.floats(0.01, 0.99), st.sampled_from([1e-6, 1 - 1e-6]))

many = settings(max_examples=200, deadline=None, derandomize=True, database=None)


def logprobs(seed: int, sharpness: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(ROWS, V, generator=generator, dtype=torch.float64)).log_softmax(-1)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def assert_between(low: float, values: torch.Tensor, high: float) -> None:
    assert low - 1e-12 <= values.min() <= values.max() <= high + 1e-12


@many
@given(seeds=st.tuples(SEEDS, SEEDS), sharpness=st.tuples(SHARPNESS, SHARPNESS), share=SHARES)
def test_divergences_keep_their_ranges_and_identities(
    seeds: tuple[int, int], sharpness: tuple[float, float], share: float
) -> None:
    student, teacher = (logprobs(seed, sharp) for seed, sharp in zip(seeds, sharpness, strict=True))
    jsd = losses.jsd(student, teacher, share)
    skew_kl, skew_rkl = losses.skew_kl(student, teacher, share), losses.skew_rkl(student, teacher, share)
    assert_between(0, jsd, -share * math.log(share) - (1 - share) * math.log1p(-share))
    assert_between(0, skew_kl, -math.log(share))
    assert_between(0, skew_rkl, -math.log(share))
    assert_same(jsd, losses.jsd(teacher, student, 1 - share))
    assert_same(skew_rkl, losses.skew_kl(teacher, student, share))
    assert_same(jsd, share * skew_kl + (1 - share) * losses.skew_rkl(student, teacher, 1 - share))
    for divergence in (losses.jsd, losses.skew_kl, losses.skew_rkl):
        assert divergence(student, student, share).abs().max() <= 1e-12


@many
@given(
    seeds=st.tuples(SEEDS, SEEDS),
    sharpness=st.tuples(SHARPNESS, SHARPNESS),
    share=SHARES,
    whose=st.sampled_from(["teacher", "student", "union"]),
)
def test_on_a_support_with_a_tail_they_grow_with_it_from_0_to_the_full_value(
    seeds: tuple[int, int], sharpness: tuple[float, float], share: float, whose: str
) -> None:
    student, teacher = (logprobs(seed, sharp) for seed, sharp in zip(seeds, sharpness, strict=True))
    supports = []
    for k in (1, 2, 4, 6, V):
        given_ids = None if whose == "teacher" else support_of(student, k)[0]
        ids, values, tail = support_of(teacher, 0 if whose == "student" else k, given_ids)
        supports.append((losses.student_support(student, ids), torch.cat([values, tail[:, None]], dim=-1)))
    for divergence, weight in (
        (losses.jsd, 0.0),
        (losses.jsd, share),
        (losses.jsd, 1.0),
        (losses.skew_kl, share),
        (losses.skew_rkl, share),
    ):
        full = divergence(student, teacher, weight)
        rounding = 1e-12 * full.clamp(min=1)
        smaller = torch.zeros_like(full)
        for support in supports:
            larger = divergence(*support, weight)
            assert (larger >= smaller - rounding).all()
            assert (larger <= full + rounding).all()
            smaller = larger
        assert_same(smaller, full)
