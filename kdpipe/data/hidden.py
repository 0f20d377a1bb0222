"""`hidden.safetensors`: the teacher's states before its output head, at each completion token.

The file holds `offsets` int64 [rows + 1] and `hidden` [tokens, G]: row i of `scores.parquet` owns the rows
from offsets[i] to offsets[i + 1]. Its metadata names the head that they belong to by digest.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open

from kdpipe.errors import ArtifactError

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def to_bytes(states: npt.NDArray[np.float32], dtype: torch.dtype) -> bytes:
    """Hidden states [n, G] as the file holds them. `dtype` is the teacher's, so nothing is rounded."""
    if not len(states):  # of an empty completion, which torch cannot view as bytes
        return b""
    return torch.from_numpy(states).to(dtype).contiguous().view(torch.uint8).numpy().tobytes()


def write_hidden(
    path: Path, parts: Sequence[Path], *, width: int, dtype: torch.dtype, head_sha256: str
) -> None:
    """Writes the `hidden` column of the parts, states of G = `width`, one part in memory at a time."""
    size = width * torch.empty(0, dtype=dtype).element_size()
    lengths = [row.as_buffer().size for part in parts for row in _column(part)]
    offsets = np.concatenate([[0], np.cumsum(np.array(lengths, np.int64) // size)]).astype("<i8")
    # safetensors' own writer wants the whole tensor in memory; the format is a header and the bytes.
    header = json.dumps(
        {
            "__metadata__": {"head_sha256": head_sha256},
            "offsets": {"dtype": "I64", "shape": [len(offsets)], "data_offsets": [0, offsets.nbytes]},
            "hidden": {
                "dtype": _DTYPES[dtype],
                "shape": [int(offsets[-1]), width],
                "data_offsets": [offsets.nbytes, offsets.nbytes + int(offsets[-1]) * size],
            },
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header + offsets.tobytes())
        for part in parts:
            for row in _column(part):
                file.write(row.as_buffer())


def _column(part: Path) -> pa.ChunkedArray:
    return pq.read_table(part, columns=["hidden"])["hidden"]


class HiddenFile:
    """Reads rows of the file as they are needed; the operating system keeps what it can in memory.

    Raises ArtifactError when the file is not one, or belongs to another output head.
    """

    def __init__(self, path: Path, *, head_sha256: str) -> None:
        try:
            self._file = cast("Any", safe_open(path, framework="pt"))
            self._offsets: list[int] = self._file.get_tensor("offsets").tolist()
            self._hidden = self._file.get_slice("hidden")
            found = (self._file.metadata() or {}).get("head_sha256")
        except (OSError, SafetensorError, AttributeError) as error:
            raise ArtifactError(
                f"{path}: cannot be read: {error}", hint="kdpipe verify names the step"
            ) from error
        if found != head_sha256:
            raise ArtifactError(
                f"{path}: its hidden states belong to another output head than the teacher's",
                hint="the teacher's files changed since it scored: score again with --force teacher-score@ROUND",
            )

    def rows(self, indices: Sequence[int]) -> torch.Tensor:
        """The states [tokens, G] of those completions, one after another."""
        return torch.cat([self._hidden[self._offsets[i] : self._offsets[i + 1]] for i in indices])
