from __future__ import annotations

import numpy as np
import pytest
import torch

from kdpipe.engines.hf import sampling as sampling_module
from kdpipe.engines.hf.sampling import LAST_BELOW_ONE, draw, truncated, uniforms
from kdpipe.engines.protocol import Sampling

PLAIN = Sampling(temperature=1.0, max_new_tokens=1, end_ids=(), num_ids=6)


def chi_square(ids: torch.Tensor, probs: torch.Tensor) -> float:
    counts = torch.bincount(ids, minlength=len(probs)).double()
    assert (counts[probs == 0] == 0).all()
    expected = len(ids) * probs.double()
    some = expected > 0
    return float(((counts - expected)[some] ** 2 / expected[some]).sum())


def test_uniforms_are_the_seeds_own_and_a_longer_row_starts_with_the_shorter():
    both = uniforms([7, 2**63 - 1], 50)
    assert (uniforms([2**63 - 1], 20)[0] == both[1, :20]).all()
    assert len(np.unique(uniforms([5, 5 + 2**32, 5 + 2**62], 4))) == 12
    assert both.min() >= 0
    assert both.max() < 1


def test_uniforms_are_uniform_along_seeds_and_along_steps():
    for sample in (uniforms(range(20000), 1)[:, 0], uniforms([3], 20000)[0]):
        counts = np.histogram(sample, bins=20, range=(0, 1))[0]
        assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # 99.9 % of chi-square, 19 degrees
        assert abs(np.corrcoef(sample[:-1], sample[1:])[0, 1]) < 0.025


@pytest.mark.parametrize("num_ids", [6, 1400])
def test_draws_have_the_softmax_distribution_in_one_level_and_in_two(num_ids):
    logits = torch.randn(num_ids, generator=torch.Generator().manual_seed(0))
    logits[::3] = -torch.inf
    draws = 30000
    u = torch.from_numpy(uniforms(range(draws), 1)[:, 0])
    ids = torch.cat([draw(logits.expand(500, -1), part, sampling=PLAIN)[0] for part in u.split(500)])
    degrees = int((logits > -torch.inf).sum()) - 1
    limit = degrees + 3.5 * (2 * degrees) ** 0.5 + 4
    assert chi_square(ids, logits.softmax(0)) < limit


@pytest.mark.parametrize("block", [2, 4])
def test_two_levels_find_what_one_level_finds(block, monkeypatch):
    logits = 3 * torch.randn(400, 11, generator=torch.Generator().manual_seed(1))
    u = torch.from_numpy(uniforms(range(400), 1)[:, 0])
    one, _ = draw(logits, u, sampling=PLAIN)
    monkeypatch.setattr(sampling_module, "_BLOCK", block)
    two, _ = draw(logits, u, sampling=PLAIN)
    assert (one == two).all()
    assert len(one.unique()) == 11


@pytest.mark.parametrize("num_ids", [5, 1500])
def test_the_first_and_last_uniform_never_draw_an_id_of_probability_0(num_ids):
    logits = torch.full((2, num_ids), -torch.inf)
    logits[:, 1 : num_ids - 2] = 0
    ids, logprobs = draw(logits, torch.tensor([0.0, LAST_BELOW_ONE], dtype=torch.float64), sampling=PLAIN)
    assert ids.tolist() == [1, num_ids - 3]
    assert logprobs.isfinite().all()


def test_logprobs_are_at_the_temperature():
    logits = torch.tensor([[0.0, 1.0, 3.0]]).double()
    settings = Sampling(temperature=0.5, max_new_tokens=1, end_ids=(), num_ids=3)
    for u in (0.001, 0.01, 0.9):
        ids, logprobs = draw(logits, torch.tensor([u]).double(), sampling=settings)
        weights = torch.tensor([0.0, 2.0, 6.0]).double()
        assert logprobs.item() == pytest.approx((weights[ids[0]] - weights.logsumexp(0)).item(), abs=1e-12)


def test_greedy_takes_the_lowest_of_equal_ids():
    greedy = Sampling(temperature=0.0, max_new_tokens=1, end_ids=(), num_ids=4)
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0], [5.0, 5.0, 5.0, 5.0]]).double()
    ids, logprobs = draw(logits, torch.zeros(2).double(), sampling=greedy)
    assert ids.tolist() == [1, 0]
    assert logprobs[1].item() == pytest.approx(-np.log(4), abs=1e-12)


def test_top_k_keeps_exactly_k_and_ties_go_to_the_lower_id():
    logits = torch.tensor([[1.0, 3.0, 1.0, 2.0, 1.0]])
    kept = truncated(logits, top_k=3, top_p=1.0) > -torch.inf
    assert kept.tolist() == [[True, True, False, True, False]]


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    probs = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).double()

    def kept(top_p: float, top_k: int = 0) -> list[int]:
        left = truncated(probs.log(), top_k=top_k, top_p=top_p) > -torch.inf
        return left[0].nonzero().squeeze(-1).tolist()

    assert kept(1e-9) == [1]
    assert kept(0.39) == [1]
    assert kept(0.41) == [1, 2]
    assert kept(0.69) == [1, 2]
    assert kept(0.71) == [1, 2, 3]
    # After top_k the nucleus is of what is left: 0.4 / 0.7 = 0.57.
    assert kept(0.56, top_k=2) == [1]
    assert kept(0.58, top_k=2) == [1, 2]
