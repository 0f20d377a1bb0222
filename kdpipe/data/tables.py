"""Rows as parquet, with columns that other programs read; a file that lacks one is damaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from kdpipe.data.rows import Rollout
from kdpipe.errors import ArtifactError

TableRow: TypeAlias = dict[str, Any]
"""A row of a parquet file by column; its schema below says the types."""

IDS = pa.list_(pa.int32())
LOGPROBS = pa.list_(pa.float32())
FLAGS = pa.list_(pa.bool_())
TYPES = {
    "prompt_id": pa.string(),
    "sample": pa.int32(),
    "question": pa.string(),
    "expected": pa.string(),
    "prompt_token_ids": IDS,
    "completion_token_ids": IDS,
    "sampler_logprobs": LOGPROBS,
    "source": pa.string(),
    "finish_reason": pa.string(),
    "text": pa.string(),
    "answer_strict": pa.string(),
    "answer_flexible": pa.string(),
    "answer": pa.string(),
    "correct": pa.bool_(),
    "reward": pa.float32(),
    "teacher": pa.string(),
    "teacher_prompt_token_ids": IDS,
    "teacher_logprobs": LOGPROBS,
    "scorable": FLAGS,
    "topk_ids": pa.list_(IDS),
    "tail_logprobs": LOGPROBS,
    "hidden": pa.large_binary(),
    "epoch": pa.int32(),
    "optimizer_step": pa.int32(),
    "advantage": pa.float32(),
    "kept": pa.bool_(),
    "proximal_logprobs": LOGPROBS,
    "reverse_kl_nats": LOGPROBS,
    "teachers": pa.list_(pa.string()),
    "teachers_prompt_token_ids": pa.list_(IDS),
}
"""A column has one type in every table; that of `topk_logprobs` is a setting."""


def _schema(columns: str) -> pa.Schema:
    return pa.schema([(name, TYPES[name]) for name in columns.split()])


ROLLOUTS = _schema(
    "prompt_id sample question expected prompt_token_ids completion_token_ids sampler_logprobs source "
    "finish_reason text answer_strict answer_flexible answer correct reward"
)
SCORES = _schema("prompt_id sample teacher teacher_prompt_token_ids teacher_logprobs scorable")
HIDDEN_PART = pa.schema([*SCORES, ("hidden", TYPES["hidden"])])
"""A finished piece of a long scoring; at commit, its hidden states move to a file of their own."""
COMPLETIONS = _schema("prompt_id sample epoch optimizer_step advantage kept proximal_logprobs")
GRADES = _schema(
    "prompt_id sample question expected text answer_strict answer_flexible answer correct reward "
    "prompt_token_ids completion_token_ids sampler_logprobs finish_reason"
)
REVERSE_KL = _schema(
    "prompt_id sample prompt_token_ids teacher_prompt_token_ids completion_token_ids sampler_logprobs "
    "teacher_logprobs scorable reverse_kl_nats"
)
REVERSE_KL_OF_SEVERAL = _schema(
    "prompt_id sample prompt_token_ids completion_token_ids sampler_logprobs "
    "teacher_logprobs scorable reverse_kl_nats teachers teachers_prompt_token_ids"
)
"""With several teachers: those of the problem, and what each of them read. `teacher_logprobs` are the mixture's."""


def topk_schema(dtype: Literal["float32", "float16"]) -> pa.Schema:
    """The columns of scores with a support, whose log-probs are stored in `dtype`."""
    stored = pa.list_(pa.list_(pa.float32() if dtype == "float32" else pa.float16()))
    support = [("topk_ids", TYPES["topk_ids"]), ("topk_logprobs", stored), ("tail_logprobs", LOGPROBS)]
    return pa.schema([*SCORES, *support])


@dataclass(frozen=True, slots=True)
class Scores:
    """One row of `scores.parquet`: n completion tokens under one teacher.

    `topk_ids` [n, k], `topk_logprobs` [n, k] and `tail_logprobs` [n] are None where no support is kept; a
    support shorter than k ends with id -1. `hidden` is there in unfinished pieces only (see hidden.py). Where
    `scorable` is false the teacher has no such id: its log-prob is 0 there and must not be used.
    """

    prompt_id: str
    sample: int
    teacher: str
    teacher_prompt_token_ids: list[int]
    teacher_logprobs: npt.NDArray[np.float32]
    scorable: npt.NDArray[np.bool_]
    topk_ids: npt.NDArray[np.int32] | None = None
    topk_logprobs: npt.NDArray[np.float32] | None = None
    tail_logprobs: npt.NDArray[np.float32] | None = None
    hidden: bytes | None = None


def write_rows(path: Path, rows: Sequence[Any], schema: pa.Schema) -> None:
    """Writes dataclass rows or dicts as one parquet file; equal rows give equal bytes."""
    columns = {
        name: [row[name] if isinstance(row, dict) else getattr(row, name) for row in rows]
        for name in schema.names
    }
    arrays = [_array(columns[field.name], field.type) for field in schema]
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), path, compression="zstd")


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    """An arrow array; 2-D numpy values become lists of equally long lists without a Python loop."""
    if values and isinstance(values[0], np.ndarray) and values[0].ndim == 2:
        lengths = [value.shape[0] for value in values]
        inner_type = kind.value_type.value_type
        flat = np.concatenate([value.reshape(-1) for value in values])
        if pa.types.is_float16(inner_type):
            flat = flat.astype(np.float16)
        width = values[0].shape[1]
        inner_offsets = pa.array(np.arange(sum(lengths) + 1, dtype=np.int32) * width)
        inner = pa.ListArray.from_arrays(inner_offsets, pa.array(flat, inner_type))
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        return pa.ListArray.from_arrays(offsets, inner)
    return pa.array(values, kind)


def read_rows(path: Path, schema: pa.Schema, *, columns: list[str] | None = None) -> list[TableRow]:
    """The rows of a parquet file as dicts; raises ArtifactError when it is not of this schema."""
    return _read(path, schema, columns).to_pylist()  # type: ignore[no-any-return]


def read_lists(path: Path, schema: pa.Schema, column: str) -> list[npt.NDArray[Any] | None]:
    """One column of lists as arrays that share memory, None for a null; raises as `read_rows` does."""
    values = _read(path, schema, [column])[column].combine_chunks()
    flat, bounds, mask = _flat(values.values), _flat(values.offsets), values.buffers()[0]
    known = np.ones(len(values), bool) if mask is None else _bits(mask, values.offset, len(values))
    return [
        flat[start:stop] if there else None
        for start, stop, there in zip(bounds[:-1], bounds[1:], known, strict=True)
    ]


_DTYPES = {pa.int32(): np.int32, pa.float16(): np.float16, pa.float32(): np.float32}


def _flat(values: pa.Array) -> npt.NDArray[Any]:
    """The values of an array without nulls, in the same memory: `to_numpy` would import pandas first."""
    _, data = values.buffers()
    if pa.types.is_boolean(values.type):
        return _bits(data, values.offset, len(values))
    dtype = _DTYPES[values.type]
    if data is None or not len(values):
        return np.zeros(0, dtype)
    return np.frombuffer(data, dtype, count=len(values), offset=values.offset * np.dtype(dtype).itemsize)


def _bits(data: pa.Buffer, offset: int, count: int) -> npt.NDArray[np.bool_]:
    packed = np.frombuffer(data, np.uint8)
    return np.unpackbits(packed, count=offset + count, bitorder="little")[offset:].astype(bool)


def read_rollouts(path: Path) -> list[Rollout]:
    """The rows of a rollouts file."""
    names = [field.name for field in fields(Rollout)]
    return [Rollout(**{name: row[name] for name in names}) for row in read_rows(path, ROLLOUTS)]


def read_scores(path: Path) -> list[Scores]:
    """The rows of a scores file, with or without a support."""
    schema, found = SCORES, pq.read_schema(path)
    if "topk_ids" in found.names:
        is_half = pa.types.is_float16(found.field("topk_logprobs").type.value_type.value_type)
        schema = topk_schema("float16" if is_half else "float32")
    table = _read(path, schema, None)
    plain = table.select(["prompt_id", "sample", "teacher", "teacher_prompt_token_ids"]).to_pylist()
    scores = [
        Scores(
            **row,
            teacher_logprobs=_numpy(table["teacher_logprobs"][index], np.float32),
            scorable=_numpy(table["scorable"][index], np.bool_),
        )
        for index, row in enumerate(plain)
    ]
    if schema is SCORES:
        return scores
    width = _width(table["topk_ids"])
    return [
        replace(
            score,
            topk_ids=_matrix(table["topk_ids"][index], len(score.scorable), width, np.int32),
            topk_logprobs=_matrix(table["topk_logprobs"][index], len(score.scorable), width, np.float32),
            tail_logprobs=_numpy(table["tail_logprobs"][index], np.float32),
        )
        for index, score in enumerate(scores)
    ]


def _read(path: Path, schema: pa.Schema, columns: list[str] | None) -> pa.Table:
    try:
        # `read_table` would import pandas, for nothing: a third of a second of every command that reads a table.
        with pq.ParquetFile(path) as file:
            table = file.read(columns=columns)
        wanted = schema if columns is None else pa.schema([schema.field(name) for name in columns])
        table = table.select(wanted.names)
        return table if table.schema.equals(wanted) else table.cast(wanted)
    except (pa.ArrowException, KeyError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ArtifactError(
            f"{path}: not the table it should be: {reason}", hint="kdpipe verify names the step"
        ) from error


def _numpy(scalar: pa.ListScalar, dtype: Any) -> npt.NDArray[Any]:
    return np.asarray(_flat(scalar.values), dtype=dtype)


def _matrix(scalar: pa.ListScalar, n: int, width: int, dtype: Any) -> npt.NDArray[Any]:
    inner = scalar.values
    return np.asarray(_flat(inner.flatten()), dtype=dtype).reshape(n, width)


def _width(column: pa.ChunkedArray) -> int:
    """The number of entries of each token in a column of lists of lists; 0 where there is no token."""
    tokens = (token for chunk in column.chunks for token in chunk.flatten())
    return next((len(token) for token in tokens), 0)


def merge(parts: Sequence[Path], path: Path, schema: pa.Schema) -> None:
    """Writes the rows of `parts`, in order, as one file whose bytes depend on the rows only."""
    table = pa.concat_tables([_read(part, schema, None) for part in parts]) if parts else schema.empty_table()
    pq.write_table(table.combine_chunks(), path, compression="zstd")
