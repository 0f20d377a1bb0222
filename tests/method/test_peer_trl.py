"""The Jensen-Shannon loss against TRL's, in an environment of its own whose interpreter KDPIPE_PEER_PYTHON names."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from kdpipe.method import losses
from kdpipe.method.micro_batch import micro_batch_loss
from kdpipe.method.objective import shares
from kdpipe.method.token_batch import TeacherSupport, TokenBatch
from kdpipe.models.logprobs import Head
from kdpipe.recipe.objective import Objective
from tests.peer import peer_python

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

pytestmark = pytest.mark.peer

B, T, V = 4, 6, 11
TEMPERATURE = 0.7
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
THEIRS = """
import sys
import numpy, torch
from trl.experimental.gkd import GKDTrainer

given = numpy.load(sys.argv[1])
labels, teacher = torch.tensor(given["labels"]), torch.tensor(given["teacher"])
losses, gradients = [], []
for beta in given["betas"].tolist():
    for reduction, temperature in (("sum", 1.0), ("batchmean", given["temperature"].item())):
        student = torch.tensor(given["student"], requires_grad=True)
        loss = GKDTrainer.generalized_jsd_loss(
            student, teacher, labels=labels, beta=beta, temperature=temperature, reduction=reduction
        )
        loss.backward()
        losses.append(loss.item())
        gradients.append(student.grad.numpy())
numpy.savez(sys.argv[2], losses=losses, gradients=gradients)
"""


@dataclass(frozen=True)
class Peer:
    """Random logits [B, T, V] and a mask, and what TRL makes of them for each beta."""

    student: Tensor
    teacher: Tensor
    kept: Tensor
    losses: Tensor
    gradients: Tensor

    def of(self, beta: float, *, reduction: str) -> tuple[Tensor, Tensor]:
        place = 2 * BETAS.index(beta) + ["sum", "batchmean"].index(reduction)
        return self.losses[place], self.gradients[place]


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Peer:
    folder: Path = tmp_path_factory.mktemp("trl")
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, B, T, V, generator=generator, dtype=torch.float64)
    kept = torch.rand(B, T, generator=generator) < 0.7
    kept[1] = False
    np.savez(
        folder / "given.npz",
        student=student.numpy(),
        teacher=teacher.numpy(),
        labels=torch.where(kept, 1, -100).numpy(),
        betas=BETAS,
        temperature=TEMPERATURE,
    )
    done = subprocess.run(
        [peer_python(), "-c", THEIRS, folder / "given.npz", folder / "found.npz"],
        env=os.environ | {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = np.load(folder / "found.npz")
    return Peer(student, teacher, kept, *(torch.from_numpy(found[name]) for name in ("losses", "gradients")))


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    assert expected[1].abs().max() > 1e-3


@pytest.mark.parametrize("beta", BETAS)
def test_jsd_is_trls_in_value_and_gradient(peer: Peer, beta: float) -> None:
    logits = peer.student.clone().requires_grad_()
    kept_NV = logits[peer.kept]
    loss = losses.jsd(kept_NV.log_softmax(-1), peer.teacher[peer.kept].log_softmax(-1), beta).sum()
    loss.backward()
    assert logits.grad is not None
    assert_same((loss.detach(), logits.grad), peer.of(beta, reduction="sum"))


@pytest.mark.parametrize("beta", BETAS)
def test_a_micro_batch_at_a_temperature_is_trls_mean_over_the_unmasked_tokens(
    peer: Peer, beta: float
) -> None:
    settings = Objective.model_validate({"kd": {"term": "jsd", "beta": beta, "support": "vocabulary"}})
    logits = peer.student.clone().requires_grad_()
    each, every = torch.zeros(B * T, dtype=torch.float64), torch.ones(B * T, dtype=torch.bool)
    share = shares(settings, peer.kept.sum(-1).tolist(), max_new_tokens=T)
    batch = TokenBatch(
        behaviour=each,
        proximal=each,
        advantage=each,
        kept=peer.kept.flatten(),
        scorable=every,
        kd_open=every,
        share=torch.tensor(share, dtype=torch.float64).repeat_interleave(T),
        lengths=[T] * B,
    )
    loss, _ = micro_batch_loss(
        settings,
        batch,
        torch.zeros(B * T, dtype=torch.long),
        logits.view(B * T, V),
        Head(torch.eye(V, dtype=torch.float64), None),
        temperature=TEMPERATURE,
        chunk=5,
        teacher=TeacherSupport((peer.teacher / TEMPERATURE).log_softmax(-1).view(B * T, V)),
    )
    loss.backward()
    assert logits.grad is not None
    assert_same((loss.detach(), logits.grad), peer.of(beta, reduction="batchmean"))
