"""The path from hidden states to a gradient: cuts, order, padding, masks, chunks and kept hidden states change nothing.

Two students: a table of next-token logits (hidden states are one-hot prefixes, the head is the table), where all
is seen, and a tiny transformer, where padding can go wrong.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kdpipe.method.micro_batch import TeacherHidden, micro_batch_loss, reverse_kl
from kdpipe.method.objective import distribution_value, token_loss
from kdpipe.method.token_batch import TeacherSupport, TokenBatch
from kdpipe.models import logprobs as forward
from kdpipe.models.batching import make_batch
from kdpipe.models.logprobs import Head, head_of, hidden_states, support_of
from kdpipe.recipe.objective import Objective, Support
from tests.tiny_models import tiny_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

V, LENGTHS = 13, [4, 1, 3, 3]
N = sum(LENGTHS)
OBJECTIVES: list[dict[str, Any]] = [
    {"kind": "kd", "kd": "rkl"},
    {
        "kind": "kdrl",
        "kd": {"term": "rkl", "gamma": 0.6, "baseline": "exact", "support": {"teacher_top_k": 3}},
    },
    {"kind": "kdrl", "kd": {"term": "k3", "baseline": "step"}, "distill_weight": 0.4},
    {"kind": "kdrl", "kd": {"term": "jsd", "beta": 1.0, "support": "vocabulary"}, "distill_weight": 0.4},
    {"kind": "kd", "kd": {"term": "jsd", "beta": 0.3, "support": "vocabulary"}},
    {"kind": "kd", "kd": {"term": "skew_kl", "support": {"teacher_top_k": 2}}},
    {"kind": "kdrl", "kd": {"term": "skew_rkl", "support": {"teacher_top_k": 2}}, "mask": "wrong"},
    {"kind": "srpo"},
    {"kind": "grpo"},
    {"kd": {"term": "jsd", "beta": 0.3, "support": "vocabulary"}, "off_policy_term": "kd"},
    {"kd": {"term": "skew_kl", "support": {"teacher_top_k": 2}}, "off_policy_term": "cross_entropy"},
    {
        "kind": "kdrl",
        "kd": {"term": "rkl", "gamma": 0.6, "baseline": "step"},
        "off_policy_term": "cross_entropy",
    },
    {"kind": "srpo", "distill_weight": 0.4, "off_policy_term": "cross_entropy"},
]
DISTRIBUTIONS = [fields for fields in OBJECTIVES if "support" in fields.get("kd", "")]
T_STUDENT, T_TEACHER = 1.3, 0.7
NAN, INF = float("nan"), float("inf")

every_objective = pytest.mark.parametrize("settings", OBJECTIVES)
every_junk = pytest.mark.parametrize("junk", [NAN, INF, -INF])


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_MIN_CHUNK_LOGITS", 1)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def places(completions: Sequence[int]) -> Tensor:
    """Where the tokens of these completions stand among all N."""
    starts = [sum(LENGTHS[:number]) for number in range(len(LENGTHS))]
    return torch.tensor([starts[number] + t for number in completions for t in range(LENGTHS[number])])


def all_tokens(settings: dict[str, Any]) -> TokenBatch:
    """Four completions off-policy after an update; the KD term is closed for the third.

    Where the settings say what text that the student did not sample gets, the last is such text.
    """
    yes = torch.ones(N, dtype=torch.bool)
    off = torch.zeros_like(yes)
    if "off_policy_term" in settings:
        off[places([3])] = True
    return TokenBatch(
        behaviour=(random(5, N) * 0.3 - 2.5).masked_fill(off, NAN),
        proximal=(random(6, N) * 0.3 - 2.5).masked_fill(off, NAN),
        advantage=random(7, N).masked_fill(off, NAN),
        kept=yes,
        scorable=yes,
        kd_open=yes.index_fill(0, places([2]), value=False),
        share=torch.full((N,), 1 / N, dtype=torch.float64),
        lengths=LENGTHS,
        teacher=random(8, N) * 0.3 - 2.5,
        baseline=random(9, N).masked_fill(off, NAN),
        off_policy=off,
    )


def some_tokens(batch: TokenBatch, completions: Sequence[int]) -> TokenBatch:
    at = places(completions)
    found = {field.name: getattr(batch, field.name) for field in fields(batch) if field.name != "lengths"}
    columns = {name: None if column is None else column[at] for name, column in found.items()}
    return TokenBatch(**columns, lengths=[LENGTHS[number] for number in completions])


def objective(settings: dict[str, Any]) -> Objective:
    return Objective.model_validate({"clip_low": 0.9, "clip_high": 9.0} | settings)


def teacher_of(settings: Objective) -> TeacherHidden | None:
    """The teacher's hidden states at all N tokens, where the objective needs its distribution."""
    match settings.distribution_support:
        case None:
            return None
        case Support(teacher_top_k=int(k)):
            top_k = k
        case _:
            top_k = 0
    return TeacherHidden(random(4, N, 5), Head(random(3, V, 5), None), T_TEACHER, top_k)


def at_places(teacher: TeacherHidden | None, at: Tensor) -> TeacherHidden | None:
    return None if teacher is None else replace(teacher, hidden_NG=teacher.hidden_NG[at])


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)
    assert expected[1].abs().max() > 1e-3


# ------------------------------------------------------------------------------------ a table of logits

PREFIXES = 5
TABLE = random(1, V, PREFIXES)
PREFIX = torch.randint(PREFIXES, (N,), generator=torch.Generator().manual_seed(2))
IDS = torch.randint(V, (N,), generator=torch.Generator().manual_seed(3))
ONE_HOT = torch.eye(PREFIXES, dtype=torch.float64)[PREFIX]


def of_table(
    settings: Objective,
    batch: TokenBatch,
    teacher: TeacherSupport | TeacherHidden | None,
    *,
    ids: Tensor = IDS,
    hidden: Tensor = ONE_HOT,
    chunk: int = 99,
) -> tuple[Tensor, Tensor]:
    """The loss and its gradient to the table of the student's logits."""
    table = TABLE.clone().requires_grad_()
    loss, _ = micro_batch_loss(
        settings, batch, ids, hidden, Head(table, None), temperature=T_STUDENT, chunk=chunk, teacher=teacher
    )
    return loss.detach(), torch.autograd.grad(loss, table)[0]


@every_objective
@pytest.mark.parametrize("holes", [False, True])
def test_the_loss_is_that_of_the_log_probs_written_out(settings: dict[str, Any], holes: bool) -> None:
    """With `holes`, where tokens that do not count, or that the teacher lacks, stand among the others."""
    goal, batch, table = objective(settings), all_tokens(settings), TABLE.clone().requires_grad_()
    if holes:
        batch = replace(batch, kept=torch.arange(N) % 3 != 0, scorable=torch.arange(N) % 4 != 1)
    teacher, distribution = teacher_of(goal), None
    logprobs_NV = (ONE_HOT @ table.T / T_STUDENT).log_softmax(-1)
    if teacher is not None:
        distribution = distribution_value(
            goal, logprobs_NV, stored(teacher), taught_N=batch.compared(goal), places_N=torch.arange(N)
        )
    loss, _ = token_loss(goal, batch, logprobs_NV[range(N), IDS], distribution)
    expected = loss.detach(), torch.autograd.grad(loss, table)[0]
    assert_same(of_table(goal, batch, teacher), expected, 1e-14)


@every_objective
@pytest.mark.parametrize("cut", [[[0], [1], [2], [3]], [[3, 1], [0, 2]], [[2, 0, 3], [1]]])
def test_neither_cut_nor_order_changes_the_sum(settings: dict[str, Any], cut: list[list[int]]) -> None:
    goal, batch = objective(settings), all_tokens(settings)
    teacher = teacher_of(goal)
    parts = [
        of_table(
            goal,
            some_tokens(batch, part),
            at_places(teacher, places(part)),
            ids=IDS[places(part)],
            hidden=ONE_HOT[places(part)],
        )
        for part in cut
    ]
    sums = [torch.stack(column).sum(0) for column in zip(*parts, strict=True)]
    assert_same(sums, of_table(goal, batch, teacher), 1e-13)


@every_objective
@pytest.mark.parametrize("chunk", [1, 4])
def test_chunks_of_the_output_head_change_nothing(settings: dict[str, Any], chunk: int) -> None:
    goal, batch = objective(settings), all_tokens(settings)
    teacher = teacher_of(goal)
    assert_same(of_table(goal, batch, teacher, chunk=chunk), of_table(goal, batch, teacher), 1e-13)


@every_objective
@every_junk
@pytest.mark.parametrize("how", ["hidden", "stored"])
def test_what_stands_at_a_token_that_is_not_kept_never_matters(
    settings: dict[str, Any], junk: float, how: str
) -> None:
    goal = objective(settings)
    kept = torch.ones(N, dtype=torch.bool)
    kept[[1, 3, 4, 7]] = False  # inside a completion, two ends, and a whole completion
    results = []
    for filler in (0.0, junk):
        columns = {
            name: getattr(all_tokens(settings), name).masked_fill(~kept, filler)
            for name in ("behaviour", "proximal", "advantage", "teacher", "baseline", "share")
        }
        dirty = replace(all_tokens(settings), kept=kept, **columns)
        teacher: TeacherHidden | TeacherSupport | None = teacher_of(goal)
        if isinstance(teacher, TeacherHidden):
            teacher = (
                replace(teacher, hidden_NG=teacher.hidden_NG.masked_fill(~kept[:, None], filler))
                if how == "hidden"
                else _filled(stored(teacher), ~kept, filler)
            )
        results.append(
            of_table(goal, dirty, teacher, hidden=ONE_HOT.masked_fill(~kept[:, None], filler), chunk=2)
        )
    clean, found = results
    assert torch.equal(found[0], clean[0])
    assert torch.equal(found[1], clean[1])
    assert clean[1].abs().max() > 1e-3


@every_objective
def test_a_token_that_is_not_kept_gives_its_hidden_state_no_gradient(settings: dict[str, Any]) -> None:
    goal = objective(settings)
    kept = torch.arange(N) % 3 != 1
    hidden = ONE_HOT.masked_fill(~kept[:, None], NAN).requires_grad_()
    loss, metrics = micro_batch_loss(
        goal,
        replace(all_tokens(settings), kept=kept),
        IDS,
        hidden,
        Head(TABLE, None),
        temperature=T_STUDENT,
        chunk=2,
        teacher=teacher_of(goal),
    )
    (grad,) = torch.autograd.grad(loss, hidden)
    assert (grad[~kept] == 0).all()
    assert grad[kept].isfinite().all()
    assert (grad[kept] != 0).any()
    assert int(metrics["kept_tokens"]) == int(kept.sum())


def stored(teacher: TeacherHidden) -> TeacherSupport:
    """What teacher-score would store of the same distributions."""
    logprobs_NV = (teacher.hidden_NG @ teacher.head.weight_VH.T / T_TEACHER).log_softmax(-1)
    if teacher.top_k == 0:
        return TeacherSupport(logprobs_NV)
    ids_NK, values_NK, tail_N = support_of(logprobs_NV, teacher.top_k)
    return TeacherSupport(values_NK, ids_NK, tail_N)


def _filled(support: TeacherSupport, at: Tensor, junk: float) -> TeacherSupport:
    values = support.logprobs_NS.masked_fill(at[:, None], junk)
    if support.ids_NK is None or support.tail_N is None:
        return TeacherSupport(values)
    return TeacherSupport(
        values, support.ids_NK.masked_fill(at[:, None], -7), support.tail_N.masked_fill(at, junk)
    )


@pytest.mark.parametrize("settings", DISTRIBUTIONS)
@pytest.mark.parametrize("chunk", [1, 99])
def test_kept_hidden_states_are_as_good_as_stored_distributions(settings: dict[str, Any], chunk: int) -> None:
    goal, batch = objective(settings), all_tokens(settings)
    teacher = teacher_of(goal)
    assert teacher is not None
    found = of_table(goal, batch, teacher, chunk=chunk)
    assert_same(found, of_table(goal, batch, stored(teacher)), 1e-14)
    colder = of_table(goal, batch, replace(teacher, temperature=1.0))
    assert (colder[1] - found[1]).abs().max() > 1e-3


def test_the_student_is_taken_at_the_temperature_of_the_rollout() -> None:
    batch = all_tokens({})
    for settings in (objective({"kd": "k2"}), objective(OBJECTIVES[4])):
        teacher = teacher_of(settings)
        found = of_table(settings, batch, teacher)
        scaled = of_table(settings, batch, teacher, hidden=ONE_HOT / 2)
        table = TABLE.clone().requires_grad_()
        loss, _ = micro_batch_loss(
            settings,
            batch,
            IDS,
            ONE_HOT,
            Head(table, None),
            temperature=2 * T_STUDENT,
            chunk=9,
            teacher=teacher,
        )
        assert_same((loss.detach(), torch.autograd.grad(loss, table)[0]), scaled, 1e-14)
        assert (found[0] - scaled[0]).abs() > 1e-3


@pytest.mark.parametrize("chunk", [1, 4, 99])
def test_the_held_out_divergence_is_of_the_two_distributions_written_out(chunk: int) -> None:
    head, teacher = (
        Head(random(1, V, 5), None),
        TeacherHidden(random(4, N, 5), Head(random(3, V, 5)), T_TEACHER),
    )
    hidden = random(11, N, 5)
    found = reverse_kl(hidden, head, teacher, temperature=T_STUDENT, chunk=chunk)
    student_NV = (hidden @ head.weight_VH.T / T_STUDENT).log_softmax(-1)
    expected = (student_NV.exp() * (student_NV - stored(teacher).logprobs_NS)).sum(-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_missing_distribution_is_named() -> None:
    with pytest.raises(ValueError, match="needs the teacher's distribution"):
        of_table(objective({"kd": {"term": "jsd"}}), all_tokens({}), None)


# ------------------------------------------------------------------------------------- a tiny transformer

PROMPTS = [[2, 3], [7] * 5, [4], [5, 6, 7]]
COMPLETIONS = [part.tolist() for part in IDS.split(LENGTHS)]
TRANSFORMERS = [
    *(
        pytest.param("gpt2", OBJECTIVES[number], 1e-10, id=f"gpt2-{number}")
        for number in (0, 1, 3, 6, 7, 9, 11)
    ),
    pytest.param("qwen3", OBJECTIVES[1], 1e-6, id="qwen3"),  # norms in float32, whatever the model's dtype
]


class Transformer:
    """A model in float64 and the gradients that micro-batches leave in it."""

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        self.model = tiny_model(name).double()
        self.settings = objective(settings)
        self.batch = all_tokens(settings)

    def backward(self, completions: Sequence[int], hidden_NH: Tensor) -> Tensor:
        """Adds the gradient of these completions to the model's; returns their loss."""
        at = places(completions)
        loss, _ = micro_batch_loss(
            self.settings,
            some_tokens(self.batch, completions),
            IDS[at],
            hidden_NH,
            head_of(self.model, num_ids=V),
            temperature=T_STUDENT,
            chunk=3,
            teacher=at_places(teacher_of(self.settings), at),
        )
        loss.backward()
        return loss.detach()

    def right_padded(self, completions: Sequence[int], *, extra: int = 0) -> Tensor:
        batch = make_batch([PROMPTS[i] for i in completions], [COMPLETIONS[i] for i in completions])
        ids_BT = torch.nn.functional.pad(batch.input_ids_BT, (0, extra), value=9)
        return hidden_states(self.model, replace(batch, input_ids_BT=ids_BT))

    def left_padded(self, completions: Sequence[int], *, extra: int = 0) -> Tensor:
        inputs = [PROMPTS[i] + COMPLETIONS[i][:-1] for i in completions]
        width = max(map(len, inputs)) + extra
        padding = [width - len(ids) for ids in inputs]
        hidden_BTH = self.model.get_decoder()(
            input_ids=torch.tensor([[9] * pad + ids for pad, ids in zip(padding, inputs, strict=True)]),
            attention_mask=(torch.arange(width) >= torch.tensor(padding)[:, None]).long(),
            position_ids=(torch.arange(width) - torch.tensor(padding)[:, None]).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        return torch.cat([row[width - LENGTHS[i] :] for i, row in zip(completions, hidden_BTH, strict=True)])

    def taken(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """The loss with all gradients in one row, which the model then loses."""
        grads = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        self.model.zero_grad()
        return loss, torch.cat([grad.flatten() for grad in grads])


@pytest.mark.parametrize(("name", "settings", "tolerance"), TRANSFORMERS)
def test_padding_and_accumulation_change_no_gradient_of_a_transformer(
    name: str, settings: dict[str, Any], tolerance: float
) -> None:
    student = Transformer(name, settings)
    every = [0, 1, 2, 3]
    expected = student.taken(student.backward(every, student.right_padded(every)))
    for padded in (student.right_padded, student.left_padded):
        for cut, extra in (([every], 3), ([[2, 0], [3, 1]], 0), ([[1], [3], [0], [2]], 2)):
            loss = sum(student.backward(part, padded(part, extra=extra)) for part in cut)
            assert_same(student.taken(loss), expected, tolerance)
