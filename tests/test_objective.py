"""The objective against exact enumeration of a tiny categorical policy, in float64.

The policy draws one token of V, or two of which the first may end the completion (id 0). Every completion is
enumerated with its probability under the behaviour policy, so expectations are sums and claims hold to 1e-10.
"""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kdpipe.objective import (
    NonFiniteError,
    TeacherSupport,
    TokenBatch,
    advantages,
    at_step,
    baselines,
    distribution_value,
    open_completions,
    shares,
    token_loss,
)
from kdpipe.recipe import Objective

V = 4
NAN, INF = math.nan, math.inf
MAX_TOKENS = [1, 2]
VOCABULARY = {"term": "jsd", "support": "vocabulary"}


@dataclass(frozen=True)
class Policy:
    """Next-token logits: row 0 for the first token, row 1 + y for the second after y."""

    logits: Tensor

    @property
    def logprobs(self) -> Tensor:
        return self.logits.log_softmax(-1)

    def of(self, completion: tuple[int, ...]) -> Tensor:
        """The distribution at each position of a completion, [n, V]."""
        return self.logprobs[prefixes(completion)]

    def tokens(self, completion: tuple[int, ...]) -> Tensor:
        return self.of(completion).gather(-1, torch.tensor(completion)[:, None]).squeeze(-1)

    def probability(self, completion: tuple[int, ...]) -> Tensor:
        return self.tokens(completion).sum().exp()


def prefixes(completion: tuple[int, ...]) -> list[int]:
    return [0] + [1 + token for token in completion[:-1]]


def policy(seed: int) -> Policy:
    generator = torch.Generator().manual_seed(seed)
    return Policy(torch.randn(1 + V, V, generator=generator, dtype=torch.float64).requires_grad_())


def completions(max_tokens: int) -> list[tuple[int, ...]]:
    if max_tokens == 1:
        return [(token,) for token in range(V)]
    return [(0,)] + [(first, second) for first in range(1, V) for second in range(V)]


@dataclass(frozen=True)
class Case:
    """A micro-batch with the student's log-probs and what comes of its distributions."""

    student: Tensor
    behaviour: Tensor
    proximal: Tensor
    advantage: Tensor
    kept: Tensor
    scorable: Tensor
    lengths: list[int]
    teacher: Tensor | None = None
    divergence: Tensor | None = None
    kd_open: Tensor | None = None
    baseline: Tensor | None = None


def loss_of(settings: Objective, case: Case, *, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss with an equal share of `1 / denominator` for every token."""
    batch = TokenBatch(
        behaviour=case.behaviour,
        proximal=case.proximal,
        advantage=case.advantage,
        kept=case.kept,
        scorable=case.scorable,
        kd_open=torch.ones_like(case.kept) if case.kd_open is None else case.kd_open,
        share=torch.full(case.kept.shape, 1 / denominator, dtype=torch.float64),
        lengths=case.lengths,
        teacher=case.teacher,
        baseline=case.baseline,
    )
    return token_loss(settings, batch, case.student, case.divergence)


def divergence_of(
    settings: Objective,
    logprobs_NV: Tensor,
    *,
    scorable_N: Tensor,
    topk_ids_NK: Tensor,
    topk_logprobs_NK: Tensor,
    tail_N: Tensor,
    offset: int = 0,
) -> Tensor:
    support = TeacherSupport(topk_logprobs_NK, topk_ids_NK, tail_N)
    places = torch.arange(len(logprobs_NV)) + offset
    return distribution_value(settings, logprobs_NV, support, taught_N=scorable_N, places_N=places)


def objective(**fields: Any) -> Objective:
    return Objective.model_validate(fields)


def batch_of(
    settings: Objective,
    rows: list[tuple[int, ...]],
    student: Policy,
    teacher: Policy,
    *,
    behaviour: Policy | None = None,
    proximal: Policy | None = None,
    advantage: list[float] | None = None,
    scorable: list[bool] | None = None,
) -> Case:
    """The micro-batch of some completions; behaviour and proximal policy are the student's unless given."""
    lengths = [len(row) for row in rows]
    num_tokens = sum(lengths)
    is_scorable = torch.tensor(scorable or [True] * num_tokens)
    divergence = None
    support = settings.distribution_support
    if support is not None:
        k = V if support == "vocabulary" else support.teacher_top_k
        values, ids = torch.cat([teacher.of(row) for row in rows]).detach().sort(dim=-1, descending=True)
        divergence = divergence_of(
            settings,
            torch.cat([student.of(row) for row in rows]),
            scorable_N=is_scorable,
            topk_ids_NK=ids[:, :k],
            topk_logprobs_NK=values[:, :k],
            tail_N=values[:, k:].logsumexp(-1),
        )
    tokens = torch.cat([student.tokens(row) for row in rows])
    return Case(
        student=tokens,
        behaviour=torch.cat([(behaviour or student).tokens(row) for row in rows]).detach(),
        proximal=torch.cat([(proximal or student).tokens(row) for row in rows]).detach(),
        advantage=torch.tensor(advantage or [0.5] * len(rows), dtype=torch.float64).repeat_interleave(
            torch.tensor(lengths)
        ),
        kept=torch.ones(num_tokens, dtype=torch.bool),
        scorable=is_scorable,
        lengths=lengths,
        teacher=torch.cat([teacher.tokens(row) for row in rows]).detach(),
        divergence=divergence,
    )


def gradient(value: Tensor, student: Policy) -> Tensor:
    (result,) = torch.autograd.grad(value, student.logits, allow_unused=True, retain_graph=True)
    return torch.zeros_like(student.logits) if result is None else result


def expected_gradient(
    settings: Objective, max_tokens: int, student: Policy, teacher: Policy, *, behaviour: Policy
) -> Tensor:
    """The gradient of the summed loss over all completions, weighed by their behaviour probability."""
    total = torch.zeros_like(student.logits)
    for row in completions(max_tokens):
        batch = batch_of(settings, [row], student, teacher, behaviour=behaviour, proximal=policy(31))
        loss, _ = loss_of(settings, batch, denominator=1)
        total += behaviour.probability(row).detach() * gradient(loss, student)
    return total


def exact_gradient(
    name: str, max_tokens: int, student: Policy, teacher: Policy, *, behaviour: Policy
) -> Tensor:
    """`sum_t E_{y<t} grad KL_t` through the whole distributions, prefixes drawn by the behaviour policy."""
    s, p = student.logprobs, teacher.logprobs.detach()
    divergence = {
        "reverse": (s.exp() * (s - p)).sum(-1),
        "forward": (p.exp() * (p - s)).sum(-1),
        "jensen_shannon": _jensen_shannon(s, p),
        "skew_kl": (p.exp() * (p - (0.3 * p.exp() + 0.7 * s.exp()).log())).sum(-1),
        "skew_rkl": (s.exp() * (s - (0.3 * s.exp() + 0.7 * p.exp()).log())).sum(-1),
    }[name]
    value = divergence[0]
    if max_tokens == 2:
        first = behaviour.logprobs[0].detach().exp()
        value = value + sum(first[token] * divergence[1 + token] for token in range(1, V))
    return gradient(value, student)


def _jensen_shannon(s: Tensor, p: Tensor) -> Tensor:
    m = (0.5 * s.exp() + 0.5 * p.exp()).log()
    return 0.5 * (s.exp() * (s - m)).sum(-1) + 0.5 * (p.exp() * (p - m)).sum(-1)


def assert_equal(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


# ----------------------------------------------------------------------------------------- the KD part


KD_CLAIMS = [
    ("rkl", "reverse"),
    ("k2", "reverse"),
    (VOCABULARY | {"beta": 1.0}, "reverse"),
    (VOCABULARY | {"beta": 0.0}, "forward"),
    (VOCABULARY | {"beta": 0.5}, "jensen_shannon"),
    ("k3", "forward"),
    ({"term": "skew_kl", "alpha": 0.3, "support": "vocabulary"}, "skew_kl"),
    ({"term": "skew_rkl", "alpha": 0.3, "support": "vocabulary"}, "skew_rkl"),
    ({"term": "rkl", "baseline": "exact", "support": "vocabulary"}, "reverse"),
    ({"term": "k2", "baseline": "exact", "support": {"teacher_top_k": 2}}, "reverse"),
    ({"term": "rkl", "decoupled": {}}, "reverse"),
    ({"term": "k3", "decoupled": {}}, "forward"),
]


@pytest.mark.parametrize("max_tokens", MAX_TOKENS)
@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize(("kd", "divergence"), KD_CLAIMS)
def test_the_expected_gradient_is_that_of_the_claimed_divergence(
    kd: Any, divergence: str, off_policy: bool, max_tokens: int
) -> None:
    student, teacher = policy(1), policy(2)
    behaviour = policy(3) if off_policy else student
    found = expected_gradient(objective(kd=kd), max_tokens, student, teacher, behaviour=behaviour)
    expected = exact_gradient(divergence, max_tokens, student, teacher, behaviour=behaviour)
    assert expected.abs().max() > 0.01
    assert_equal(found, expected)


@pytest.mark.parametrize("max_tokens", MAX_TOKENS)
def test_rkl_with_gamma_1_has_the_gradient_of_the_sequence_kl(max_tokens: int) -> None:
    student, teacher = policy(4), policy(5)
    settings = objective(kd={"term": "rkl", "gamma": 1.0})
    found = expected_gradient(settings, max_tokens, student, teacher, behaviour=student)
    sequence_kl = sum(
        student.probability(row) * (student.tokens(row) - teacher.tokens(row).detach()).sum()
        for row in completions(max_tokens)
    )
    assert_equal(found, gradient(sequence_kl, student))


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_rkl_below_gamma_1_has_another_gradient_than_the_sequence_kl(gamma: float) -> None:
    student, teacher = policy(4), policy(5)
    one = expected_gradient(
        objective(kd={"term": "rkl", "gamma": 1.0}), 2, student, teacher, behaviour=student
    )
    other = expected_gradient(
        objective(kd={"term": "rkl", "gamma": gamma}), 2, student, teacher, behaviour=student
    )
    assert (one - other).abs().max() > 0.01


@pytest.mark.parametrize(
    "kd",
    [
        "rkl",
        "k2",
        {"term": "rkl", "gamma": 1.0},
        *(claim[0] for claim in KD_CLAIMS[2:]),
        {"term": "jsd", "support": {"teacher_top_k": 2}},
    ],
)
@pytest.mark.parametrize("off_policy", [False, True])
def test_every_single_completion_has_no_gradient_where_teacher_and_student_agree(
    kd: Any, off_policy: bool
) -> None:
    student = policy(6)
    settings = objective(kd=kd)
    for row in completions(2):
        batch = batch_of(settings, [row], student, student, behaviour=policy(7) if off_policy else None)
        loss, _ = loss_of(settings, batch, denominator=1)
        assert gradient(loss, student).abs().max() <= 1e-12


@pytest.mark.parametrize("term", ["rkl", "k2"])
@pytest.mark.parametrize(
    ("ratio", "weight"),
    [
        ({"control": "none"}, lambda rho, d: rho),
        ({"control": "truncate", "cap": 1.2}, lambda rho, d: min(rho, 1.2)),
        ({"control": "mask", "low": 0.7, "high": 1.4}, lambda rho, d: rho if 0.7 <= rho <= 1.4 else 0.0),
        (
            {"control": "clip", "low": 0.3, "high": 0.4},
            lambda rho, d: 0.0 if (d > 0 and rho > 1.4) or (d < 0 and rho < 0.7) else rho,
        ),
    ],
)
def test_ratio_control_weighs_every_token_once(term: str, ratio: dict[str, Any], weight: Any) -> None:
    student, teacher, behaviour = policy(8), policy(9), policy(10)
    settings = objective(kd={"term": term, "ratio": ratio})
    acted = 0
    for row in completions(2):
        batch = batch_of(settings, [row], student, teacher, behaviour=behaviour)
        loss, metrics = loss_of(settings, batch, denominator=1)
        assert batch.teacher is not None
        difference = (batch.teacher - batch.student).detach()
        ratios = (batch.student.detach() - batch.behaviour).exp()
        weights = [weight(rho, d) for rho, d in zip(ratios.tolist(), difference.tolist(), strict=True)]
        expected = -(torch.tensor(weights, dtype=torch.float64) * difference * batch.student).sum()
        assert_equal(gradient(loss, student), gradient(expected, student), 1e-12)
        count = sum(w != rho for w, rho in zip(weights, ratios.tolist(), strict=True))
        assert int(metrics["kd_ratio_acted"]) == count
        acted += count
    assert (acted > 0) is (ratio["control"] != "none")


def test_the_ratio_clip_of_rkl_looks_at_the_discounted_signal() -> None:
    # d = (+1, -3): with gamma 1 the first signal is -2, so its ratio of 2 is not clipped but would be by d.
    student = torch.tensor([-1.0, -1.0], dtype=torch.float64, requires_grad=True)
    batch = Case(
        student=student,
        behaviour=student.detach() - math.log(2),
        proximal=student.detach(),
        advantage=torch.zeros(2, dtype=torch.float64),
        kept=torch.ones(2, dtype=torch.bool),
        scorable=torch.ones(2, dtype=torch.bool),
        lengths=[2],
        teacher=student.detach() + torch.tensor([1.0, -3.0], dtype=torch.float64),
    )
    clip = {"control": "clip", "low": 0.2, "high": 0.2}
    loss, _ = loss_of(objective(kd={"term": "rkl", "gamma": 1.0, "ratio": clip}), batch, denominator=1)
    assert torch.autograd.grad(loss, student)[0].tolist() == [pytest.approx(4.0), pytest.approx(6.0)]
    loss, _ = loss_of(objective(kd={"term": "rkl", "gamma": 0.0, "ratio": clip}), batch, denominator=1)
    assert torch.autograd.grad(loss, student)[0].tolist() == [0.0, pytest.approx(6.0)]


def test_distribution_terms_are_never_ratio_weighted() -> None:
    student, teacher = policy(1), policy(2)
    settings = objective(kd=VOCABULARY | {"beta": 0.3})
    values = [
        loss_of(settings, batch_of(settings, [(1, 2)], student, teacher, behaviour=behaviour), denominator=1)[
            0
        ]
        for behaviour in (student, policy(3))
    ]
    assert torch.equal(values[0], values[1])


# ------------------------------------------------------------------------------------------- the RL part


@pytest.mark.parametrize("group_size", [2, 3])
@pytest.mark.parametrize("max_tokens", MAX_TOKENS)
def test_the_expected_grpo_gradient_is_the_policy_gradient_times_g_minus_1_over_g(
    max_tokens: int, group_size: int
) -> None:
    student, teacher = policy(11), policy(12)
    settings = objective(kind="grpo", group_normalization="mean")
    rows = completions(max_tokens) if group_size == 2 else completions(1)
    reward = {row: float((3 * sum(row) + len(row)) % 4) for row in rows}
    found = torch.zeros_like(student.logits)
    for group in itertools.product(rows, repeat=group_size):
        chance = math.prod(student.probability(row).item() for row in group)
        advantage = advantages(settings, [reward[row] for row in group], [0] * group_size)
        batch = batch_of(settings, list(group), student, teacher, advantage=advantage)
        loss, _ = loss_of(settings, batch, denominator=group_size)
        found += chance * gradient(loss, student)
    objective_value = sum(student.probability(row) * reward[row] for row in rows)
    expected = -gradient(objective_value, student) * (group_size - 1) / group_size
    assert expected.abs().max() > 0.01
    assert_equal(found, expected)


@pytest.mark.parametrize(
    ("control", "weight"),
    [
        ({"control": "none"}, lambda v: v),
        ({"control": "truncate", "cap": 1.5}, lambda v: min(v, 1.5)),
        ({"control": "mask", "cap": 1.5}, lambda v: v if v <= 1.5 else 0.0),
    ],
)
@pytest.mark.parametrize("advantage", [0.8, -0.8])
def test_the_decoupled_loss_clips_on_the_proximal_ratio_and_weighs_by_the_behaviour_ratio(
    control: dict[str, Any], weight: Any, advantage: float
) -> None:
    settings = objective(kind="grpo", behaviour=control, clip_low=0.2, clip_high=0.3, dual_clip=2.0)
    logs = torch.tensor([0.5, 0.9, 1.1, 1.4, 3.0], dtype=torch.float64).log()
    u, v = (grid.reshape(-1) for grid in torch.meshgrid(logs, logs, indexing="ij"))
    proximal = torch.full((25,), -2.0, dtype=torch.float64)
    student = (proximal + u).requires_grad_()
    full = torch.ones(25, dtype=torch.bool)
    batch = Case(
        student=student,
        behaviour=proximal - v,
        proximal=proximal,
        advantage=torch.full((25,), advantage, dtype=torch.float64),
        kept=full,
        scorable=full,
        lengths=[20, 5],
    )
    loss, metrics = loss_of(settings, batch, denominator=5)
    (grad,) = torch.autograd.grad(loss, student)
    value, slopes, clipped, acted = 0.0, [], 0, 0
    for ratio, behaviour_ratio in zip(u.exp().tolist(), v.exp().tolist(), strict=True):
        held = min(max(ratio, 0.8), 1.3)
        term = max(-advantage * ratio, -advantage * held)
        is_flat = term != -advantage * ratio
        if advantage < 0 and term > 2 * abs(advantage):
            term, is_flat = 2 * abs(advantage), True
        w = weight(behaviour_ratio)
        value += w * term
        slopes.append(0.0 if is_flat else -w * advantage * ratio / 5)
        clipped += is_flat
        acted += not math.isclose(w, behaviour_ratio)
    assert loss.item() == pytest.approx(value / 5, rel=1e-12)
    assert_equal(grad, torch.tensor(slopes, dtype=torch.float64), 1e-12)
    assert int(metrics["rl_clipped"]) == clipped
    assert int(metrics["rl_behaviour_acted"]) == acted
    assert metrics["rl_loss"].item() == pytest.approx(value, rel=1e-12)


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

ROWS = [(1, 2), (0,), (3, 0), (2, 2)]
KDS: list[Any] = [
    "k2",
    {"term": "rkl", "gamma": 0.7, "ratio": {"control": "truncate", "cap": 1.1}},
    {"term": "jsd", "beta": 0.4, "support": {"teacher_top_k": 2}},
    {"term": "skew_rkl", "support": {"teacher_top_k": 3}},
    {
        "term": "k3",
        "decoupled": {
            "update": {"control": "clip", "low": 0.2, "high": 0.2},
            "behaviour": {"control": "truncate", "cap": 1.1},
        },
    },
    "k1_loss",
]


def mixed_batch(settings: Objective, student: Policy, rows: list[tuple[int, ...]] = ROWS) -> Case:
    advantage = {(1, 2): 1.0, (0,): -0.4, (3, 0): 0.0, (2, 2): -1.3}
    return batch_of(
        settings,
        rows,
        student,
        policy(21),
        behaviour=policy(22),
        proximal=policy(23),
        advantage=[advantage[row] for row in rows],
    )


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
        loss, metrics = loss_of(settings, mixed_batch(settings, student), denominator=7)
        results.append((loss, gradient(loss, student), metrics))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][2].keys() == results[1][2].keys()
    assert results[0][1].abs().max() > 0


@pytest.mark.parametrize("kind", ["grpo", "kd"])
def test_a_term_of_weight_0_is_not_computed(kind: str) -> None:
    student = policy(20)
    zero = {"grpo": "distill_weight", "kd": "rl_weight"}[kind]
    settings = objective(kind="kdrl", **{zero: 0.0})
    batch = mixed_batch(settings, student)
    nothing = torch.full_like(batch.advantage, NAN)
    batch = (
        replace(batch, teacher=nothing)
        if kind == "grpo"
        else replace(batch, advantage=nothing, proximal=nothing)
    )
    loss, _ = loss_of(settings, batch, denominator=7)
    assert gradient(loss, student).isfinite().all()


@pytest.mark.parametrize("kd", KDS)
def test_kdrl_is_the_weighted_sum_of_its_terms(kd: Any) -> None:
    student = policy(20)
    both, rl, distill = (
        objective(kind="kdrl", kd=kd, rl_weight=0.7, distill_weight=0.2),
        objective(kind="grpo", kd=kd, rl_weight=1.0),
        objective(kind="kd", kd=kd, distill_weight=1.0),
    )
    losses = [
        loss_of(settings, mixed_batch(settings, student), denominator=5)[0]
        for settings in (both, rl, distill)
    ]
    assert_equal(losses[0], 0.7 * losses[1] + 0.2 * losses[2], 1e-14)


# ----------------------------------------------------------------------------- reduction and masks


@pytest.mark.parametrize("kd", KDS)
@pytest.mark.parametrize("cut", [[[0], [1], [2], [3]], [[0, 1], [2, 3]], [[3, 0], [2, 1]], [[2], [1, 0, 3]]])
def test_the_loss_and_gradient_of_a_step_do_not_depend_on_its_micro_batches(
    kd: Any, cut: list[list[int]]
) -> None:
    student = policy(20)
    settings = objective(kind="kdrl", kd=kd, distill_weight=0.2)
    whole, metrics = loss_of(settings, mixed_batch(settings, student), denominator=7)
    parts = [
        loss_of(settings, mixed_batch(settings, student, [ROWS[i] for i in part]), denominator=7)
        for part in cut
    ]
    assert_equal(sum(loss for loss, _ in parts), whole, 1e-14)
    assert_equal(sum(gradient(loss, student) for loss, _ in parts), gradient(whole, student), 1e-14)
    for name, value in metrics.items():
        total = torch.stack([part[name].double() for _, part in parts]).sum()
        assert_equal(total, value.double(), 1e-12)


@pytest.mark.parametrize("kind", ["kd", "grpo", "kdrl"])
@pytest.mark.parametrize("kd", KDS)
@pytest.mark.parametrize("junk", [NAN, INF, -INF])
def test_what_stands_at_a_token_that_is_not_kept_does_not_matter(kind: str, kd: Any, junk: float) -> None:
    settings = objective(kind=kind, kd=kd)
    student = policy(20)
    clean = mixed_batch(settings, student)
    kept = torch.tensor([True, False, True, True, True, True, False])
    leaf = clean.student.detach().masked_fill(~kept, junk).requires_grad_()
    dirty = replace(
        clean,
        student=leaf,
        **{
            name: getattr(clean, name).masked_fill(~kept, junk)
            for name in ("behaviour", "proximal", "advantage", "teacher")
        },
        divergence=None if clean.divergence is None else clean.divergence.detach().masked_fill(~kept, junk),
        kept=kept,
    )
    expected, _ = loss_of(settings, replace(clean, kept=kept), denominator=5)
    loss, metrics = loss_of(settings, dirty, denominator=5)
    assert_equal(loss, expected, 1e-14)
    assert int(metrics["kept_tokens"]) == 5
    if loss.requires_grad:
        (grad,) = torch.autograd.grad(loss, leaf, allow_unused=True)
        if grad is not None:
            assert grad.isfinite().all()
            assert (grad[~kept] == 0).all()


def test_a_token_that_is_not_scorable_leaves_the_kd_term_but_stays_in_rl_and_in_the_denominator() -> None:
    settings = objective(kind="kdrl", kd="k2")
    student = policy(20)
    batch = mixed_batch(settings, student)
    assert batch.teacher is not None
    scorable = torch.tensor([True, True, False, True, True, True, True])
    masked, metrics = loss_of(
        settings,
        replace(batch, scorable=scorable, teacher=batch.teacher.masked_fill(~scorable, NAN)),
        denominator=7,
    )
    whole, _ = loss_of(settings, batch, denominator=7)
    rho = (batch.student[2] - batch.behaviour[2]).exp()
    missing = rho * 0.5 * (batch.student[2] - batch.teacher[2]) ** 2 / 7
    assert_equal(masked, whole - missing, 1e-14)
    assert (int(metrics["kept_tokens"]), int(metrics["kd_tokens"])) == (7, 6)


def test_a_masked_token_inside_a_completion_keeps_its_place_in_the_discounting() -> None:
    student = torch.tensor([-1.0, -2.0, -1.5], dtype=torch.float64, requires_grad=True)
    full = torch.ones(3, dtype=torch.bool)
    batch = Case(
        student=student,
        behaviour=student.detach(),
        proximal=student.detach(),
        advantage=torch.zeros(3, dtype=torch.float64),
        kept=full,
        scorable=torch.tensor([True, False, True]),
        lengths=[3],
        teacher=student.detach() + torch.tensor([1.0, NAN, 4.0], dtype=torch.float64),
    )
    loss, _ = loss_of(objective(kd={"term": "rkl", "gamma": 0.5}), batch, denominator=1)
    assert torch.autograd.grad(loss, student)[0].tolist() == [-2.0, 0.0, -4.0]


def test_junk_in_the_top_k_of_a_position_that_is_not_scorable_does_not_matter() -> None:
    settings = objective(kd={"term": "jsd", "beta": 0.4})
    student = policy(24)
    teacher = policy(25).logprobs.detach()
    values, ids = teacher.sort(dim=-1, descending=True)
    scorable = torch.tensor([True, False, True, False, True])
    junk = ~scorable[:, None]
    found = divergence_of(
        settings,
        student.logprobs,
        scorable_N=scorable,
        topk_ids_NK=ids[:, :2].masked_fill(junk, -7),
        topk_logprobs_NK=values[:, :2].masked_fill(junk, NAN),
        tail_N=values[:, 2:].logsumexp(-1).masked_fill(~scorable, INF),
    )
    expected = divergence_of(
        settings,
        student.logprobs[scorable],
        scorable_N=torch.ones(3, dtype=torch.bool),
        topk_ids_NK=ids[scorable, :2],
        topk_logprobs_NK=values[scorable, :2],
        tail_N=values[scorable, 2:].logsumexp(-1),
    )
    assert torch.equal(found[scorable], expected)
    assert (found[~scorable] == 0).all()
    assert_equal(gradient(found.sum(), student), gradient(expected.sum(), student), 1e-14)
    assert (gradient(found.sum(), student)[~scorable] == 0).all()


@pytest.mark.parametrize("kd", KDS)
def test_a_micro_batch_without_a_kept_token_contributes_0_with_a_finite_gradient(kd: Any) -> None:
    settings = objective(kind="kdrl", kd=kd)
    student = policy(20)
    batch = mixed_batch(settings, student)
    loss, metrics = loss_of(settings, replace(batch, kept=torch.zeros(7, dtype=torch.bool)), denominator=3)
    assert loss.item() == 0
    assert (gradient(loss, student) == 0).all()
    assert int(metrics["kept_tokens"]) == 0


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("kind", "field"),
    [("grpo", field) for field in ("student", "behaviour", "proximal", "advantage")]
    + [("kd", field) for field in ("student", "behaviour", "teacher")],
)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_kept_number_that_is_not_finite_is_an_error_that_names_its_index(
    kind: str, field: str, value: float
) -> None:
    settings = objective(kind=kind)
    batch = mixed_batch(settings, policy(20))
    tensor = getattr(batch, field).detach().clone()
    tensor[4] = value
    kept = torch.tensor([True, False, True, True, True, True, True])
    with pytest.raises(NonFiniteError) as caught:
        loss_of(settings, replace(batch, **{field: tensor}, kept=kept), denominator=7)
    assert caught.value.index == 4
    assert str(value) in caught.value.message


def test_a_teacher_zero_under_student_mass_is_an_error_that_names_position_and_token() -> None:
    student = policy(24)
    values, ids = policy(25).logprobs.detach().sort(dim=-1, descending=True)
    values[3, 1] = -INF
    scorable = torch.tensor([True, False, True, True, True])
    arguments = {
        "scorable_N": scorable,
        "topk_ids_NK": ids,
        "topk_logprobs_NK": values,
        "tail_N": values[:, 0],
    }
    with pytest.raises(NonFiniteError, match=f"token id {int(ids[3, 1])} .* infinite") as caught:
        divergence_of(objective(kd={"term": "jsd", "beta": 1.0}), student.logprobs, **arguments)
    assert caught.value.index == 3
    with pytest.raises(NonFiniteError) as caught:
        divergence_of(objective(kd={"term": "jsd", "beta": 1.0}), student.logprobs, **arguments, offset=512)
    assert caught.value.index == 515
    bounded = divergence_of(objective(kd={"term": "jsd", "beta": 0.5}), student.logprobs, **arguments)
    assert bounded.isfinite().all()


@pytest.mark.parametrize(
    ("value", "message"), [(-INF, "tail bucket .* infinite"), (NAN, "tail bucket .* not a log-prob")]
)
def test_a_bad_tail_is_an_error_that_says_so(value: float, message: str) -> None:
    student = policy(24)
    values, ids = policy(25).logprobs.detach().sort(dim=-1, descending=True)
    tail = values[:, 2:].logsumexp(-1)
    tail[2] = value
    with pytest.raises(NonFiniteError, match=message) as caught:
        divergence_of(
            objective(kd={"term": "jsd", "beta": 1.0}),
            student.logprobs,
            scorable_N=torch.ones(5, dtype=torch.bool),
            topk_ids_NK=ids[:, :2],
            topk_logprobs_NK=values[:, :2],
            tail_N=tail,
        )
    assert caught.value.index == 2


def test_what_an_objective_needs_and_lacks_is_named() -> None:
    student = policy(20)
    for kd, name in (
        ("rkl", "TokenBatch.teacher"),
        ("k1_loss", "TokenBatch.teacher"),
        ({"term": "rkl", "baseline": "step"}, "baseline step"),
        ({"term": "jsd"}, "distribution_N"),
    ):
        settings = objective(kd=kd)
        batch = replace(mixed_batch(objective(), student), divergence=None)
        if name == "TokenBatch.teacher":
            batch = replace(batch, teacher=None)
        with pytest.raises(ValueError, match=name):
            loss_of(settings, batch, denominator=7)


def test_a_batch_whose_shapes_disagree_is_refused() -> None:
    batch = mixed_batch(objective(), policy(20))
    with pytest.raises(ValueError, match="proximal has shape"):
        loss_of(objective(), replace(batch, proximal=batch.proximal[:-1]), denominator=7)


def test_metrics_are_sums_over_tokens_without_a_graph() -> None:
    settings = objective(kind="kdrl", kd="k2", rl_weight=0.5, distill_weight=0.25)
    batch = mixed_batch(settings, policy(20))
    loss, metrics = loss_of(settings, batch, denominator=7)
    assert batch.teacher is not None
    assert_equal(metrics["kd_reverse_kl_nats"], (batch.student - batch.teacher).sum().detach(), 1e-14)
    assert_equal((0.5 * metrics["rl_loss"] + 0.25 * metrics["kd_loss"]) / 7, loss.detach(), 1e-14)
    assert not any(value.requires_grad for value in metrics.values())


# ------------------------------------------------------------------------------------- k1_loss, by itself


@pytest.mark.parametrize("max_tokens", MAX_TOKENS)
def test_k1_loss_has_no_expected_gradient_whatever_the_teacher(max_tokens: int) -> None:
    student = policy(1)
    found = expected_gradient(objective(kd="k1_loss"), max_tokens, student, policy(2), behaviour=student)
    assert found.abs().max() <= 1e-12
    batch = batch_of(objective(kd="k1_loss"), [(1, 2)], student, policy(2))
    assert gradient(loss_of(objective(kd="k1_loss"), batch, denominator=1)[0], student).abs().max() > 0.1


# ------------------------------------------------------------------------------------------ ratio, baseline


def test_decoupled_weights_are_a_product_of_two_ratios() -> None:
    student, teacher, behaviour, proximal = policy(8), policy(9), policy(10), policy(11)
    control = {
        "update": {"control": "clip", "low": 0.2, "high": 0.2},
        "behaviour": {"control": "mask", "low": 0.8, "high": 1.5},
    }
    settings = objective(kd={"term": "k2", "decoupled": control})
    acted = 0
    for row in completions(2):
        case = batch_of(settings, [row], student, teacher, behaviour=behaviour, proximal=proximal)
        assert case.teacher is not None
        expected = torch.zeros((), dtype=torch.float64)
        count = 0
        for s, p, b, q in zip(case.student, case.proximal, case.behaviour, case.teacher, strict=True):
            d, u, v = float(q - s), float((s - p).exp()), float((p - b).exp())
            flat = (d > 0 and u > 1.2) or (d < 0 and u < 0.8)
            outside = not 0.8 <= v <= 1.5
            expected = expected - (0.0 if flat or outside else u * v) * d * s
            count += flat or outside
        loss, metrics = loss_of(settings, case, denominator=1)
        assert_equal(gradient(loss, student), gradient(expected, student), 1e-12)
        assert int(metrics["kd_ratio_acted"]) == count
        acted += count
    assert 0 < acted < 2 * len(completions(2)) - 1


@pytest.mark.parametrize("term", ["rkl", "k2", "k3"])
@pytest.mark.parametrize("off_policy", [False, True])
def test_the_mean_over_the_other_completions_leaves_the_expected_gradient_of_pairs(
    term: str, off_policy: bool
) -> None:
    student, teacher = policy(1), policy(2)
    sampler = policy(3) if off_policy else student
    plain = objective(kd=term)
    settings = objective(kd={"term": term, "baseline": "step"})
    alone = expected_gradient(plain, 2, student, teacher, behaviour=sampler)
    found, biased = torch.zeros_like(alone), torch.zeros_like(alone)
    squares = [0.0, 0.0]
    for pair in itertools.product(completions(2), repeat=2):
        chance = math.prod(float(sampler.probability(row)) for row in pair)
        case = batch_of(settings, list(pair), student, teacher, behaviour=sampler, proximal=policy(4))
        assert case.teacher is not None
        differences = list((case.teacher - case.proximal).split(case.lengths))
        taught = [torch.ones(n, dtype=torch.bool) for n in case.lengths]
        values = baselines(settings.kd, differences, taught, [0, 0])
        spread = torch.tensor(values, dtype=torch.float64).repeat_interleave(torch.tensor(case.lengths))
        with_it = gradient(loss_of(settings, replace(case, baseline=spread), denominator=1)[0], student)
        without = gradient(loss_of(plain, case, denominator=1)[0], student)
        found += chance * with_it
        squares[0] += chance * float((with_it - 2 * alone).square().sum())
        squares[1] += chance * float((without - 2 * alone).square().sum())
        signals = torch.cat(differences)
        own = (signals.expm1() if term == "k3" else signals).mean().expand(len(spread))
        biased += chance * gradient(loss_of(settings, replace(case, baseline=own), denominator=1)[0], student)
    assert_equal(found, 2 * alone)
    assert squares[0] != squares[1]
    assert (biased - 2 * alone).abs().max() > 1e-3, "a mean that includes the own completion is biased"


def test_baselines_are_means_over_the_tokens_of_the_others_of_a_scope() -> None:
    kd = objective(kd={"term": "k2", "baseline": "group"}).kd
    differences = [
        torch.tensor([1.0, 2.0]),
        torch.tensor([NAN, 5.0]),
        torch.tensor([7.0]),
        torch.tensor([9.0]),
    ]
    taught = [torch.ones(2, dtype=torch.bool), torch.tensor([False, True])] + [
        torch.ones(1, dtype=torch.bool)
    ] * 2
    assert baselines(kd, differences, taught, ["a", "a", "a", "b"]) == [6.0, 10 / 3, 8 / 3, 0.0]
    discounted = objective(kd={"term": "rkl", "gamma": 0.5, "baseline": "step"}).kd
    assert baselines(discounted, differences, taught, [0, 0, 1, 1]) == [5.0, 2.0, 9.0, 7.0]


def test_the_exact_baseline_lowers_the_variance_of_the_gradient() -> None:
    student, teacher = policy(1), policy(2)
    variances = []
    for kd in ("rkl", {"term": "rkl", "baseline": "exact", "support": "vocabulary"}):
        settings = objective(kd=kd)
        mean = expected_gradient(settings, 2, student, teacher, behaviour=student)
        variances.append(
            sum(
                float(student.probability(row))
                * float(
                    (
                        gradient(
                            loss_of(settings, batch_of(settings, [row], student, teacher), denominator=1)[0],
                            student,
                        )
                        - mean
                    )
                    .square()
                    .sum()
                )
                for row in completions(2)
            )
        )
    assert variances[1] < 0.95 * variances[0]


# --------------------------------------------------------------------------- masks, schedules, shares, srpo


def test_a_closed_completion_contributes_nothing_to_the_kd_part_and_stays_in_the_rl_part() -> None:
    student = policy(20)
    settings = objective(kind="kdrl", kd="k2", mask="wrong", distill_weight=0.3)
    case = mixed_batch(settings, student)
    assert case.teacher is not None
    closed = torch.tensor([False, False, True, True, True, True, True])  # the first completion
    junk = replace(case, kd_open=closed, teacher=case.teacher.masked_fill(~closed, NAN))
    loss, metrics = loss_of(settings, junk, denominator=7)
    rl, _ = loss_of(objective(kind="grpo"), case, denominator=7)
    rest = mixed_batch(settings, student, ROWS[1:])
    kd, _ = loss_of(objective(kd="k2", distill_weight=0.3), rest, denominator=7)
    assert_equal(loss, rl + kd, 1e-14)
    assert (int(metrics["kept_tokens"]), int(metrics["kd_tokens"])) == (7, 5)


def test_which_completions_a_mask_opens() -> None:
    correct, groups = [True, False, False, False], ["a", "a", "b", "b"]
    assert open_completions(objective(kind="kdrl"), correct, groups) == [True] * 4
    wrong = [False, True, True, True]
    assert open_completions(objective(kind="kdrl", mask="wrong"), correct, groups) == wrong
    assert open_completions(objective(kind="srpo"), correct, groups) == wrong
    hopeless = objective(kind="kdrl", mask="all_wrong_groups")
    assert open_completions(hopeless, correct, groups) == [False, False, True, True]


def test_a_schedule_reaches_both_ends_and_its_middle() -> None:
    for kind, middle in (("linear", 0.6), ("cosine", 0.6)):
        settings = objective(kind="kdrl", distill_weight=1.0, distill_schedule={"kind": kind, "end": 0.2})
        weights = [at_step(settings, step, 5).distill_weight for step in range(6)]
        assert weights == pytest.approx([1.0, weights[1], middle, weights[3], 0.2, 0.2])
        expected = 0.8 if kind == "linear" else 0.2 + 0.4 * (1 + math.cos(math.pi / 4))
        assert weights[1] == pytest.approx(expected)
        assert at_step(settings, 0, 1).distill_weight == 1.0
    off = objective(kind="kdrl", distill_weight=1.0, distill_schedule={"kind": "linear", "end": 0.0})
    assert not at_step(off, 4, 5).has_kd
    assert at_step(objective(), 3, 5) == objective()


def test_shares_add_up_as_the_normalization_says() -> None:
    kept = [3, 1, 0, None]
    assert shares(objective(), kept, max_new_tokens=8) == [1 / 4] * 4
    sequence = objective(normalization="sequence")
    assert shares(sequence, kept, max_new_tokens=8) == [1 / 6, 1 / 2, 0.0, 0.0]
    assert shares(objective(normalization="fixed"), kept, max_new_tokens=8) == [1 / 24] * 4
    longer = objective(normalization="fixed", fixed_length=10)
    assert shares(longer, kept, max_new_tokens=8) == [1 / 30] * 4
    for settings in (objective(), sequence, longer):
        assert all(math.isfinite(share) for share in shares(settings, [None, None], max_new_tokens=8))


def test_srpo_sends_one_signal_through_the_rl_loss() -> None:
    student = policy(20)
    settings = objective(kind="srpo", rl_weight=0.7, distill_weight=0.4, dual_clip=1.5)
    case = mixed_batch(settings, student)
    assert case.teacher is not None
    correct = torch.tensor([True, True, False, False, False, True, True])
    loss, _ = loss_of(settings, replace(case, kd_open=~correct), denominator=7)
    expected = torch.zeros((), dtype=torch.float64)
    for t in range(7):
        d = float(case.teacher[t] - case.student[t])
        signal = 0.7 * float(case.advantage[t]) if correct[t] else 0.4 * d
        u = (case.student[t] - case.proximal[t]).exp()
        term = torch.maximum(-signal * u, -signal * u.clamp(0.8, 1.2))
        if signal < 0:
            term = term.clamp(max=1.5 * abs(signal))
        expected = expected + (case.proximal[t] - case.behaviour[t]).exp() * term / 7
    assert_equal(loss, expected, 1e-14)
    assert_equal(gradient(loss, student), gradient(expected, student), 1e-14)


def test_then_is_kd_first_and_grpo_after() -> None:
    settings = objective(kind="then", kd_rounds=2, kd="k2")
    phases = [settings.in_round(number).kind for number in (1, 2, 3)]
    assert phases == ["kd", "kd", "grpo"]
    with pytest.raises(ValueError, match="in_round"):
        loss_of(settings, mixed_batch(objective(), policy(20)), denominator=1)
