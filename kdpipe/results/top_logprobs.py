"""The teacher's most probable ids at each token, from what scoring kept: a support, or hidden states.

From hidden states they are computed here, with numpy and the output head in the teacher's own weights: results never
load torch, as `data.hidden` does for training. What they say of the sampled tokens is compared with the stored scores
first: where it differs, nothing is shown.

Shapes: n tokens, K ids, H hidden size, V ids in use.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kdpipe.data.payload import HIDDEN_FILE
from kdpipe.data.tables import Scores
from kdpipe.errors import ArtifactError

Floats: TypeAlias = npt.NDArray[np.float32]
Ranked: TypeAlias = "list[tuple[int, float]]"
"""Ids with their log-probs, the most probable first."""

SHOWN = 5
MAX_HEAD_BYTES = 64 << 20
MAX_HEADER_BYTES = 100 << 20  # what safetensors itself allows
TOLERANCE_NATS = 0.05
"""How far the recomputed log-prob of a sampled token may be from the stored one; engines round differently."""
HEADS = ("lm_head.weight", "model.embed_tokens.weight", "transformer.wte.weight")
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I64": np.int64}


def of_support(scores: Scores) -> list[Ranked] | None:
    """Those of a kept support; None where there is none."""
    if scores.topk_ids is None or scores.topk_logprobs is None:
        return None
    return [_ranked(ids, values) for ids, values in zip(scores.topk_ids, scores.topk_logprobs, strict=True)]


def _ranked(ids_K: npt.NDArray[np.int32], values_K: Floats) -> Ranked:
    order = np.argsort(-values_K, kind="stable")
    pairs = [(int(ids_K[i]), float(values_K[i])) for i in order if ids_K[i] >= 0 and np.isfinite(values_K[i])]
    return pairs[:SHOWN]


@dataclass(frozen=True, slots=True)
class KeptStates:
    """A teacher's hidden states [tokens, H] of a round, and its output head [V, H]."""

    states: npt.NDArray[np.generic]
    offsets: npt.NDArray[np.int64]
    head_VH: Floats
    temperature: float

    def of(self, index: int, ids: npt.NDArray[np.int64], stored: Floats) -> list[Ranked] | None:
        """The most probable ids at each token of row `index`; None where they contradict the stored scores."""
        hidden_nH = _float32(self.states[self.offsets[index] : self.offsets[index + 1]])
        if len(hidden_nH) != len(ids) or not len(ids) or ids.max() >= len(self.head_VH):
            return None
        logits_nV = hidden_nH @ self.head_VH.T / self.temperature
        logits_nV -= logits_nV.max(axis=1, keepdims=True)
        logprobs_nV = logits_nV - np.log(np.exp(logits_nV).sum(axis=1, keepdims=True))
        if np.abs(logprobs_nV[np.arange(len(ids)), ids] - stored).max() > TOLERANCE_NATS:
            return None
        count = min(SHOWN, logprobs_nV.shape[1])
        top_nK = np.argsort(-logprobs_nV, axis=1, kind="stable")[:, :count]
        return [
            [(int(number), float(row_V[number])) for number in top_K]
            for top_K, row_V in zip(top_nK, logprobs_nV, strict=True)
        ]


def open_states(scores: Path, model: Path, *, temperature: float, num_ids: int) -> KeptStates | None:
    """States of a scores entry with a model folder's head; None where one is missing or too large."""
    states = _tensors(scores / HIDDEN_FILE)
    if not {"offsets", "hidden"} <= states.keys():
        return None
    for path in sorted(model.glob("*.safetensors")):
        found = _tensors(path)
        name = next((name for name in HEADS if name in found), None)
        if name is not None and found[name].nbytes <= MAX_HEAD_BYTES:
            head = _float32(found[name][:num_ids])
            if head.shape[1] == states["hidden"].shape[1]:
                return KeptStates(states["hidden"], np.asarray(states["offsets"]), head, temperature)
    return None


def _float32(values: npt.NDArray[np.generic]) -> Floats:
    if values.dtype == np.uint16:  # bfloat16 is the upper half of a float32
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def _tensors(path: Path) -> dict[str, npt.NDArray[np.generic]]:
    """The tensors of a safetensors file, mapped and not read; bfloat16 as its bits.

    Empty where there is no file. Raises ArtifactError where it is no safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            [length] = struct.unpack("<Q", file.read(8))
            if length > min(size, MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {
            name: np.memmap(
                path,
                _DTYPES[item["dtype"]],
                mode="r",
                offset=8 + length + item["data_offsets"][0],
                shape=tuple(item["shape"]),
            )
            for name, item in header.items()
            if item["dtype"] in _DTYPES
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ArtifactError(f"{path}: cannot be read as tensors: {error}") from error
