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
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import cycle, product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import kdpipe.workers
from kdpipe import check_loss as module
from kdpipe import forward, losses, micro_batch, objective
from kdpipe.batching import Batch
from kdpipe.check_loss import Finding, Phase, cases_of, check_loss, judged, serve, unsound
from kdpipe.cli import app
from kdpipe.objective import TokenBatch
from kdpipe.recipe import KdTerm, Objective, Recipe, load_recipe
from kdpipe.recipes_shipped import shipped
from tests.worlds import tiny_recipe

NAMES = [path.stem for path in shipped()]
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
    return {finding.number for phase in phases for finding in phase.findings if finding.verdict == "FAILED"}


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
        rows = self.logprobs_NS if isinstance(self, objective.TeacherSupport) else self.hidden_NG
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


def first_padding_attended(right: Wrong) -> Wrong:
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


def added_baseline(right: Wrong) -> Wrong:
    """A baseline per token of everything in the micro-batch."""
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
    "support: shift by one": Mutant(objective.TeacherSupport, "at", shifted),
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
        objective, "open_completions", lambda _: lambda goal, correct, groups: [True] * len(correct)
    ),
    "KD mask inverted": Mutant(
        objective, "open_completions", lambda right: lambda *args: [not is_open for is_open in right(*args)]
    ),
    "KD mask of the neighbour": Mutant(
        objective, "open_completions", lambda right: lambda *args: [right(*args)[-1], *right(*args)[:-1]]
    ),
    "dropped completions counted": Mutant(objective, "shares", dropped_counted),
    "sampled ids: shift by one": Mutant(
        forward,
        "token_logprobs",
        lambda right: lambda hidden, head, ids, **options: right(hidden, head, ids.roll(1), **options),
    ),
    "hidden states: shift by one": Mutant(forward, "hidden_states", position_before),
    "prompts cut to the shortest": Mutant(
        sys.modules["kdpipe.batching"], "make_batch", first_padding_attended
    ),
    "temperature twice": Mutant(
        forward,
        "token_logprobs",
        lambda right: (
            lambda *args, temperature, **options: right(*args, temperature=temperature**2, **options)
        ),
    ),
    # baselines
    "baseline: own tokens in the mean": Mutant(objective, "baselines", own_mean),
    "baseline: of the sampled token": Mutant(objective, "_baseline", of_sampled_token),
    "baseline: of the micro-batch": Mutant(objective, "_baseline", added_baseline),
    "baseline: not detached": Mutant(
        objective,
        "_sampled_token_term",
        lambda right: (
            lambda kd, batch, student, distribution, at: (
                right(kd, batch, student, distribution, at)[0] - 0.1 * student[at],
                right(kd, batch, student, distribution, at)[1],
            )
        ),
    ),
}

RKL = {"kind": "kd", "kd": "rkl"}
OBJECTIVES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    # name: settings, and the property that catches each mutant
    "rkl": (
        RKL,
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
            "baseline: not detached": 3,
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
FAIL_UNMUTATED = {"k1_loss": {1, 2, 3}}


@cache
def unmutated(name: str) -> set[int]:
    return failed(check_loss(recipe_of(OBJECTIVES[name][0])))


@pytest.mark.parametrize(
    ("name", "mutant", "number"),
    [(name, mutant, number) for name, (_, caught) in OBJECTIVES.items() for mutant, number in caught.items()],
)
def test_check_loss_catches_the_mutant_and_passes_without_it(
    name: str, mutant: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert unmutated(name) == FAIL_UNMUTATED.get(name, set())
    MUTANTS[mutant].install(monkeypatch)
    found = [judged(case, number) for _, case in cases_of(recipe_of(OBJECTIVES[name][0]))]
    assert number not in unmutated(name)
    assert "FAILED" in [finding.verdict for finding in found], found


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
