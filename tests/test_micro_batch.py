"""The path from hidden states to a gradient: cuts, masks, chunks and kept hidden states change nothing.

The "model" is a table of next-token logits: hidden states are one-hot prefixes, the head is the table.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from kdpipe.forward import Head, support_of
from kdpipe.micro_batch import TeacherHidden, micro_batch_loss
from kdpipe.objective import TeacherSupport, TokenBatch
from kdpipe.recipe import Objective

V, PREFIXES, N = 6, 5, 11
LENGTHS = [4, 1, 3, 3]
KDS: list[Any] = [
    "rkl",
    {"term": "rkl", "gamma": 0.6, "baseline": "exact", "support": {"teacher_top_k": 3}},
    {"term": "k3", "baseline": "step"},
    {"term": "jsd", "beta": 1.0, "support": "vocabulary"},
    {"term": "skew_kl", "support": {"teacher_top_k": 2}},
]


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class World:
    """Data of four completions, and the gradient that a micro-batch of some of them gives."""

    def __init__(self, kd: Any) -> None:
        self.settings = Objective.model_validate({"kind": "kdrl", "kd": kd, "distill_weight": 0.4})
        self.table = random(1, V, PREFIXES).requires_grad_()
        generator = torch.Generator().manual_seed(2)
        self.prefix = torch.randint(PREFIXES, (N,), generator=generator)
        self.hidden = torch.eye(PREFIXES, dtype=torch.float64)[self.prefix]
        self.ids = torch.randint(V, (N,), generator=generator)
        self.teacher_table = random(3, V, 4)
        self.teacher_hidden = random(4, N, 4)
        yes = torch.ones(N, dtype=torch.bool)
        self.batch = TokenBatch(
            behaviour=-random(5, N).abs(),
            proximal=-random(6, N).abs(),
            advantage=random(7, N),
            kept=yes,
            scorable=yes,
            kd_open=yes,
            share=torch.full((N,), 1 / N, dtype=torch.float64),
            lengths=LENGTHS,
            teacher=-random(8, N).abs(),
            baseline=random(9, N),
        )

    @property
    def kept_hidden(self) -> TeacherHidden:
        support = self.settings.distribution_support
        top_k = 0 if support in (None, "vocabulary") else support.teacher_top_k  # type: ignore[union-attr]
        return TeacherHidden(self.teacher_hidden, Head(self.teacher_table, None), 1.7, top_k or 0)

    def loss(
        self, batch: TokenBatch, hidden: torch.Tensor, teacher: Any = None, *, chunk: int = 99, at: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids = self.ids if at is None else self.ids[at]
        teacher = teacher or self.kept_hidden
        loss, _ = micro_batch_loss(
            self.settings,
            batch,
            ids,
            hidden,
            Head(self.table, None),
            temperature=1.3,
            chunk=chunk,
            teacher=teacher,
        )
        return loss.detach(), torch.autograd.grad(loss, self.table)[0]

    def of(self, completions: list[int], *, chunk: int = 99) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and gradient of a micro-batch of these completions."""
        starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
        at = torch.tensor([starts[i] + t for i in completions for t in range(LENGTHS[i])])
        columns = {
            field.name: getattr(self.batch, field.name)[at]
            for field in fields(self.batch)
            if field.name != "lengths"
        }
        batch = TokenBatch(**columns, lengths=[LENGTHS[i] for i in completions])
        teacher = replace(self.kept_hidden, hidden_NG=self.teacher_hidden[at])
        return self.loss(batch, self.hidden[at], teacher, chunk=chunk, at=at)


@pytest.mark.parametrize("kd", KDS)
def test_the_gradient_does_not_depend_on_cut_order_or_chunk(kd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdpipe.forward._MIN_CHUNK_LOGITS", 1)
    world = World(kd)
    whole = world.of([0, 1, 2, 3])
    assert whole[1].abs().max() > 1e-3
    for cut in ([[0], [1], [2], [3]], [[3, 1], [0, 2]], [[2, 0, 3], [1]]):
        parts = [world.of(part, chunk=2) for part in cut]
        for index in (0, 1):
            total = torch.stack([part[index] for part in parts]).sum(0)
            torch.testing.assert_close(total, whole[index], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kd", KDS)
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf")])
def test_what_stands_at_tokens_that_are_not_kept_never_matters(kd: Any, junk: float) -> None:
    world = World(kd)
    kept = torch.ones(N, dtype=torch.bool)
    kept[[3, 4, 7]] = False  # two ends and a whole completion
    clean = replace(world.batch, kept=kept)
    columns = {
        name: getattr(clean, name).masked_fill(~kept, junk)
        for name in ("behaviour", "proximal", "advantage", "teacher", "baseline")
    }
    dirty = replace(clean, **columns)
    hidden = world.hidden.masked_fill(~kept[:, None], junk)
    teacher = replace(world.kept_hidden, hidden_NG=world.teacher_hidden.masked_fill(~kept[:, None], junk))
    expected, found = world.loss(clean, world.hidden), world.loss(dirty, hidden, teacher)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("kd", KDS[3:])
def test_kept_hidden_states_are_as_good_as_stored_distributions(kd: Any) -> None:
    world = World(kd)
    logprobs = (world.teacher_hidden @ world.teacher_table.T / 1.7).log_softmax(-1)
    stored = TeacherSupport(logprobs)
    if world.kept_hidden.top_k:
        ids, values, tail = support_of(logprobs, world.kept_hidden.top_k)
        stored = TeacherSupport(values, ids, tail)
    expected, found = world.loss(world.batch, world.hidden, stored), world.loss(world.batch, world.hidden)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_a_missing_distribution_is_named() -> None:
    world = World("rkl")
    settings = Objective.model_validate({"kd": {"term": "jsd"}})
    with pytest.raises(ValueError, match="needs the teacher's distribution"):
        micro_batch_loss(
            settings,
            world.batch,
            world.ids,
            world.hidden,
            Head(world.table, None),
            temperature=1.0,
            chunk=9,
            teacher=None,
        )
