"""A data set of the hub, or a folder in one of its layouts, opened by the library `datasets`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kdpipe.data.rows import Problem
from kdpipe.data.tasks import DATA_SUFFIXES, hub_data
from kdpipe.data.tasks.form import read_splits
from kdpipe.data.tasks.record import DataRecord
from kdpipe.errors import DataError, PreflightError, is_machine_fault, refusal
from kdpipe.recipe.place import place_of
from kdpipe.recipe.task import DatasetTask


def find_files(task: DatasetTask, folder: Path) -> dict[str, Path]:
    """All data files of a local folder under each split, as no name says whose rows they hold.

    None for a hub id. Raises DataError where there are none.
    """
    if hub_data(task, folder):
        return {}
    data = place_of(task.path, folder)
    if not data.is_dir():
        raise DataError(f"{data}: no such folder", hint="task.path is a folder of data files or a hub id")
    paths = sorted(
        path for path in data.rglob("*") if path.suffix in DATA_SUFFIXES or path.name == "README.md"
    )
    if not paths:
        raise DataError(f"{data}: holds no data files", hint=f"expected some of: {', '.join(DATA_SUFFIXES)}")
    return {f"{split}/{path.relative_to(data)}": path for split in ("train", "test") for path in paths}


def read_problems(
    task: DatasetTask, folder: Path, hub_folder: Path | None, say: Callable[[str], None]
) -> tuple[list[Problem], list[Problem]]:
    """Train and test problems. Raises PreflightError without the library, DataError on what it refuses."""
    data = place_of(task.path, folder) if hub_folder is None else hub_folder
    if not data.is_dir():
        raise DataError(
            f"task.path: {task.path!r} is no folder in {folder}, and no such hub data set was downloaded"
        )
    splits = {"train": task.split.train, "test": task.split.test}
    return read_splits(task, {name: _records(task, data, split) for name, split in splits.items()}, say)


def _records(task: DatasetTask, data: Path, split: str) -> list[DataRecord]:
    try:
        import datasets
    except ImportError:
        raise PreflightError(
            "task.kind dataset: the library datasets, which opens it, is not installed",
            hint='install it: pip install "kdpipe[data]"',
        ) from None
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(str(data), name=task.config, split=split).to_list()
    except (datasets.exceptions.DatasetsError, ValueError, LookupError, TypeError, OSError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and is_machine_fault(cause):
            raise refusal(cause, datasets.config.HF_DATASETS_CACHE) from None
        reason = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
        where = f"{task.path}" + (f", config {task.config}" if task.config else "")
        raise DataError(
            f"{where}, split {split!r}: {reason}",
            hint="task.config and task.split say which rows; a slice is written as train[:90%]",
        ) from None
    if not rows:
        raise DataError(f"{task.path}: split {split!r} holds no records, expected at least one")
    return [DataRecord(f"{task.path}, {split}: row {row}", fields) for row, fields in enumerate(rows)]
