"""The models that a process has in memory: opened once, shared by engines and trainer, dropped for others."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdpipe.models.adapters import is_adapted, read_adapter, switch_adapter
from kdpipe.models.devices import resolve_dtype
from kdpipe.models.folder import open_model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from kdpipe.models.source import ModelSource


@dataclass(slots=True)
class _Held:
    """A network in the cache; `adapter` is the digest of the one in it, None where none is known."""

    network: PreTrainedModel
    adapter: str | None = None


class ModelCache:
    """Loaded models by digest and dtype, the least recently used dropped beyond `limit`.

    A trainer puts its in-memory model here under the digest of what it has just saved, so that sampling
    from it loads nothing. A model changed in place must be put again: that forgets its former digest.

    A model with an adapter is the network of the model below it, with the adapter switched on: both share one
    network, and what `get` returns is good until the next `get`. It holds one adapter, so another one
    replaces the weights of the one before, in place.
    """

    def __init__(self, device: torch.device, *, limit: int = 3) -> None:
        self.device = device
        self._limit = limit
        self._models: OrderedDict[tuple[str, torch.dtype], _Held] = OrderedDict()
        self._turns: set[str] = set()

    def take_turns(self, digest: str) -> None:
        """Makes this content one of those of which a single one is held: opening one drops the others before."""
        self._turns.add(digest)

    def put(self, digest: str, dtype: torch.dtype, model: PreTrainedModel) -> None:
        """Makes `model` what `get` returns for this content."""
        self.forget(model)
        self._models[digest, dtype] = _Held(model)
        while len(self._models) > self._limit:
            self._models.popitem(last=False)

    def put_adapter(self, digest: str, model: PreTrainedModel) -> None:
        """Says which adapter this network holds now; nothing where it was dropped meanwhile."""
        for held in self._models.values():
            if held.network is model:
                held.adapter = digest

    def get(self, source: ModelSource) -> PreTrainedModel:
        """The model of this source in eval mode, opened from its folder when it is not here."""
        dtype, _ = resolve_dtype(source.dtype, self.device)
        held = self._models.get((source.digest, dtype))
        if held is None:
            if source.digest in self._turns:
                for digest in self._turns:
                    self.drop(digest)
            model = open_model(
                source.folder, dtype=dtype, device=self.device, trust_remote_code=source.trust_remote_code
            ).requires_grad_(False)  # engines sample and score; whoever trains opens a model of its own
            self.put(source.digest, dtype, model)
            held = self._models[source.digest, dtype]
        self._models.move_to_end((source.digest, dtype))
        if source.adapter is not None and held.adapter != source.adapter.digest:
            held.adapter = None  # until it is wholly read
            read_adapter(held.network, source.adapter.folder)
            held.adapter = source.adapter.digest
        switch_adapter(held.network, on=source.adapter is not None)
        return held.network.eval()

    def holds(self, source: ModelSource) -> bool:
        """Whether `get` would open nothing."""
        held = self._models.get((source.digest, resolve_dtype(source.dtype, self.device)[0]))
        return held is not None and (source.adapter is None or held.adapter == source.adapter.digest)

    def forget(self, model: PreTrainedModel) -> None:
        """Drops this very model, under whatever digest: its weights are about to change.

        Of a model with an adapter only that changes, and the network stays for the model below it.
        """
        for key in [key for key, held in self._models.items() if held.network is model]:
            if is_adapted(model):
                self._models[key].adapter = None
            else:
                del self._models[key]

    def drop(self, digest: str) -> None:
        """Drops the models with this digest, of any dtype."""
        for key in [key for key in self._models if key[0] == digest]:
            del self._models[key]

    def clear(self) -> None:
        """Drops all models."""
        self._models.clear()
