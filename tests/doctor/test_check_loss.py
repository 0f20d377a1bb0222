"""check-loss passes every objective that is what it claims, and catches every wrong variant of the code written here.

A mutant replaces a function of kdpipe, wherever it was imported, with a wrong one. That it is on an objective's path is
part of the claim: the check passes without it, and the property named here fails with it.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import cycle, product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from _pytest.mark.structures import ParameterSet
from torch import Tensor
from typer.testing import CliRunner

import kdpipe.workers.worker
from kdpipe.cli.app import app
from kdpipe.cli.doctor import check_loss_lines
from kdpipe.doctor.finding import CHECK_LOSS, CheckLoss, Finding, Measure, Phase
from kdpipe.doctor.loss import check as module
from kdpipe.doctor.loss.check import LossServer, cases_of, judged, unsound
from kdpipe.method import advantage, losses, micro_batch, objective
from kdpipe.method.token_batch import TeacherSupport, TokenBatch
from kdpipe.models import logprobs as forward
from kdpipe.models.batching import Batch
from kdpipe.recipe.file import load_recipe, shipped
from kdpipe.recipe.objective import KdTerm, Objective
from kdpipe.recipe.schema import Recipe
from kdpipe.workers.worker import Report
from tests.wire import answered, asked
from tests.worlds import tiny_recipe

NAMES = [path.stem for path in shipped()]
DOC = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text(encoding="utf-8")
COMMAND = Path(sys.executable).with_name("kdpipe")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def recipe_of(settings: dict[str, Any], **changes: Any) -> Recipe:
    # Not 1: a temperature that is forgotten or applied twice should be seen.
    changes = {"rollout__temperature": 0.8} | changes
    return Recipe.model_validate(tiny_recipe(train__objective=settings, **changes))


def failed(phases: list[Phase]) -> set[int]:
    return {
        number
        for phase in phases
        for number, finding in enumerate(phase.findings, 1)
        if finding.verdict == "FAILED"
    }


def finding(phases: list[Phase], number: int, phase: int = 0) -> Finding:
    return phases[phase].findings[number - 1]


# --------------------------------------------------------------------------------------------- mutants

Wrong = Callable[..., Any]


@dataclass(frozen=True)
class Mutant:
    """A function or property of kdpipe, and what makes a wrong one of it."""

    owner: Any
    name: str
    wrong: Callable[[Any], Any]

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Puts the wrong one everywhere that the right one was imported."""
        original = vars(self.owner)[self.name]
        wrong = self.wrong(original)
        if isinstance(self.owner, type):
            patch.setattr(self.owner, self.name, wrong)
            return
        for name, loaded in list(sys.modules.items()):
            if name == "kdpipe" or name.startswith("kdpipe."):
                for attribute, value in list(vars(loaded).items()):
                    if value is original:
                        patch.setattr(loaded, attribute, wrong)


def leaking(value: Tensor, student: Tensor) -> Tensor:
    """The value, with the gradient of q - s that a missing detach would leave in it."""
    return value + (student.detach() - student)


def weighed(weight: Tensor, student: Tensor) -> Tensor:
    """The weight exp(s - b), whose detach is missing."""
    return weight * (student - student.detach()).exp()


def flipped(right: Wrong) -> Wrong:
    return lambda *args, **options: -right(*args, **options)


def uniform_teacher(right: Wrong) -> Wrong:
    """For functions of (student, teacher, ...): the teacher is not looked at."""
    return lambda student, teacher, *rest: right(
        student, torch.full_like(teacher, -math.log(teacher.shape[-1])), *rest
    )


def shifted(right: Wrong) -> Wrong:
    """The teacher's distribution of the next token."""

    def wrong(self: Any, index: Tensor) -> Any:
        rows = self.logprobs_NS if isinstance(self, TeacherSupport) else self.hidden_NG
        return right(self, (index + 1) % len(rows))

    return wrong


def constant_mixture(right: Wrong) -> Wrong:
    return lambda *args: right(*args).detach()


def wrong_loss(change: Callable[[TokenBatch], TokenBatch]) -> Callable[[Wrong], Wrong]:
    """A loss that reads a changed batch."""
    return lambda right: lambda goal, batch, *rest: right(goal, change(batch), *rest)


def mean_of_micro_batch(right: Wrong) -> Wrong:
    def wrong(goal: Objective, batch: TokenBatch, *rest: Any) -> Any:
        loss, metrics = right(goal, batch, *rest)
        return loss / batch.share[batch.kept].sum(), metrics

    return wrong


def mean_of_completions(right: Wrong) -> Wrong:
    def wrong(goal: Objective, batch: TokenBatch, *rest: Any) -> Any:
        loss, metrics = right(goal, batch, *rest)
        return loss / len(batch.lengths), metrics

    return wrong


def centred_in_micro_batch(batch: TokenBatch) -> TokenBatch:
    return replace(batch, advantage=batch.advantage - batch.advantage[batch.kept].mean())


def masked_by_product(batch: TokenBatch) -> TokenBatch:
    """A product with 0 in the place of cutting out."""
    return replace(batch, kept=torch.ones_like(batch.kept), share=batch.share * batch.kept)


def position_before(right: Wrong) -> Wrong:
    return lambda model, batch: right(model, _moved(batch))


def _moved(batch: Batch) -> Batch:
    return replace(batch, positions_N=(batch.positions_N - 1).clamp(min=0))


def cut_to_the_shortest(right: Wrong) -> Wrong:
    """Prompts cut to the shortest: what comes before is lost for some rows."""
    return lambda prompts, completions, **options: right(
        [prompt[-min(map(len, prompts)) :] for prompt in prompts], completions, **options
    )


def own_mean(right: Wrong) -> Wrong:
    """Baselines that take the completion's own tokens in."""

    def wrong(kd: Any, differences: Any, taught: Any, scopes: Any) -> list[float]:
        sums: dict[Any, list[Tensor]] = {}
        for difference, mask, scope in zip(differences, taught, scopes, strict=True):
            signal = difference.expm1() if kd.term == "k3" else difference
            sums.setdefault(scope, []).append(signal[mask])
        return [float(torch.cat(sums[scope]).mean()) for scope in scopes]

    return wrong


def of_sampled_token(right: Wrong) -> Wrong:
    """A baseline that depends on the token whose signal it is taken off."""
    return lambda kd, batch, distribution, at: right(kd, batch, distribution, at) + 0.5 * batch.teacher[at]


def mean_of_signals(right: Wrong) -> Wrong:
    """A baseline that is the mean of whatever is in the micro-batch."""
    return lambda kd, batch, distribution, at: (
        right(kd, batch, distribution, at) + (batch.teacher[at] - batch.proximal[at]).mean()
    )


def dropped_counted(right: Wrong) -> Wrong:
    """Shares that count completions of which nothing is left."""
    return lambda goal, kept, **options: [
        share * sum(count is not None for count in kept) / len(kept) for share in right(goal, kept, **options)
    ]


def everything_in_one_completion(right: Wrong) -> Wrong:
    """Discounting that goes on into the next completion."""
    return lambda values, lengths, *, gamma: right(values, [sum(lengths)], gamma=gamma)


def past(right: Wrong) -> Wrong:
    """Discounting of what came before the token."""
    return lambda values, lengths, *, gamma: right(values.flip(0), list(reversed(lengths)), gamma=gamma).flip(
        0
    )


MUTANTS: dict[str, Mutant] = {
    # sampled-token terms
    "rkl: sign": Mutant(losses, "rkl_surrogate", flipped),
    "rkl: missing detach": Mutant(
        losses,
        "rkl_surrogate",
        lambda _: lambda s, a, w: -(w.detach() * leaking(a.detach(), s)) * s,
    ),
    "rkl: teacher dropped": Mutant(
        losses, "rkl_surrogate", lambda right: lambda s, a, w: right(s, -s.detach(), w)
    ),
    "rkl: log-ratio as the loss": Mutant(
        losses, "rkl_surrogate", lambda _: lambda s, a, w: w.detach() * -leaking(a.detach(), s)
    ),
    "k2: sign": Mutant(losses, "k2", flipped),
    "k2: missing detach": Mutant(
        losses, "k2", lambda _: lambda s, q, w: weighed(w.detach(), s) * 0.5 * (s - q).square()
    ),
    "k2: teacher dropped": Mutant(losses, "k2", lambda right: lambda s, q, w: right(s, 0 * q, w)),
    "k3: sign": Mutant(losses, "k3", flipped),
    "k3: missing detach": Mutant(
        losses, "k3", lambda right: lambda s, q, w: right(s, q, 1 + 0 * w) * weighed(w.detach(), s)
    ),
    "k3: teacher dropped": Mutant(losses, "k3", lambda right: lambda s, q, w: right(s, 0 * q - 1, w)),
    "k3: swapped": Mutant(losses, "k3", lambda _: lambda s, q, w: w.detach() * ((s - q).expm1() - (s - q))),
    "ratio dropped": Mutant(objective, "_ratio_weight", lambda _: lambda settings, ratio, a: 0 * ratio + 1),
    "ratio applied twice": Mutant(
        objective, "_ratio_weight", lambda right: lambda settings, ratio, a: right(settings, ratio, a) * ratio
    ),
    "discount: next completion": Mutant(losses, "discounted_future_sum", everything_in_one_completion),
    "discount: the past": Mutant(losses, "discounted_future_sum", past),
    "discount: gamma ignored": Mutant(
        losses, "discounted_future_sum", lambda right: lambda values, lengths, *, gamma: values.clone()
    ),
    # distribution terms
    **{
        f"{name}: {what}": Mutant(losses, name, wrong)
        for name in ("jsd", "skew_kl", "skew_rkl")
        for what, wrong in (
            ("sign", flipped),
            ("teacher dropped", uniform_teacher),
            ("swapped", lambda right: lambda student, teacher, share: right(teacher, student, share)),
            ("other share", lambda right: lambda student, teacher, share: right(student, teacher, 1 - share)),
        )
        if (name, what) != ("jsd", "other share")
    },
    "mixture: detached": Mutant(losses, "mixture", constant_mixture),
    "kl: second detached": Mutant(
        losses, "kl", lambda right: lambda first, second: right(first, second.detach())
    ),
    "kl: first detached": Mutant(
        losses, "kl", lambda right: lambda first, second: right(first.detach(), second)
    ),
    "support: shift by one": Mutant(TeacherSupport, "at", shifted),
    "hidden: shift by one": Mutant(micro_batch.TeacherHidden, "at", shifted),
    "tail dropped": Mutant(
        losses,
        "student_support",
        lambda right: (
            lambda logprobs, ids: right(logprobs, ids).index_fill(-1, torch.tensor([ids.shape[-1]]), -9)
        ),
    ),
    "vocabulary of ids shifted": Mutant(
        losses, "student_support", lambda right: lambda logprobs, ids: right(logprobs.roll(1, -1), ids)
    ),
    # RL and srpo
    "ppo: sign": Mutant(losses, "ppo_loss", lambda right: lambda s, p, a, **clips: right(s, p, -a, **clips)),
    "srpo: teacher dropped": Mutant(
        objective,
        "_rl_signal",
        lambda right: (
            lambda goal, batch, *rest: right(goal, replace(batch, teacher=0 * batch.teacher), *rest)
        ),
    ),
    # masks, reduction and the path from the model
    "per-micro-batch mean": Mutant(objective, "token_loss", mean_of_micro_batch),
    "mean over completions of a micro-batch": Mutant(objective, "token_loss", mean_of_completions),
    "advantages centred in a micro-batch": Mutant(
        objective, "token_loss", wrong_loss(centred_in_micro_batch)
    ),
    "mask ignored": Mutant(
        objective, "token_loss", wrong_loss(lambda b: replace(b, kept=torch.ones_like(b.kept)))
    ),
    "mask by product": Mutant(objective, "token_loss", wrong_loss(masked_by_product)),
    "scorable ignored": Mutant(
        objective, "token_loss", wrong_loss(lambda b: replace(b, scorable=torch.ones_like(b.kept)))
    ),
    "KD mask ignored": Mutant(
        advantage, "open_completions", lambda _: lambda goal, correct, groups: [True] * len(correct)
    ),
    "KD mask inverted": Mutant(
        advantage, "open_completions", lambda right: lambda *args: [not is_open for is_open in right(*args)]
    ),
    "KD mask of the neighbour": Mutant(
        advantage, "open_completions", lambda right: lambda *args: [right(*args)[-1], *right(*args)[:-1]]
    ),
    "dropped completions counted": Mutant(objective, "shares", dropped_counted),
    "sampled ids: shift by one": Mutant(
        forward,
        "token_logprobs",
        lambda right: lambda hidden, head, ids, **options: right(hidden, head, ids.roll(1), **options),
    ),
    "hidden states: shift by one": Mutant(forward, "hidden_states", position_before),
    "prompts cut to the shortest": Mutant(
        sys.modules["kdpipe.models.batching"], "make_batch", cut_to_the_shortest
    ),
    "temperature twice": Mutant(
        forward,
        "token_logprobs",
        lambda right: (
            lambda *args, temperature, **options: right(*args, temperature=temperature**2, **options)
        ),
    ),
    # baselines
    "baseline: own tokens in the mean": Mutant(advantage, "baselines", own_mean),
    "baseline: of the sampled token": Mutant(objective, "_baseline", of_sampled_token),
    "baseline: of the micro-batch": Mutant(objective, "_baseline", mean_of_signals),
}

OBJECTIVES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    # name: settings, and the property that catches each mutant
    "rkl": (
        {"kind": "kd", "kd": "rkl"},
        {
            "rkl: sign": 2,
            "rkl: missing detach": 2,
            "rkl: teacher dropped": 1,
            "rkl: log-ratio as the loss": 1,
            "ratio dropped": 2,
            "ratio applied twice": 2,
            "sampled ids: shift by one": 2,
            "mask ignored": 5,
            "scorable ignored": 5,
            "per-micro-batch mean": 4,
            "temperature twice": 2,
        },
    ),
    "rkl, gamma": (
        {"kind": "kd", "kd": {"term": "rkl", "gamma": 0.7}},
        {"discount: next completion": 4, "discount: the past": 2, "discount: gamma ignored": 2},
    ),
    "rkl, gamma 1": (
        {"kind": "kd", "kd": {"term": "rkl", "gamma": 1.0}},
        {"discount: next completion": 2, "discount: the past": 2, "discount: gamma ignored": 2},
    ),
    "k2": (
        {"kind": "kd", "kd": "k2"},
        {
            "k2: sign": 2,
            "k2: missing detach": 2,
            "k2: teacher dropped": 1,
            "sampled ids: shift by one": 3,
            "mask ignored": 5,
            "per-micro-batch mean": 4,
        },
    ),
    "k3": (
        {"kind": "kd", "kd": "k3"},
        {
            "k3: sign": 2,
            "k3: missing detach": 2,
            "k3: teacher dropped": 1,
            "k3: swapped": 2,
            "mask by product": 5,
            "per-micro-batch mean": 4,
        },
    ),
    "k1_loss": (
        {"kind": "kd", "kd": "k1_loss"},
        {"per-micro-batch mean": 4, "mask ignored": 5, "hidden states: shift by one": 4},
    ),
    "jsd(0)": (
        {"kind": "kd", "kd": {"term": "jsd", "beta": 0.0, "support": "vocabulary"}},
        {
            "jsd: sign": 2,
            "jsd: swapped": 2,
            "kl: second detached": 1,
            "jsd: teacher dropped": 1,
            "hidden: shift by one": 2,
            "mask ignored": 5,
            "per-micro-batch mean": 4,
        },
    ),
    "jsd(0.5)": (
        {"kind": "kd", "kd": {"term": "jsd", "beta": 0.5, "support": {"student_top_k": 2}}},
        {
            "jsd: sign": 2,
            "kl: first detached": 2,
            "jsd: teacher dropped": 3,
            "support: shift by one": 3,
            "tail dropped": 2,
            "vocabulary of ids shifted": 3,
            "mask ignored": 5,
        },
    ),
    "jsd(1)": (
        {"kind": "kd", "kd": {"term": "jsd", "beta": 1.0, "support": {"teacher_top_k": 2}}},
        {
            "jsd: sign": 2,
            "jsd: swapped": 2,
            "kl: first detached": 2,
            "support: shift by one": 2,
            "scorable ignored": 5,
            "per-micro-batch mean": 4,
        },
    ),
    "skew_kl": (
        {"kind": "kd", "kd": {"term": "skew_kl", "support": {"union_top_k": 2}}},
        {
            "skew_kl: sign": 2,
            "skew_kl: swapped": 2,
            "skew_kl: other share": 2,
            "skew_kl: teacher dropped": 1,
            "mixture: detached": 1,
            "support: shift by one": 3,
        },
    ),
    "skew_rkl": (
        {"kind": "kd", "kd": {"term": "skew_rkl", "support": "vocabulary"}},
        {
            "skew_rkl: sign": 2,
            "skew_rkl: teacher dropped": 1,
            "skew_rkl: swapped": 2,
            "skew_rkl: other share": 2,
            "mixture: detached": 2,
            "kl: first detached": 2,
            "hidden: shift by one": 3,
        },
    ),
    "rkl, decoupled": (
        {"kind": "kd", "kd": {"term": "rkl", "decoupled": {}}},
        {"ratio dropped": 2, "ratio applied twice": 2, "rkl: sign": 2},
    ),
    "baseline step": (
        {"kind": "kd", "kd": {"term": "rkl", "baseline": "step"}},
        {
            "baseline: own tokens in the mean": 2,
            "baseline: of the sampled token": 2,
            "baseline: of the micro-batch": 4,
            "rkl: sign": 2,
        },
    ),
    "baseline group": (
        {"kind": "kd", "kd": {"term": "k3", "baseline": "group"}},
        {
            "baseline: own tokens in the mean": 2,
            "baseline: of the sampled token": 2,
            "baseline: of the micro-batch": 4,
            "k3: sign": 2,
        },
    ),
    "baseline exact": (
        {"kind": "kd", "kd": {"term": "k2", "baseline": "exact", "support": {"teacher_top_k": 2}}},
        {
            "baseline: of the sampled token": 2,
            "baseline: of the micro-batch": 4,
            "support: shift by one": 3,
            "k2: missing detach": 2,
        },
    ),
    "grpo": (
        {"kind": "grpo"},
        {
            "per-micro-batch mean": 4,
            "mask ignored": 5,
            "mask by product": 5,
            "hidden states: shift by one": 4,
            "prompts cut to the shortest": 4,
            "advantages centred in a micro-batch": 4,
        },
    ),
    "kdrl": (
        {"kind": "kdrl", "distill_weight": 5e-3},
        {
            "rkl: sign": 2,
            "rkl: teacher dropped": 1,
            "rkl: log-ratio as the loss": 1,
            "mask ignored": 5,
            "per-micro-batch mean": 4,
            "advantages centred in a micro-batch": 4,
        },
    ),
    "kdrl, schedule": (
        {
            "kind": "kdrl",
            "distill_weight": 0.0,
            "distill_schedule": {"kind": "cosine", "end": 0.1},
        },
        {"rkl: sign": 2, "rkl: missing detach": 2, "per-micro-batch mean": 4},
    ),
    "kdrl, mask wrong": (
        {"kind": "kdrl", "kd": "k2", "mask": "wrong"},
        {"KD mask ignored": 2, "KD mask inverted": 2, "KD mask of the neighbour": 2, "k2: sign": 2},
    ),
    "kdrl, mask all_wrong_groups": (
        {"kind": "kdrl", "kd": {"term": "jsd"}, "mask": "all_wrong_groups"},
        {"KD mask ignored": 2, "KD mask inverted": 2, "KD mask of the neighbour": 2, "jsd: sign": 2},
    ),
    "srpo": (
        {"kind": "srpo", "distill_weight": 0.3},
        {
            "ppo: sign": 2,
            "srpo: teacher dropped": 1,
            "KD mask inverted": 2,
            "mask ignored": 5,
            "per-micro-batch mean": 4,
        },
    ),
    "then": (
        {"kind": "then", "kd_rounds": 1, "kd": {"term": "skew_kl"}},
        {
            "skew_kl: sign": 2,
            "mixture: detached": 1,
            "mask by product": 5,
            "advantages centred in a micro-batch": 4,
        },
    ),
    "normalization sequence": (
        {"kind": "kdrl", "normalization": "sequence"},
        {"per-micro-batch mean": 4, "mask ignored": 5, "dropped completions counted": 5},
    ),
    "normalization fixed": (
        {"kind": "kdrl", "normalization": "fixed"},
        {"mean over completions of a micro-batch": 4, "mask ignored": 5, "dropped completions counted": 5},
    ),
}


def verdicts(name: str, number: int) -> set[str]:
    """Those on one property, in all phases of an objective."""
    recipe = recipe_of(OBJECTIVES[name][0])
    return {judged(case, number).verdict for _, case in cases_of(recipe)}


@cache
def passes_unmutated(name: str, number: int) -> bool:
    return "FAILED" not in verdicts(name, number)


def mutations() -> Iterator[ParameterSet]:
    """Every mutant in every objective that it belongs to; all but its first one are slow."""
    seen: set[str] = set()
    for name, (_, caught) in OBJECTIVES.items():
        for mutant, number in caught.items():
            yield pytest.param(name, mutant, number, marks=[pytest.mark.slow] if mutant in seen else [])
            seen.add(mutant)


@pytest.mark.parametrize(("name", "mutant", "number"), list(mutations()))
def test_check_loss_catches_the_mutant_and_passes_without_it(
    name: str, mutant: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert passes_unmutated(name, number)
    MUTANTS[mutant].install(monkeypatch)
    assert "FAILED" in verdicts(name, number)


def test_every_objective_has_three_mutants_and_every_mutant_an_objective() -> None:
    assert all(len(caught) >= 3 for _, caught in OBJECTIVES.values())
    assert {mutant for _, caught in OBJECTIVES.values() for mutant in caught} == set(MUTANTS)
    goals = [Objective.model_validate(settings) for settings, _ in OBJECTIVES.values()]
    terms = {get_args(term.model_fields["term"].annotation)[0] for term in get_args(get_args(KdTerm)[0])}
    assert {goal.kd.term for goal in goals} == terms
    assert {goal.kind for goal in goals} == set(get_args(Objective.model_fields["kind"].annotation))
    assert {goal.mask for goal in goals} == set(get_args(Objective.model_fields["mask"].annotation))
    choices = get_args(Objective.model_fields["normalization"].annotation)
    assert {goal.normalization for goal in goals} == set(choices)


# ------------------------------------------------------------------------------------- what it says of good ones

TRUNCATE = {"control": "truncate", "cap": 1.1}
MASK = {"control": "mask", "low": 0.9, "high": 1.1}
CLIP = {"control": "clip", "low": 0.1, "high": 0.1}
CONTROLS: list[dict[str, Any]] = [
    {},
    *({"ratio": control} for control in (TRUNCATE, MASK, CLIP)),
    {"decoupled": {"update": CLIP, "behaviour": MASK}},
    {"decoupled": {"behaviour": TRUNCATE}},
]
SUPPORTS: list[Any] = ["vocabulary", {"teacher_top_k": 2}, {"student_top_k": 64}, {"union_top_k": 1}]
SAMPLED: list[dict[str, Any]] = [
    *({"term": "rkl", "gamma": gamma} for gamma in (0.0, 0.5, 1.0)),
    {"term": "k2"},
    {"term": "k3"},
]
BASELINES: list[dict[str, Any]] = [
    {"baseline": "step"},
    {"baseline": "group"},
    *({"baseline": "exact", "support": support} for support in SUPPORTS),
]
DISTRIBUTIONS: list[dict[str, Any]] = [
    *({"term": "jsd", "beta": beta} for beta in (0.0, 0.3, 0.5, 1.0)),
    *({"term": term, "alpha": alpha} for term in ("skew_kl", "skew_rkl") for alpha in (0.0, 0.4)),
]
KINDS: list[dict[str, Any]] = [
    {"kind": "kd"},
    {"kind": "kdrl", "rl_weight": 2.0, "distill_weight": 5e-3},
    {"kind": "then", "kd_rounds": 2},
    {"kind": "kdrl", "mask": "wrong", "behaviour": {"control": "mask", "cap": 1.1}},
    {"kind": "kdrl", "mask": "all_wrong_groups", "dual_clip": 1.5},
]
NORMALIZATIONS = ["token", "sequence", "fixed"]
SCHEDULES: list[dict[str, Any]] = [
    {},
    {"distill_schedule": {"kind": "linear", "end": 1e-3}},
    {"distill_schedule": {"kind": "cosine", "end": 2.0, "rounds": 5}},
]


def takes(term: dict[str, Any], more: dict[str, Any]) -> bool:
    return not (term["term"] == "k3" and more.get("baseline") == "exact")


EVERY_KD = [
    *(term | control for term, control in product(SAMPLED, CONTROLS)),
    *(term | more for term, more in product(SAMPLED, BASELINES) if takes(term, more)),
    *(term | {"support": support} for term, support in product(DISTRIBUTIONS, SUPPORTS)),
]
"""Every KD term with every control, baseline and support; the default suite takes some, other choices in turn."""
# A step of 23 has no factor in common with the number of controls, baselines or supports.
TURNS = [
    {"kd": kd, "normalization": normalization} | kind | schedule
    for kd, kind, normalization, schedule in zip(
        EVERY_KD[::23], cycle(KINDS), cycle(NORMALIZATIONS), cycle(SCHEDULES), strict=False
    )
]


def check_loss(recipe: Recipe) -> tuple[Phase, ...]:
    return LossServer()(CheckLoss(recipe), Report(lambda _event: None)).phases


def passes(settings: dict[str, Any], **changes: Any) -> None:
    phases = check_loss(recipe_of(settings, **changes))
    assert failed(phases) == set(), phases
    number = 2 if settings["kind"] == "then" else 1
    assert len(phases) == number
    verdicts = [finding.verdict for finding in phases[0].findings]
    assert verdicts == ["ok"] * 5


@pytest.mark.parametrize("settings", TURNS, ids=str)
def test_a_kd_term_with_its_settings_passes(settings: dict[str, Any]) -> None:
    passes(settings)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(KINDS)))
@pytest.mark.parametrize("kd", EVERY_KD, ids=str)
def test_every_kd_term_passes_in_every_kind(kd: dict[str, Any], number: int) -> None:
    turn = EVERY_KD.index(kd) + number
    passes({"kd": kd, "normalization": NORMALIZATIONS[turn % 3]} | KINDS[number] | SCHEDULES[turn // 3 % 3])


def test_hidden_states_and_a_teacher_temperature_of_its_own_pass() -> None:
    settings = {"kind": "kd", "kd": {"term": "jsd", "support": {"teacher_top_k": 2}}}
    passes(settings, teacher_score__keep="hidden", rollout__temperature=1.7)
    recipe = recipe_of(settings)
    [teacher] = recipe.teachers
    warmer = recipe.model_copy(update={"teachers": [teacher.model_copy(update={"temperature": 3.0})]})
    assert failed(check_loss(warmer)) == set()


REFERENCES: list[dict[str, Any]] = [
    {"kind": "kd", "kd": "jsd"},
    {
        "kind": "kd",
        "kd": {"term": "skew_kl", "support": {"union_top_k": 8}},
        "off_policy_term": "cross_entropy",
    },
    {"kind": "kd", "kd": {"term": "rkl", "baseline": "step"}, "normalization": "sequence"},
    {"kind": "kdrl", "kd": {"term": "k2", "baseline": "exact"}, "mask": "all_wrong_groups"},
    {"kind": "kdrl", "kd": {"term": "jsd", "support": "vocabulary"}, "mask": "wrong"},
    {"kind": "srpo"},
]


@pytest.mark.parametrize("settings", REFERENCES, ids=str)
def test_an_objective_with_reference_text_passes(settings: dict[str, Any]) -> None:
    passes(settings, rollout__on_policy_fraction=0.5)


@pytest.mark.parametrize("settings", [s for s in REFERENCES if s["kind"] != "kd"], ids=str)
def test_a_loss_that_takes_reference_text_for_samples_fails_5(settings: dict[str, Any]) -> None:
    recipe = recipe_of(settings, rollout__on_policy_fraction=0.5)
    with pytest.MonkeyPatch.context() as patch:
        Mutant(objective, "token_loss", wrong_loss(lambda batch: replace(batch, off_policy=None))).install(
            patch
        )
        found = failed(check_loss(recipe))
    assert found == {5}


def test_srpo_passes_with_every_control_of_its_rl_loss() -> None:
    passes({"kind": "srpo", "dual_clip": 1.2, "behaviour": {"control": "truncate", "cap": 1.1}})


def test_bounds_at_a_ratio_of_1_and_weights_far_apart_pass() -> None:
    """On-policy ratios are 1 to the last bit, so that what a bound there does is no matter of rounding."""
    narrow = {"control": "clip", "low": 0.0, "high": 1e-9}
    passes(
        {
            "kind": "kdrl",
            "kd": {"term": "k3", "ratio": narrow},
            "behaviour": {"control": "mask", "cap": 1.0},
            "rl_weight": 100.0,
            "distill_weight": 1e-6,
        }
    )


@pytest.mark.parametrize("kind", [{"kind": "kd"}, {"kind": "kdrl", "distill_weight": 5e-3}])
def test_k1_loss_fails_1_2_and_3_and_nothing_else(kind: dict[str, Any]) -> None:
    phases = check_loss(recipe_of(kind | {"kd": "k1_loss"}))
    assert failed(phases) == {1, 2, 3}
    follows, claim, rests = (finding(phases, number) for number in (1, 2, 3))
    assert [measure.value for measure in follows.measures] == [0.0]
    on_policy = next(measure for measure in claim.measures if measure.name == "on-policy")
    assert on_policy.value == pytest.approx(on_policy.of)  # nothing of the claimed gradient is there
    assert all(measure.value > 0.1 for measure in rests.measures)


@pytest.mark.parametrize("settings", [{"kind": "grpo"}, {"kind": "kdrl", "distill_weight": 0.0}])
def test_without_a_kd_part_1_to_3_are_not_applicable(settings: dict[str, Any]) -> None:
    [phase] = check_loss(recipe_of(settings))
    assert [finding.verdict for finding in phase.findings] == ["not applicable"] * 3 + ["ok"] * 2
    assert unsound(recipe_of(settings)) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "kdrl", "kd": "k2", "distill_weight": 1e-13},
        {"kind": "kdrl", "kd": "k1_loss", "distill_weight": 1e-13},
        {"kind": "kd", "kd": {"term": "jsd", "beta": 1e-12}},
        {"kind": "kd", "kd": {"term": "skew_rkl", "alpha": 1 - 1e-9}},
    ],
    ids=str,
)
def test_a_term_below_rounding_is_called_so_and_nothing_more_is_said_of_it(settings: dict[str, Any]) -> None:
    [phase] = check_loss(recipe_of(settings))
    assert [finding.verdict for finding in phase.findings] == ["FAILED", "skipped", "skipped", "ok", "ok"]
    assert phase.findings[0].catches.startswith("the KD term is below rounding")
    assert {finding.said for finding in phase.findings[1:3]} == {"below rounding"}
    assert "drops out" not in "\n".join(check_loss_lines(phase, lambda text, _style: text))


@pytest.mark.parametrize(
    ("settings", "begins", "ends"),
    [
        ({"kind": "kdrl", "mask": "wrong"}, "with the mask open, the expected gradient", "teacher)"),
        ({"kind": "kdrl", "mask": "all_wrong_groups"}, "with the mask open, the expected", "teacher)"),
        ({"kind": "srpo"}, "with every completion wrong, the expected gradient", "teacher)"),
        (
            {"kind": "kd", "kd": {"term": "rkl", "ratio": MASK}},
            "the expected",
            "without its bounds on ratios)",
        ),
        (
            {"kind": "kd", "kd": {"term": "rkl", "decoupled": {"behaviour": TRUNCATE}}},
            "the expected",
            "without its bounds on ratios)",
        ),
        ({"kind": "kd", "kd": "k2"}, "the expected gradient", "teacher)"),
        ({"kind": "grpo"}, "the expected gradient", "claim"),
    ],
    ids=str,
)
def test_property_2_says_under_which_conditions_it_was_measured(
    settings: dict[str, Any], begins: str, ends: str
) -> None:
    [(_, case)] = cases_of(recipe_of(settings))
    said = module._claim(case.objective)
    assert (said.startswith(begins), said.endswith(ends)) == (True, True), said


def test_a_schedule_is_said_to_be_at_its_largest_weight() -> None:
    linear = {"kind": "linear", "end": 0.5}
    [(when, _)] = cases_of(recipe_of({"kind": "kdrl", "distill_schedule": linear}))
    assert when == "at the schedule's largest weight: "
    (first, _), _ = cases_of(recipe_of({"kind": "then", "kd_rounds": 2, "distill_schedule": linear}))
    assert first == "rounds 1 to 2: at the schedule's largest weight: "


def test_then_is_checked_phase_by_phase() -> None:
    first, second = check_loss(recipe_of({"kind": "then", "kd_rounds": 2, "kd": "k1_loss"}))
    assert first.objective.startswith("rounds 1 to 2: kd,")
    assert second.objective.startswith("from round 3: grpo,")
    assert (failed([first]), failed([second])) == ({1, 2, 3}, set())


@pytest.mark.parametrize(("start", "end"), [(0.25, 0.5), (0.5, 0.25)])
def test_a_schedule_is_checked_at_its_largest_weight(start: float, end: float) -> None:
    schedule = {"kind": "linear", "end": end}
    [(_, case)] = cases_of(recipe_of({"kind": "kdrl", "distill_weight": start, "distill_schedule": schedule}))
    assert case.objective.distill_weight == 0.5
    assert case.objective.distill_schedule.kind == "constant"


def test_what_no_unbiased_setting_has_is_not_claimed_off_policy() -> None:
    def names(settings: dict[str, Any]) -> set[str]:
        [(_, case)] = cases_of(recipe_of(settings))
        return {measure.name for measure in judged(case, 2).measures}

    clipped = {"kind": "kd", "kd": {"term": "rkl", "ratio": CLIP}}
    assert names(clipped) == {"on-policy", "off-policy, ratio none"}
    assert names({"kind": "kd", "kd": {"term": "jsd"}}) == {"on-policy", "off-policy"}
    assert names({"kind": "srpo"}) == {"on-policy", "closed completions", "open completions"}


def test_a_number_that_is_not_finite_is_a_failure_and_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for _, case in cases_of(recipe_of({"kind": "kd", "kd": "k2"})))
    monkeypatch.setattr(losses, "k2", lambda s, q, w: (s - s.detach()).abs().sqrt())  # 0, its gradient nan
    found = judged(case, 2)
    assert (found.verdict, found.said) == ("FAILED", "")
    assert {m.name: math.isfinite(m.value) for m in found.measures} == {
        "on-policy": False,
        "off-policy, ratio none": False,
    }
    monkeypatch.setattr(losses, "k2", lambda s, q, w: s * math.nan)
    assert judged(case, 2).said == "the KD term is nan, expected a finite number"
    monkeypatch.undo()
    MUTANTS["mask ignored"].install(monkeypatch)
    assert "expected a finite number" in judged(case, 5).said


# ------------------------------------------------------------------------------------------- the command line


class NearWorker:
    """Checks in this process what a worker would."""

    def __init__(self, target: str, talk: Any, *, log: Path, environment: dict[str, str]) -> None:
        assert target == "kdpipe.doctor.loss.check:LossServer"
        assert environment["OMP_NUM_THREADS"] == "1"

    def call(self, request: Any) -> Any:
        found = LossServer()(asked(CHECK_LOSS, request), Report(lambda _event: None))
        return answered(CHECK_LOSS, found)

    def stop(self) -> None: ...


def command(monkeypatch: pytest.MonkeyPatch, *args: str) -> Any:
    monkeypatch.setattr(kdpipe.workers.worker, "Worker", NearWorker)
    return CliRunner().invoke(app, ["check-loss", *args])


def test_a_good_recipe_exits_with_0(monkeypatch: pytest.MonkeyPatch) -> None:
    result = command(monkeypatch, "quickstart")
    assert (result.exit_code, result.stderr) == (0, "")
    assert [len(re.findall(rf"\b{word}\b", result.stdout)) for word in ("ok", "FAILED")] == [5, 0]


def test_a_failure_exits_with_4_and_says_what_it_means(monkeypatch: pytest.MonkeyPatch) -> None:
    result = command(monkeypatch, "gsm8k-qwen3-kdrl", "--set", "train.objective.kd=k1_loss")
    assert result.exit_code == 4
    assert "error: gsm8k-qwen3-kdrl: its objective fails properties 1, 2, 3" in result.stderr
    assert "reproduce: true" in result.stderr
    shown = " ".join(result.stdout.split())
    assert all(f"{number} FAILED: {module.MEANING[number]}" in shown for number in (1, 2, 3))


@pytest.mark.parametrize(("kd", "code", "numbers"), [("k2", 0, []), ("k1_loss", 4, [1, 2, 3])])
def test_json_is_one_document_in_both_cases(
    kd: str, code: int, numbers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = command(monkeypatch, "quickstart", "--set", f"train.objective.kd={kd}", "--json")
    assert result.exit_code == code
    document = json.loads(result.stdout)
    assert document["failed"] == numbers
    [phase] = document["phases"]
    assert [found["probe"] for found in phase["findings"]] == [f"property {n}" for n in (1, 2, 3, 4, 5)]
    assert [n for n, found in enumerate(phase["findings"], 1) if found["verdict"] == "FAILED"] == numbers
    for found in phase["findings"]:
        assert found["measures"]
        for measure in found["measures"]:
            assert {"name", "value", "of", "limit", "must_exceed", "origin"} == set(measure)


@pytest.mark.parametrize("settings", [settings for settings, _ in OBJECTIVES.values()], ids=str)
def test_everything_fits_80_columns(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = Measure("on-policy", 1.2e-16, 1.0, of=1.2e-3), Measure("nan", math.nan, 0.0, of=1.0)
    for name in ("_claim_holds", "_agreement_rests", "_cuts_agree"):
        monkeypatch.setattr(module, name, lambda _case: [good])
    monkeypatch.setattr(module, "_teacher_matters", lambda _case: [replace(good, must_exceed=True)])
    monkeypatch.setattr(module, "_masks_hold", lambda _case: [bad])
    recipe = recipe_of(settings)
    found = answered(CHECK_LOSS, LossServer()(CheckLoss(recipe), Report(lambda _event: None)))
    lines = [line for phase in found.phases for line in check_loss_lines(phase, lambda text, _style: text)]
    assert max(map(len, lines)) <= 80
    assert any("not finite" in line for line in lines)


SHOWN = re.findall(r"<!-- check-loss: ([^\n]*) -->\n```\n\$ kdpipe check-loss \1\n(.*?)```\n", DOC, re.DOTALL)


@pytest.mark.parametrize(("arguments", "shown"), SHOWN, ids=[arguments for arguments, _ in SHOWN])
def test_the_documentation_shows_what_is_printed(
    arguments: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_rounding(text: str) -> str:
        return re.sub(r"[\d.]+e-\d+|\b0\b(?!\.)", "tiny", text)

    result = command(monkeypatch, *arguments.split())
    assert [len(line) <= 80 for line in shown.splitlines()] == [True] * len(shown.splitlines())
    assert without_rounding(result.stdout) == without_rounding(shown)


def test_the_documentation_shows_a_good_objective_and_a_bad_one() -> None:
    assert [("FAILED" in shown, "k1_loss" in arguments) for arguments, shown in SHOWN] == [
        (False, False),
        (True, True),
    ]


def test_the_documentation_has_every_property() -> None:
    section = DOC.partition("## check-loss")[2]
    assert re.findall(r"^\| (\d) \|", section, re.MULTILINE) == [str(number) for number in module.MEANING]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_passes_in_less_than_20_seconds(name: str, tmp_path: Path) -> None:
    started = time.monotonic()
    result = subprocess.run(
        [COMMAND, "check-loss", name], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_passes(name: str) -> None:
    phases = check_loss(load_recipe(next(path for path in shipped() if path.stem == name)).recipe)
    assert failed(phases) == set()
