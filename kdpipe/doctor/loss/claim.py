"""The claim of a KD term, in words and as an exact gradient over enumerated completions.

Written out from probabilities, with none of kdpipe's losses: what check-loss compares these with must not share
their mistakes. Shapes as in `enumerated.py`; S support points.
"""

from collections.abc import Sequence

import torch
from pydantic import JsonValue
from torch import Tensor

from kdpipe.doctor.loss.enumerated import (
    Completion,
    Policies,
    of_tokens,
    on_support,
    prefixes_of,
    support_in_world,
)
from kdpipe.recipe.objective import (
    DistributionTerm,
    JsdTerm,
    K3Term,
    KdTerm,
    Objective,
    RklTerm,
    SkewKlTerm,
    SkewRklTerm,
)


def description_of(objective: Objective) -> str:
    """The objective in a line: kind, weights, the KD term with its own settings, normalization."""
    parts: list[str] = [objective.kind]
    if objective.has_rl:
        parts.append(f"rl_weight {objective.rl_weight:g}")
    if objective.has_kd:
        parts.append(f"distill_weight {objective.distill_weight:g}")
        own = objective.kd.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
        name = own.pop("term")
        parts.append(" ".join([f"kd {name}", *(f"{key} {_spelled(value)}" for key, value in own.items())]))
    if objective.mask != "none":
        parts.append(f"mask {objective.mask}")
    return ", ".join([*parts, f"normalization {objective.normalization}"])


def _spelled(value: JsonValue) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_spelled(item)}" for name, item in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def claim_of(objective: Objective) -> str:
    """What the KD term claims to descend."""
    if not objective.has_kd:
        return "the KD term's claim"
    reverse, forward = "KL(student‖teacher)", "KL(teacher‖student)"
    match objective.kd:
        case RklTerm(gamma=1.0):
            return "the KL of whole completions"
        case RklTerm(gamma=gamma) if gamma > 0:
            return f"its formula (gamma {gamma:g})"
        case K3Term():
            return forward
        case JsdTerm(beta=beta):
            name = {0.0: forward, 1.0: reverse}.get(beta, f"JSD({beta:g})")
        case SkewKlTerm(alpha=alpha):
            name = f"skew KL({alpha:g})"
        case SkewRklTerm(alpha=alpha):
            name = f"skew reverse KL({alpha:g})"
        case _:
            return reverse
    whose, k = support_in_world(objective)
    return f"{name} on the {whose} top {k} and a tail" if k else name


def claimed_gradient(objective: Objective, world: Sequence[Completion], policies: Policies) -> Tensor:
    """The gradient [P, V] that the KD term claims, at weight 1, over completions that b draws."""
    student_PV = policies.student.clone().requires_grad_()
    s_PV, q_PV, b_PV = (
        logits.log_softmax(-1) for logits in (student_PV, policies.teacher, policies.behaviour)
    )
    is_on_policy = policies.behaviour is policies.student
    total = s_PV.new_zeros(())
    for completion in world:
        prefixes = prefixes_of(completion)
        s_n, q_n, b_n = (of_tokens(completion, logprobs[prefixes]) for logprobs in (s_PV, q_PV, b_PV))
        chance = b_n.sum().exp()
        match objective.kd:
            case RklTerm(gamma=1.0) if is_on_policy:
                total = total + s_n.sum().exp() * (s_n - q_n).sum()
            case RklTerm(gamma=gamma) if gamma > 0:
                total = total - chance * _discounted(s_n, q_n, b_n, gamma)
            case kd:
                for prefix in prefixes:
                    ids_K = _ids(objective, q_PV[prefix], b_PV[prefix])
                    student_S, teacher_S = (
                        _bucketed(table_PV[prefix].exp(), ids_K) for table_PV in (s_PV, q_PV)
                    )
                    total = total + chance * _divergence(kd, student_S, teacher_S)
    (gradient,) = torch.autograd.grad(total, student_PV)
    return gradient


def _discounted(s_n: Tensor, q_n: Tensor, b_n: Tensor, gamma: float) -> Tensor:
    """`sum_t rho_t D_t s_t`, the formula of `rkl`."""
    d_n = (q_n - s_n).detach()
    rho_n = (s_n - b_n).exp().detach()
    terms = [
        rho_n[t] * sum(gamma ** (u - t) * d_n[u] for u in range(t, len(d_n))) * s_n[t]
        for t in range(len(d_n))
    ]
    return torch.stack(terms).sum()


def _divergence(kd: KdTerm, student_S: Tensor, teacher_S: Tensor) -> Tensor:
    """The divergence of two distributions, from their probabilities."""

    def kl(first: Tensor, second: Tensor) -> Tensor:
        return (first * (first / second).log()).sum()

    match kd:
        case K3Term() | JsdTerm(beta=0.0):
            return kl(teacher_S, student_S)
        case JsdTerm(beta=beta) if beta < 1:
            mixture_S = beta * teacher_S + (1 - beta) * student_S
            return beta * kl(teacher_S, mixture_S) + (1 - beta) * kl(student_S, mixture_S)
        case SkewKlTerm(alpha=alpha):
            return kl(teacher_S, alpha * teacher_S + (1 - alpha) * student_S)
        case SkewRklTerm(alpha=alpha):
            return kl(student_S, alpha * student_S + (1 - alpha) * teacher_S)
    return kl(student_S, teacher_S)


def _ids(objective: Objective, teacher_V: Tensor, sampler_V: Tensor) -> Tensor | None:
    """The ids of the support at one prefix; None is the vocabulary."""
    if not isinstance(objective.kd, DistributionTerm) or objective.distribution_support == "vocabulary":
        return None
    ids_1K, _, _ = on_support(objective, teacher_V[None], sampler_V[None])
    return ids_1K[0]


def _bucketed(chances_V: Tensor, ids_K: Tensor | None) -> Tensor:
    """The probabilities of the ids, and of all others together."""
    if ids_K is None:
        return chances_V
    found_K = chances_V[ids_K[ids_K >= 0]]
    return torch.cat([found_K, 1 - found_K.sum(0, keepdim=True)])
