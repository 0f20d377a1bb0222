"""Losses against closed forms and naive formulas, in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kdpipe.method import losses

INF = math.inf
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
ALPHAS = [0.0, 0.1, 0.6]
DIVERGENCES = [("jsd", beta) for beta in BETAS] + [
    (name, alpha) for name in ("skew_kl", "skew_rkl") for alpha in ALPHAS
]
every_divergence = pytest.mark.parametrize(("name", "share"), DIVERGENCES)


def random_logprobs(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).log_softmax(-1)


def logs(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def divergence(name: str, student: Tensor, teacher: Tensor, share: float) -> Tensor:
    return {"jsd": losses.jsd, "skew_kl": losses.skew_kl, "skew_rkl": losses.skew_rkl}[name](
        student, teacher, share
    )


def naive(name: str, student: Tensor, teacher: Tensor, share: float) -> Tensor:
    """The definition, in probabilities."""

    def kl(first: Tensor, second: Tensor) -> Tensor:
        return (first * (first / second).log()).sum(-1)

    s, p = student.exp(), teacher.exp()
    match name:
        case "jsd" if share == 0:
            return kl(p, s)
        case "jsd" if share == 1:
            return kl(s, p)
        case "jsd":
            m = share * p + (1 - share) * s
            return share * kl(p, m) + (1 - share) * kl(s, m)
        case "skew_kl":
            return kl(p, share * p + (1 - share) * s)
        case _:
            return kl(s, share * s + (1 - share) * p)


def top(teacher: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and log-probs of the top k, and the log of the remaining mass."""
    values, ids = teacher.sort(dim=-1, descending=True)
    return ids[:, :k], values[:, :k], values[:, k:].logsumexp(-1)


def on_top(name: str, student: Tensor, teacher: Tensor, share: float, *, k: int) -> Tensor:
    """The divergence on the teacher's top k and a tail."""
    ids, values, tail = top(teacher, k)
    return divergence(
        name, losses.student_support(student, ids), torch.cat([values, tail[:, None]], dim=-1), share
    )


def assert_same(found: Tensor, expected: Tensor, leaf: Tensor, *, tolerance: float = 1e-14) -> None:
    """Equal values, and equal gradients to the leaf."""
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    one, other = (torch.autograd.grad(value.sum(), leaf, retain_graph=True)[0] for value in (found, expected))
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


# ----------------------------------------------------------------------------------------------- support


def test_the_student_support_holds_the_named_ids_and_the_rest_of_the_mass() -> None:
    student = logs(0.1, 0.2, 0.3, 0.4)
    support = losses.student_support(student, torch.tensor([[3, 0]]))
    torch.testing.assert_close(support.exp(), torch.tensor([[0.4, 0.1, 0.5]], dtype=torch.float64))


def test_a_support_of_the_whole_vocabulary_has_an_empty_tail() -> None:
    student = random_logprobs(0, 3, 5)
    ids, values, tail = top(random_logprobs(1, 3, 5), 5)
    assert (losses.student_support(student, ids)[:, 5] == -INF).all()
    assert (torch.cat([values, tail[:, None]], dim=-1)[:, 5] == -INF).all()


@every_divergence
def test_padding_of_a_support_changes_neither_value_nor_gradient(name: str, share: float) -> None:
    logits = random_logprobs(2, 4, 6).requires_grad_()
    student = logits.log_softmax(-1)
    ids, values, tail = top(random_logprobs(3, 4, 6), 3)
    pad = torch.full((4, 2), -1)
    nothing = torch.full((4, 2), -INF)
    padded = divergence(
        name,
        losses.student_support(student, torch.cat([ids, pad], dim=-1)),
        torch.cat([values, nothing, tail[:, None]], dim=-1),
        share,
    )
    plain = divergence(
        name, losses.student_support(student, ids), torch.cat([values, tail[:, None]], dim=-1), share
    )
    assert_same(padded, plain, logits)


def test_the_tail_keeps_its_digits_where_the_top_k_hold_nearly_everything() -> None:
    # In float32, 1 - sum is exactly 0 here.
    logits = torch.tensor([[30.0, 0.0, 0.0]])
    tail = losses.student_support(logits.log_softmax(-1), torch.tensor([[0]]))[0, 1]
    assert tail.item() == pytest.approx(math.log(2) - 30, rel=1e-6)


def test_a_tail_without_mass_is_minus_infinity_with_finite_gradients() -> None:
    logits = torch.tensor([[1.0, 2.0, -INF], [1.0, 2.0, 0.5]], dtype=torch.float64, requires_grad=True)
    support = losses.student_support(logits.log_softmax(-1), torch.tensor([[0, 1], [0, 1]]))
    assert support[0, 2].item() == -INF
    support[:, :2].sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


# ------------------------------------------------------------------------------------------ divergences


@every_divergence
def test_a_divergence_is_its_definition_in_value_and_gradient(name: str, share: float) -> None:
    logits, teacher = random_logprobs(2, 6, 7).requires_grad_(), random_logprobs(3, 6, 7)
    student = logits.log_softmax(-1)
    found, expected = (of(name, student, teacher, share) for of in (divergence, naive))
    assert_same(found, expected, logits, tolerance=1e-12)


def test_jsd_weighs_the_teacher_with_beta() -> None:
    student, teacher = logs(1.0, 0.0), logs(0.5, 0.5)
    m0, m1 = 0.25 * 0.5 + 0.75, 0.25 * 0.5
    expected = 0.25 * (0.5 * math.log(0.5 / m0) + 0.5 * math.log(0.5 / m1)) + 0.75 * math.log(1 / m0)
    assert losses.jsd(student, teacher, 0.25).item() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("beta", BETAS)
def test_jsd_swaps_its_arguments_with_one_minus_beta(beta: float) -> None:
    student, teacher = random_logprobs(4, 50, 9), random_logprobs(5, 50, 9)
    torch.testing.assert_close(
        losses.jsd(student, teacher, beta), losses.jsd(teacher, student, 1 - beta), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_lies_between_0_and_the_entropy_of_beta_which_disjoint_distributions_reach(beta: float) -> None:
    entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    peaked, other = (
        (9 * random_logprobs(6, 200, 4)).log_softmax(-1),
        (9 * random_logprobs(7, 200, 4)).log_softmax(-1),
    )
    values = losses.jsd(peaked, other, beta)
    assert (values >= -1e-12).all()
    assert (values <= entropy + 1e-12).all()
    assert losses.jsd(logs(1.0, 0.0), logs(0.0, 1.0), beta).item() == pytest.approx(entropy, abs=1e-14)


@pytest.mark.parametrize("alpha", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("name", ["skew_kl", "skew_rkl"])
def test_a_skewed_kl_lies_between_0_and_minus_log_alpha_which_disjoint_distributions_reach(
    name: str, alpha: float
) -> None:
    student, teacher = ((9 * random_logprobs(seed, 200, 4)).log_softmax(-1) for seed in (6, 7))
    values = divergence(name, student, teacher, alpha)
    assert (values >= -1e-12).all()
    assert (values <= -math.log(alpha) + 1e-12).all()
    reached = divergence(name, logs(1.0, 0.0), logs(0.0, 1.0), alpha)
    assert reached.item() == pytest.approx(-math.log(alpha), abs=1e-14)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_is_the_weighted_sum_of_the_two_skewed_kls(beta: float) -> None:
    student, teacher = random_logprobs(4, 50, 9), random_logprobs(5, 50, 9)
    parts = beta * losses.skew_kl(student, teacher, beta) + (1 - beta) * losses.skew_rkl(
        student, teacher, 1 - beta
    )
    torch.testing.assert_close(losses.jsd(student, teacher, beta), parts, rtol=0, atol=1e-12)


def test_shares_too_small_for_a_difference_from_1_are_the_limit() -> None:
    student, teacher = random_logprobs(4, 50, 9), random_logprobs(5, 50, 9)
    for name, tiny in (("jsd", 1e-300), ("skew_kl", 1e-17), ("skew_rkl", 1e-17)):
        limit = torch.zeros(50, dtype=torch.float64) if name == "jsd" else naive(name, student, teacher, 0.0)
        torch.testing.assert_close(divergence(name, student, teacher, tiny), limit, rtol=0, atol=1e-12)


def test_jsd_at_0_and_1_is_the_limit_of_jsd_over_beta_not_the_formula() -> None:
    student, teacher = random_logprobs(8, 20, 5), random_logprobs(9, 20, 5)
    for end, other in ((0.0, 1e-6), (1.0, 1 - 1e-6)):
        slope = losses.jsd(student, teacher, other) / 1e-6
        torch.testing.assert_close(losses.jsd(student, teacher, end), slope, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(losses.jsd(student, teacher, 0), losses.kl(teacher, student), rtol=0, atol=0)
    torch.testing.assert_close(losses.jsd(student, teacher, 1), losses.kl(student, teacher), rtol=0, atol=0)


@every_divergence
def test_a_support_of_the_whole_vocabulary_is_no_support_at_all(name: str, share: float) -> None:
    logits, teacher = random_logprobs(10, 30, 8).requires_grad_(), random_logprobs(11, 30, 8)
    student = logits.log_softmax(-1)
    found = on_top(name, student, teacher, share, k=8)
    assert_same(found, divergence(name, student, teacher, share), logits, tolerance=1e-12)


@every_divergence
def test_a_divergence_grows_with_the_support_from_0_to_the_full_value(name: str, share: float) -> None:
    student, teacher = random_logprobs(12, 100, 8), random_logprobs(13, 100, 8)
    values = [on_top(name, student, teacher, share, k=k) for k in range(1, 9)]
    for smaller, larger in zip([torch.zeros(100, dtype=torch.float64), *values], values, strict=False):
        assert (larger >= smaller - 1e-12).all()
    torch.testing.assert_close(values[-1], divergence(name, student, teacher, share), rtol=0, atol=1e-12)


@every_divergence
@pytest.mark.parametrize("k", [1, 3, 6])
def test_a_divergence_has_no_gradient_where_teacher_and_student_agree(
    name: str, share: float, k: int
) -> None:
    logits = random_logprobs(14, 10, 6).requires_grad_()
    student = logits.log_softmax(-1)
    value = on_top(name, student, student.detach(), share, k=k)
    (grad,) = torch.autograd.grad(value.sum(), logits)
    assert value.abs().max() < 1e-12
    assert grad.abs().max() < 1e-12


@every_divergence
def test_ids_and_tails_without_mass_on_both_sides_are_harmless(name: str, share: float) -> None:
    logits = torch.tensor([[0.3, -0.2, 1.0, -INF]], dtype=torch.float64, requires_grad=True)
    student, teacher = logits.log_softmax(-1), logs(0.5, 0.3, 0.2, 0.0)
    without = divergence(name, logits[:, :3].log_softmax(-1), teacher[:, :3], share)
    assert_same(divergence(name, student, teacher, share), without, logits)
    as_a_tail = losses.student_support(student, torch.tensor([[0, 1, 2]]))
    assert_same(divergence(name, as_a_tail, teacher, share), without, logits)


REVERSE = {("jsd", 1.0), ("skew_rkl", 0.0)}
FORWARD = {("jsd", 0.0), ("skew_kl", 0.0)}


@every_divergence
def test_a_teacher_zero_under_student_mass_is_infinite_for_reverse_kl_only(name: str, share: float) -> None:
    logits = torch.tensor([[0.3, -0.2]], dtype=torch.float64, requires_grad=True)
    student, teacher = logits.log_softmax(-1), logs(1.0, 0.0)
    value = divergence(name, student, teacher, share)
    assert bool(value.isinf()) is ((name, share) in REVERSE)
    if (name, share) not in REVERSE:
        (grad,) = torch.autograd.grad(value.sum(), logits)
        assert grad.isfinite().all()


@every_divergence
def test_a_student_zero_under_teacher_mass_is_infinite_for_forward_kl_only(name: str, share: float) -> None:
    logits = torch.tensor([[0.3, -INF]], dtype=torch.float64, requires_grad=True)
    student, teacher = logits.log_softmax(-1), logs(0.4, 0.6)
    value = divergence(name, student, teacher, share)
    assert bool(value.isinf()) is ((name, share) in FORWARD)
    if (name, share) not in FORWARD:
        (grad,) = torch.autograd.grad(value.sum(), logits)
        assert grad.isfinite().all()


# -------------------------------------------------------------------------------- sampled-token terms


SAMPLED = [
    (losses.k2, lambda d: d, lambda d: 0.5 * d**2),
    (losses.k3, torch.expm1, lambda d: d.exp() - 1 - d),
]


@pytest.mark.parametrize(("term", "signal", "value"), SAMPLED)
def test_k2_and_k3_have_the_gradient_of_the_surrogate_with_their_own_signal(
    term: Any, signal: Any, value: Any
) -> None:
    generator = torch.Generator().manual_seed(15)
    student = torch.randn(100, generator=generator, dtype=torch.float64).requires_grad_()
    teacher, weight = torch.randn(2, 100, generator=generator, dtype=torch.float64)
    difference = teacher - student.detach()
    found = term(student, teacher, weight)
    torch.testing.assert_close(found.detach(), weight * value(difference), rtol=0, atol=1e-12)
    (first,) = torch.autograd.grad(found.sum(), student)
    surrogate = losses.rkl_surrogate(student, signal(difference), weight)
    (second,) = torch.autograd.grad(surrogate.sum(), student)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-12)
    torch.testing.assert_close(first, -weight * signal(difference), rtol=0, atol=1e-12)


def test_signal_weight_and_teacher_are_detached() -> None:
    student = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    loss = losses.rkl_surrogate(student, student * 3, student.exp())
    (grad,) = torch.autograd.grad(loss.sum(), student)
    torch.testing.assert_close(grad, -(student * 3 * student.exp()).detach())
    for term, signal, _ in SAMPLED:
        (grad,) = torch.autograd.grad(term(student, student * 3, student.exp()).sum(), student)
        torch.testing.assert_close(grad, (-student.exp() * signal(2 * student)).detach())


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_the_future_sum_is_its_definition_within_each_completion(gamma: float) -> None:
    lengths = [1, 5, 0, 2, 8, 13]
    values = torch.randn(29, generator=torch.Generator().manual_seed(16), dtype=torch.float64)
    expected = torch.cat(
        [
            torch.stack(
                [sum(gamma ** (u - t) * part[u] for u in range(t, len(part))) for t in range(len(part))]
            )
            for part in values.split(lengths)
            if len(part)
        ]
    )
    result = losses.discounted_future_sum(values.clone().requires_grad_(), lengths, gamma=gamma)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
    assert not result.requires_grad


def test_the_future_sum_of_nothing_is_nothing_and_wrong_lengths_are_refused() -> None:
    assert losses.discounted_future_sum(torch.zeros(0), [], gamma=0.5).shape == (0,)
    with pytest.raises(ValueError, match="3 tokens in all, but 2 values"):
        losses.discounted_future_sum(torch.zeros(2), [1, 2], gamma=1.0)


# ------------------------------------------------------------------------------------------------ PPO


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual_clip", "loss", "slope", "is_flat"),
    [
        # slope is d loss / d s = d loss / d u * u
        (1.0, 2.0, None, -2.0, -2.0, False),
        (1.1, 2.0, None, -2.2, -2.2, False),
        (1.5, 2.0, None, -2.6, 0.0, True),  # up enough: held at 1 + high
        (0.5, 2.0, None, -1.0, -1.0, False),  # a good token fell: pulled back up
        (0.5, -2.0, None, 1.6, 0.0, True),  # down enough: held at 1 - low
        (0.9, -2.0, None, 1.8, 1.8, False),
        (1.5, -2.0, None, 3.0, 3.0, False),  # a bad token rose: pushed down
        (5.0, -2.0, None, 10.0, 10.0, False),
        (5.0, -2.0, 3.0, 6.0, 0.0, True),  # dual clip: at most 3 |A|
        (2.0, -2.0, 3.0, 4.0, 4.0, False),
        (5.0, 2.0, 3.0, -2.6, 0.0, True),  # dual clip leaves good tokens alone
        (1.2, 2.0, 1.1, -2.4, -2.4, False),  # even where it is tighter than the clip
        (5.0, 0.0, 3.0, 0.0, 0.0, False),
    ],
)
def test_ppo_and_dual_clip_in_closed_form(
    ratio: float, advantage: float, dual_clip: float | None, loss: float, slope: float, is_flat: bool
) -> None:
    proximal = torch.tensor([-0.7], dtype=torch.float64)
    student = (proximal + math.log(ratio)).requires_grad_()
    value, flat = losses.ppo_loss(
        student,
        proximal,
        torch.tensor([advantage], dtype=torch.float64),
        clip_low=0.2,
        clip_high=0.3,
        dual_clip=dual_clip,
    )
    (grad,) = torch.autograd.grad(value.sum(), student)
    assert value.item() == pytest.approx(loss, abs=1e-12)
    assert grad.item() == pytest.approx(slope, abs=1e-12)
    assert flat.tolist() == [is_flat]
