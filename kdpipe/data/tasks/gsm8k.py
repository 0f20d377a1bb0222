"""GSM8K from a local folder: JSONL as its authors published it, or parquet as the hub stores it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from kdpipe.data.graders.marking import MARK
from kdpipe.data.rows import Problem
from kdpipe.data.tasks import hub_data
from kdpipe.data.tasks.data_file import read_records
from kdpipe.data.tasks.form import read_expected
from kdpipe.data.tasks.record import DataRecord
from kdpipe.errors import DataError
from kdpipe.recipe.place import place_of
from kdpipe.recipe.task import Gsm8kTask

SPLITS = ("train", "test")


def find_files(task: Gsm8kTask, folder: Path) -> dict[str, Path]:
    """The files of both splits in `data`, or in its `main` folder; `train/1` is the second file of train.

    None for a hub id. Raises DataError when a split is missing or not all of its numbered files are there.
    """
    if hub_data(task, folder):
        return {}
    data = place_of(task.data, folder)
    files: dict[str, Path] = {}
    for split in SPLITS:
        paths = _split_files(data, split)
        files |= {split if len(paths) == 1 else f"{split}/{index}": path for index, path in enumerate(paths)}
    return files


def read_problems(
    task: Gsm8kTask, folder: Path, hub_folder: Path | None, _say: Callable[[str], None]
) -> tuple[list[Problem], list[Problem]]:
    """Train and test problems, with ids `gsm8k/<split>/<row>`.

    Raises DataError on a hub id that was not downloaded.
    """
    data = place_of(task.data, folder)
    if hub := hub_data(task, folder):
        if hub_folder is None:
            raise DataError(
                f"task.data: {hub.name!r} is no folder in {folder}, and no such hub data set was downloaded",
                hint="give a local folder with train.jsonl and test.jsonl, for example data: ./gsm8k",
            )
        data = hub_folder
    train, test = (
        [
            _problem(task, record, f"gsm8k/{split}/{row}")
            for row, record in enumerate(
                record for path in _split_files(data, split) for record in read_records(path)
            )
        ]
        for split in SPLITS
    )
    return train, test


def _split_files(data: Path, split: str) -> list[Path]:
    """One file, or all of those whose names say `-of-00003`; raises DataError when one is missing."""
    if not data.is_dir():
        raise DataError(
            f"{data}: no such folder", hint="task.data is a folder with GSM8K's files or a hub id"
        )
    for folder in (data, data / "main"):
        for name in (f"{split}.jsonl", f"{split}.parquet"):
            if (folder / name).is_file():
                return [folder / name]
        shards = sorted(folder.glob(f"{split}-*.parquet"))
        totals = {int(match[1]) for path in shards if (match := re.search(r"-of-(\d+)\.parquet$", path.name))}
        if totals and totals != {len(shards)}:
            names = ", ".join(path.name for path in shards)
            raise DataError(
                f"{folder}: found {names}, expected all files of one numbering", hint="copy the data again"
            )
        if shards:
            return shards
    found = ", ".join(sorted(path.name for path in data.iterdir())[:8]) or "nothing"
    raise DataError(
        f"{data}: no {split} split; found {found}, expected {split}.jsonl, {split}.parquet "
        f"or {split}-*.parquet there or in its folder main",
        hint="copy GSM8K's files there, or write its hub id in task.data",
    )


def _problem(task: Gsm8kTask, record: DataRecord, prompt_id: str) -> Problem:
    solution = record.text("answer")
    if MARK not in solution:
        raise DataError(
            f"{record.place}: the answer ends in {solution[-60:]!r}, expected a last line {MARK} N",
            hint="data of another form is read by task kind jsonl",
        )
    return Problem(prompt_id, record.text("question"), read_expected(task, record, solution), solution)
