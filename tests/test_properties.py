"""Ranges, identities and supports of the divergences, on random distributions: 200 examples of 64 rows each."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdpipe import losses
from kdpipe.forward import support_of

SEEDS = st.integers(0, 2**31 - 1)
SHARPNESS = st.sampled_from([0.1, 1.0, 5.0, 40.0])
WEIGHTS = st.floats(0.01, 0.99)


def pair(seed: int, sharpness: float, ids: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(2, 64, ids, generator=generator, dtype=torch.float64)
    student, teacher = logits.log_softmax(-1)
    return student, teacher


@settings(max_examples=200, deadline=None, derandomize=True)
@given(seed=SEEDS, sharpness=SHARPNESS, weight=WEIGHTS)
def test_ranges_and_identities(seed: int, sharpness: float, weight: float) -> None:
    student, teacher = pair(seed, sharpness)
    jsd = losses.jsd(student, teacher, weight)
    skew_kl = losses.skew_kl(student, teacher, weight)
    skew_rkl = losses.skew_rkl(student, teacher, weight)
    entropy = -weight * math.log(weight) - (1 - weight) * math.log(1 - weight)
    assert -1e-12 <= jsd.min() <= jsd.max() <= entropy + 1e-12
    for value, share in ((skew_kl, weight), (skew_rkl, weight)):
        assert -1e-12 <= value.min() <= value.max() <= -math.log(share) + 1e-12
    torch.testing.assert_close(jsd, losses.jsd(teacher, student, 1 - weight), rtol=0, atol=1e-10)
    mixed = weight * skew_kl + (1 - weight) * losses.skew_rkl(student, teacher, 1 - weight)
    torch.testing.assert_close(jsd, mixed, rtol=0, atol=1e-10)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    seed=SEEDS, sharpness=SHARPNESS, weight=WEIGHTS, chooser=st.sampled_from(["teacher", "student", "union"])
)
def test_a_support_is_a_lower_bound_that_grows_to_the_whole(
    seed: int, sharpness: float, weight: float, chooser: str
) -> None:
    student, teacher = pair(seed, sharpness)

    def on_support(k: int, name: str) -> torch.Tensor:
        given_ids = support_of(student, k)[0] if chooser != "teacher" else None
        ids, logprobs, tail = support_of(teacher, k if chooser != "student" else 0, given_ids)
        first = losses.student_support(student, ids)
        second = losses.teacher_support(logprobs, tail)
        return divergences[name](first, second)

    divergences = {
        "forward": lambda s, p: losses.jsd(s, p, 0.0),
        "reverse": lambda s, p: losses.jsd(s, p, 1.0),
        "jsd": lambda s, p: losses.jsd(s, p, weight),
        "skew_kl": lambda s, p: losses.skew_kl(s, p, weight),
        "skew_rkl": lambda s, p: losses.skew_rkl(s, p, weight),
    }
    for name, divergence in divergences.items():
        full = divergence(student, teacher)
        tolerance = 1e-12 * (1 + full)
        previous = -tolerance
        for k in (1, 2, 4, 6, 7):
            current = on_support(k, name)
            assert (current >= previous - tolerance).all(), (name, k)
            assert (current <= full + tolerance).all(), (name, k)
            previous = current
        torch.testing.assert_close(previous, full, rtol=1e-12, atol=1e-12)
