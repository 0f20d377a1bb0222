"""The models that steps train, with their optimizers: kept, from a checkpoint, or from disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kdpipe.data.seeds import derive_seed
from kdpipe.data.tasks.arithmetic import words
from kdpipe.execution.inputs import Inputs
from kdpipe.models.adapters import read_adapter, start_adapter, targets_of
from kdpipe.models.cache import ModelCache
from kdpipe.models.devices import resolve_dtype
from kdpipe.models.folder import open_model, scratch_model
from kdpipe.models.prompting import Text
from kdpipe.models.tokenizer import arithmetic_tokenizer, num_ids_in_use
from kdpipe.recipe.models import Lora, Optimizer, Scratch, Sft, SftOptimizer
from kdpipe.recipe.roles import EMA_ROLE, STUDENT_ROLE
from kdpipe.recipe.schema import Recipe
from kdpipe.recipe.section import DtypeName
from kdpipe.stages.settings.stage import SftSettings, TrainSettings
from kdpipe.store.stage import Stage
from kdpipe.training.ema import Average
from kdpipe.training.local import LocalTrainer


class Trainers:
    """Opens what the steps train; the student with its optimizer stays in memory from round to round."""

    def __init__(self, recipe: Recipe, cache: ModelCache) -> None:
        self._recipe = recipe
        self._cache = cache
        self._device = cache.device
        self._kept: LocalTrainer | None = None

    def cold_start(
        self, inputs: Inputs, settings: SftSettings, text: Text, checkpoint: Path | None
    ) -> LocalTrainer:
        """The model of an sft step with a fresh optimizer, or as a checkpoint left them."""
        model, lora = settings.model, self._recipe.student.lora
        folder = checkpoint / "model" if checkpoint else inputs.folders.get(inputs.step.subject)
        if model.lora is not None:
            network = _with_adapter(self._shared(inputs), model.lora, checkpoint)
        elif folder is not None:
            network = self._network(folder, trust=model.trust_remote_code)
        else:
            assert model.scratch is not None
            network = self.scratch(inputs, model.scratch)
        if settings.student is not None and lora is not None and model.lora is None:
            targets_of(network, lora)  # before it is trained for nothing
        start = model.sft or Sft(steps=1)
        trainer = self._fresh(network, start.optimizer, text, horizon=start.steps, dtype=model.dtype)
        if checkpoint is not None:
            trainer.restore(checkpoint / "trainer")
        return trainer

    def student(
        self, inputs: Inputs, settings: TrainSettings, text: Text, checkpoint: Path | None
    ) -> LocalTrainer:
        """The student, or its adapter, with its optimizer: kept, from a checkpoint, or from disk."""
        kept, self._kept = self._kept, None
        lora = self._recipe.student.lora
        entry = inputs.origin(STUDENT_ROLE)[0] if lora is None else inputs.adapter(STUDENT_ROLE)
        manifest = entry.manifest() if entry else None
        network = None if lora is None else self._shared(inputs)
        if kept and network is not None and kept.model is not network:
            kept = None  # the cache has opened another network since
        if checkpoint is None and kept and manifest and kept.version == manifest.payload_digest:
            return kept
        if network is None:
            folder = checkpoint / "model" if checkpoint else inputs.opened_weights(STUDENT_ROLE)
            network = self._network(folder, trust=settings.student.trust_remote_code)
        else:
            _with_adapter(network, settings.lora, checkpoint)
        optimizer, train = settings.train.optimizer, settings.train
        rounds = optimizer.schedule_rounds or 1  # a constant schedule has no horizon
        horizon = rounds * train.minibatches * train.epochs
        trainer = self._fresh(network, optimizer, text, horizon=horizon, dtype=settings.student.dtype)
        if checkpoint is not None:
            trainer.restore(checkpoint / "trainer")
        elif entry is not None and "trainer" in inputs.step.inputs[STUDENT_ROLE].opens:
            trainer.restore(entry.opened("trainer") / "trainer")
        return trainer

    def _shared(self, inputs: Inputs) -> Any:
        """The network that also samples, whose adapter is trained: nothing is there twice."""
        source = inputs.source(STUDENT_ROLE)
        if not self._cache.holds(source):
            inputs.check_weights(STUDENT_ROLE)
        return self._cache.lend(source)

    def _fresh(
        self, network: Any, optimizer: Optimizer | SftOptimizer, text: Text, *, horizon: int, dtype: DtypeName
    ) -> LocalTrainer:
        """A trainer before its first of `horizon` optimizer steps."""
        return LocalTrainer(
            network,
            optimizer,
            num_ids=text.num_ids,
            horizon=horizon,
            compute=resolve_dtype(dtype, self._device)[0],
            gradient_checkpointing=self._recipe.runtime.gradient_checkpointing,
        )

    def _network(self, folder: Path, *, trust: bool) -> Any:
        """A model to train: float32 masters, whatever it computes in."""
        return open_model(folder, dtype=torch.float32, device=self._device, trust_remote_code=trust)

    def scratch(self, inputs: Inputs, settings: Scratch) -> Any:
        """A model initialised from the recipe's seed, or the step's, with the task's own tokenizer."""
        tokenizer = arithmetic_tokenizer(words())
        seed = inputs.step.seed if settings.seed is None else settings.seed
        network = scratch_model(
            settings,
            num_ids=num_ids_in_use(tokenizer),
            eos_id=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id,
            seed=seed,
        )
        return network.to(self._device)

    def average(self, inputs: Inputs, settings: TrainSettings) -> Average | None:
        """The average of the students before this round; before the first, the initial student."""
        decay, student = settings.ema_decay, settings.student
        if decay is None:
            return None
        folder = inputs.opened_weights(EMA_ROLE if EMA_ROLE in inputs.steps else STUDENT_ROLE)
        dtype, _ = resolve_dtype(student.dtype, self._device)
        return Average(decay, folder, self._device, dtype, student.trust_remote_code)

    def publish(self, inputs: Inputs, trainer: LocalTrainer, version: str) -> None:
        """Publishes what was trained, and keeps the student's trainer for the next round."""
        if inputs.step.stage == Stage.SFT:
            trainer.model.requires_grad_(False)  # from here on it is only asked
        trainer.publish(version, self._cache)
        if inputs.step.stage == Stage.TRAIN:
            self._kept = trainer


def _with_adapter(network: Any, lora: Lora | None, checkpoint: Path | None) -> Any:
    """The network with its adapter: as it is, that of a checkpoint, or where `lora` begins its first."""
    if lora is not None and lora.seed is not None:
        start_adapter(network, lora, seed=derive_seed(lora.seed, "lora"))
    if checkpoint is not None:
        read_adapter(network, checkpoint / "model")
    return network
