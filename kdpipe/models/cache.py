"""The models that a process has in memory: opened once, shared, dropped when there are too many."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from kdpipe.models.adapters import is_adapted, read_adapter, switch_adapter
from kdpipe.models.devices import resolve_dtype
from kdpipe.models.folder import open_model
from kdpipe.models.source import ModelSource


@dataclass(slots=True)
class _Held:
    """A network in the cache; `adapter` is the version of the adapter in it, None where none is known."""

    network: PreTrainedModel
    adapter: str | None = None


class ModelCache:
    """Loaded models by version and dtype, the least recently used dropped beyond `limit`.

    A version is the digest of what was written of the weights, so that weights in memory and on disk are one thing.
    A trainer publishes its network under the version that it has just written, so that sampling from it loads nothing
    and copies nothing, and withdraws it before it changes the weights.

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

    def publish(self, version: str, network: PreTrainedModel) -> None:
        """Makes the network's present weights what `get` returns for this version, until it is withdrawn.

        A network holds one version: the one before is withdrawn. Of a network with an adapter it is the adapter's, and
        none is published where the network was dropped.
        """
        if is_adapted(network):
            for held in self._models.values():
                if held.network is network:
                    held.adapter = version
            return
        self._models = OrderedDict(
            (key, held) for key, held in self._models.items() if held.network is not network
        )
        self._models[version, network.dtype] = _Held(network)
        while len(self._models) > self._limit:
            self._models.popitem(last=False)

    def withdraw(self, version: str) -> None:
        """Makes `get` open this version, a model's or an adapter's, from its folder, of whatever dtype."""
        self.drop(version)
        for held in self._models.values():
            if held.adapter == version:
                held.adapter = None

    def lend(self, source: ModelSource) -> PreTrainedModel:
        """The network of this source for whoever changes its adapter: whatever version it holds is withdrawn."""
        network = self.get(source)
        for held in self._models.values():
            if held.network is network:
                held.adapter = None
        return network

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
            self.publish(source.digest, model)
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

    def drop(self, digest: str) -> None:
        """Drops the models with this digest, of any dtype."""
        for key in [key for key in self._models if key[0] == digest]:
            del self._models[key]

    def clear(self) -> None:
        self._models.clear()
