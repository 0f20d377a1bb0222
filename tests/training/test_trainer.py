"""The trainer on one device: its schedule, what it recomputes, what it refuses, and its masters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from kdpipe.errors import ArtifactError
from kdpipe.recipe.models import Optimizer
from kdpipe.training.local import LocalTrainer
from kdpipe.training.optimizer import learning_rate, read_trainer, write_trainer
from tests.training.steps import NUM_IDS, WHOLE, batch_of, copied, cross_entropy, equal, take_step, tiny_llama


def trainer(
    *,
    checkpointing: bool = False,
    dropout: float = 0.0,
    compute: torch.dtype = torch.float32,
    **settings: object,
) -> LocalTrainer:
    optimizer = Optimizer.model_validate({"learning_rate": 1e-2, **settings})
    return LocalTrainer(
        tiny_llama(dropout=dropout),
        optimizer,
        num_ids=NUM_IDS,
        horizon=10,
        compute=compute,
        gradient_checkpointing=checkpointing,
    )


def rates(steps: int, **settings: object) -> list[float]:
    optimizer = Optimizer.model_validate({"learning_rate": 1e-2, **settings})
    return [learning_rate(optimizer, step, horizon=10) for step in range(steps)]


def test_warm_up_rises_linearly_to_the_rate_and_a_constant_schedule_stays_there() -> None:
    assert rates(6, warmup_steps=4) == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


def test_a_linear_schedule_falls_to_nothing_at_the_horizon() -> None:
    found = rates(12, schedule="linear", warmup_steps=2)
    assert found[:2] == pytest.approx([0.005, 0.01])
    assert found[2:] == pytest.approx([0.01 * (10 - step) / 8 if step < 10 else 0 for step in range(2, 12)])


def test_a_cosine_schedule_passes_half_the_rate_half_way() -> None:
    found = rates(11, schedule="cosine")
    assert found[0] == pytest.approx(0.01)
    assert found[5] == pytest.approx(0.005)
    assert found[10] == pytest.approx(0.0)


def test_gradient_checkpointing_changes_neither_gradients_nor_weights() -> None:
    plain, recomputing = trainer(), trainer(checkpointing=True)
    assert take_step(plain) == take_step(recomputing)
    assert equal(plain.weights(), recomputing.weights())


def test_dropout_is_off_while_training() -> None:
    with_dropout, without = trainer(checkpointing=True, dropout=0.5), trainer(checkpointing=True)
    assert take_step(with_dropout) == take_step(without)


@pytest.mark.parametrize("family", ["falcon", "bloom", "opt", "gpt2"])
def test_so_is_every_kind_of_it_and_the_config_stays_as_it_was(family: str) -> None:
    """Dropout as a module, as a number in a layer, as a number in the config, and whole layers that are left out."""
    names = (
        "hidden_dropout",
        "attention_dropout",
        "dropout",
        "layerdrop",
        "resid_pdrop",
        "attn_pdrop",
        "embd_pdrop",
    )
    config = CONFIG_MAPPING[family](
        vocab_size=NUM_IDS, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32,
        word_embed_proj_dim=16, pad_token_id=0,
    )  # fmt: skip
    for name in names:
        if hasattr(config, name):
            setattr(config, name, 0.5)
    written = config.to_dict()
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config)
    found = LocalTrainer(network, Optimizer(), num_ids=NUM_IDS, horizon=2, gradient_checkpointing=True)
    found.begin()
    losses = {found.accumulate(batch_of(WHOLE[0]), cross_entropy(batch_of(WHOLE[0])))["loss"] for _ in "ab"}
    found.end()
    assert len(losses) == 1
    assert {name: network.config.to_dict()[name] for name in written} == written


def test_gradients_are_clipped_to_the_norm(tmp_path: Path) -> None:
    # AdamW's first step does not depend on the gradient's scale, its moments do.
    loose, tight = trainer(max_grad_norm=1e9), trainer(max_grad_norm=1e-3)
    norm = take_step(loose).gradient_norm
    take_step(tight)
    moments = []
    for name, subject in (("loose", loose), ("tight", tight)):
        subject.write_state(tmp_path / name)
        moments.append(read_trainer(tmp_path / name)[0]["exp_avg.model.norm.weight"])
    assert float((moments[1] / moments[0]).mean()) == pytest.approx(1e-3 / norm, rel=1e-3)


def test_state_of_another_model_is_refused(tmp_path: Path) -> None:
    subject = trainer()
    take_step(subject)
    subject.write_state(tmp_path / "own")
    tensors, state = read_trainer(tmp_path / "own")
    tensors["exp_avg.model.norm.weight"] = torch.zeros(3)
    write_trainer(tmp_path / "other", tensors=tensors, state=state)
    with pytest.raises(ArtifactError, match=r"no moments of the right shape for model\.norm\.weight"):
        trainer().restore(tmp_path / "other")
    write_trainer(tmp_path / "empty", tensors={}, state={})
    with pytest.raises(ArtifactError, match="optimizer_step is None"):
        trainer().restore(tmp_path / "empty")


def test_bfloat16_compute_keeps_float32_masters_and_goes_on_from_them(tmp_path: Path) -> None:
    subject = trainer(compute=torch.bfloat16)
    take_step(subject)
    assert {weight.dtype for weight in subject.weights().values()} == {torch.float32}
    subject.write_state(tmp_path / "trainer")
    tensors, _ = read_trainer(tmp_path / "trainer")
    masters = {name: tensor for name, tensor in tensors.items() if name.startswith("master.")}
    assert equal(masters, {f"master.{name}": weight for name, weight in copied(subject).items()})
    resumed = trainer(compute=torch.bfloat16)
    resumed.restore(tmp_path / "trainer")
    assert equal(resumed.weights(), subject.weights())


def test_bfloat16_compute_rounds_the_forward_pass() -> None:
    assert take_step(trainer()).gradient_norm != take_step(trainer(compute=torch.bfloat16)).gradient_norm
