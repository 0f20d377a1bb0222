"""The five properties of check-loss, measured on a recipe's objective before anything is trained.

Properties 1 to 3 are about the KD part alone: the gradient of the objective less that at `distill_weight: 0`, every
completion enumerated. 4 and 5 are about the whole loss of an optimizer step, in which a recipe with reference text
has a completion of that kind.

What `end_token` and `truncated` mask is decided by train, before the loss, and an expectation over what is left is
no divergence: properties 1 to 3 are about completions of which everything counts.

Shapes as in `enumerated.py`; R completions.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from kdpipe.doctor.finding import CHECK_LOSS, CheckedLoss, CheckLoss, Finding, Measure, Phase, Verdict
from kdpipe.doctor.loss.claim import claim_of, claimed_gradient, description_of
from kdpipe.doctor.loss.enumerated import (
    STEP,
    WORLDS,
    Completion,
    EnumeratedRow,
    LossCase,
    Policies,
    V,
    as_step,
    drawn,
    gradients,
    is_right,
    loss_of,
    of_tokens,
    off_policy,
    on_policy,
    prefixes_of,
    random_logits,
    table_rows,
)
from kdpipe.doctor.loss.transformer import transformer
from kdpipe.method.token_batch import NonFiniteError
from kdpipe.models.logprobs import Head
from kdpipe.recipe.objective import (
    DecoupledControl,
    DistillSchedule,
    Objective,
    RatioControl,
    SampledTerm,
)
from kdpipe.recipe.schema import Recipe
from kdpipe.workers.message import Nothing
from kdpipe.workers.worker import Report

ROUNDING = 1e-14  # what float64 leaves of sums that are exactly 0
MEANING = {
    1: "the teacher drops out of the expected gradient: on average nothing is learned from it",
    2: "on average, training does not descend what this objective claims to descend",
    3: "a student that agrees with the teacher is pushed away from it",
    4: "the update depends on how a step is cut into micro-batches, ordered or padded",
    5: "values at masked tokens get into the loss",
}
BELOW_ROUNDING = (
    "the KD term is below rounding: beside the rest of the loss, or by itself, its gradient is no more than float64 "
    "rounds away, so nothing is learned from the teacher"
)
ASIDES = {
    "none": "",
    "shuffled_teacher": "; without train.control shuffled_teacher, which gives it the scores of other text",
    "self_teacher": "; without train.control self_teacher, with which the teacher is the student that sampled",
    "constant_advantage": "; without train.control constant_advantage, which on purpose leaves the teacher out",
}
"""What is said of a control, which these properties are not about: it changes what the loss is given."""
KD_PROPERTIES = (1, 2, 3)  # those that `run` insists on


class LossServer:
    """What a worker runs for `kdpipe check-loss`."""

    talk = CHECK_LOSS

    def __call__(self, request: CheckLoss, _report: Report[Nothing]) -> CheckedLoss:
        aside = ASIDES[request.recipe.train.control]
        phases = [
            Phase(
                when + description_of(case.objective) + aside,
                tuple(judged(case, number) for number in MEANING),
            )
            for when, case in cases_of(request.recipe)
        ]
        return CheckedLoss(tuple(phases))


def unsound(recipe: Recipe) -> list[str]:
    """What properties 1 to 3 find wrong with the KD part of the objective, a line each."""
    return [line for _, case in cases_of(recipe) for line in _unsound(case)]


@cache
def _unsound(case: LossCase) -> tuple[str, ...]:
    return tuple(
        f"{finding.probe}: {finding.catches}"
        for finding in (judged(case, number) for number in KD_PROPERTIES)
        if finding.verdict == "FAILED"
    )


def cases_of(recipe: Recipe) -> list[tuple[str, LossCase]]:
    """The phases of the objective, each with its name; a schedule is at its largest weight."""
    objective = recipe.train.objective
    largest = max(objective.distill_weight, objective.distill_schedule.end or 0.0)
    fixed = {"distill_weight": largest, "distill_schedule": DistillSchedule.model_construct()}
    case = LossCase(
        objective.model_copy(update=fixed),
        temperature=recipe.rollout.temperature,
        teacher_temperature=recipe.temperature_of(recipe.teacher),
        keeps_hidden=recipe.keep.hidden,
        max_new_tokens=recipe.rollout.max_new_tokens,
        has_references=recipe.rollout.on_policy_fraction < 1,
    )
    last = objective.kd_rounds
    scheduled = "" if objective.distill_schedule.kind == "constant" else "at the schedule's largest weight: "
    phases = (
        {scheduled: 1}
        if last is None
        else {f"rounds 1 to {last}: {scheduled}": last, f"from round {last + 1}: ": last + 1}
    )
    return [
        (when, replace(case, objective=case.objective.in_round(number))) for when, number in phases.items()
    ]


def judged(case: LossCase, number: int) -> Finding:
    """The finding on a property, with the worst measure of each name."""
    claim, measure = _property(case, number)
    meaning = MEANING[number]

    def finding(verdict: Verdict, measures: Sequence[Measure] = (), said: str = "") -> Finding:
        return Finding(f"property {number}", claim, verdict, said, tuple(measures), meaning)

    if number in KD_PROPERTIES and not case.objective.has_kd:
        return finding("not applicable")
    try:
        if number in KD_PROPERTIES and _is_below_rounding(case):
            if number > 1:
                return finding("skipped", said="below rounding")
            meaning = BELOW_ROUNDING
        measures = sorted(measure(case), key=lambda found: found.badness)
    except NonFiniteError as error:
        # The loss refuses a number that it should not have looked at, or that is its own making.
        return finding("FAILED", said=error.found)
    worst = {found.name: found for found in measures}
    ordered = sorted(worst.values(), key=lambda found: found.badness, reverse=True)
    return finding("ok" if all(found.is_ok for found in measures) else "FAILED", ordered)


def _property(case: LossCase, number: int) -> tuple[str, Callable[[LossCase], list[Measure]]]:
    """The claim of a property about the objective, and the function that measures it."""
    match number:
        case 1:
            return "the expected gradient follows the teacher", _teacher_matters
        case 2:
            return _claim(case.objective), _claim_holds
        case 3:
            return "where both agree, no completion is pushed", _agreement_rests
        case 4:
            return "cuts, order and padding change nothing", _cuts_agree
        case _:
            return "masked tokens change nothing", _masks_hold


def _claim(objective: Objective) -> str:
    """What property 2 measures, with the conditions under which it does."""
    where = ""
    if objective.kind == "srpo":
        where = "with every completion wrong, "
    elif objective.mask != "none":
        where = "with the mask open, "
    is_bounded = objective.has_kd and isinstance(objective.kd, SampledTerm) and objective.kd.is_bounded
    how = " (off-policy: without its bounds on ratios)" if is_bounded else ""
    return f"{where}the expected gradient is that of {claim_of(objective)}{how}"


def _is_below_rounding(case: LossCase) -> bool:
    """Whether the gradient that the KD term claims is lost in the rounding of the whole."""
    policies, world = on_policy(), WORLDS["one token"]
    _, _, noise = _kd_part(case, world, policies)
    return 100 * ROUNDING + noise >= 0.1 * _size(claimed_gradient(case.objective, world, policies))


def _teacher_matters(case: LossCase) -> list[Measure]:
    measures = []
    for world in _worlds(case):
        (one_RPV, weight_R, noise), (other_RPV, _, more) = (
            _kd_part(case, world, on_policy(teacher=teacher)) for teacher in (2, 3)
        )
        one, other = (torch.einsum("r,rpv->pv", weight_R, part_RPV) for part_RPV in (one_RPV, other_RPV))
        size = max(_size(one), _size(other))
        limit = max(1e-3 * size, 100 * ROUNDING + noise + more)
        measures.append(Measure("on-policy", _size(one - other), limit, must_exceed=True, of=size))
    return measures


def _claim_holds(case: LossCase) -> list[Measure]:
    """The expectation with the KD mask open; and that a closed completion has no KD part at all."""
    settings = [("on-policy", case, on_policy())]
    kd = case.objective.kd
    if case.objective.kind == "srpo":
        pass  # its signal goes through PPO's clip, which has no unbiased setting
    elif isinstance(kd, SampledTerm):
        free = {"ratio": RatioControl(), "decoupled": DecoupledControl() if kd.decoupled else None}
        plain = case.having({"kd": kd.model_copy(update=free)})
        settings.append(("off-policy, ratio none", plain, off_policy()))
    else:
        settings.append(("off-policy", case, off_policy()))
    measures = []
    for (name, setting, policies), world in itertools.product(settings, _worlds(case)):
        part_RPV, weight_R, noise = _kd_part(setting, world, policies, all_wrong=True)
        found = torch.einsum("r,rpv->pv", weight_R, part_RPV)
        wanted = claimed_gradient(setting.objective, world, policies)
        measures.append(_apart(name, found, wanted, noise=noise))
    return measures + _closed_completions(case)


def _closed_completions(case: LossCase) -> list[Measure]:
    """The KD part where the KD mask closes a completion, which is exactly none, and where it does not."""
    objective = case.objective
    groups = [STEP[number : number + 2] for number in range(0, len(STEP), 2)]
    if objective.kind == "srpo" or objective.mask == "wrong":
        closed = [is_right(completion) for group in groups for completion in group]
    elif objective.mask == "all_wrong_groups":
        closed = [any(map(is_right, group)) for group in groups for _ in group]
    else:
        return []
    part_RPV, noise = _rows_kd_part(case, drawn(case, groups, on_policy()), on_policy().student)
    is_closed_R = torch.tensor(closed)
    size, limit = _size(part_RPV[~is_closed_R]), 100 * ROUNDING + noise
    return [
        Measure("closed completions", _size(part_RPV[is_closed_R]), 0.0, of=size),
        Measure("open completions", size, limit, must_exceed=True, of=size),
    ]


def _agreement_rests(case: LossCase) -> list[Measure]:
    on, off = on_policy(), off_policy()
    size = _size(_kd_part(case, WORLDS["one token"], on)[0])  # where they do not agree
    measures = []
    behaviours = {"on-policy": on.behaviour, "off-policy": off.behaviour}
    for (name, behaviour), world in itertools.product(behaviours.items(), _worlds(case)):
        agreed = replace(on, teacher=on.student, behaviour=behaviour)
        part_RPV, _, noise = _kd_part(case, world, agreed)
        measures.append(Measure(name, _size(part_RPV), 1e-12 + noise, of=size))
    return measures


def _worlds(case: LossCase) -> list[list[Completion]]:
    # Pairs of completions are many: the world that holds everything is enough.
    return [WORLDS["early end"]] if case.has_others_baseline else list(WORLDS.values())


def _kd_part(
    case: LossCase, world: Sequence[Completion], policies: Policies, *, all_wrong: bool = False
) -> tuple[Tensor, Tensor, float]:
    """The KD part of each completion's gradient at weight 1 [R, P, V], with probabilities [R].

    The third value is the rounding error of that part. Where baselines are means over others, completions come in all
    pairs, each of a prompt and a step of its own.
    """
    groups = list(itertools.product(world, repeat=2 if case.has_others_baseline else 1))
    rows = drawn(case, groups, policies, all_wrong=all_wrong)
    part_RPV, noise = _rows_kd_part(case, rows, policies.student)
    sampler_PV = policies.behaviour.log_softmax(-1)
    chances = {
        completion: float(of_tokens(completion, sampler_PV[prefixes_of(completion)]).sum().exp())
        for completion in world
    }
    weights = [math.prod(chances[c] for c in group) / len(group) for group in groups for _ in group]
    return part_RPV, torch.tensor(weights, dtype=torch.float64), noise


def _rows_kd_part(case: LossCase, rows: Sequence[EnumeratedRow], student_PV: Tensor) -> tuple[Tensor, float]:
    """Each row's gradient less that at `distill_weight: 0` [R, P, V], at weight 1, and its rounding error.

    All rows are one micro-batch, in which each token has logits, and so a gradient, of its own.
    """
    prefixes_N = torch.tensor([prefix for row in rows for prefix in row.context])
    rows_N = torch.tensor([number for number, row in enumerate(rows) for _ in row.tokens])

    def gradient(case: LossCase) -> Tensor:
        result_RPV = student_PV.new_zeros(len(rows), *student_PV.shape)
        if not (case.objective.has_kd or case.objective.has_rl):
            return result_RPV
        logits_NV = (case.temperature * student_PV[prefixes_N]).requires_grad_()
        states_NN = torch.eye(len(logits_NV), dtype=logits_NV.dtype)
        loss = loss_of(case, rows, states_NN, Head(logits_NV.T))
        found_NV = gradients(loss, [logits_NV])[0] * case.temperature
        return result_RPV.index_put((rows_N, prefixes_N), found_NV, accumulate=True)

    whole_RPV, rest_RPV = gradient(case), gradient(case.having({"distill_weight": 0.0}))
    weight = case.objective.distill_weight
    noise = 64 * torch.finfo(torch.float64).eps * _size(whole_RPV) / weight
    return (whole_RPV - rest_RPV) / weight, noise


def _cuts_agree(case: LossCase) -> list[Measure]:
    """The sum over micro-batches against one of all rows, on the table, and on a transformer that pads."""
    measures = []
    model = transformer()
    for name, given, outcome in (
        ("table", table_rows(case), _table_outcome),
        ("transformer", model.rows, model.outcome),
    ):
        rows = [row for row in as_step(case, given) if row.kept_n.any()]
        whole = outcome(case, rows)
        # Each row alone, two parts, the other order, and a mixed one.
        for cut in ([[row] for row in rows], [rows[:3], rows[3:]], [rows[::-1]], [rows[1::2], rows[::-2]]):
            parts = [outcome(case, part) for part in cut]
            measures.append(_apart(name, torch.stack(parts).sum(0), whole))
    padded = [model.outcome(case, rows, left_padding=amount) for amount in (0, 3)]
    return measures + [_apart("left padding", found, whole) for found in padded]


def _masks_hold(case: LossCase) -> list[Measure]:
    """Masked tokens with nan or infinity against harmless ones, and these against rows without them."""
    rows = table_rows(case)
    clean = _table_outcome(case, as_step(case, rows), harmful=0.0)
    size = _size(clean)
    cut = _table_outcome(case, as_step(case, rows, cut=True))
    measures = [Measure("cut out", _size(cut - clean), 1e-12 * size, of=size)]
    for value in (math.nan, math.inf, -math.inf):
        harmed = _table_outcome(case, as_step(case, rows, harmful=value), harmful=value)
        measures.append(Measure(f"{value:g}", _size(harmed - clean), 0.0, of=size))
    return measures


def _table_outcome(case: LossCase, rows: Sequence[EnumeratedRow], *, harmful: float | None = None) -> Tensor:
    """Loss and gradient of a micro-batch of the categorical policy; `harmful` fills masked states."""
    prefixes_N = torch.tensor([prefix for row in rows for prefix in row.context])
    hidden_NP = torch.nn.functional.one_hot(prefixes_N, 1 + V).double()
    if harmful is not None:
        hidden_NP[~torch.cat([row.kept_n for row in rows])] = harmful
    logits_PV = (case.temperature * random_logits(1)).requires_grad_()
    loss = loss_of(case, rows, hidden_NP, Head(logits_PV.T))
    return torch.cat([loss.detach()[None], gradients(loss, [logits_PV])[0].flatten()])


def _apart(name: str, found: Tensor, wanted: Tensor, *, noise: float = 0.0) -> Measure:
    """How far they are apart, which rounding alone may make them."""
    size = _size(wanted)
    return Measure(name, _size(found - wanted), 1e-10 * size + ROUNDING + noise, of=size)


def _size(tensor: Tensor) -> float:
    """The largest absolute value, or nan; 0 of nothing."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0
