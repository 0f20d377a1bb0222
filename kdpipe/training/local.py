"""The trainer of a model on one device of this process: float32 masters, AdamW, clipping.

Only weights that require gradients are trained: with a LoRA adapter those of the adapter.

Left out on purpose: loss scaling (bfloat16 needs none).
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kdpipe.errors import ArtifactError, StepError
from kdpipe.models.batching import Batch
from kdpipe.models.cache import ModelCache
from kdpipe.models.folder import write_model
from kdpipe.models.logprobs import head_of, hidden_states, token_logprobs
from kdpipe.recipe.models import Optimizer, SftOptimizer
from kdpipe.training.optimizer import learning_rate, moments, read_trainer, restore_moments, write_trainer
from kdpipe.training.protocol import Loss, Update

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_STEPS = 2**53  # what a float counts by ones


class LocalTrainer:
    """See Trainer.

    `num_ids` are the ids in use, `horizon` the optimizer steps of the schedule. `compute` is the dtype of matrix
    products: where it is neither float32 nor that of the model's own weights, the float32 weights are cast under
    autocast. (Frozen weights below an adapter are narrow themselves.)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: Optimizer | SftOptimizer,
        *,
        num_ids: int,
        horizon: int,
        compute: torch.dtype = torch.float32,
        gradient_checkpointing: bool = False,
    ) -> None:
        _switch_dropout_off(model)
        self.model = model
        self.device: torch.device = model.device
        self.step = 0
        self._settings = settings
        self._num_ids = num_ids
        self._horizon = horizon
        self._compute = compute
        self._checkpointing = gradient_checkpointing
        self._trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._optimizer = torch.optim.AdamW(
            list(self._trained.values()),
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            foreach=True,
        )
        self._published: tuple[str, ModelCache] | None = None

    @property
    def version(self) -> str | None:
        return None if self._published is None else self._published[0]

    def logprobs(self, batch: Batch, *, temperature: float, chunk: int) -> torch.Tensor:
        with torch.no_grad(), self._computing():
            hidden_NH, head = hidden_states(self.model, batch), head_of(self.model, num_ids=self._num_ids)
            logprobs_N, _ = token_logprobs(
                hidden_NH, head, batch.target_ids_N, temperature=temperature, chunk=chunk
            )
        return logprobs_N.float().cpu()

    def begin(self) -> None:
        self._withdraw()
        if self._checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            for module in self.model.modules():  # layers recompute in train mode, which nothing else needs
                if hasattr(module, "gradient_checkpointing") and not hasattr(module, "get_input_embeddings"):
                    module.training = True
        self._optimizer.zero_grad(set_to_none=True)

    def accumulate(self, batch: Batch, loss: Loss) -> dict[str, float]:
        with self._computing():
            hidden_NH = hidden_states(self.model, batch)
            total, metrics = loss(hidden_NH, head_of(self.model, num_ids=self._num_ids))
        total.backward()  # type: ignore[no-untyped-call]
        return {name: float(value) for name, value in {"loss": total.detach(), **metrics}.items()}

    def apply(self, *, is_rounding: bool = False) -> Update:
        found = torch.nn.utils.clip_grad_norm_(list(self._trained.values()), self._settings.max_grad_norm)
        norm, rate = float(found), learning_rate(self._settings, self.step, horizon=self._horizon)
        if not math.isfinite(norm):
            raise StepError(
                f"optimizer step {self.step + 1}: the gradient norm is {norm}, expected a finite number",
                hint="lower train.optimizer.learning_rate, or look at the round's rollouts and scores",
            )
        if not is_rounding:
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            self._optimizer.step()
            self.step += 1
        self._optimizer.zero_grad(set_to_none=True)
        return Update(norm, rate, is_skipped=is_rounding)

    def end(self) -> None:
        if self._checkpointing:
            self.model.gradient_checkpointing_disable()
        self.model.eval()

    def weights(self) -> Mapping[str, torch.Tensor]:
        return dict(self.model.named_parameters())

    def write_weights(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        write_model(self.model, tokenizer, folder, dtype=self._compute)

    def write_state(self, folder: Path) -> None:
        """See Trainer. Frozen weights are as narrow as they are written, an adapter as wide."""
        self._write_state(folder, masters=self.model.dtype != self._compute)

    def write_checkpoint(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        write_model(self.model, tokenizer, folder / "model", dtype=torch.float32)
        self._write_state(folder / "trainer", masters=False)

    def restore(self, folder: Path) -> None:
        self._withdraw()
        tensors, state = read_trainer(folder)
        step = state.get("optimizer_step")
        if type(step) is not int or not 0 <= step < MAX_STEPS:
            raise ArtifactError(f"trainer state: optimizer_step is {step!r}, expected a whole number")
        restore_moments(self._optimizer, self._trained, tensors, step=step)
        self.step = step
        with torch.no_grad():
            for name, weight in self._trained.items():
                if (master := tensors.get(f"master.{name}")) is not None:
                    weight.copy_(master)

    def publish(self, version: str, cache: ModelCache) -> None:
        """See Trainer. The cache gets the network itself, and none where engines run it in a narrower dtype."""
        self._withdraw()
        if self._compute == self.model.dtype:
            cache.publish(version, self.model)
        self._published = (version, cache)

    def _withdraw(self) -> None:
        if self._published is not None:
            version, cache = self._published
            cache.withdraw(version)
            self._published = None

    def _write_state(self, folder: Path, *, masters: bool) -> None:
        tensors = moments(self._optimizer, self._trained)
        if masters:
            tensors |= {f"master.{name}": weight for name, weight in self._trained.items()}
        # No generator: every order and draw is derived from seeds by hashing.
        rate = learning_rate(self._settings, self.step, horizon=self._horizon)
        write_trainer(folder, tensors=tensors, state={"optimizer_step": self.step, "learning_rate": rate})

    def _computing(self) -> contextlib.AbstractContextManager[None]:
        """The context of a forward pass: autocast where the compute dtype is not the weights'."""
        if self._compute in (torch.float32, self.model.dtype):
            return contextlib.nullcontext()
        return torch.autocast(self.model.device.type, dtype=self._compute)


def _switch_dropout_off(model: PreTrainedModel) -> None:
    """Dropout is off wherever a log-prob is taken, and here one always is."""
    quiet = copy.deepcopy(model.config)  # some layers (Falcon) ask the config, which is written as it was
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif module is not model and getattr(module, "config", None) is model.config:
            module.config = quiet
    for owner in (quiet, *model.modules()):
        for name, value in list(vars(owner).items()):
            if "drop" in name and isinstance(value, float):
                setattr(owner, name, 0.0)
