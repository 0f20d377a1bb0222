"""Optimizer steps small enough to enumerate, with their loss from train's own `micro_batch_loss`.

The student is a categorical policy over V ids, so that every completion can be listed with its probability, in
float64. Right and wrong completions alternate, advantages are given. Logits are those at the rollout's
temperature: the policy is the same at every one.

Shapes: N completion tokens, n those of one completion, P prefixes, V ids, H hidden size, K ids of a support.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, lru_cache

import torch
from torch import Tensor

from kdpipe.method.advantage import baselines, open_completions
from kdpipe.method.micro_batch import TeacherHidden, micro_batch_loss
from kdpipe.method.objective import shares
from kdpipe.method.token_batch import TeacherSupport, TokenBatch
from kdpipe.models.logprobs import Head, support_of
from kdpipe.recipe.objective import Objective, SampledTerm

Completion = tuple[int, ...]

V = 4
END = 0  # the id that ends a completion early
_PAIRS = list(itertools.product(range(V), repeat=2))
WORLDS: dict[str, list[Completion]] = {
    "one token": [(token,) for token in range(V)],
    "two tokens": _PAIRS,
    "early end": [(END,), *(pair for pair in _PAIRS if pair[0] != END)],
}
STEP: list[Completion] = [
    *((1, 2, 3), (3, END)),
    *((3, 3, 1, 2, END), (2,)),
    *((1, 1, 3), (2, 3, 1)),
    *((1, END), (3, 2)),
]
"""The completions of an optimizer step, two to a prompt; those of the last prompt are both wrong."""
MASKED_ENDS, DROPPED, NOT_SCORABLE = (1, 6, 7), 3, ((0, 1), (4, 0))
"""Completions of the step whose last token, or all of which, is masked, and tokens that the teacher lacks."""
REFERENCE = 4
"""The completion of the step that serves as reference text, where a recipe has some."""
CHUNK = 512


@dataclass(frozen=True, slots=True)
class LossCase:
    """An objective without phases and schedule, with the settings of train that it depends on."""

    objective: Objective
    temperature: float
    teacher_temperature: float
    keeps_hidden: bool
    max_new_tokens: int
    has_references: bool = False

    def having(self, changes: Mapping[str, object]) -> LossCase:
        return replace(self, objective=self.objective.model_copy(update=changes))

    @property
    def has_others_baseline(self) -> bool:
        """Whether the KD part of a completion depends on other completions."""
        kd = self.objective.kd
        return self.objective.has_kd and isinstance(kd, SampledTerm) and kd.baseline in ("step", "group")


@dataclass(frozen=True, slots=True, eq=False)
class Policies:
    """Logits [P, V] of the next token: prefix 0 is the prompt's, prefix 1 + y is what follows y.

    Made once each and known by identity, as what is drawn from them is.
    """

    student: Tensor
    teacher: Tensor
    behaviour: Tensor
    proximal: Tensor


@dataclass(frozen=True, slots=True)
class EnumeratedRow:
    """A completion with all that its loss reads; `context` is the prefix of each token, or a prompt."""

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
    is_reference: bool = False

    @property
    def teacher_n(self) -> Tensor:
        """The teacher's log-probs of the tokens."""
        return of_tokens(self.tokens, self.teacher_nV)

    @property
    def taught_n(self) -> Tensor:
        """The sampled tokens that the KD part looks at."""
        return self.kept_n & self.scorable_n & (self.is_open and not self.is_reference)


def random_logits(seed: int) -> Tensor:
    """Random logits [P, V] of a categorical policy."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1 + V, V, generator=generator, dtype=torch.float64)


@cache
def on_policy(*, teacher: int = 2) -> Policies:
    """A student that samples as it is, before its first update."""
    student = random_logits(1)
    return Policies(student, random_logits(teacher), student, student)


@cache
def off_policy() -> Policies:
    """The same student after updates, and a sampler that disagreed with it before them."""
    student = random_logits(1)
    behaviour, proximal = student + 0.5 * random_logits(4), student + 0.3 * random_logits(5)
    return Policies(student, random_logits(2), behaviour, proximal)


def prefixes_of(completion: Completion) -> list[int]:
    """The prefix that each token follows."""
    return [0, *(1 + token for token in completion[:-1])]


def of_tokens(completion: Completion, logprobs_nV: Tensor) -> Tensor:
    """The log-probs [n] of the tokens."""
    return logprobs_nV.gather(-1, torch.tensor(completion)[:, None]).squeeze(-1)


def is_right(completion: Completion) -> bool:
    """Whether the completion is right."""
    return sum(completion) % 2 == 0


def row_of(
    completion: Completion,
    context: tuple[int, ...],
    *,
    teacher_nV: Tensor,
    sampler_nV: Tensor,
    proximal_nV: Tensor,
) -> EnumeratedRow:
    """The row of a completion whose tokens all count, from log-probs."""
    counts_n = torch.ones(len(completion), dtype=torch.bool)
    zeros_n = torch.zeros(len(completion), dtype=torch.float64)
    advantage = 0.7 + 0.1 * len(completion) if is_right(completion) else -0.5 - 0.1 * completion[0]
    return EnumeratedRow(
        completion,
        context,
        behaviour_n=of_tokens(completion, sampler_nV),
        proximal_n=of_tokens(completion, proximal_nV),
        teacher_nV=teacher_nV,
        sampler_nV=sampler_nV,
        advantage_n=zeros_n + advantage,
        baseline_n=zeros_n,
        kept_n=counts_n,
        scorable_n=counts_n,
    )


def drawn(
    case: LossCase, groups: Sequence[Sequence[Completion]], policies: Policies, *, all_wrong: bool = False
) -> list[EnumeratedRow]:
    """Completions of the categorical policy; those of a group share prompt and optimizer step."""
    row = _drawing(policies, case.temperature)
    rows = [row(completion) for group in groups for completion in group]
    numbers = [number for number, group in enumerate(groups) for _ in group]
    return _with_baselines(case, _opened(case, rows, numbers, all_wrong=all_wrong), numbers)


@lru_cache(maxsize=8)
def _drawing(policies: Policies, temperature: float) -> Callable[[Completion], EnumeratedRow]:
    """The row of a completion that these policies draw at that temperature."""
    # The trainer divides by the temperature: so do the others, which keeps b = s true to the last bit.
    teacher_PV, sampler_PV, proximal_PV = (
        (temperature * logits_PV / temperature).log_softmax(-1)
        for logits_PV in (policies.teacher, policies.behaviour, policies.proximal)
    )

    @cache
    def row(completion: Completion) -> EnumeratedRow:
        at = prefixes_of(completion)
        return row_of(
            completion,
            tuple(at),
            teacher_nV=teacher_PV[at],
            sampler_nV=sampler_PV[at],
            proximal_nV=proximal_PV[at],
        )

    return row


def table_rows(case: LossCase) -> list[EnumeratedRow]:
    """The completions of the step from the categorical policy, every second one drawn off-policy."""
    groups = [(completion,) for completion in STEP]
    rows = drawn(case, groups, on_policy())
    rows[1::2] = drawn(case, groups, off_policy())[1::2]
    return rows


def as_step(
    case: LossCase, rows: Sequence[EnumeratedRow], *, harmful: float | None = None, cut: bool = False
) -> list[EnumeratedRow]:
    """The rows of STEP as an optimizer step sees them, with masks, baselines and shares.

    `harmful` fills whatever a mask hides; `cut` removes masked tokens and what is dropped.
    """
    rows = list(rows)
    for number in MASKED_ENDS:
        rows[number] = replace(rows[number], kept_n=_all_but(rows[number], len(rows[number].tokens) - 1))
    rows[DROPPED] = replace(rows[DROPPED], kept_n=torch.zeros_like(rows[DROPPED].kept_n))
    for number, place in NOT_SCORABLE:
        rows[number] = replace(rows[number], scorable_n=_all_but(rows[number], place))
    rows[REFERENCE] = replace(rows[REFERENCE], is_reference=case.has_references)
    prompts = [number // 2 for number in range(len(rows))]
    rows = _opened(case, rows, prompts)
    if cut:
        prompts = [prompt for row, prompt in zip(rows, prompts, strict=True) if row.kept_n.any()]
        rows = [_without_masked(row) for row in rows if row.kept_n.any()]
    counts = [int(row.kept_n.sum()) or None for row in rows]
    weights = shares(case.objective, counts, max_new_tokens=case.max_new_tokens)
    rows = [replace(row, share=share) for row, share in zip(rows, weights, strict=True)]
    if harmful is not None:
        rows = [_harmed(case, row, harmful) for row in rows]
    kd = case.objective.kd
    is_step_mean = isinstance(kd, SampledTerm) and kd.baseline == "step"
    rows = _with_baselines(case, rows, [0] * len(rows) if is_step_mean else prompts)
    return rows if harmful is None else [_harmed(case, row, harmful) for row in rows]


def _all_but(row: EnumeratedRow, place: int) -> Tensor:
    return torch.arange(len(row.tokens)) != place


def _opened(
    case: LossCase, rows: Sequence[EnumeratedRow], prompts: Sequence[int], *, all_wrong: bool = False
) -> list[EnumeratedRow]:
    """The rows with the KD mask applied."""
    own = [number for number, row in enumerate(rows) if not row.is_reference]
    grades = [not all_wrong and is_right(rows[number].tokens) for number in own]
    found = open_completions(case.objective, grades, [prompts[number] for number in own])
    is_open = dict(zip(own, found, strict=True))
    return [replace(row, is_open=is_open.get(number, False)) for number, row in enumerate(rows)]


def _with_baselines(
    case: LossCase, rows: Sequence[EnumeratedRow], scopes: Sequence[int]
) -> list[EnumeratedRow]:
    """The rows with the mean signal of the others in their scope, where the objective asks for it."""
    kd = case.objective.kd
    if not (case.has_others_baseline and isinstance(kd, SampledTerm)):
        return list(rows)
    differences = [row.teacher_n - row.proximal_n for row in rows]
    found = baselines(kd, differences, [row.taught_n for row in rows], scopes)
    return [
        replace(row, baseline_n=torch.full_like(row.baseline_n, value))
        for row, value in zip(rows, found, strict=True)
    ]


def _harmed(case: LossCase, row: EnumeratedRow, value: float) -> EnumeratedRow:
    """The row with `value` wherever a mask says that nothing is read."""

    def put(tensor: Tensor, is_read_n: Tensor) -> Tensor:
        is_read = is_read_n if tensor.ndim == 1 else is_read_n[:, None]
        return torch.where(is_read, tensor, value)

    reads_ratios = case.objective.has_rl or case.objective.kind == "srpo"  # of every token that counts
    by_ratio_n = row.kept_n & (not row.is_reference) if reads_ratios else row.taught_n
    by_teacher_n = row.taught_n
    if row.is_reference and case.objective.off_policy_loss == "kd":
        by_teacher_n = row.kept_n & row.scorable_n
    return replace(
        row,
        behaviour_n=put(row.behaviour_n, by_ratio_n),
        proximal_n=put(row.proximal_n, by_ratio_n),
        advantage_n=put(row.advantage_n, by_ratio_n),
        baseline_n=put(row.baseline_n, row.taught_n),
        teacher_nV=put(row.teacher_nV, by_teacher_n),
    )


def _without_masked(row: EnumeratedRow) -> EnumeratedRow:
    """The row without its masked tokens, which are its last ones."""
    n = int(row.kept_n.sum())
    names = [field.name for field in fields(row) if isinstance(getattr(row, field.name), (Tensor, tuple))]
    return replace(row, **{name: getattr(row, name)[:n] for name in names})


def loss_of(case: LossCase, rows: Sequence[EnumeratedRow], hidden_NH: Tensor, head: Head) -> Tensor:
    """The loss of a micro-batch of these rows, as train computes it."""
    counts = torch.tensor([len(row.tokens) for row in rows])

    def spread(values: list[bool] | list[float]) -> Tensor:
        return torch.tensor(values).repeat_interleave(counts)

    per_token = ("behaviour", "proximal", "advantage", "kept", "scorable", "teacher", "baseline")
    batch = TokenBatch(
        **{name: torch.cat([getattr(row, f"{name}_n") for row in rows]) for name in per_token},
        kd_open=spread([row.is_open for row in rows]),
        share=spread([row.share for row in rows]).double(),
        lengths=counts.tolist(),
        off_policy=spread([row.is_reference for row in rows]),
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


def _teacher(case: LossCase, rows: Sequence[EnumeratedRow]) -> TeacherSupport | TeacherHidden | None:
    """The teacher's distribution in the form in which the recipe keeps it."""
    if case.objective.distribution_support is None:
        return None
    teacher_NV = torch.cat([row.teacher_nV for row in rows])
    if case.keeps_hidden:
        whose, k = support_in_world(case.objective)
        head = Head(case.teacher_temperature * torch.eye(V, dtype=teacher_NV.dtype))
        return TeacherHidden(teacher_NV, head, case.teacher_temperature, k if whose == "teacher's" else 0)
    sampler_NV = torch.cat([row.sampler_nV for row in rows])
    ids_NK, logprobs_NK, tail_N = on_support(case.objective, teacher_NV, sampler_NV)
    return TeacherSupport(logprobs_NK, ids_NK, tail_N)


def on_support(objective: Objective, teacher_NV: Tensor, sampler_NV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, the teacher's log-probs of them, and its log-mass of the others, as teacher-score keeps them."""
    whose, k = support_in_world(objective)
    given_NK = None if whose == "teacher's" else support_of(sampler_NV, k)[0]
    return support_of(teacher_NV, 0 if whose == "student's" else k, given_NK)


def support_in_world(objective: Objective) -> tuple[str, int]:
    """Whose most probable ids the distributions are compared on, and how many of V; 0 is the vocabulary."""
    support = objective.distribution_support
    if support is None or isinstance(support, str):
        return "", 0
    if support.union_top_k is not None:  # both together leave ids for the tail, too
        return "two models'", min(support.union_top_k, (V - 1) // 2)
    if support.student_top_k is not None:
        return "student's", min(support.student_top_k, V - 2)
    return "teacher's", min(support.teacher_top_k or 0, V - 2)


def gradients(loss: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of the loss to each tensor; 0 where it has none."""
    if not loss.requires_grad:
        return [torch.zeros_like(tensor) for tensor in tensors]
    return list(torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True))
