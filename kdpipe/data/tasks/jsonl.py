"""A user's own questions and answers, from local files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kdpipe.data.rows import Problem
from kdpipe.data.tasks.data_file import read_records
from kdpipe.data.tasks.form import read_splits
from kdpipe.errors import DataError
from kdpipe.recipe.place import place_of
from kdpipe.recipe.task import JsonlTask


def find_files(task: JsonlTask, folder: Path) -> dict[str, Path]:
    """The file of each split; raises DataError when one is missing."""
    files = {split: place_of(name, folder) for split, name in (("train", task.train), ("test", task.test))}
    for split, path in files.items():
        if not path.is_file():
            raise DataError(f"{path}: no such file", hint=f"task.{split} names it, from the recipe's folder")
    return files


def read_problems(
    task: JsonlTask, folder: Path, _hub_folder: Path | None, say: Callable[[str], None]
) -> tuple[list[Problem], list[Problem]]:
    """Train and test problems."""
    files = find_files(task, folder)
    return read_splits(task, {split: read_records(path) for split, path in files.items()}, say)
