"""`check-loss`: what a recipe's objective does to the student, measured before money is spent (method: check-loss).

A tiny categorical policy, all of whose completions are enumerated, and a tiny transformer, in float64, go through
`micro_batch_loss`, the function that train calls. Right and wrong completions alternate, advantages are held fixed.

Gradients are with respect to logits at the recipe's temperature: the policy is the same at every temperature.
What `end_token` and `truncated` mask is decided by train, before the loss, and an expectation over what is left is
no divergence: properties 1 to 3 are about completions of which everything counts.

Shapes: N completion tokens, n those of one completion, R completions, P prefixes, V ids, H hidden size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from kdpipe.batching import make_batch
from kdpipe.checkpoints import scratch_model
from kdpipe.forward import Head, head_of, hidden_states, support_of
from kdpipe.micro_batch import TeacherHidden, micro_batch_loss
from kdpipe.objective import (
    NonFiniteError,
    TeacherSupport,
    TokenBatch,
    baselines,
    open_completions,
    shares,
)
from kdpipe.recipe import (
    DistillSchedule,
    DistributionTerm,
    JsdTerm,
    K3Term,
    Objective,
    RatioControl,
    Recipe,
    RklTerm,
    SampledTerm,
    Scratch,
    SkewKlTerm,
    SkewRklTerm,
)

if TYPE_CHECKING:
    from pydantic import JsonValue

    from kdpipe.workers import Message, Report

Completion = tuple[int, ...]
Outcome = Callable[["Case", Sequence["Row"]], Tensor]

V = 5
END = 0  # the id that ends a completion early
WORLDS: dict[str, list[Completion]] = {
    "one token": [(token,) for token in range(V)],
    "two tokens": list(itertools.product(range(V), repeat=2)),
    "early end": [(END,), *((first, second) for first in range(1, V) for second in range(V))],
}
STEP = [(1, 2, 3), (4, END), (3, 3, 1, 2, END), (2,), (4, 1, 1), (2, 4, 3, 1), (1, END), (3, 2)]
"""The completions of an optimizer step, two to a prompt."""
CHUNK = 512
ROUNDING = 1e-14  # what float64 leaves of sums that are exactly 0
MEANING = {
    1: "the teacher drops out of the expected gradient: on average nothing is learned from it",
    2: "on average, training does not descend what this objective claims to descend",
    3: "a student that agrees with the teacher is pushed away from it",
    4: "the update depends on how a step is cut into micro-batches, ordered or padded",
    5: "what stands at masked tokens gets into the loss",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """The verdict on one property, and the numbers of the comparison that decided it."""

    number: int
    claim: str
    verdict: Literal["ok", "FAILED", "not applicable"]
    measured: str = ""
    value: float | None = None
    reference: float | None = None
    detail: str = ""
    meaning: str = ""


@dataclass(frozen=True, slots=True)
class Measure:
    """One comparison: a deviation that may be `limit` at most, or a movement that is more than `limit`."""

    name: str
    value: float
    reference: float
    limit: float
    must_move: bool = False

    @property
    def is_ok(self) -> bool:
        """Whether the value is a number on the right side of its limit."""
        return self.value > self.limit if self.must_move else self.value <= self.limit


@dataclass(frozen=True, slots=True)
class Case:
    """An objective without phases and schedule, and how train would feed it."""

    objective: Objective
    temperature: float
    teacher_temperature: float
    keeps_hidden: bool
    max_new_tokens: int

    def having(self, **changes: Any) -> Case:
        """The same with a changed objective."""
        return replace(self, objective=self.objective.model_copy(update=changes))

    @property
    def has_rl_loss(self) -> bool:
        """Whether advantages or ratios to the proximal policy are read at every token that counts."""
        return self.objective.has_rl or self.objective.kind == "srpo"

    @property
    def closes_completions(self) -> bool:
        """Whether the KD part looks at some completions only."""
        return self.objective.kind == "srpo" or self.objective.mask != "none"

    @property
    def has_others_baseline(self) -> bool:
        """Whether the KD part of a completion depends on other completions."""
        kd = self.objective.kd
        return isinstance(kd, SampledTerm) and kd.baseline in ("step", "group")


@dataclass(frozen=True, slots=True)
class Row:
    """A completion with all that its loss reads; `context` is the prefix of each token, or a transformer's prompt."""

    tokens: Completion
    context: tuple[int, ...]
    behaviour_n: Tensor
    proximal_n: Tensor
    teacher_nV: Tensor
    sampler_nV: Tensor
    advantage_n: Tensor
    baseline_n: Tensor
    kept_n: Tensor
    scorable_n: Tensor
    is_open: bool = True
    share: float = 1.0

    @property
    def teacher_n(self) -> Tensor:
        """The teacher's log-probs of the tokens."""
        return _of(self.tokens, self.teacher_nV)

    @property
    def taught_n(self) -> Tensor:
        """The tokens that the KD part looks at."""
        return self.kept_n & self.scorable_n & self.is_open


@dataclass(frozen=True, slots=True)
class Policies:
    """Logits [P, V] of the next token: prefix 0 is the prompt's, prefix 1 + y is what follows y."""

    student: Tensor
    teacher: Tensor
    behaviour: Tensor
    proximal: Tensor


# ------------------------------------------------------------------------------------------------ entry


def serve() -> Callable[[Message, Report], Message]:
    """What a worker runs for the command line: from a recipe to the findings on each phase of its objective."""

    def check(request: Message, _report: Report) -> Message:
        torch.set_num_threads(1)  # everything is tiny
        phases: list[JsonValue] = [
            {"objective": heading, "findings": [asdict(finding) for finding in findings]}
            for heading, findings in check_loss(Recipe.model_validate(request["recipe"]))
        ]
        return {"phases": phases}

    return check


def check_loss(recipe: Recipe) -> list[tuple[str, list[Finding]]]:
    """For each phase of the recipe's objective a heading and the findings on the five properties."""
    return [
        (
            _heading(phase, case.objective),
            [
                *_kd_findings(case),
                _judged(4, "micro-batches, order and padding change nothing", partial(_cuts_agree, case)),
                _judged(5, "masked tokens change nothing, whatever they hold", partial(_masks_hold, case)),
            ],
        )
        for phase, case in _cases(recipe)
    ]


def unsound(recipe: Recipe) -> str:
    """What properties 1 to 3 find wrong with the KD part of the recipe's objective; empty where nothing is."""
    return "; ".join(filter(None, (_unsound(case) for _, case in _cases(recipe))))


@cache
def _unsound(case: Case) -> str:
    failed = [finding for finding in _kd_findings(case) if finding.verdict == "FAILED"]
    return "; ".join(f"property {finding.number}: {finding.meaning}" for finding in failed)


def _cases(recipe: Recipe) -> list[tuple[str, Case]]:
    """The phases of the objective, each with what to call it; a schedule stands at its largest weight."""
    objective = recipe.train.objective
    schedule = objective.distill_schedule
    case = Case(
        objective,
        temperature=recipe.rollout.temperature,
        teacher_temperature=recipe.teacher.temperature or recipe.rollout.temperature,
        keeps_hidden=recipe.keep.hidden,
        max_new_tokens=recipe.rollout.max_new_tokens,
    ).having(
        distill_weight=max(objective.distill_weight, schedule.end or 0.0), distill_schedule=DistillSchedule()
    )
    if objective.kd_rounds is None:
        return [("", case)]
    last = objective.kd_rounds
    names = {1: f"rounds 1 to {last}: ", last + 1: f"from round {last + 1}: "}
    return [(name, replace(case, objective=case.objective.in_round(r))) for r, name in names.items()]


def _heading(phase: str, objective: Objective) -> str:
    """The objective in a line: kind, weights, and the KD term with its parameters."""
    parts = [f"{phase}{objective.kind}"]
    if objective.has_rl:
        parts.append(f"rl_weight {objective.rl_weight:g}")
    if objective.has_kd:
        parts.append(f"distill_weight {objective.distill_weight:g}")
        term = objective.kd.model_dump(mode="json", exclude_none=True)
        name = term.pop("term")
        off: tuple[JsonValue, ...] = ("none", {"control": "none"})
        own = [f" {key} {_spelled(value)}" for key, value in term.items() if value not in off]
        parts.append(f"kd {name}{''.join(own)}")
    if objective.mask != "none":
        parts.append(f"mask {objective.mask}")
    return ", ".join([*parts, f"normalization {objective.normalization}"])


def _spelled(value: JsonValue) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_spelled(item)}" for name, item in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _judged(number: int, claim: str, measure: Callable[[], list[Measure]]) -> Finding:
    """The finding on a property; the comparison nearest to its limit, or beyond it, stands for all."""
    try:
        measures = measure()
    except NonFiniteError as error:
        # The loss refuses a number that it should not have looked at, or that is its own making.
        return Finding(number, claim, "FAILED", error.found, meaning=MEANING[number])
    is_ok = all(measure.is_ok for measure in measures)
    worst = max(measures, key=_badness)
    verb = "moves by" if worst.must_move else "off by"
    largest: dict[str, float] = {}
    for found in sorted(measures, key=_badness):
        largest[found.name] = found.value
    return Finding(
        number,
        claim,
        "ok" if is_ok else "FAILED",
        f"{verb} {worst.value:.2g} of {worst.reference:.2g}",
        worst.value if math.isfinite(worst.value) else None,
        worst.reference if math.isfinite(worst.reference) else None,
        ", ".join(f"{name} {value:.2g}" for name, value in largest.items()),
        "" if is_ok else MEANING[number],
    )


def _badness(measure: Measure) -> tuple[bool, float]:
    ratio = measure.value / measure.limit if measure.limit else measure.value
    return not measure.is_ok, -ratio if measure.must_move else ratio


# ---------------------------------------------------------------------------------- 1 to 3: the KD part


def _kd_findings(case: Case) -> list[Finding]:
    properties: list[tuple[str, Callable[[Case], list[Measure]]]] = [
        ("the expected gradient moves when the teacher does", _teacher_matters),
        (f"the expected gradient is that of {_claim(case.objective)}", _claim_holds),
        ("no completion is pushed where the teacher is the student", _agreement_rests),
    ]
    if not case.objective.has_kd:
        return [Finding(n, claim, "not applicable") for n, (claim, _) in enumerate(properties, 1)]
    return [_judged(n, claim, partial(measure, case)) for n, (claim, measure) in enumerate(properties, 1)]


def _claim(objective: Objective) -> str:
    """What the KD term claims to descend, in words."""
    reverse, forward = "KL(student‖teacher)", "KL(teacher‖student)"
    kd = objective.kd
    match kd:
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
    whose, k = _support(objective)
    return f"{name} on the {whose} {k} ids and a tail" if k else name


def _teacher_matters(case: Case) -> list[Measure]:
    measures = []
    for world in _worlds(case):
        found, noise = [], 0.0
        for teacher in (_logits(2), _logits(3)):
            student = _logits(1)
            part_RPV, weight_R, noise = _kd_part(case, world, Policies(student, teacher, student, student))
            found.append(torch.einsum("r,rpv->pv", weight_R, part_RPV))
        size = max(_size(gradient) for gradient in found)
        limit = max(1e-3 * size, ROUNDING * 100 + noise)
        measures.append(Measure("on-policy", _size(found[0] - found[1]), size, limit, must_move=True))
    return measures


def _claim_holds(case: Case) -> list[Measure]:
    """The expectation with the KD mask open; and that a closed completion has no KD part at all."""
    student, teacher = _logits(1), _logits(2)
    on = Policies(student, teacher, student, student)
    off = Policies(student, teacher, student + 0.5 * _logits(4), student + 0.3 * _logits(5))
    pairs = [("on-policy", case, on)]
    kd = case.objective.kd
    if isinstance(kd, SampledTerm) and case.objective.kind != "srpo":  # srpo's clip has no unbiased setting
        plain = kd.model_copy(update={"ratio": RatioControl(), "decoupled": None})
        pairs.append(("off-policy, ratio none", case.having(kd=plain), off))
    elif case.objective.kind != "srpo":
        pairs.append(("off-policy", case, off))
    measures = []
    for (name, setting, policies), world in itertools.product(pairs, _worlds(case)):
        part_RPV, weight_R, noise = _kd_part(setting, world, policies, all_wrong=True)
        found = torch.einsum("r,rpv->pv", weight_R, part_RPV)
        wanted = _claimed_gradient(setting, world, policies)
        size = _size(wanted)
        measures.append(Measure(name, _size(found - wanted), size, 1e-10 * size + ROUNDING + noise))
    if case.closes_completions:
        rows = _drawn(case, [tuple(STEP[i : i + 2]) for i in range(0, len(STEP), 2)], off)
        whole_RPV, rest_RPV = _with_and_without_kd(case, rows, student)
        part_RPV = whole_RPV - rest_RPV
        is_closed = torch.tensor([not row.is_open for row in rows])
        measures.append(Measure("closed completions", _size(part_RPV[is_closed]), _size(part_RPV), 0.0))
    return measures


def _agreement_rests(case: Case) -> list[Measure]:
    student = _logits(1)
    measures = []
    behaviours = {"on-policy": student, "off-policy": student + 0.5 * _logits(4)}
    for (name, behaviour), world in itertools.product(behaviours.items(), _worlds(case)):
        part_RPV, _, noise = _kd_part(case, world, Policies(student, student, behaviour, student))
        other_RPV, _, _ = _kd_part(case, world, Policies(student, _logits(2), behaviour, student))
        measures.append(Measure(name, _size(part_RPV), _size(other_RPV), 1e-12 + noise))
    return measures


def _worlds(case: Case) -> list[list[Completion]]:
    # Pairs of completions are many: the worlds that hold everything are enough.
    names = ("one token", "early end") if case.has_others_baseline else tuple(WORLDS)
    return [WORLDS[name] for name in names]


def _kd_part(
    case: Case, world: Sequence[Completion], policies: Policies, *, all_wrong: bool = False
) -> tuple[Tensor, Tensor, float]:
    """The KD part of each completion's gradient at weight 1 [R, P, V], each one's probability [R], and its rounding.

    Where baselines are means over others, completions come in all pairs, each of a prompt and a step of its own.
    """
    groups = list(itertools.product(world, repeat=2 if case.has_others_baseline else 1))
    rows = _drawn(case, groups, policies, all_wrong=all_wrong)
    whole_RPV, rest_RPV = _with_and_without_kd(case, rows, policies.student)
    sampler_PV = policies.behaviour.log_softmax(-1)
    chances = {
        completion: float(_of(completion, sampler_PV[_prefixes(completion)]).sum().exp())
        for completion in world
    }
    weights = [math.prod(chances[c] for c in group) / len(group) for group in groups for _ in group]
    weight = case.objective.distill_weight
    noise = 64 * torch.finfo(torch.float64).eps * _size(whole_RPV) / weight
    return (whole_RPV - rest_RPV) / weight, torch.tensor(weights, dtype=torch.float64), noise


def _with_and_without_kd(case: Case, rows: Sequence[Row], student_PV: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's gradient of the objective, and of what is left of it at `distill_weight: 0`, [R, P, V] each.

    All rows are one micro-batch, in which each token has logits, and so a gradient, of its own.
    """
    prefixes_N = torch.tensor([prefix for row in rows for prefix in row.context])
    rows_N = torch.tensor([number for number, row in enumerate(rows) for _ in row.tokens])

    def gradient(case: Case) -> Tensor:
        result_RPV = student_PV.new_zeros(len(rows), *student_PV.shape)
        if not (case.objective.has_kd or case.objective.has_rl):
            return result_RPV
        logits_NV = (case.temperature * student_PV[prefixes_N]).requires_grad_()
        states_NN = torch.eye(len(logits_NV), dtype=logits_NV.dtype)
        loss = _loss(case, rows, states_NN, Head(logits_NV.T, None))
        found_NV = _gradients(loss, [logits_NV])[0] * case.temperature
        return result_RPV.index_put((rows_N, prefixes_N), found_NV, accumulate=True)

    return gradient(case), gradient(case.having(distill_weight=0.0))


def _claimed_gradient(case: Case, world: Sequence[Completion], policies: Policies) -> Tensor:
    """The gradient [P, V] of what the KD term claims to descend, written out without any of kdpipe's losses."""
    student_PV = policies.student.clone().requires_grad_()
    s_PV, q_PV, b_PV = (
        logits.log_softmax(-1) for logits in (student_PV, policies.teacher, policies.behaviour)
    )
    kd = case.objective.kd
    total = s_PV.new_zeros(())
    for completion in world:
        prefixes = _prefixes(completion)
        s_n, q_n, b_n = (_of(completion, logprobs[prefixes]) for logprobs in (s_PV, q_PV, b_PV))
        if isinstance(kd, RklTerm) and kd.gamma == 1 and policies.behaviour is policies.student:
            total = total + s_n.sum().exp() * (s_n - q_n).sum()
            continue
        chance = b_n.sum().exp()
        if isinstance(kd, RklTerm) and kd.gamma > 0:
            difference_n = (q_n - s_n).detach()
            for t in range(len(completion)):
                signal = sum(kd.gamma ** (u - t) * difference_n[u] for u in range(t, len(completion)))
                total = total - chance * (s_n[t] - b_n[t]).exp().detach() * signal * s_n[t]
        else:
            for prefix in prefixes:
                ids_1K = None
                if isinstance(kd, DistributionTerm) and case.objective.distribution_support != "vocabulary":
                    ids_1K, _, _ = _on_support(case.objective, q_PV[[prefix]], b_PV[[prefix]])
                student_S, teacher_S = (
                    _bucketed(table_PV[prefix].exp(), ids_1K) for table_PV in (s_PV, q_PV)
                )
                total = total + chance * _divergence(kd, student_S, teacher_S)
    return _gradients(total, [student_PV])[0]


def _divergence(kd: object, student_S: Tensor, teacher_S: Tensor) -> Tensor:
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


def _bucketed(chances_V: Tensor, ids_1K: Tensor | None) -> Tensor:
    if ids_1K is None:
        return chances_V
    found_K = chances_V[ids_1K[ids_1K >= 0]]
    return torch.cat([found_K, 1 - found_K.sum(0, keepdim=True)])


# --------------------------------------------------------------------------------- 4 and 5: the whole loss


def _cuts_agree(case: Case) -> list[Measure]:
    """The sum over micro-batches against one of all rows, on the table, and on a transformer that pads."""
    measures = []

    def compare(name: str, found: Tensor, wanted: Tensor) -> None:
        size = _size(wanted)
        measures.append(Measure(name, _size(found - wanted), size, 1e-10 * size + ROUNDING))

    rows = [row for row in _step_of_table(case) if row.kept_n.any()]
    whole = _table_outcome(case, rows)
    for cut in _cuts(rows):
        compare("table", torch.stack([_table_outcome(case, part) for part in cut]).sum(0), whole)
    model = _transformer()
    rows = [row for row in _step_of_transformer(case, model) if row.kept_n.any()]
    whole = _transformer_outcome(case, model, rows)
    for cut in _cuts(rows):
        parts = [_transformer_outcome(case, model, part) for part in cut]
        compare("transformer", torch.stack(parts).sum(0), whole)
    for amount in (0, 3):
        compare("left padding", _transformer_outcome(case, model, rows, left_padding=amount), whole)
    return measures


def _cuts(rows: Sequence[Row]) -> Iterator[list[Sequence[Row]]]:
    """Ways to cut a step into micro-batches: each row alone, two parts, the other order, a mixed one."""
    yield [[row] for row in rows]
    yield [rows[:3], rows[3:]]
    yield [rows[::-1]]
    yield [rows[1::2], rows[::-2]]


def _masks_hold(case: Case) -> list[Measure]:
    """Masked tokens that hold nan or an infinity against harmless ones, and these against rows without them."""
    rows = _step_of_table(case)
    clean = _table_outcome(case, rows, harmful=0.0)
    cut = [_cut(row) for row in rows if row.kept_n.any()]
    size = _size(clean)
    measures = [Measure("cut out", _size(_table_outcome(case, cut) - clean), size, 0.0)]
    for value in (math.nan, math.inf, -math.inf):
        harmed = _table_outcome(case, _step_of_table(case, harmful=value), harmful=value)
        measures.append(Measure(f"{value:g}", _size(harmed - clean), size, 0.0))
    return measures


def _harmed(case: Case, row: Row, value: float) -> Row:
    """The row with `value` wherever a mask says that nothing is read."""

    def put(tensor: Tensor, is_read_n: Tensor) -> Tensor:
        is_read = is_read_n if tensor.ndim == 1 else is_read_n[:, None]
        return torch.where(is_read, tensor, value)

    by_ratio_n = row.kept_n if case.has_rl_loss else row.taught_n
    return replace(
        row,
        behaviour_n=put(row.behaviour_n, by_ratio_n),
        proximal_n=put(row.proximal_n, by_ratio_n),
        advantage_n=put(row.advantage_n, by_ratio_n),
        baseline_n=put(row.baseline_n, row.taught_n),
        teacher_nV=put(row.teacher_nV, row.taught_n),
    )


def _cut(row: Row) -> Row:
    """The row without its masked tokens, which are its last ones."""
    n = int(row.kept_n.sum())
    return replace(
        row,
        tokens=row.tokens[:n],
        context=row.context[:n],
        behaviour_n=row.behaviour_n[:n],
        proximal_n=row.proximal_n[:n],
        teacher_nV=row.teacher_nV[:n],
        sampler_nV=row.sampler_nV[:n],
        advantage_n=row.advantage_n[:n],
        baseline_n=row.baseline_n[:n],
        kept_n=row.kept_n[:n],
        scorable_n=row.scorable_n[:n],
    )


def _step_of_table(case: Case, *, harmful: float | None = None) -> list[Row]:
    """An optimizer step of the categorical policy; every second row was drawn by the student as it is."""
    student, teacher = _logits(1), _logits(2)
    on = Policies(student, teacher, student, student)
    off = Policies(student, teacher, student + 0.5 * _logits(4), student + 0.3 * _logits(5))
    rows = [_drawn(case, [(c,)], (on, off)[i % 2])[0] for i, c in enumerate(STEP)]
    return _step(case, rows, harmful=harmful)


def _step(case: Case, rows: Sequence[Row], *, harmful: float | None = None) -> list[Row]:
    """The rows as an optimizer step sees them: masks, baselines and shares of the recipe's normalization."""
    rows = list(rows)
    for number in (1, 6, 7):  # a masked end token
        rows[number] = replace(rows[number], kept_n=_all_but(rows[number], len(rows[number].tokens) - 1))
    rows[3] = replace(rows[3], kept_n=torch.zeros_like(rows[3].kept_n))  # dropped
    for number, place in ((0, 1), (4, 0)):  # ids that the teacher lacks
        rows[number] = replace(rows[number], scorable_n=_all_but(rows[number], place))
    counts = [int(row.kept_n.sum()) or None for row in rows]
    weights = shares(case.objective, counts, max_new_tokens=case.max_new_tokens)
    rows = [replace(row, share=share) for row, share in zip(rows, weights, strict=True)]
    prompts = [number // 2 for number in range(len(rows))]
    rows = _opened(case, rows, prompts)
    if harmful is not None:
        rows = [_harmed(case, row, harmful) for row in rows]
    kd = case.objective.kd
    is_step_mean = isinstance(kd, SampledTerm) and kd.baseline == "step"
    rows = _with_baselines(case, rows, [0] * len(rows) if is_step_mean else prompts)
    return rows if harmful is None else [_harmed(case, row, harmful) for row in rows]


def _all_but(row: Row, place: int) -> Tensor:
    return torch.arange(len(row.tokens)) != place


def _table_outcome(case: Case, rows: Sequence[Row], *, harmful: float | None = None) -> Tensor:
    """Loss and gradient of a micro-batch of the categorical policy; `harmful` stands in masked hidden states."""
    prefixes_N = torch.tensor([prefix for row in rows for prefix in row.context])
    hidden_NP = torch.nn.functional.one_hot(prefixes_N, 1 + V).double()
    if harmful is not None:
        hidden_NP[~torch.cat([row.kept_n for row in rows])] = harmful
    logits_PV = (case.temperature * _logits(1)).requires_grad_()
    loss = _loss(case, rows, hidden_NP, Head(logits_PV.T, None))
    return torch.cat([loss.detach()[None], _gradients(loss, [logits_PV])[0].flatten()])


# ---------------------------------------------------------------------------------------- a tiny transformer


@cache
def _transformer() -> Any:
    settings = Scratch(
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        max_positions=32,
        tie_embeddings=False,
        init_std=0.3,
    )
    model = scratch_model(settings, num_ids=V, eos_id=END, pad_id=END, seed=1).double()
    for module in list(model.modules()):
        for name, norm in list(module.named_children()):
            if name.endswith("norm"):  # transformers' own computes in float32 whatever it is given
                size, eps = norm.weight.shape[0], norm.variance_epsilon
                setattr(module, name, torch.nn.RMSNorm(size, eps=eps, dtype=torch.float64))
    return model


def _step_of_transformer(case: Case, model: Any) -> list[Row]:
    """An optimizer step of the transformer, whose log-probs come from unbatched forwards."""
    generator = torch.Generator().manual_seed(6)
    rows = []
    for number, completion in enumerate(STEP):
        prompt = tuple((3 * number + place) % V for place in range(1 + (5 * number) % 4))
        with torch.no_grad():
            logits_TV = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0]
        student_nV = logits_TV[len(prompt) - 1 : -1].log_softmax(-1)
        teacher_nV, *noise_2nV = torch.randn(3, *student_nV.shape, generator=generator, dtype=torch.float64)
        if number % 2:  # these were drawn by the student as it is
            noise_2nV = [0 * noise_nV for noise_nV in noise_2nV]
        rows.append(
            _row(
                completion,
                prompt,
                teacher_nV=teacher_nV.log_softmax(-1),
                sampler_nV=(student_nV + 0.5 * noise_2nV[0]).log_softmax(-1),
                proximal_nV=(student_nV + 0.3 * noise_2nV[1]).log_softmax(-1),
            )
        )
    return _step(case, rows)


def _transformer_outcome(
    case: Case, model: Any, rows: Sequence[Row], *, left_padding: int | None = None
) -> Tensor:
    """Loss and gradient of a micro-batch of the transformer; padded on the left by at least that many tokens."""
    if left_padding is None:
        batch = make_batch([row.context for row in rows], [row.tokens for row in rows])
        hidden_NH = hidden_states(model, batch)
    else:
        hidden_NH = _left_padded(model, rows, left_padding)
    # The model's logits are those at the temperature, as everywhere here.
    head = Head(case.temperature * head_of(model, num_ids=V).weight_VH, None)
    loss = _loss(case, rows, hidden_NH, head)
    gradients = _gradients(loss, list(model.parameters()))
    return torch.cat([loss.detach()[None], *(gradient.flatten() for gradient in gradients)])


def _left_padded(model: Any, rows: Sequence[Row], amount: int) -> Tensor:
    """The hidden states [N, H] that predict the rows' tokens, by a way of its own: mask and positions."""
    sequences = [(*row.context, *row.tokens) for row in rows]
    width = amount + max(map(len, sequences))
    ids_BT = torch.tensor([[END] * (width - len(ids)) + list(ids) for ids in sequences])
    mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in sequences])
    hidden_BTH: Tensor = model.get_decoder()(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        position_ids=(mask_BT.cumsum(-1) - 1).clamp(min=0),
        use_cache=False,
    ).last_hidden_state
    return torch.cat(
        [hidden[-len(row.tokens) - 1 : -1] for row, hidden in zip(rows, hidden_BTH, strict=True)]
    )


# -------------------------------------------------------------------------------------------------- rows


def _drawn(
    case: Case, groups: Sequence[Sequence[Completion]], policies: Policies, *, all_wrong: bool = False
) -> list[Row]:
    """Completions of the categorical policy; those of a group share prompt and optimizer step."""
    # The trainer divides by the temperature: so do the others, which keeps b = s true to the last bit.
    teacher_PV, sampler_PV, proximal_PV = (
        (case.temperature * logits_PV / case.temperature).log_softmax(-1)
        for logits_PV in (policies.teacher, policies.behaviour, policies.proximal)
    )

    @cache
    def row(completion: Completion) -> Row:
        at = _prefixes(completion)
        return _row(
            completion,
            tuple(at),
            teacher_nV=teacher_PV[at],
            sampler_nV=sampler_PV[at],
            proximal_nV=proximal_PV[at],
        )

    rows = [row(completion) for group in groups for completion in group]
    numbers = [number for number, group in enumerate(groups) for _ in group]
    return _with_baselines(case, _opened(case, rows, numbers, all_wrong=all_wrong), numbers)


def _row(
    completion: Completion,
    context: tuple[int, ...],
    *,
    teacher_nV: Tensor,
    sampler_nV: Tensor,
    proximal_nV: Tensor,
) -> Row:
    """A completion of whose tokens everything counts, from log-probs."""
    counts_n = torch.ones(len(completion), dtype=torch.bool)
    zeros_n = torch.zeros(len(completion), dtype=torch.float64)
    advantage = 0.7 + 0.1 * len(completion) if _is_right(completion) else -0.5 - 0.1 * completion[0]
    return Row(
        completion,
        context,
        behaviour_n=_of(completion, sampler_nV),
        proximal_n=_of(completion, proximal_nV),
        teacher_nV=teacher_nV,
        sampler_nV=sampler_nV,
        advantage_n=zeros_n + advantage,
        baseline_n=zeros_n,
        kept_n=counts_n,
        scorable_n=counts_n,
    )


def _opened(case: Case, rows: Sequence[Row], prompts: Sequence[int], *, all_wrong: bool = False) -> list[Row]:
    """The rows as the KD mask leaves them."""
    grades = [not all_wrong and _is_right(row.tokens) for row in rows]
    found = open_completions(case.objective, grades, prompts)
    return [replace(row, is_open=is_open) for row, is_open in zip(rows, found, strict=True)]


def _with_baselines(case: Case, rows: Sequence[Row], scopes: Sequence[int]) -> list[Row]:
    """The rows with the mean signal of the others in their scope, where the objective asks for it."""
    kd = case.objective.kd
    if not (case.objective.has_kd and case.has_others_baseline and isinstance(kd, SampledTerm)):
        return list(rows)
    differences = [row.teacher_n - row.proximal_n for row in rows]
    found = baselines(kd, differences, [row.taught_n for row in rows], scopes)
    return [
        replace(row, baseline_n=torch.full_like(row.baseline_n, value))
        for row, value in zip(rows, found, strict=True)
    ]


def _loss(case: Case, rows: Sequence[Row], hidden_NH: Tensor, head: Head) -> Tensor:
    """What train computes of these rows."""
    counts = torch.tensor([len(row.tokens) for row in rows])

    def spread(values: list[Any]) -> Tensor:
        return torch.tensor(values).repeat_interleave(counts)

    batch = TokenBatch(
        behaviour=torch.cat([row.behaviour_n for row in rows]),
        proximal=torch.cat([row.proximal_n for row in rows]),
        advantage=torch.cat([row.advantage_n for row in rows]),
        kept=torch.cat([row.kept_n for row in rows]),
        scorable=torch.cat([row.scorable_n for row in rows]),
        kd_open=spread([row.is_open for row in rows]),
        share=spread([row.share for row in rows]).double(),
        lengths=counts.tolist(),
        teacher=torch.cat([row.teacher_n for row in rows]),
        baseline=torch.cat([row.baseline_n for row in rows]),
    )
    loss, _ = micro_batch_loss(
        case.objective,
        batch,
        torch.tensor([token for row in rows for token in row.tokens]),
        hidden_NH,
        head,
        temperature=case.temperature,
        chunk=CHUNK,
        teacher=_teacher(case, rows),
    )
    return loss


def _teacher(case: Case, rows: Sequence[Row]) -> TeacherSupport | TeacherHidden | None:
    """The teacher's distribution in the form in which the recipe keeps it."""
    if case.objective.distribution_support is None:
        return None
    teacher_NV = torch.cat([row.teacher_nV for row in rows])
    if case.keeps_hidden:
        whose, k = _support(case.objective)
        head = Head(case.teacher_temperature * torch.eye(V, dtype=teacher_NV.dtype), None)
        return TeacherHidden(teacher_NV, head, case.teacher_temperature, k if whose == "teacher's" else 0)
    sampler_NV = torch.cat([row.sampler_nV for row in rows])
    ids_NK, logprobs_NK, tail_N = _on_support(case.objective, teacher_NV, sampler_NV)
    return TeacherSupport(logprobs_NK, ids_NK, tail_N)


def _on_support(
    objective: Objective, teacher_NV: Tensor, sampler_NV: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, the teacher's log-probs of them, and its log-mass of the others, as teacher-score keeps them."""
    whose, k = _support(objective)
    given_NK = None if whose == "teacher's" else support_of(sampler_NV, k)[0]
    return support_of(teacher_NV, 0 if whose == "student's" else k, given_NK)


def _support(objective: Objective) -> tuple[str, int]:
    """Whose most probable ids the distributions are compared on, and how many of them; 0 is the vocabulary."""
    support = objective.distribution_support
    if support is None or isinstance(support, str):
        return "", 0
    if support.union_top_k is not None:  # both together leave ids for the tail, too
        return "two models' top", min(support.union_top_k, (V - 1) // 2)
    if support.student_top_k is not None:
        return "student's", min(support.student_top_k, V - 2)
    return "teacher's", min(support.teacher_top_k or 0, V - 2)


def _prefixes(completion: Completion) -> list[int]:
    return [0, *(1 + token for token in completion[:-1])]


def _is_right(completion: Completion) -> bool:
    return sum(completion) % 2 == 0


def _of(completion: Completion, logprobs_nV: Tensor) -> Tensor:
    """The log-probs [n] of the tokens."""
    return logprobs_nV.gather(-1, torch.tensor(completion)[:, None]).squeeze(-1)


def _logits(seed: int) -> Tensor:
    """Random logits [P, V] of a categorical policy."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1 + V, V, generator=generator, dtype=torch.float64)


def _gradients(loss: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)
    return list(found)


def _size(tensor: Tensor) -> float:
    """The largest absolute value, or nan; 0 of nothing."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0
