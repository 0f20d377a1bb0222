"""The moving average of the students: read, moved by one round, written. A teacher may be one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kdpipe.errors import ArtifactError
from kdpipe.models.folder import open_model, write_model
from kdpipe.training.optimizer import read_trainer, write_trainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MASTERS = "masters"


@dataclass(frozen=True, slots=True)
class Average:
    """The moving average of the students, over float32 weights.

    `folder` holds it as it was before this round; before round 1 that is the student itself. `dtype` is that of the
    written weights.
    """

    decay: float
    folder: Path
    device: torch.device
    dtype: torch.dtype
    trust_remote_code: bool

    def write_next(
        self, students: Mapping[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase, folder: Path
    ) -> None:
        """Writes `decay` times the old average plus the rest times the student, as a Hugging Face folder.

        Where `dtype` is narrower than float32, the average's own weights stand beside, in `masters/`.
        """
        model = open_model(
            self.folder, dtype=torch.float32, device=self.device, trust_remote_code=self.trust_remote_code
        )
        kept = self.folder / MASTERS
        masters = read_trainer(kept)[0] if kept.is_dir() else None
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if masters is not None:
                    if (master := masters.get(f"master.{name}")) is None:
                        raise ArtifactError(f"{kept}: no master weight of {name}")
                    weight.copy_(master)
                weight.mul_(self.decay).add_(students[name], alpha=1 - self.decay)
        write_model(model, tokenizer, folder, dtype=self.dtype)
        if self.dtype != torch.float32:
            wide = {f"master.{name}": weight for name, weight in model.named_parameters()}
            write_trainer(folder / MASTERS, tensors=wide, state={})
