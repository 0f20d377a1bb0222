"""The models that a step trains, with their optimizers: warm from the step before, from a checkpoint, or from disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kdpipe.data.seeds import derive_seed
from kdpipe.data.tasks.arithmetic import words
from kdpipe.execution.inputs import Inputs
from kdpipe.models.adapters import read_adapter, start_adapter
from kdpipe.models.devices import resolve_dtype
from kdpipe.models.folder import open_model, scratch_model
from kdpipe.models.prompting import arithmetic_tokenizer, num_ids_in_use
from kdpipe.recipe.roles import EMA_ROLE, STUDENT_ROLE
from kdpipe.recipe.schema import Lora, Scratch
from kdpipe.store.step import Stage
from kdpipe.training.ema import Average
from kdpipe.training.local import LocalTrainer


class Training:
    """The models being trained on what a step opens."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.recipe = inputs.recipe
        self.step = inputs.step
        self.warm = inputs.warm

    def student_trainer(self, checkpoint: Path | None) -> LocalTrainer:
        """The student with its optimizer: warm from the last round, from a checkpoint, or from disk."""
        recipe = self.recipe
        if recipe.student.lora is not None:
            return self._adapter_trainer(recipe.student.lora, checkpoint)
        entry, name = self.inputs.origin(STUDENT_ROLE)
        manifest = entry.manifest() if entry else None
        warm, self.warm.trainer = self.warm.trainer, None
        if (
            checkpoint is None
            and warm is not None
            and manifest is not None
            and warm[0] == manifest.payload_digest
        ):
            return warm[1]
        opens = self.step.inputs[STUDENT_ROLE].opens if entry else ()
        if entry is not None:
            entry.opened(*opens)
        folder = entry.folder if entry else self.inputs.base_folder(name)
        assert folder is not None
        weights = checkpoint / "model" if checkpoint else folder / "model" if entry else folder
        trainer = self._trainer(self.network(weights, trust=recipe.student.trust_remote_code))
        if checkpoint is not None:
            trainer.restore(checkpoint / "trainer")
        elif "trainer" in opens:
            trainer.restore(folder / "trainer")
        return trainer

    def _adapter_trainer(self, lora: Lora, checkpoint: Path | None) -> LocalTrainer:
        """The student's adapter with its optimizer, on the network that also samples: nothing is there twice."""
        source, entry = self.inputs.source(STUDENT_ROLE), self.inputs.adapter(STUDENT_ROLE)
        model = self.warm.cache.get(source)
        warm, self.warm.trainer = self.warm.trainer, None
        if (
            checkpoint is None
            and warm is not None
            and source.adapter is not None
            and warm[0] == source.adapter.digest
            and warm[1].model is model
        ):
            return warm[1]
        if entry is None:
            seed = self.recipe.seed if lora.seed is None else lora.seed
            start_adapter(model, lora, seed=derive_seed(seed, "lora"))
        if checkpoint is not None:
            read_adapter(model, checkpoint / "model")
        trainer = self._trainer(model)
        if checkpoint is not None:
            trainer.restore(checkpoint / "trainer")
        elif entry is not None:
            trainer.restore(entry.opened("trainer") / "trainer")
        return trainer

    def _trainer(self, model: Any) -> LocalTrainer:
        """A student of the recipe with a fresh optimizer."""
        recipe, settings = self.recipe, self.recipe.train
        dtype, _ = resolve_dtype(recipe.student.dtype, self.warm.device)
        steps = settings.minibatches * settings.epochs
        return LocalTrainer(
            model,
            settings.optimizer,
            num_ids=self.inputs.text(STUDENT_ROLE).num_ids,
            horizon=(settings.optimizer.schedule_rounds or recipe.rounds) * steps,
            compute=dtype,
            gradient_checkpointing=recipe.runtime.gradient_checkpointing,
        )

    def network(self, folder: Path, *, trust: bool) -> Any:
        """A model to train: float32 masters, whatever it computes in."""
        return open_model(folder, dtype=torch.float32, device=self.warm.device, trust_remote_code=trust)

    def scratch(self, settings: Scratch) -> Any:
        """A model initialised from the recipe's seed, or the step's, with the task's own tokenizer."""
        tokenizer = arithmetic_tokenizer(words())
        seed = self.step.seed if settings.seed is None else settings.seed
        network = scratch_model(
            settings,
            num_ids=num_ids_in_use(tokenizer),
            eos_id=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id,
            seed=seed,
        )
        return network.to(self.warm.device)

    def average(self) -> Average | None:
        """The average of the students before this round; before the first it is the student that it starts with."""
        decay = self.recipe.ema_decay
        if decay is None:
            return None
        role, kind = (EMA_ROLE, "ema") if EMA_ROLE in self.inputs.steps else (STUDENT_ROLE, "model")
        entry, name = self.inputs.origin(role)
        folder = entry.opened(kind) / kind if entry else self.inputs.base_folder(name)
        assert folder is not None
        dtype, _ = resolve_dtype(self.recipe.student.dtype, self.warm.device)
        return Average(decay, folder, self.warm.device, dtype, self.recipe.student.trust_remote_code)

    def keep_warm(self, trainer: LocalTrainer, digest: str) -> None:
        """Keeps what was trained for the steps that ask it or go on with it; `digest` is its entry's."""
        settings = (
            self.recipe.student if self.step.subject == "" else self.inputs.settings(self.inputs.own_role())
        )
        dtype, _ = resolve_dtype(settings.dtype, self.warm.device)
        if self.step.stage == Stage.SFT:
            trainer.model.requires_grad_(False)  # from here on it is only asked
        if self.step.stage == Stage.TRAIN and self.recipe.student.lora is not None:
            self.warm.cache.put_adapter(digest, trainer.model)
        elif dtype == trainer.model.dtype:
            self.warm.cache.put(digest, dtype, trainer.model)
        if self.step.stage == Stage.TRAIN:
            self.warm.trainer = (digest, trainer)
