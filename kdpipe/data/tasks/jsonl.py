"""Questions and answers from JSONL or parquet files of the user; other tasks share the reading."""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kdpipe.data.graders.number import MARK, extract_expected, parse_number
from kdpipe.data.rows import Problem
from kdpipe.errors import DataError
from kdpipe.recipe.place import place_of
from kdpipe.recipe.task import JsonlTask

MAX_ID_LENGTH = 200
_SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class DataRecord:
    """One record of a data file; `place` says where it stands, as messages show it."""

    place: str
    fields: dict[str, object]

    def text(self, field: str) -> str:
        """The text in `field`; raises DataError when it is missing, not text, blank or not Unicode."""
        value = self._present(field)
        if not isinstance(value, str):
            raise DataError(
                f"{self.place}: field {field!r} is {_kind(value)}, expected text", hint="write it in quotes"
            )
        if not value.strip():
            raise DataError(f"{self.place}: field {field!r} is empty", hint="remove the record or fill it in")
        if _SURROGATE.search(value):
            raise DataError(
                f"{self.place}: field {field!r} holds half of a surrogate pair, which is not a character"
            )
        return value

    def identity(self, field: str) -> str:
        """The record's own id in `field`, text or a whole number; raises DataError on one unfit for logs."""
        value = self._present(field)
        whole = isinstance(value, int) and not isinstance(value, bool)
        text = str(value) if whole else self.text(field)
        if not text.isprintable() or len(text) > MAX_ID_LENGTH:
            raise DataError(
                f"{self.place}: the id in field {field!r} has {len(text)} characters ({text[:40]!a}...), "
                f"expected at most {MAX_ID_LENGTH}, all printable"
            )
        return text

    def others(self, *known: str) -> dict[str, str | int | float]:
        """Every text and finite number of the record but those in `known` fields."""
        return {
            name: value
            for name, value in self.fields.items()
            if name not in known
            and (
                (isinstance(value, str) and not _SURROGATE.search(value))
                or (isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value))
            )
        }

    def _present(self, field: str) -> object:
        if field not in self.fields:
            known = ", ".join(map(repr, self.fields)) or "none"
            raise DataError(
                f"{self.place}: field {field!r} is missing; the record has: {known}", hint=_NAME_FIELDS
            )
        return self.fields[field]


_NAME_FIELDS = "task.question_field and task.answer_field of a jsonl task name the fields to read"


def find_files(task: JsonlTask, folder: Path) -> dict[str, Path]:
    """The file of each split; raises DataError when one is missing."""
    files = {split: place_of(name, folder) for split, name in (("train", task.train), ("test", task.test))}
    for split, path in files.items():
        if not path.is_file():
            raise DataError(f"{path}: no such file", hint=f"task.{split} names it, from the recipe's folder")
    return files


def read_problems(
    task: JsonlTask, folder: Path, _hub_folder: Path | None
) -> tuple[list[Problem], list[Problem]]:
    """Train and test problems; their ids are the records' own, or `jsonl/<split>/<row>`."""
    files = find_files(task, folder)
    seen: dict[str, str] = {}
    train, test = (
        [
            _problem(task, record, f"jsonl/{split}/{row}", seen)
            for row, record in enumerate(read_records(files[split]))
        ]
        for split in ("train", "test")
    )
    return train, test


def _problem(task: JsonlTask, record: DataRecord, prompt_id: str, seen: dict[str, str]) -> Problem:
    if task.id_field is not None:
        prompt_id = record.identity(task.id_field)
        if prompt_id in seen:
            raise DataError(
                f"{record.place}: the id {prompt_id!r} stands already at {seen[prompt_id]}; "
                "expected ids that are unique over train and test",
                hint="without task.id_field the rows of each file are numbered",
            )
        seen[prompt_id] = record.place
    solution = record.text(task.answer_field)
    expected = extract_expected(solution) if MARK in solution else solution.strip()
    if expected is None or parse_number(expected) is None:
        raise DataError(
            f"{record.place}: the answer in field {task.answer_field!r} is or ends in "
            f"{(expected or solution)[-60:]!r}, expected a number, alone or after {MARK}"
        )
    others = record.others(task.question_field, task.answer_field)
    return Problem(prompt_id, record.text(task.question_field), expected, solution, others)


def read_records(path: Path) -> list[DataRecord]:
    """The records of a parquet file (by its suffix) or of a JSONL file; at least one."""
    try:
        records = list(_read_parquet(path) if path.suffix == ".parquet" else _read_jsonl(path))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file", hint="the recipe's task section names the data") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not records:
        raise DataError(f"{path}: holds no records, expected at least one")
    return records


def _read_jsonl(path: Path) -> Iterator[DataRecord]:
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            value = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{place}: byte {error.start + 1} of the line is not UTF-8", hint="save the file as UTF-8"
            ) from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: not valid JSON: {error}", hint="one JSON object a line") from None
        if not isinstance(value, dict):
            raise DataError(f"{place}: {_kind(value)}, expected a JSON object", hint="one JSON object a line")
        yield DataRecord(place, value)


def _read_parquet(path: Path) -> Iterator[DataRecord]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with path.open("rb") as file:
        try:
            rows: list[dict[str, object]] = pq.read_table(file).to_pylist()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: not a parquet file that can be read: {error}") from None
    yield from (DataRecord(f"{path}: row {row}", fields) for row, fields in enumerate(rows))


def _kind(value: object) -> str:
    """What `value` is, in JSON's words."""
    match value:
        case None | bool() | int() | float():
            return json.dumps(value)
        case str():
            return "text"
        case list():
            return "a list"
        case dict():
            return "an object"
    return f"a {type(value).__name__}"
