"""The objective against exact enumeration of a tiny categorical policy, in float64.

The policy draws one token of V, or two of which the first may end the completion (id 0). All completions stand in
one micro-batch, the share of each being its probability under the sampler: the gradient of that loss *is* the
expected gradient of the loss summed over a completion's tokens, and claims hold to 1e-10.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kdpipe.method.advantage import advantages, baselines, open_completions
from kdpipe.method.objective import _ratio_weight, at_step, distribution_value, shares, token_loss
from kdpipe.method.token_batch import NonFiniteError, TeacherSupport, TokenBatch
from kdpipe.models.logprobs import support_of
from kdpipe.recipe.objective import BehaviourControl, Objective, RatioControl, Support

Row = tuple[int, ...]
V = 4
NAN, INF = math.nan, math.inf
MAX_TOKENS = [1, 2]


@dataclass(frozen=True)
class Policy:
    """Next-token logits: row 0 for the first token, row 1 + y for the second after y."""

    logits: Tensor

    @property
    def logprobs(self) -> Tensor:
        return self.logits.log_softmax(-1)

    def at(self, rows: Sequence[Row]) -> Tensor:
        """The distribution at each token of the completions, [N, V]."""
        return self.logprobs[prefixes(rows)]

    def of(self, rows: Sequence[Row]) -> Tensor:
        """The log-prob of each token of the completions, [N]."""
        return self.at(rows).gather(-1, tokens(rows)[:, None]).squeeze(-1)

    def probability(self, row: Row) -> float:
        return self.of([row]).sum().exp().item()


def prefixes(rows: Sequence[Row]) -> Tensor:
    return torch.tensor([prefix for row in rows for prefix in (0, *(1 + token for token in row[:-1]))])


def tokens(rows: Sequence[Row]) -> Tensor:
    return torch.tensor([token for row in rows for token in row])


def policy(seed: int) -> Policy:
    generator = torch.Generator().manual_seed(seed)
    return Policy(torch.randn(1 + V, V, generator=generator, dtype=torch.float64).requires_grad_())


def completions(max_tokens: int) -> list[Row]:
    if max_tokens == 1:
        return [(token,) for token in range(V)]
    return [(0,)] + [(first, second) for first in range(1, V) for second in range(V)]


def objective(**fields: Any) -> Objective:
    return Objective.model_validate(fields)


@dataclass(frozen=True)
class Sample:
    """Completions as the objective sees them: what is given, and what the student makes of them."""

    batch: TokenBatch
    student: Tensor
    distribution: Tensor | None

    def having(self, **columns: Any) -> "Sample":
        return replace(self, batch=replace(self.batch, **columns))

    @property
    def difference(self) -> Tensor:
        """d_t, [N]."""
        assert self.batch.teacher is not None
        return self.batch.teacher - self.student.detach()


def spread(values: Sequence[float], rows: Sequence[Row]) -> Tensor:
    """The value of each completion at each of its tokens, [N]."""
    return torch.cat(
        [torch.full((len(row),), value, dtype=torch.float64) for value, row in zip(values, rows, strict=True)]
    )


def sample_of(
    settings: Objective,
    rows: Sequence[Row],
    student: Policy,
    teacher: Policy,
    *,
    behaviour: Policy | None = None,
    proximal: Policy | None = None,
    share: Sequence[float] | None = None,
    advantage: Sequence[float] | None = None,
) -> Sample:
    """The micro-batch of some completions: on-policy, summed and with a constant advantage unless said otherwise."""
    support = _support(settings, teacher.at(rows).detach())
    every = torch.ones(len(tokens(rows)), dtype=torch.bool)
    distribution = None
    if support is not None:
        distribution = distribution_value(
            settings, student.at(rows), support, taught_N=every, places_N=torch.arange(len(every))
        )
    batch = TokenBatch(
        behaviour=(behaviour or student).of(rows).detach(),
        proximal=(proximal or student).of(rows).detach(),
        advantage=spread(advantage or [0.5] * len(rows), rows),
        kept=every,
        scorable=every,
        kd_open=every,
        share=spread(share or [1.0] * len(rows), rows),
        lengths=[len(row) for row in rows],
        teacher=teacher.of(rows).detach(),
    )
    return Sample(batch, student.of(rows), distribution)


def _support(settings: Objective, logprobs_NV: Tensor) -> TeacherSupport | None:
    match settings.distribution_support:
        case None:
            return None
        case Support(teacher_top_k=int(k)):
            ids_NK, values_NK, tail_N = support_of(logprobs_NV, k)
            return TeacherSupport(values_NK, ids_NK, tail_N)
        case _:
            return TeacherSupport(logprobs_NV)


def loss_of(settings: Objective, sample: Sample) -> tuple[Tensor, dict[str, Tensor]]:
    return token_loss(settings, sample.batch, sample.student, sample.distribution)


def gradient(value: Tensor, student: Policy) -> Tensor:
    (result,) = torch.autograd.grad(value, student.logits, allow_unused=True, retain_graph=True)
    return torch.zeros_like(student.logits) if result is None else result


def slopes(settings: Objective, sample: Sample) -> Tensor:
    """The derivative of the loss with respect to the log-prob of each sampled token, [N]."""
    (result,) = torch.autograd.grad(loss_of(settings, sample)[0], sample.student, retain_graph=True)
    return result


def expected_gradient(
    settings: Objective,
    max_tokens: int,
    student: Policy,
    teacher: Policy,
    *,
    behaviour: Policy | None = None,
    proximal: Policy | None = None,
) -> Tensor:
    """That of the loss summed over the tokens of a completion which the behaviour policy draws."""
    rows = completions(max_tokens)
    chances = [(behaviour or student).probability(row) for row in rows]
    sample = sample_of(
        settings, rows, student, teacher, behaviour=behaviour, proximal=proximal, share=chances
    )
    return gradient(loss_of(settings, sample)[0], student)


def exact_gradient(
    divergence: Callable[[Tensor, Tensor], Tensor],
    max_tokens: int,
    student: Policy,
    teacher: Policy,
    *,
    behaviour: Policy | None = None,
) -> Tensor:
    """`sum_t E_{y<t} grad D_t` through the whole distributions, the prefixes' distribution held fixed."""
    value = divergence(student.logprobs, teacher.logprobs.detach())
    total = value[0]
    if max_tokens == 2:
        first = (behaviour or student).logprobs[0].detach().exp()
        total = total + (first[1:] * value[2:]).sum()  # id 0 ends: nothing follows it
    return gradient(total, student)


def forward(s: Tensor, p: Tensor) -> Tensor:
    return (p.exp() * (p - s)).sum(-1)


def reverse(s: Tensor, p: Tensor) -> Tensor:
    return forward(p, s)


def mixed(share: float, first: Tensor, second: Tensor) -> Tensor:
    return (share * first.exp() + (1 - share) * second.exp()).log()


def jensen_shannon(s: Tensor, p: Tensor) -> Tensor:
    return 0.2 * forward(mixed(0.2, p, s), p) + 0.8 * forward(mixed(0.2, p, s), s)


def assert_equal(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


# ----------------------------------------------------------------------------- what the KD terms descend

WHOLE = {"support": "vocabulary"}
SAMPLED_CLAIMS = [("rkl", reverse), ("k2", reverse), ("k3", forward)]
KD_CLAIMS: list[tuple[Any, Any]] = [
    *SAMPLED_CLAIMS,
    ({"term": "rkl", "decoupled": {}}, reverse),
    ({"term": "k2", "decoupled": {}}, reverse),
    ({"term": "k3", "decoupled": {}}, forward),
    ({"term": "rkl", "baseline": "exact"} | WHOLE, reverse),
    ({"term": "k2", "baseline": "exact", "support": {"teacher_top_k": 2}}, reverse),
    ({"term": "jsd", "beta": 0.0} | WHOLE, forward),
    ({"term": "jsd", "beta": 0.2} | WHOLE, jensen_shannon),
    ({"term": "jsd", "beta": 1.0} | WHOLE, reverse),
    ({"term": "skew_kl", "alpha": 0.3} | WHOLE, lambda s, p: forward(mixed(0.3, p, s), p)),
    ({"term": "skew_rkl", "alpha": 0.3} | WHOLE, lambda s, p: forward(mixed(0.3, s, p), s)),
]
TRUNCATE = {"control": "truncate", "cap": 1.2}
MASK = {"control": "mask", "low": 0.7, "high": 1.4}
CLIP = {"control": "clip", "low": 0.3, "high": 0.4}


@pytest.mark.parametrize("max_tokens", MAX_TOKENS)
@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize(("kd", "divergence"), KD_CLAIMS)
def test_the_expected_gradient_is_that_of_the_claimed_divergence(
    kd: Any, divergence: Any, off_policy: bool, max_tokens: int
) -> None:
    student, teacher, behaviour = policy(1), policy(2), policy(3) if off_policy else None
    found = expected_gradient(
        objective(kd=kd), max_tokens, student, teacher, behaviour=behaviour, proximal=policy(4)
    )
    expected = exact_gradient(divergence, max_tokens, student, teacher, behaviour=behaviour)
    assert expected.abs().max() > 0.01
    assert_equal(found, expected)


@pytest.mark.parametrize("max_tokens", MAX_TOKENS)
@pytest.mark.parametrize(
    "control",
    [
        {"ratio": TRUNCATE},
        {"ratio": MASK},
        {"ratio": CLIP},
        {"decoupled": {"update": CLIP, "behaviour": MASK}},
    ],
)
@pytest.mark.parametrize(("term", "divergence"), SAMPLED_CLAIMS)
def test_on_policy_no_ratio_control_changes_what_is_descended(
    term: str, divergence: Any, control: Any, max_tokens: int
) -> None:
    student, teacher = policy(1), policy(2)
    found = expected_gradient(objective(kd={"term": term} | control), max_tokens, student, teacher)
    assert_equal(found, exact_gradient(divergence, max_tokens, student, teacher))


@pytest.mark.parametrize("max_tokens", MAX_TOKENS)
def test_k1_loss_has_no_expected_gradient_and_no_teacher_in_any(max_tokens: int) -> None:
    settings, student = objective(kd="k1_loss"), policy(1)
    assert expected_gradient(settings, max_tokens, student, policy(2)).abs().max() <= 1e-12
    rows = completions(max_tokens)
    for teacher in (policy(2), policy(5)):
        sample = sample_of(settings, rows, student, teacher, behaviour=policy(3))
        assert (slopes(settings, sample) == 1).all()


@pytest.mark.parametrize(
    "control", [{}, {"ratio": CLIP}, {"decoupled": {"update": CLIP, "behaviour": TRUNCATE}}]
)
@pytest.mark.parametrize("baseline", [{}, {"baseline": "exact"} | WHOLE])
def test_k2_and_rkl_have_the_same_gradient_for_every_token(control: Any, baseline: Any) -> None:
    found = []
    for term in ("k2", "rkl"):
        settings = objective(kd={"term": term} | baseline | control)
        sample = sample_of(
            settings, completions(2), policy(1), policy(2), behaviour=policy(3), proximal=policy(4)
        )
        found.append(slopes(settings, sample))
    assert_equal(*found, 1e-12)


@pytest.mark.parametrize("baseline", [{}, {"baseline": "exact"} | WHOLE])
@pytest.mark.parametrize("max_tokens", MAX_TOKENS)
def test_rkl_with_gamma_1_has_the_gradient_of_the_sequence_kl(max_tokens: int, baseline: Any) -> None:
    student, teacher = policy(4), policy(5)
    settings = objective(kd={"term": "rkl", "gamma": 1.0} | baseline)
    sequence_kl = sum(
        student.of([row]).sum().exp() * (student.of([row]) - teacher.of([row]).detach()).sum()
        for row in completions(max_tokens)
    )
    assert_equal(expected_gradient(settings, max_tokens, student, teacher), gradient(sequence_kl, student))


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_rkl_below_gamma_1_has_another_gradient_than_the_sequence_kl(gamma: float) -> None:
    one, other = (
        expected_gradient(objective(kd={"term": "rkl", "gamma": value}), 2, policy(4), policy(5))
        for value in (1.0, gamma)
    )
    assert (one - other).abs().max() > 0.01


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.8, 1.0])
def test_rkl_discounts_the_future_of_its_own_completion_by_its_formula(gamma: float) -> None:
    settings = objective(kd={"term": "rkl", "gamma": gamma})
    rows = [(1, 2), (0,), (3, 0), (2, 2)]
    sample = sample_of(settings, rows, policy(4), policy(5), behaviour=policy(6))
    expected = []
    for rho, d in zip(
        (sample.student.detach() - sample.batch.behaviour).exp().split(sample.batch.lengths),
        sample.difference.split(sample.batch.lengths),
        strict=True,
    ):
        for t in range(len(d)):
            future = sum(gamma ** (u - t) * d[u] for u in range(t, len(d)))
            expected.append(-rho[t] * future)
    assert_equal(slopes(settings, sample), torch.stack(expected), 1e-12)


@pytest.mark.parametrize(
    "kd",
    [
        *(kd for kd, _ in KD_CLAIMS),
        {"term": "rkl", "gamma": 1.0},
        {"term": "jsd", "support": {"teacher_top_k": 2}},
        {"term": "skew_rkl", "support": {"teacher_top_k": 1}},
    ],
)
@pytest.mark.parametrize("off_policy", [False, True])
def test_every_single_completion_has_no_gradient_where_teacher_and_student_agree(
    kd: Any, off_policy: bool
) -> None:
    student, settings = policy(6), objective(kd=kd)
    for row in completions(2):
        sample = sample_of(settings, [row], student, student, behaviour=policy(7) if off_policy else None)
        assert gradient(loss_of(settings, sample)[0], student).abs().max() <= 1e-12


# ---------------------------------------------------------------------------------------- ratio weights


@pytest.mark.parametrize("term", ["rkl", "k2", "k3"])
@pytest.mark.parametrize(
    ("ratio", "weight"),
    [
        ({"control": "none"}, lambda rho, a: rho),
        (TRUNCATE, lambda rho, a: min(rho, 1.2)),
        (MASK, lambda rho, a: rho if 0.7 <= rho <= 1.4 else 0.0),
        (CLIP, lambda rho, a: 0.0 if (a > 0 and rho > 1.4) or (a < 0 and rho < 0.7) else rho),
    ],
)
def test_ratio_control_weighs_every_token_once(term: str, ratio: dict[str, Any], weight: Any) -> None:
    settings = objective(kd={"term": term, "ratio": ratio})
    sample = sample_of(settings, completions(2), policy(8), policy(9), behaviour=policy(10))
    signal = sample.difference.expm1() if term == "k3" else sample.difference
    ratios = (sample.student.detach() - sample.batch.behaviour).exp()
    weights = [weight(rho, a) for rho, a in zip(ratios.tolist(), signal.tolist(), strict=True)]
    acted = sum(w != rho for w, rho in zip(weights, ratios.tolist(), strict=True))
    assert_equal(slopes(settings, sample), -torch.tensor(weights, dtype=torch.float64) * signal, 1e-12)
    assert int(loss_of(settings, sample)[1]["kd_ratio_acted"]) == acted
    assert (acted > 0) is (ratio["control"] != "none")


@pytest.mark.parametrize(
    ("behaviour", "before"),
    [
        ({"control": "none"}, lambda v: v),
        ({"control": "truncate", "cap": 1.1}, lambda v: min(v, 1.1)),
        ({"control": "mask", "low": 0.8, "high": 1.5}, lambda v: v if 0.8 <= v <= 1.5 else 0.0),
    ],
)
@pytest.mark.parametrize("update", [{"control": "none"}, {"control": "clip", "low": 0.2, "high": 0.2}])
@pytest.mark.parametrize("term", ["rkl", "k3"])
def test_decoupled_weights_are_a_product_of_two_ratios(
    term: str, update: dict[str, Any], behaviour: dict[str, Any], before: Any
) -> None:
    settings = objective(kd={"term": term, "decoupled": {"update": update, "behaviour": behaviour}})
    sample = sample_of(
        settings, completions(2), policy(8), policy(9), behaviour=policy(10), proximal=policy(11)
    )
    signal = sample.difference.expm1() if term == "k3" else sample.difference
    expected, acted = [], 0
    for s, p, b, a in zip(
        sample.student.tolist(),
        sample.batch.proximal.tolist(),
        sample.batch.behaviour.tolist(),
        signal.tolist(),
        strict=True,
    ):
        u, v = math.exp(s - p), math.exp(p - b)
        is_clipped = update["control"] == "clip" and ((a > 0 and u > 1.2) or (a < 0 and u < 0.8))
        expected.append(-(0.0 if is_clipped else u) * before(v) * a)
        acted += is_clipped or before(v) != v
    assert_equal(slopes(settings, sample), torch.tensor(expected, dtype=torch.float64), 1e-12)
    assert int(loss_of(settings, sample)[1]["kd_ratio_acted"]) == acted
    assert (acted > 0) is (update["control"] != "none" or behaviour["control"] != "none")


def test_the_ratio_clip_of_rkl_looks_at_the_discounted_signal() -> None:
    # d = (+1, -3): with gamma 1 the first signal is -2, so its ratio of 2 is not clipped but would be by d.
    clip = {"control": "clip", "low": 0.2, "high": 0.2}
    found = {}
    for gamma in (1.0, 0.0):
        settings = objective(kd={"term": "rkl", "gamma": gamma, "ratio": clip})
        sample = sample_of(settings, [(1, 2)], policy(8), policy(9))
        student = sample.student.detach()
        sample = sample.having(
            behaviour=student - math.log(2),
            teacher=student + torch.tensor([1.0, -3.0], dtype=torch.float64),
        )
        found[gamma] = slopes(settings, sample).tolist()
    assert found == {1.0: pytest.approx([4.0, 6.0]), 0.0: pytest.approx([0.0, 6.0])}


def test_ratio_weights_are_their_table() -> None:
    ratio = torch.tensor([0.4, 0.5, 1.0, 2.0, 2.1], dtype=torch.float64)

    def weights(settings: RatioControl | BehaviourControl, sign: int = 1) -> list[float]:
        return _ratio_weight(settings, ratio, torch.full_like(ratio, sign)).tolist()

    for kind in (RatioControl, BehaviourControl):
        assert weights(kind()) == ratio.tolist()
        assert weights(kind(control="truncate", cap=2.0)) == [0.4, 0.5, 1.0, 2.0, 2.0]
    assert weights(RatioControl(control="mask", low=0.5, high=2.0)) == [0.0, 0.5, 1.0, 2.0, 0.0]
    assert weights(BehaviourControl(control="mask", cap=2.0)) == [0.4, 0.5, 1.0, 2.0, 0.0]
    clip = RatioControl(control="clip", low=0.5, high=1.0)
    assert weights(clip) == [0.4, 0.5, 1.0, 2.0, 0.0]
    assert weights(clip, -1) == [0.0, 0.5, 1.0, 2.0, 2.1]


def test_distribution_terms_are_never_ratio_weighted() -> None:
    settings = objective(kd={"term": "jsd", "beta": 0.3} | WHOLE)
    on, off = (
        loss_of(settings, sample_of(settings, [(1, 2)], policy(1), policy(2), behaviour=behaviour))[0]
        for behaviour in (None, policy(3))
    )
    assert torch.equal(on, off)


# -------------------------------------------------------------------------------------------- baselines


@dataclass(frozen=True)
class Pairs:
    """All pairs of independent completions, one after another, with the probability of each pair."""

    rows: list[Row]
    chances: list[float]

    @property
    def scopes(self) -> list[int]:
        return [number // 2 for number in range(len(self.rows))]

    def sample(self, settings: Objective, student: Policy, teacher: Policy, **policies: Any) -> Sample:
        """Their micro-batch, with the baseline that the settings ask for."""
        sample = sample_of(settings, self.rows, student, teacher, share=self.chances, **policies)
        if settings.kd.baseline not in ("step", "group"):
            return sample
        differences = list((sample.batch.teacher - sample.batch.proximal).split(sample.batch.lengths))
        taught = list(sample.batch.taught.split(sample.batch.lengths))
        found = baselines(settings.kd, differences, taught, self.scopes)
        return sample.having(baseline=spread(found, self.rows))

    def variance(self, settings: Objective, sample: Sample, student: Policy) -> float:
        """The variance of a pair's gradient, summed over the logits."""
        own = slopes(settings, sample) / sample.batch.share
        score_NPV = torch.zeros(len(own), 1 + V, V, dtype=torch.float64)
        at = torch.nn.functional.one_hot(tokens(self.rows), V) - student.at(self.rows).detach().exp()
        score_NPV[torch.arange(len(own)), prefixes(self.rows)] = own[:, None] * at
        pair_of_N = spread(self.scopes, self.rows).long()
        chance = torch.tensor(self.chances[::2], dtype=torch.float64)[:, None, None]
        each = torch.zeros(len(chance), 1 + V, V, dtype=torch.float64).index_add(0, pair_of_N, score_NPV)
        mean = (chance * each).sum(0)
        assert_equal(mean, gradient(loss_of(settings, sample)[0], student))
        return float((chance * (each - mean).square()).sum())


def pairs(max_tokens: int, sampler: Policy) -> Pairs:
    both = list(itertools.product(completions(max_tokens), repeat=2))
    chances = [sampler.probability(first) * sampler.probability(second) for first, second in both]
    return Pairs([row for pair in both for row in pair], [chance for chance in chances for _ in range(2)])


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("baseline", ["step", "group"])
@pytest.mark.parametrize(
    "kd", [{"term": "rkl"}, {"term": "rkl", "gamma": 1.0}, {"term": "k2"}, {"term": "k3"}]
)
def test_the_mean_over_the_other_completions_leaves_the_expected_gradient(
    kd: dict[str, Any], baseline: str, off_policy: bool
) -> None:
    if kd == {"term": "rkl", "gamma": 1.0} and off_policy:
        kd = {"term": "rkl", "gamma": 0.5}
    student, teacher, sampler = policy(1), policy(2), policy(3) if off_policy else policy(1)
    settings = objective(kd=kd | {"baseline": baseline})
    sample = pairs(2, sampler).sample(settings, student, teacher, behaviour=sampler, proximal=policy(4))
    alone = expected_gradient(objective(kd=kd), 2, student, teacher, behaviour=sampler)
    assert sample.batch.baseline is not None
    assert sample.batch.baseline.abs().max() > 0.1
    assert_equal(gradient(loss_of(settings, sample)[0], student), 2 * alone)


def test_a_mean_that_includes_the_own_completion_would_bias_the_gradient() -> None:
    student, teacher = policy(1), policy(2)
    settings = objective(kd={"term": "k2", "baseline": "step"})
    both = pairs(1, student)
    sample = both.sample(settings, student, teacher)
    own = [(first + second) / 2 for first, second in sample.difference.view(-1, 2).tolist() for _ in range(2)]
    found = gradient(loss_of(settings, sample.having(baseline=spread(own, both.rows)))[0], student)
    alone = expected_gradient(objective(kd="k2"), 1, student, teacher)
    # Half of each mean is the own signal, so half of the gradient is gone.
    assert_equal(found, alone)


@pytest.mark.parametrize(
    "baseline", [{"baseline": "step"}, {"baseline": "group"}, {"baseline": "exact"} | WHOLE]
)
def test_a_baseline_lowers_the_variance_where_the_teacher_likes_nothing_that_the_student_does(
    baseline: dict[str, Any],
) -> None:
    student, teacher = (
        Policy((policy(seed).logits.detach() + torch.tensor([shift, 0, 0, 0])).requires_grad_())
        for seed, shift in ((1, -3.0), (2, 5.0))
    )
    both = pairs(2, student)
    plain, better = (objective(kd={"term": "rkl"} | settings) for settings in ({}, baseline))
    before, after = (
        both.variance(settings, both.sample(settings, student, teacher), student)
        for settings in (plain, better)
    )
    assert 0 < after < 0.8 * before


def test_baselines_are_means_over_the_taught_tokens_of_the_others_of_a_scope() -> None:
    kd = objective(kd={"term": "k2", "baseline": "group"}).kd
    differences = [torch.tensor(values) for values in ([1.0, 2.0], [NAN, 5.0], [7.0], [9.0])]
    taught = [torch.tensor(mask) for mask in ([True, True], [False, True], [True], [True])]
    assert baselines(kd, differences, taught, ["a", "a", "a", "b"]) == [6.0, 10 / 3, 8 / 3, 0.0]
    discounted = objective(kd={"term": "rkl", "gamma": 0.5, "baseline": "step"}).kd
    assert baselines(discounted, differences, taught, [0, 0, 1, 1]) == [5.0, 2.0, 9.0, 7.0]
    k3 = objective(kd={"term": "k3", "baseline": "step"}).kd
    assert baselines(k3, differences[2:], taught[2:], [0, 0]) == pytest.approx([math.expm1(9), math.expm1(7)])


# ------------------------------------------------------------------------------------------- the RL part


@pytest.mark.parametrize(("max_tokens", "group_size"), [(1, 2), (2, 2), (1, 3)])
def test_the_expected_grpo_gradient_is_the_policy_gradient_times_g_minus_1_over_g(
    max_tokens: int, group_size: int
) -> None:
    student, settings = policy(11), objective(kind="grpo", group_normalization="mean")
    reward = {row: float((3 * sum(row) + len(row)) % 4) for row in completions(max_tokens)}
    rows, chances, signal = [], [], []
    for group in itertools.product(reward, repeat=group_size):
        rows += group
        chances += [math.prod(student.probability(row) for row in group) / group_size] * group_size
        signal += advantages(settings, [reward[row] for row in group], [0] * group_size)
    sample = sample_of(settings, rows, student, policy(12), share=chances, advantage=signal)
    mean_reward = sum(student.of([row]).sum().exp() * value for row, value in reward.items())
    expected = -gradient(mean_reward, student) * (group_size - 1) / group_size
    assert expected.abs().max() > 0.01
    assert_equal(gradient(loss_of(settings, sample)[0], student), expected)


@pytest.mark.parametrize(
    ("control", "weight"),
    [
        ({"control": "none"}, lambda v: v),
        ({"control": "truncate", "cap": 1.5}, lambda v: min(v, 1.5)),
        ({"control": "mask", "cap": 1.5}, lambda v: v if v <= 1.5 else 0.0),
    ],
)
@pytest.mark.parametrize("advantage", [0.8, -0.8])
@pytest.mark.parametrize("dual_clip", [None, 2.0])
def test_the_decoupled_loss_clips_on_the_proximal_ratio_and_weighs_by_the_behaviour_ratio(
    control: dict[str, Any], weight: Any, advantage: float, dual_clip: float | None
) -> None:
    settings = objective(kind="grpo", behaviour=control, clip_low=0.2, clip_high=0.3, dual_clip=dual_clip)
    grid = list(itertools.product([0.5, 0.9, 1.1, 1.4, 3.0], repeat=2))
    u, v = torch.tensor(grid, dtype=torch.float64).log().T
    sample = sample_of(
        settings, [(0,)] * 25, policy(8), policy(9), share=[0.2] * 25, advantage=[advantage] * 25
    )
    proximal = sample.student.detach() - u
    sample = sample.having(proximal=proximal, behaviour=proximal - v)
    losses, expected, clipped, acted = [], [], 0, 0
    for ratio, behaviour_ratio in grid:
        loss = max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.3))
        is_flat = loss != -advantage * ratio
        if advantage < 0 and dual_clip is not None and loss > dual_clip * abs(advantage):
            loss, is_flat = dual_clip * abs(advantage), True
        w = weight(behaviour_ratio)
        losses.append(w * loss)
        expected.append(0.0 if is_flat else -0.2 * w * advantage * ratio)
        clipped += is_flat
        acted += w != behaviour_ratio
    value, metrics = loss_of(settings, sample)
    assert value.item() == pytest.approx(0.2 * sum(losses), rel=1e-12)
    assert metrics["rl_loss"].item() == pytest.approx(sum(losses), rel=1e-12)
    assert_equal(slopes(settings, sample), torch.tensor(expected, dtype=torch.float64), 1e-12)
    assert (int(metrics["rl_clipped"]), int(metrics["rl_behaviour_acted"])) == (clipped, acted)


# -------------------------------------------------------------------------------------------- advantages


def test_advantages_are_centred_by_group_and_scaled_by_its_sample_std() -> None:
    rewards, groups = [1.0, 0.0, 0.0, 1.0, 3.0], ["a", "b", "a", "a", "b"]
    mean = advantages(objective(group_normalization="mean"), rewards, groups)
    assert mean == pytest.approx([1 / 3, -1.5, -2 / 3, 1 / 3, 1.5])
    a, b = math.sqrt(1 / 3) + 1e-5, math.sqrt(4.5) + 1e-5
    scaled = advantages(objective(), rewards, groups)
    assert scaled == pytest.approx([1 / 3 / a, -1.5 / b, -2 / 3 / a, 1 / 3 / a, 1.5 / b], rel=1e-12)


def test_rewards_are_shifted_then_scaled_then_clipped() -> None:
    settings = objective(group_normalization="mean", reward_bias=-0.5, reward_scaling=10, reward_clip=4)
    assert advantages(settings, [1.0, 0.0], [0, 0]) == [4.0, -4.0]
    settings = objective(group_normalization="mean", reward_bias=1, reward_scaling=2)
    assert advantages(settings, [1.0, 0.0, 30.0], [0, 0, 1]) == [1.0, -1.0, 0.0]


@pytest.mark.parametrize("reward", [0.1, 0.3, 1.0])
def test_groups_of_one_and_groups_of_equal_rewards_have_exactly_no_advantage(reward: float) -> None:
    assert advantages(objective(), [reward], [0]) == [0.0]
    assert advantages(objective(), [reward] * 7, [0] * 7) == [0.0] * 7


def test_batch_normalization_leaves_mean_0_and_sample_std_1_over_completions() -> None:
    settings = objective(group_normalization="mean", batch_normalization=True)
    values = torch.tensor(
        advantages(settings, [1.0, 0.0, 5.0, 2.0, 9.0], [0, 0, 1, 1, 1]), dtype=torch.float64
    )
    assert values.mean().item() == pytest.approx(0, abs=1e-12)
    assert values.std().item() == pytest.approx(1, abs=1e-4)
    assert advantages(settings, [1.0, 1.0], [0, 0]) == [0.0, 0.0]
    assert advantages(settings, [], []) == []


@pytest.mark.parametrize("reward", [NAN, INF, -INF])
def test_a_reward_that_is_not_finite_is_an_error_that_names_the_completion(reward: float) -> None:
    with pytest.raises(NonFiniteError, match="reward") as caught:
        advantages(objective(), [0.0, reward], [0, 0])
    assert caught.value.index == 1


def test_every_reward_needs_its_group() -> None:
    with pytest.raises(ValueError, match="argument 2"):
        advantages(objective(), [0.0, 1.0], [0])


# ---------------------------------------------------------------------------------------- combinations

ROWS: list[Row] = [(1, 2), (0,), (3, 0), (2, 2)]
RIGHT = torch.tensor([True, True, False, False, False, True, True])  # the completions at both ends
KDS: list[Any] = [
    "k2",
    {"term": "rkl", "gamma": 0.7, "ratio": {"control": "truncate", "cap": 1.1}},
    {"term": "rkl", "baseline": "exact", "support": {"teacher_top_k": 2}},
    {"term": "k3", "baseline": "group", "decoupled": {"update": CLIP, "behaviour": TRUNCATE}},
    {"term": "jsd", "beta": 0.4, "support": {"teacher_top_k": 2}},
    {"term": "skew_rkl", "support": {"teacher_top_k": 3}},
    "k1_loss",
]


def mixed_sample(settings: Objective, student: Policy, rows: Sequence[Row] = ROWS) -> Sample:
    """Off-policy, updated once, with good and bad completions; each token's share is 1 / 7."""
    advantage = {(1, 2): 1.0, (0,): -0.4, (3, 0): 0.0, (2, 2): -1.3}
    baseline = {(1, 2): 0.3, (0,): -0.2, (3, 0): 0.1, (2, 2): 0.6}
    sample = sample_of(
        settings,
        rows,
        student,
        policy(21),
        behaviour=policy(22),
        proximal=policy(23),
        share=[1 / 7] * len(rows),
        advantage=[advantage[row] for row in rows],
    )
    return sample.having(baseline=spread([baseline[row] for row in rows], rows))


@pytest.mark.parametrize("kd", KDS)
@pytest.mark.parametrize(
    ("zeroed", "alone"),
    [
        ({"distill_weight": 0.0, "rl_weight": 0.3}, {"kind": "grpo", "rl_weight": 0.3}),
        ({"rl_weight": 0.0, "distill_weight": 0.3}, {"kind": "kd", "distill_weight": 0.3}),
    ],
)
def test_kdrl_with_a_weight_of_0_is_the_other_recipe_bit_for_bit(kd: Any, zeroed: Any, alone: Any) -> None:
    student = policy(20)
    results = []
    for settings in (objective(kind="kdrl", kd=kd, **zeroed), objective(kd=kd, **alone)):
        loss, metrics = loss_of(settings, mixed_sample(settings, student))
        results.append((loss, gradient(loss, student), metrics))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][2].keys() == results[1][2].keys()
    assert results[0][1].abs().max() > 0


@pytest.mark.parametrize(
    ("zeroed", "unread"),
    [("distill_weight", ["teacher", "baseline"]), ("rl_weight", ["advantage", "proximal"])],
)
def test_a_term_of_weight_0_is_not_computed(zeroed: str, unread: list[str]) -> None:
    student, settings = policy(20), objective(kind="kdrl", **{zeroed: 0.0})
    sample = mixed_sample(settings, student)
    sample = sample.having(**{name: torch.full_like(sample.student, NAN) for name in unread})
    assert gradient(loss_of(settings, sample)[0], student).isfinite().all()


@pytest.mark.parametrize("kd", KDS)
def test_kdrl_is_the_weighted_sum_of_its_terms(kd: Any) -> None:
    student = policy(20)
    both, rl, distill = (
        loss_of(settings, mixed_sample(settings, student))[0]
        for settings in (
            objective(kind="kdrl", kd=kd, rl_weight=0.7, distill_weight=0.2),
            objective(kind="grpo"),
            objective(kind="kd", kd=kd),
        )
    )
    assert_equal(both, 0.7 * rl + 0.2 * distill, 1e-14)


@pytest.mark.parametrize(
    ("behaviour", "before"),
    [
        ({"control": "none"}, lambda v: v),
        ({"control": "truncate", "cap": 1.2}, lambda v: min(v, 1.2)),
        ({"control": "mask", "cap": 1.2}, lambda v: v if v <= 1.2 else 0.0),
    ],
)
def test_srpo_sends_one_signal_through_the_rl_loss(behaviour: dict[str, Any], before: Any) -> None:
    student = policy(20)
    settings = objective(
        kind="srpo", rl_weight=0.7, distill_weight=0.4, dual_clip=1.5, clip_high=0.3, behaviour=behaviour
    )
    sample = mixed_sample(settings, student).having(kd_open=~RIGHT)
    batch, difference = sample.batch, sample.difference
    losses = []
    for t, s in enumerate(sample.student):
        signal = 0.7 * float(batch.advantage[t]) if RIGHT[t] else 0.4 * float(difference[t])
        u = (s - batch.proximal[t]).exp()
        loss = torch.maximum(-signal * u, -signal * u.clamp(0.8, 1.3))
        if signal < 0:
            loss = loss.clamp(max=1.5 * abs(signal))
        losses.append(before(math.exp(batch.proximal[t] - batch.behaviour[t])) * loss / 7)
    expected, found = torch.stack(losses).sum(), loss_of(settings, sample)[0]
    assert_equal(found, expected, 1e-14)
    assert_equal(gradient(found, student), gradient(expected, student), 1e-14)


@pytest.mark.parametrize(("zeroed", "read"), [("distill_weight", RIGHT), ("rl_weight", ~RIGHT)])
def test_srpo_with_a_weight_of_0_has_no_signal_in_the_other_half(zeroed: str, read: Tensor) -> None:
    settings = objective(kind="srpo", **{zeroed: 0.0})
    sample = mixed_sample(settings, policy(20)).having(kd_open=~RIGHT)
    found = slopes(settings, sample)
    assert (found[~read] == 0).all()
    assert found[read].abs().max() > 0.01


def test_then_is_kd_first_and_grpo_after() -> None:
    settings = objective(kind="then", kd_rounds=2, kd="k2", rl_weight=0.3)
    for number, alone in (
        (1, {"kind": "kd"}),
        (2, {"kind": "kd"}),
        (3, {"kind": "grpo"}),
        (9, {"kind": "grpo"}),
    ):
        assert settings.in_round(number) == objective(kd="k2", rl_weight=0.3, **alone)
    assert objective(kind="kdrl").in_round(3) == objective(kind="kdrl")
    with pytest.raises(ValueError, match="in_round"):
        loss_of(settings, mixed_sample(objective(), policy(20)))


# -------------------------------------------------------------------------------- one step of a run


@pytest.mark.parametrize(
    ("kind", "quarter"), [("linear", 0.8), ("cosine", 0.2 + 0.4 * (1 + math.cos(math.pi / 4)))]
)
def test_a_schedule_reaches_both_ends_and_holds_the_last(kind: str, quarter: float) -> None:
    settings = objective(kind="kdrl", distill_weight=1.0, distill_schedule={"kind": kind, "end": 0.2})
    weights = [at_step(settings, step, 5).distill_weight for step in range(7)]
    assert weights == pytest.approx([1.0, quarter, 0.6, 1.2 - quarter, 0.2, 0.2, 0.2])
    assert [at_step(settings, step, 1).distill_weight for step in (0, 1)] == [1.0, 0.2]


def test_a_constant_weight_stays_and_a_scheduled_0_takes_the_term_out_of_that_step() -> None:
    assert at_step(objective(), 3, 5) == objective()
    falling = objective(kind="kdrl", distill_weight=1.0, distill_schedule={"kind": "linear", "end": 0.0})
    rising = objective(kind="kdrl", distill_weight=0.0, distill_schedule={"kind": "cosine", "end": 1.0})
    assert [at_step(falling, step, 5).has_kd for step in range(5)] == [True] * 4 + [False]
    assert [at_step(rising, step, 5).has_kd for step in range(5)] == [False] + [True] * 4


def test_shares_are_what_the_normalization_says() -> None:
    kept = [3, 1, 0, None]  # None is dropped, 0 has lost its only token
    assert shares(objective(), kept, max_new_tokens=8) == [1 / 4] * 4
    assert shares(objective(normalization="sequence"), kept, max_new_tokens=8) == [1 / 6, 1 / 2, 0.0, 0.0]
    assert shares(objective(normalization="fixed"), kept, max_new_tokens=8) == [1 / 24] * 4
    assert shares(objective(normalization="fixed", fixed_length=10), kept, max_new_tokens=8) == [1 / 30] * 4


@pytest.mark.parametrize("normalization", ["token", "sequence", "fixed"])
@pytest.mark.parametrize("kept", [[], [None, None], [0, None]])
def test_shares_of_a_step_with_nothing_left_are_finite(normalization: str, kept: list[int | None]) -> None:
    found = shares(objective(normalization=normalization), kept, max_new_tokens=8)
    assert len(found) == len(kept)
    assert all(math.isfinite(share) for share in found)


def test_which_completions_a_mask_opens() -> None:
    correct, groups = [True, False, False, False], ["a", "a", "b", "b"]
    wrong = [False, True, True, True]
    for settings, expected in (
        (objective(), [True] * 4),
        (objective(kind="kdrl"), [True] * 4),
        (objective(kind="kdrl", mask="wrong"), wrong),
        (objective(kind="srpo"), wrong),
        (objective(kind="kdrl", mask="all_wrong_groups"), [False, False, True, True]),
    ):
        assert open_completions(settings, correct, groups) == expected


# ----------------------------------------------------------------------------- micro-batches and masks


@pytest.mark.parametrize("kd", KDS)
@pytest.mark.parametrize("cut", [[[0], [1], [2], [3]], [[0, 1], [2, 3]], [[3, 0], [2, 1]], [[2], [1, 0, 3]]])
def test_the_loss_and_gradient_of_a_step_do_not_depend_on_its_micro_batches(
    kd: Any, cut: list[list[int]]
) -> None:
    student = policy(20)
    settings = objective(kind="kdrl", kd=kd, distill_weight=0.2)
    whole, metrics = loss_of(settings, mixed_sample(settings, student))
    parts = [
        loss_of(settings, mixed_sample(settings, student, [ROWS[number] for number in part])) for part in cut
    ]
    assert_equal(sum(loss for loss, _ in parts), whole, 1e-14)
    assert_equal(sum(gradient(loss, student) for loss, _ in parts), gradient(whole, student), 1e-14)
    for name, value in metrics.items():
        assert_equal(sum(part[name] for _, part in parts), value, 1e-12)


@pytest.mark.parametrize(("kind", "kd"), [*itertools.product(["kd", "grpo", "kdrl"], KDS), ("srpo", "rkl")])
@pytest.mark.parametrize("junk", [NAN, INF, -INF])
def test_what_stands_at_a_token_that_is_not_kept_does_not_matter(kind: str, kd: Any, junk: float) -> None:
    settings, student = objective(kind=kind, kd=kd, clip_low=0.9, clip_high=9.0), policy(20)
    kept = torch.tensor([True, True, False, True, True, True, False])  # not a whole completion, nor an end
    found = []
    for filler in (0.0, junk):
        sample = mixed_sample(settings, student)
        columns = ("behaviour", "proximal", "advantage", "teacher", "baseline", "share")
        filled = {name: getattr(sample.batch, name).masked_fill(~kept, filler) for name in columns}
        sample = sample.having(kept=kept, kd_open=~RIGHT | (kind != "srpo"), **filled)
        leaves = [
            value.detach().masked_fill(~kept, filler).requires_grad_()
            for value in (sample.student, sample.distribution)
            if value is not None
        ]
        sample = replace(sample, student=leaves[0], distribution=leaves[1] if len(leaves) > 1 else None)
        loss, metrics = loss_of(settings, sample)
        found.append((loss, metrics, torch.autograd.grad(loss, leaves, allow_unused=True)))
    clean, dirty = found
    assert torch.equal(dirty[0], clean[0])
    assert dirty[1] == clean[1]
    assert int(dirty[1]["kept_tokens"]) == 5
    for ours, expected in zip(dirty[2], clean[2], strict=True):
        assert (ours is None) is (expected is None)
        if ours is not None:
            assert torch.equal(ours, expected)
            assert (ours[~kept] == 0).all()
    assert any(ours is not None and (ours != 0).any() for ours in dirty[2])


@pytest.mark.parametrize("kd", KDS)
def test_a_closed_completion_gives_nothing_to_the_kd_part_and_changes_nobody_elses(kd: Any) -> None:
    student = policy(20)
    settings = objective(kind="kdrl", kd=kd, mask="wrong", distill_weight=0.3)
    sample = mixed_sample(settings, student)
    assert sample.batch.teacher is not None
    closed = sample.having(kd_open=~RIGHT, teacher=sample.batch.teacher.masked_fill(RIGHT, NAN))
    rl, _ = loss_of(objective(kind="grpo"), sample)
    rest = mixed_sample(settings, student, ROWS[1:3])  # each token's share is 1 / 7 here, too
    kd_of_rest, _ = loss_of(objective(kd=kd, distill_weight=0.3), rest)
    loss, metrics = loss_of(settings, closed)
    assert_equal(gradient(loss, student), gradient(rl, student) + gradient(kd_of_rest, student), 1e-14)
    assert_equal(loss, rl + kd_of_rest, 1e-14)
    assert (int(metrics["kept_tokens"]), int(metrics["kd_tokens"])) == (7, 3)


def test_a_token_that_is_not_scorable_leaves_the_kd_term_but_stays_in_rl_and_in_the_denominator() -> None:
    settings = objective(kind="kdrl", kd="k2")
    sample = mixed_sample(settings, policy(20))
    assert sample.batch.teacher is not None
    scorable = torch.arange(7) != 2
    teacher = sample.batch.teacher.masked_fill(~scorable, NAN)
    masked, metrics = loss_of(settings, sample.having(scorable=scorable, teacher=teacher))
    whole, _ = loss_of(settings, sample)
    rho = (sample.student - sample.batch.behaviour).exp()
    missing = rho * 0.5 * sample.difference.square() / 7
    assert_equal(masked, whole - missing[2], 1e-14)
    assert (int(metrics["kept_tokens"]), int(metrics["kd_tokens"])) == (7, 6)


def test_a_masked_token_inside_a_completion_keeps_its_place_in_the_discounting() -> None:
    settings = objective(kd={"term": "rkl", "gamma": 0.5})
    leaf = torch.tensor([-1.0, -2.0, -1.5], dtype=torch.float64, requires_grad=True)
    sample = replace(sample_of(settings, [(1, 2, 0)], policy(8), policy(9)), student=leaf).having(
        behaviour=leaf.detach(),
        scorable=torch.tensor([True, False, True]),
        teacher=leaf.detach() + torch.tensor([1.0, NAN, 4.0], dtype=torch.float64),
    )
    assert slopes(settings, sample).tolist() == [-2.0, 0.0, -4.0]


@pytest.mark.parametrize("kd", KDS)
def test_a_micro_batch_without_a_kept_token_contributes_0_with_a_finite_gradient(kd: Any) -> None:
    settings, student = objective(kind="kdrl", kd=kd), policy(20)
    sample = mixed_sample(settings, student).having(kept=torch.zeros(7, dtype=torch.bool))
    loss, metrics = loss_of(settings, sample)
    assert loss.item() == 0
    assert (gradient(loss, student) == 0).all()
    assert int(metrics["kept_tokens"]) == 0


# ------------------------------------------------------------------------------------ whole distributions

ALL = torch.ones(1 + V, dtype=torch.bool)
PLACES = torch.arange(1 + V)
DISTRIBUTIONS: list[Any] = [
    {"term": "jsd", "beta": 0.0},
    {"term": "jsd", "beta": 0.4},
    {"term": "jsd", "beta": 1.0},
    {"term": "skew_kl", "alpha": 0.0},
    {"term": "skew_kl"},
    {"term": "skew_rkl", "alpha": 0.0},
    {"term": "skew_rkl"},
]
EXACT = {"term": "rkl", "baseline": "exact"}


def stored(teacher_NV: Tensor, k: int, student_NV: Tensor | None = None) -> TeacherSupport:
    """The teacher on its top k, in union with the student's where that is given."""
    given = None if student_NV is None else support_of(student_NV, k)[0]
    ids_NK, values_NK, tail_N = support_of(teacher_NV, k, given)
    return TeacherSupport(values_NK, ids_NK, tail_N)


def test_the_exact_baseline_is_the_expected_signal_without_a_gradient() -> None:
    student, teacher = policy(24), policy(25).logprobs.detach()
    s = student.logprobs.detach()
    found = distribution_value(
        objective(kd=EXACT), student.logprobs, TeacherSupport(teacher), taught_N=ALL, places_N=PLACES
    )
    assert not found.requires_grad
    assert_equal(found, (s.exp() * (teacher - s)).sum(-1), 1e-14)


@pytest.mark.parametrize("kd", [*DISTRIBUTIONS, EXACT])
def test_padding_of_a_union_changes_neither_value_nor_gradient(kd: Any) -> None:
    settings, student, teacher = objective(kd=kd), policy(24), policy(25).logprobs.detach()
    union = stored(teacher, 2, student.logprobs.detach())
    assert union.ids_NK is not None
    assert union.tail_N is not None
    padding_N = (union.ids_NK < 0).sum(-1)
    assert len(padding_N.unique()) > 1, "rows with and without padding"
    assert (union.logprobs_NS[union.ids_NK < 0] == -INF).all()
    padded = distribution_value(settings, student.logprobs, union, taught_N=ALL, places_N=PLACES)
    for row in range(1 + V):
        used = union.ids_NK[row] >= 0
        alone = TeacherSupport(
            union.logprobs_NS[row : row + 1, used],
            union.ids_NK[row : row + 1, used],
            union.tail_N[row : row + 1],
        )
        expected = distribution_value(
            settings, student.logprobs[row : row + 1], alone, taught_N=ALL[:1], places_N=PLACES[:1]
        )
        assert_equal(padded[row], expected[0], 1e-14)
        if kd is not EXACT:
            assert_equal(gradient(padded[row], student), gradient(expected[0], student), 1e-14)


@pytest.mark.parametrize("kd", [*DISTRIBUTIONS, EXACT])
@pytest.mark.parametrize("k", [2, 3, 4])
def test_ids_that_neither_side_can_emit_and_empty_tails_are_harmless(kd: Any, k: int) -> None:
    settings = objective(kd=kd)
    logits = policy(24).logits.detach().index_fill(1, torch.tensor([3]), -INF).requires_grad_()
    student = Policy(logits)
    teacher = policy(25).logits.detach().index_fill(1, torch.tensor([3]), -INF).log_softmax(-1)
    found = distribution_value(settings, student.logprobs, stored(teacher, k), taught_N=ALL, places_N=PLACES)
    expected = distribution_value(
        settings,
        student.logits[:, :3].log_softmax(-1),
        stored(teacher[:, :3], min(k, 3)),
        taught_N=ALL,
        places_N=PLACES,
    )
    assert_equal(found, expected, 1e-14)
    if kd is not EXACT:
        assert_equal(gradient(found.sum(), student), gradient(expected.sum(), student), 1e-14)


@pytest.mark.parametrize("kd", [*DISTRIBUTIONS, EXACT])
def test_junk_in_the_support_of_a_position_that_is_not_taught_does_not_matter(kd: Any) -> None:
    settings, student, teacher = objective(kd=kd), policy(24), policy(25).logprobs.detach()
    taught = torch.tensor([True, False, True, False, True])
    clean = stored(teacher, 2)
    assert clean.ids_NK is not None
    assert clean.tail_N is not None
    dirty = TeacherSupport(
        clean.logprobs_NS.masked_fill(~taught[:, None], NAN),
        clean.ids_NK.masked_fill(~taught[:, None], -7),
        clean.tail_N.masked_fill(~taught, INF),
    )
    found = distribution_value(settings, student.logprobs, dirty, taught_N=taught, places_N=PLACES)
    expected = distribution_value(settings, student.logprobs, clean, taught_N=ALL, places_N=PLACES)
    assert torch.equal(found[taught], expected[taught])
    assert (found[~taught] == 0).all()
    if kd is not EXACT:
        assert_equal(gradient(found.sum(), student), gradient(expected[taught].sum(), student), 1e-14)
        assert (gradient(found.sum(), student)[~taught] == 0).all()


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        *((objective(kind="grpo"), name) for name in ("student", "behaviour", "proximal", "advantage")),
        *((objective(), name) for name in ("student", "behaviour", "teacher")),
        (objective(kd={"term": "k2", "decoupled": {}}), "proximal"),
        (objective(kd={"term": "jsd"} | WHOLE), "distribution"),
        (objective(kind="srpo"), "teacher"),
    ],
)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_kept_number_that_is_not_finite_is_an_error_that_names_its_index(
    settings: Objective, name: str, value: float
) -> None:
    sample = mixed_sample(settings, policy(20)).having(kept=torch.arange(7) != 1)
    at = torch.arange(7) == 4
    if name in ("student", "distribution"):
        sample = replace(sample, **{name: getattr(sample, name).masked_fill(at, value)})
    else:
        sample = sample.having(**{name: getattr(sample.batch, name).masked_fill(at, value)})
    with pytest.raises(NonFiniteError) as caught:
        loss_of(settings, sample)
    assert caught.value.index == 4
    assert str(value) in caught.value.message


def test_a_teacher_zero_under_student_mass_is_an_error_that_names_position_and_token() -> None:
    student, support = policy(24), stored(policy(25).logprobs.detach(), V)
    assert support.ids_NK is not None
    support.logprobs_NS[3, 1] = -INF
    token = int(support.ids_NK[3, 1])
    taught = torch.tensor([True, False, True, True, True])
    for kd in ({"term": "jsd", "beta": 1.0}, {"term": "skew_rkl", "alpha": 0.0}, EXACT):
        with pytest.raises(NonFiniteError, match=f"token id {token} .* infinite") as caught:
            distribution_value(
                objective(kd=kd), student.logprobs, support, taught_N=taught, places_N=PLACES + 512
            )
        assert caught.value.index == 515
    for kd in ({"term": "jsd", "beta": 0.5}, {"term": "skew_kl"}, {"term": "skew_rkl"}):
        found = distribution_value(
            objective(kd=kd), student.logprobs, support, taught_N=taught, places_N=PLACES
        )
        assert found.isfinite().all()


def test_a_student_zero_under_teacher_mass_is_an_error_of_the_forward_terms() -> None:
    logits = policy(24).logits.detach().clone()
    logits[2, 1] = -INF
    support = TeacherSupport(policy(25).logprobs.detach())
    for kd in ({"term": "jsd", "beta": 0.0}, {"term": "skew_kl", "alpha": 0.0}):
        with pytest.raises(NonFiniteError, match="token id 1 has log-prob -inf under the student") as caught:
            distribution_value(
                objective(kd=kd), logits.log_softmax(-1), support, taught_N=ALL, places_N=PLACES
            )
        assert caught.value.index == 2


@pytest.mark.parametrize(
    ("value", "message"), [(-INF, "tail bucket .* infinite"), (NAN, "tail bucket .* not a log-prob")]
)
def test_a_bad_tail_is_an_error_that_says_so(value: float, message: str) -> None:
    support = stored(policy(25).logprobs.detach(), 2)
    assert support.tail_N is not None
    support.tail_N[2] = value
    settings = objective(kd={"term": "jsd", "beta": 1.0})
    with pytest.raises(NonFiniteError, match=message) as caught:
        distribution_value(settings, policy(24).logprobs, support, taught_N=ALL, places_N=PLACES)
    assert caught.value.index == 2


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (objective(), "TokenBatch.teacher"),
        (objective(kd="k1_loss"), "TokenBatch.teacher"),
        (objective(kind="srpo"), "TokenBatch.teacher"),
        (objective(kd={"term": "rkl", "baseline": "step"}), "baseline step"),
        (objective(kd=EXACT), "baseline exact"),
        (objective(kd={"term": "jsd"}), "distribution_N"),
    ],
)
def test_what_an_objective_needs_and_lacks_is_named(settings: Objective, name: str) -> None:
    sample = replace(mixed_sample(objective(), policy(20)).having(baseline=None), distribution=None)
    if name == "TokenBatch.teacher":
        sample = sample.having(teacher=None)
    with pytest.raises(ValueError, match=name):
        loss_of(settings, sample)


def test_a_batch_whose_shapes_disagree_is_refused() -> None:
    sample = mixed_sample(objective(), policy(20))
    with pytest.raises(ValueError, match="proximal has shape"):
        sample.having(proximal=sample.batch.proximal[:-1])


def test_metrics_are_sums_over_tokens_without_a_graph() -> None:
    settings = objective(kind="kdrl", kd="k2", rl_weight=0.5, distill_weight=0.25)
    sample = mixed_sample(settings, policy(20))
    loss, metrics = loss_of(settings, sample)
    assert_equal(metrics["kd_reverse_kl_nats"], -sample.difference.sum(), 1e-14)
    assert_equal((0.5 * metrics["rl_loss"] + 0.25 * metrics["kd_loss"]) / 7, loss.detach(), 1e-14)
    assert not any(value.requires_grad for value in metrics.values())


# ------------------------------------------------------------------------------------- signal or rounding

SOLE_KD = {
    "rkl": {"kd": "rkl"},
    "rkl, discounted": {"kd": {"term": "rkl", "gamma": 0.9}},
    "k2": {"kd": "k2"},
    "k3": {"kd": "k3"},
    "jsd": {"kd": {"term": "jsd", "beta": 0.5, "support": "vocabulary"}},
    "kdrl": {"kind": "kdrl", "kd": "rkl"},
    "srpo": {"kind": "srpo"},
}


def signal_of(settings: Objective, gap: float, *, advantage: float = 0.0) -> tuple[int, int]:
    """(tokens with a signal, tokens of rounding) of a batch whose teacher is `gap` nats off at one of its tokens."""
    student = torch.tensor([-0.5, -1.5, -2.5])
    teacher = student + torch.tensor([0.0, gap, 0.0])
    yes = torch.ones(3, dtype=torch.bool)
    batch = TokenBatch(
        behaviour=student,
        proximal=student,
        advantage=torch.full((3,), advantage),
        kept=yes,
        scorable=yes,
        kd_open=yes,
        share=torch.full((3,), 1 / 3),
        lengths=[2, 1],
        teacher=teacher,
    )
    _, metrics = token_loss(settings, batch, student.requires_grad_(), torch.zeros(3))
    return int(metrics["signal_tokens"]), int(metrics["rounding_tokens"])


@pytest.mark.parametrize("name", SOLE_KD)
def test_a_teacher_that_agrees_but_for_rounding_gives_no_signal_and_a_thousandth_of_a_nat_does(
    name: str,
) -> None:
    settings = objective(**SOLE_KD[name])
    assert signal_of(settings, 0.0) == (0, 3)
    assert signal_of(settings, 1.3e-5) == (0, 3)
    assert signal_of(settings, 1e-3) == (1, 2)
    assert signal_of(settings, -1e-3) == (1, 2)


def test_an_advantage_and_k1_loss_are_a_signal_whatever_the_teacher_says() -> None:
    assert signal_of(objective(kind="kdrl", kd="rkl"), 0.0, advantage=1e-6) == (3, 3)
    assert signal_of(objective(kd="k1_loss"), 0.0) == (3, 0)


def test_a_divergence_is_a_signal_where_the_sampled_tokens_agree() -> None:
    settings = objective(kd={"term": "jsd", "beta": 1.0, "support": "vocabulary"})
    student = torch.tensor([-0.5, -0.5])
    yes = torch.ones(2, dtype=torch.bool)
    zero = torch.zeros(2)
    batch = TokenBatch(student, student, zero, yes, yes, yes, zero + 0.5, [2], teacher=student)
    _, metrics = token_loss(settings, batch, student, torch.tensor([0.0, 1e-3]))
    assert (int(metrics["signal_tokens"]), int(metrics["rounding_tokens"])) == (1, 1)


def test_text_that_is_learned_by_cross_entropy_is_a_signal() -> None:
    settings = objective(kd="rkl")
    assert settings.off_policy_loss == "cross_entropy"
    student = torch.tensor([-0.5, -0.5])
    yes, zero = torch.ones(2, dtype=torch.bool), torch.zeros(2)
    batch = TokenBatch(
        student,
        student,
        zero,
        yes,
        yes,
        yes,
        zero + 0.5,
        [1, 1],
        teacher=student,
        off_policy=torch.tensor([False, True]),
    )
    _, metrics = token_loss(settings, batch, student)
    assert (int(metrics["signal_tokens"]), int(metrics["rounding_tokens"])) == (1, 1)
