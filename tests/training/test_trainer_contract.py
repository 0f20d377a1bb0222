"""What every trainer promises; a new one is one more maker."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kdpipe.engines.hf.engine import HfEngine
from kdpipe.engines.protocol import Completion, SampleRequest, Sampling
from kdpipe.errors import EngineError, StepError
from kdpipe.models.cache import ModelCache
from kdpipe.models.folder import open_model
from kdpipe.models.source import ModelSource
from kdpipe.recipe.models import Optimizer
from kdpipe.recipe.runtime import Runtime
from kdpipe.training.local import LocalTrainer
from kdpipe.training.optimizer import read_trainer
from kdpipe.training.protocol import Trainer
from tests.tiny_models import tiny_tokenizer
from tests.training.steps import (
    NUM_IDS,
    NUM_TOKENS,
    SEQUENCES,
    WHOLE,
    batch_of,
    copied,
    cross_entropy,
    equal,
    take_step,
    tiny_llama,
)

Make = Callable[..., Trainer]
CPU = torch.device("cpu")
CUTS = [[[0], [1], [2], [3]], [[3, 1], [0, 2]], [[0, 1, 2], [3]]]


def local(model: Any, **settings: Any) -> Trainer:
    optimizer = Optimizer.model_validate({"learning_rate": 1e-2, **settings})
    return LocalTrainer(model, optimizer, num_ids=NUM_IDS, horizon=10, compute=model.dtype)


@pytest.fixture(params=[local])
def make(request: pytest.FixtureRequest) -> Make:
    found: Make = request.param
    return found


def state_of(trainer: Trainer, folder: Path) -> tuple[dict[str, torch.Tensor], Any]:
    trainer.write_state(folder)
    return read_trainer(folder)


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_gradients_of_micro_batches_add_up_to_that_of_one_batch(
    make: Make, cut: list[list[int]], tmp_path: Path
) -> None:
    whole, pieces = make(tiny_llama().double()), make(tiny_llama().double())
    for _ in range(3):
        one, sum_of_them = take_step(whole, WHOLE), take_step(pieces, cut)
        assert sum_of_them.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-12)
    expected, _ = state_of(whole, tmp_path / "whole")
    found, _ = state_of(pieces, tmp_path / "pieces")
    for name, moment in expected.items():
        torch.testing.assert_close(found[name], moment, rtol=1e-10, atol=1e-15)
    for name, weight in whole.weights().items():
        torch.testing.assert_close(pieces.weights()[name], weight, rtol=1e-10, atol=1e-12)


def test_updates_are_adamws_with_the_settings_of_the_recipe_written_out(make: Make) -> None:
    settings = {"betas": (0.8, 0.95), "eps": 1e-2, "weight_decay": 0.3, "max_grad_norm": 0.5}
    trainer = make(tiny_llama(rows=NUM_IDS + 4).double(), schedule="linear", warmup_steps=2, **settings)
    plain = tiny_llama(rows=NUM_IDS + 4).double()
    first, second = ({name: torch.zeros_like(w) for name, w in plain.named_parameters()} for _ in "ab")
    for step, rate in enumerate([0.005, 0.01, 0.01, 0.01 * 7 / 8], start=1):
        update = take_step(trainer)
        assert update.learning_rate == pytest.approx(rate)
        gradients = gradients_of(plain)
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
        assert update.gradient_norm == pytest.approx(norm, rel=1e-6)
        assert norm > 0.5
        for name, weight in plain.named_parameters():
            gradient = gradients[name] * 0.5 / norm
            first[name] = 0.8 * first[name] + 0.2 * gradient
            second[name] = 0.95 * second[name] + 0.05 * gradient**2
            scale = (second[name] / (1 - 0.95**step)).sqrt() + 1e-2
            moved = weight * (1 - rate * 0.3) - rate * first[name] / (1 - 0.8**step) / scale
            weight.data.copy_(moved)
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(trainer.weights()[name].detach(), weight.detach(), rtol=0, atol=1e-6)


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    """Those of the token mean over all sequences, by the model's own logits of each alone."""
    total = torch.zeros((), dtype=torch.float64)
    for prompt, completion in SEQUENCES:
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        total = total - logits[:, :NUM_IDS].log_softmax(-1)[range(len(completion)), completion].sum()
    names, weights = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(total / NUM_TOKENS, weights), strict=True))


def test_a_micro_batch_reports_its_share_of_the_loss_and_its_metrics(make: Make) -> None:
    trainer = make(tiny_llama().double())
    trainer.begin()
    reports = []
    for indices in [*CUTS[0], *WHOLE]:
        batch = batch_of(indices)
        reports.append(trainer.accumulate(batch, cross_entropy(batch)))
    assert [report["tokens"] for report in reports] == [4, 5, 1, 3, 13]
    assert sum(report["loss"] for report in reports[:-1]) == pytest.approx(reports[-1]["loss"], rel=1e-12)
    logprobs = trainer.logprobs(batch, temperature=1.0, chunk=64)
    assert reports[-1]["loss"] == pytest.approx(-float(logprobs.mean()), rel=1e-6)


def test_an_update_reports_the_gradient_before_clipping_and_the_rate(make: Make) -> None:
    loose, tight = make(tiny_llama(), max_grad_norm=1e9), make(tiny_llama(), max_grad_norm=1e-3)
    first = take_step(tight)
    assert first == take_step(loose)
    assert first.gradient_norm > 1e-2
    assert (first.learning_rate, first.is_skipped) == (1e-2, False)
    assert take_step(make(tiny_llama(), warmup_steps=4)).learning_rate == pytest.approx(2.5e-3)


@pytest.mark.parametrize("settings", [{}, {"schedule": "linear", "weight_decay": 0.1, "warmup_steps": 3}])
def test_a_trainer_goes_on_from_a_checkpoint_bit_for_bit(
    make: Make, settings: dict[str, Any], tmp_path: Path
) -> None:
    unbroken = make(tiny_llama(), **settings)
    for _ in range(2):
        take_step(unbroken, CUTS[1])
    unbroken.write_checkpoint(tmp_path, tiny_tokenizer())
    model = open_model(tmp_path / "model", dtype=torch.float32, device=CPU, trust_remote_code=False)
    resumed = make(model, **settings)
    resumed.restore(tmp_path / "trainer")
    assert resumed.step == unbroken.step == 2
    for _ in range(2):
        assert take_step(resumed, CUTS[1]) == take_step(unbroken, CUTS[1])
    assert equal(resumed.weights(), unbroken.weights())
    found, expected = state_of(resumed, tmp_path / "a"), state_of(unbroken, tmp_path / "b")
    assert found[1] == expected[1]
    assert equal(found[0], expected[0])


def test_a_gradient_that_is_not_finite_leaves_the_weights(make: Make) -> None:
    trainer = make(tiny_llama())
    before = copied(trainer)
    with pytest.raises(StepError, match="optimizer step 1: the gradient norm is nan"):
        take_step(trainer, factor=float("nan"))
    assert equal(copied(trainer), before)
    assert trainer.step == 0


def test_a_step_without_a_signal_leaves_no_trace_and_the_next_is_as_without_it(
    make: Make, tmp_path: Path
) -> None:
    settings = {"schedule": "linear", "weight_decay": 0.1}
    plain, skipping = make(tiny_llama(), **settings), make(tiny_llama(), **settings)
    taken, skipped = [], []
    for number in range(2):
        skipped.append(take_step(skipping, is_rounding=True))
        # A stop after a skipped step is resumed alike, before the first moments too.
        skipping.write_checkpoint(tmp_path / str(number), tiny_tokenizer())
        model = open_model(
            tmp_path / str(number) / "model", dtype=torch.float32, device=CPU, trust_remote_code=False
        )
        skipping = make(model, **settings)
        skipping.restore(tmp_path / str(number) / "trainer")
        taken.append(take_step(plain))
        assert take_step(skipping) == taken[-1]
    assert skipped == [replace(update, is_skipped=True) for update in taken]
    assert skipping.step == plain.step == 2
    assert equal(skipping.weights(), plain.weights())
    found, expected = state_of(skipping, tmp_path / "a"), state_of(plain, tmp_path / "b")
    assert found[1] == expected[1]
    assert equal(found[0], expected[0])


# ----------------------------------------------------------------------------------------- published versions


def source_of(folder: Path) -> ModelSource:
    return ModelSource(folder, folder.name, dtype="float32")


def published(trainer: Trainer, cache: ModelCache, folder: Path) -> ModelSource:
    """The version of that name, written and then published, as a step does."""
    trainer.write_weights(folder, tiny_tokenizer())
    trainer.publish(folder.name, cache)
    return source_of(folder)


def sampled(engine: HfEngine) -> list[Completion]:
    sampling = Sampling(temperature=1.0, max_new_tokens=6, end_ids=(), num_ids=NUM_IDS)
    [found] = engine.sample([SampleRequest([3, 5], (1, 2, 3))], sampling, progress=lambda _: None)
    return found


def test_a_published_version_is_the_weights_bit_for_bit_and_each_publish_is_another(
    make: Make, tmp_path: Path
) -> None:
    trainer, cache = make(tiny_llama()), ModelCache(CPU)
    before: dict[str, torch.Tensor] = {}
    for name in ("one", "two"):
        take_step(trainer)
        source = published(trainer, cache, tmp_path / name)
        assert trainer.version == name
        assert cache.holds(source)
        found = {key: weight.clone() for key, weight in cache.get(source).named_parameters()}
        assert equal(found, trainer.weights())
        assert equal(found, dict(ModelCache(CPU).get(source).named_parameters())), "as opened from its folder"
        assert not before or not any(torch.equal(found[key], before[key]) for key in before)
        before = found


def test_a_withdrawn_version_is_never_sampled_from(make: Make, tmp_path: Path) -> None:
    trainer, cache = make(tiny_llama()), ModelCache(CPU)
    first = published(trainer, cache, tmp_path / "first")
    engine = HfEngine(cache, Runtime(sample_tokens=100, score_tokens=100, head_chunk_tokens=10))
    engine.load(first)
    before = sampled(engine)
    trainer.begin()
    assert trainer.version is None
    assert not cache.holds(first)
    with pytest.raises(EngineError, match="a trainer withdrew the weights"):
        sampled(engine)
    take_step(trainer)
    engine.load(first)
    assert sampled(engine) == before, "from its folder"
    engine.load(published(trainer, cache, tmp_path / "second"))
    assert sampled(engine) != before


def test_a_restored_trainer_has_withdrawn_what_it_published(make: Make, tmp_path: Path) -> None:
    trainer, cache = make(tiny_llama()), ModelCache(CPU)
    source = published(trainer, cache, tmp_path / "first")
    trainer.write_state(tmp_path / "trainer")
    trainer.restore(tmp_path / "trainer")
    assert trainer.version is None
    assert not cache.holds(source)
