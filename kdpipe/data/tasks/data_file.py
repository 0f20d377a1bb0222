"""Records from JSONL, CSV and parquet files; a file of another form is refused by the form it has."""

from __future__ import annotations

import codecs
import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from kdpipe.data.tasks.record import RIGHT_LINE, DataRecord, kind_of
from kdpipe.errors import DataError

MAX_COLUMNS = 20
ONE_A_LINE = f"one JSON object a line, as: {RIGHT_LINE}"
DELIMITERS = {".csv": ",", ".tsv": "\t"}
_BEGINNINGS = {
    b"version https://git-lfs": ("a Git LFS pointer, not the data", "git lfs pull fetches the data"),
    b"PAR1": ("a parquet file", "give it a name that ends in .parquet"),
    b"ARROW1": ("an Arrow file", "save it as parquet or JSONL"),
    b"\x1f\x8b": ("packed by gzip", "unpack it: gunzip FILE"),
    b"PK\x03\x04": ("a zip archive or a spreadsheet", "unpack it, or save it as CSV"),
    b"(\xb5\x2f\xfd": ("packed by zstd", "unpack it: unzstd FILE"),
    codecs.BOM_UTF16_LE: ("text in UTF-16", "save the file as UTF-8"),
    codecs.BOM_UTF16_BE: ("text in UTF-16", "save the file as UTF-8"),
    b"<": ("a page of HTML or XML", "look at what was downloaded: it may ask for a login"),
}


def read_records(path: Path) -> list[DataRecord]:
    """The records of a parquet, CSV or TSV file (by its suffix) or of a JSONL file; at least one."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            records = list(_read_parquet(path))
        elif suffix in DELIMITERS:
            records = list(_read_csv(path, DELIMITERS[suffix]))
        else:
            records = list(_read_jsonl(path))
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
            value = json.loads(line.decode("utf-8"), object_pairs_hook=_object)
        except UnicodeDecodeError as error:
            _refuse_other_form(path, content)
            raise DataError(
                f"{place}: byte {error.start + 1} of the line is not UTF-8", hint="save the file as UTF-8"
            ) from None
        except (ValueError, RecursionError) as error:
            _refuse_other_form(path, content)
            raise DataError(f"{place}: not valid JSON: {error}", hint=ONE_A_LINE) from None
        if not isinstance(value, dict):
            _refuse_other_form(path, content)
            raise DataError(f"{place}: {kind_of(value)}, expected a JSON object", hint=ONE_A_LINE)
        yield DataRecord(place, value)


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return found


def _refuse_beginning(path: Path, content: bytes) -> None:
    """Raises DataError where a file begins as one of another kind does."""
    for beginning, (form, hint) in _BEGINNINGS.items():
        if content.startswith(beginning):
            raise DataError(f"{path}: {form}", hint=hint.replace("FILE", path.name))


def _refuse_other_form(path: Path, content: bytes) -> None:
    """Raises DataError where a file that is no JSONL has another form that people have."""
    _refuse_beginning(path, content)
    first = content.lstrip().split(b"\n", 1)[0].decode("utf-8", errors="replace").strip()
    names = first.split(",")
    if first == "[" or first.startswith("[{"):
        form, hint = "a JSON array", f"jq -c '.[]' {path.name} makes a line of each record"
    elif first == "{":
        form, hint = "JSON over several lines", f"jq -c . {path.name} puts each object on one"
    elif first.startswith("{'"):
        form, hint = "objects as Python prints them", "JSON has double quotes: write the file with json.dumps"
    elif first.startswith(("{", "[", '"')):
        return
    elif 1 < len(names) <= MAX_COLUMNS:
        form, hint = f"CSV with the columns {', '.join(names)}", "give it a name that ends in .csv"
    else:
        form, hint = f"plain text, {first[:40]!a}", "write each prompt as an object"
    raise DataError(f"{path}: {form}, expected JSONL", hint=f"{hint}; {ONE_A_LINE}")


def _read_csv(path: Path, delimiter: str) -> Iterator[DataRecord]:
    """Rows by the names in the first line; every value is text, which may hold newlines within quotes."""
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    _refuse_beginning(path, content)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8", hint="save the file as UTF-8") from None
    csv.field_size_limit(sys.maxsize)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    line = 1
    try:
        for row in rows:
            place, line = f"{path}:{line}", rows.line_num + 1
            if not row:
                continue
            if names is None:
                names = _columns(path, row)
            elif len(row) != len(names):
                raise DataError(
                    f"{place}: {len(row)} values, expected {len(names)}: {', '.join(names)}",
                    hint="put a value that holds a comma, a quote or a newline in double quotes",
                )
            else:
                yield DataRecord(place, dict(zip(names, row, strict=True)))
    except csv.Error as error:
        raise DataError(
            f"{path}:{rows.line_num}: not CSV: {error}", hint='a quote within quotes is written twice: ""'
        ) from None


def _columns(path: Path, names: list[str]) -> list[str]:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{path}:1: the column {twice[0]!r} stands twice", hint="rename one of them")
    if len(names) == 1 and (other := next((sign for sign in ";\t|" if sign in names[0]), None)):
        raise DataError(
            f"{path}:1: values separated by {other!r}, expected commas",
            hint="save it with commas, or with tabs under a name that ends in .tsv",
        )
    return names


def _read_parquet(path: Path) -> Iterator[DataRecord]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with path.open("rb") as file:
        try:
            # `read_table` would import pandas, for a third of a second.
            rows: list[dict[str, object]] = pq.ParquetFile(file).read().to_pylist()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError) as error:
            file.seek(0)
            beginning = file.read(1000)
            if not beginning.startswith(b"PAR1"):
                _refuse_beginning(path, beginning)
            raise DataError(f"{path}: not a parquet file that can be read: {error}") from None
    yield from (DataRecord(f"{path}: row {row}", fields) for row, fields in enumerate(rows))
