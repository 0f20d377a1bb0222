"""The trainer: its schedule, its steps, what it refuses, and that it goes on from what it wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kdpipe.errors import ArtifactError, StepError
from kdpipe.recipe.schema import Optimizer
from kdpipe.training.state import read_trainer, write_trainer
from kdpipe.training.trainer import Trainer

IDS = torch.tensor([[3, 5, 7, 2, 9, 4], [1, 8, 6, 6, 0, 2]])


def tiny_model(*, dropout: float = 0.0) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=12,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        attention_dropout=dropout,
    )
    return LlamaForCausalLM(config)


def trainer(
    *, horizon: int = 10, checkpointing: bool = False, dropout: float = 0.0, **settings: object
) -> Trainer:
    optimizer = Optimizer.model_validate({"learning_rate": 1e-2, **settings})
    return Trainer(
        tiny_model(dropout=dropout), optimizer, horizon=horizon, gradient_checkpointing=checkpointing
    )


def take_step(subject: Trainer) -> float:
    subject.begin()
    subject.model(input_ids=IDS, labels=IDS).loss.backward()
    norm = subject.apply()
    subject.end()
    return norm


def weights(subject: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in subject.model.state_dict().items()}


def rates(subject: Trainer, steps: int) -> list[float]:
    found = []
    for step in range(steps):
        subject.step = step
        found.append(subject.learning_rate())
    return found


def test_warm_up_rises_linearly_to_the_rate_and_a_constant_schedule_stays_there() -> None:
    assert rates(trainer(warmup_steps=4), 6) == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


def test_a_linear_schedule_falls_to_nothing_at_the_horizon() -> None:
    found = rates(trainer(schedule="linear", warmup_steps=2, horizon=10), 12)
    assert found[:2] == pytest.approx([0.005, 0.01])
    assert found[2:] == pytest.approx([0.01 * (10 - step) / 8 if step < 10 else 0 for step in range(2, 12)])


def test_a_cosine_schedule_passes_half_the_rate_half_way() -> None:
    found = rates(trainer(schedule="cosine", horizon=10), 11)
    assert found[0] == pytest.approx(0.01)
    assert found[5] == pytest.approx(0.005)
    assert found[10] == pytest.approx(0.0)


def test_gradient_checkpointing_changes_neither_gradients_nor_weights() -> None:
    plain, recomputing = trainer(), trainer(checkpointing=True)
    assert take_step(plain) == take_step(recomputing)
    for name, value in weights(plain).items():
        assert torch.equal(value, recomputing.model.state_dict()[name]), name


def test_dropout_is_off_while_training() -> None:
    with_dropout, without = trainer(checkpointing=True, dropout=0.5), trainer(checkpointing=True)
    assert take_step(with_dropout) == take_step(without)


def test_gradients_are_clipped_to_the_norm() -> None:
    # AdamW's first step does not depend on the gradient's scale, its second moment does.
    loose, tight = trainer(max_grad_norm=1e9), trainer(max_grad_norm=1e-3)
    norm = take_step(loose)
    take_step(tight)
    name = "exp_avg.model.norm.weight"
    ratio = (tight.tensors(masters=False)[name] / loose.tensors(masters=False)[name]).mean()
    assert float(ratio) == pytest.approx(1e-3 / norm, rel=1e-3)


def test_a_gradient_that_is_not_finite_stops_the_step_and_leaves_the_weights() -> None:
    subject = trainer()
    before = weights(subject)
    subject.begin()
    (subject.model(input_ids=IDS, labels=IDS).loss * float("nan")).backward()
    with pytest.raises(StepError, match="optimizer step 1: the gradient norm is nan"):
        subject.apply()
    assert all(torch.equal(value, before[name]) for name, value in weights(subject).items())
    assert subject.step == 0


def test_a_trainer_goes_on_from_its_files_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    unbroken = trainer(schedule="linear")
    for _ in range(2):
        take_step(unbroken)
    write_trainer(tmp_path / "trainer", tensors=unbroken.tensors(masters=True), state=unbroken.state())
    resumed = trainer(schedule="linear")
    resumed.restore(*read_trainer(tmp_path / "trainer"))
    for subject in (unbroken, resumed):
        for _ in range(2):
            take_step(subject)
    assert resumed.step == unbroken.step == 4
    for name, value in weights(unbroken).items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_state_of_another_model_is_refused(tmp_path: Path) -> None:
    subject = trainer()
    take_step(subject)
    tensors = subject.tensors(masters=False)
    tensors["exp_avg.model.norm.weight"] = torch.zeros(3)
    with pytest.raises(ArtifactError, match=r"no moments of the right shape for model\.norm\.weight"):
        trainer().restore(tensors, subject.state())
    with pytest.raises(ArtifactError, match="optimizer_step is None"):
        trainer().restore({}, {})


def test_bfloat16_compute_keeps_float32_masters() -> None:
    optimizer = Optimizer(learning_rate=1e-2)
    subject = Trainer(tiny_model(), optimizer, horizon=10, compute=torch.bfloat16)
    with subject.computing():
        assert subject.model(input_ids=IDS).logits.dtype == torch.bfloat16
    assert {value.dtype for value in subject.tensors(masters=True).values()} == {torch.float32}
