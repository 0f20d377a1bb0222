"""What runs inside vLLM's own processes: loads weights, compares them, shapes logits.

vLLM mixes `WorkerExtension` into its worker class (`worker_extension_cls`) and calls its methods by name.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

_LOADING_ERRORS = (
    AssertionError,
    AttributeError,
    KeyError,
    OSError,
    RuntimeError,
    ValueError,
    SafetensorError,
)


class WorkerExtension:
    """Methods that vLLM's worker has besides its own; `model_runner` is the worker's."""

    model_runner: Any

    def kdpipe_load(self, folder: str, head_names: Sequence[str]) -> str:
        """Loads the weights of a folder into the running model, its output head by all of its names.

        Returns what went wrong, or nothing: an error's type would be lost on the way to the engine.
        """
        try:
            self.model_runner.reload_weights(weights_iterator=read_weights(Path(folder), head_names))
        except _LOADING_ERRORS as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def kdpipe_differing(self, folder: str, head_names: Sequence[str]) -> list[str]:
        """Names of the weights that the running model holds as the file does, but with other numbers.

        Only those that it keeps in the file's shape can be compared: embeddings, output head, norms.
        """
        held = dict(self.model_runner.get_model().named_parameters())
        return differing_weights(held, read_weights(Path(folder), head_names))

    def kdpipe_shape_logits(self, num_ids: int, temperature: float) -> None:
        """From now on logits are divided by `temperature`, and ids from `num_ids` on have none.

        So whatever vLLM makes of them - samples, their log-probs, those of prompts - is of that distribution.
        """
        model = self.model_runner.get_model()
        model.compute_logits = shaped(
            functools.partial(type(model).compute_logits, model), num_ids=num_ids, temperature=temperature
        )


def read_weights(folder: Path, head_names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the folder's files; one that goes by several `head_names` comes under each of them.

    A file of a model whose head is tied to its input embeddings holds them once, and vLLM, when it loads in place,
    would keep the head that it had.
    """
    paths = sorted(folder.glob("*.safetensors"))
    present = set()
    for path in paths:
        with safe_open(path, framework="pt") as file:
            present |= set(file.keys())
    missing = [name for name in head_names if name not in present]
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                tensor = file.get_tensor(name)
                yield name, tensor
                if name in head_names:
                    yield from ((other, tensor) for other in missing)
                    missing = []


def differing_weights(
    held: Mapping[str, torch.Tensor], wanted: Iterator[tuple[str, torch.Tensor]]
) -> list[str]:
    """Names whose tensor in `held` differs from the wanted one, padding rows left out.

    A name in brackets says that there was nothing to compare.
    """
    compared, found = 0, []
    for name, tensor in wanted:
        own = held.get(name)
        if own is None or own.ndim != tensor.ndim or own.shape[1:] != tensor.shape[1:]:
            continue
        if own.shape[0] < tensor.shape[0]:
            continue
        compared += 1
        if not torch.equal(own[: tensor.shape[0]].cpu(), tensor.to(own.dtype)):
            found.append(name)
    return found if compared else ["(none is kept as the file has it)"]


def shaped(compute_logits: Any, *, num_ids: int, temperature: float) -> Any:
    """`compute_logits` over the first `num_ids` ids, at that temperature."""

    def compute(*args: Any) -> torch.Tensor | None:
        logits: torch.Tensor | None = compute_logits(*args)
        if logits is None:  # another rank has them
            return None
        if temperature != 1:
            logits = logits.float() / temperature
        logits[..., num_ids:] = -torch.inf
        return logits

    return compute
