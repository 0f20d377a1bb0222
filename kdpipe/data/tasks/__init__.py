"""Tasks: problems and their grading. The module of a task has the task's `kind` for its name.

It is imported only where the recipe has that task, and where `kdpipe plan` asks for files only if it reads some.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

from kdpipe.recipe.place import place_of
from kdpipe.recipe.task import DatasetTask, Gsm8kTask, QuestionTask, Task

if TYPE_CHECKING:
    from kdpipe.data.rows import Problem


class TaskModule(Protocol):
    """What the module of a task has; each takes its own kind of task."""

    def find_files(self, task: Task, folder: Path) -> dict[str, Path]:
        """See `data_files`, which asks no task for files whose problems are generated."""

    def read_problems(
        self, task: Task, folder: Path, hub_folder: Path | None, say: Callable[[str], None]
    ) -> tuple[list[Problem], list[Problem]]:
        """See `read_problems`."""


class HubData(NamedTuple):
    """A data set on the hub, and which of its files are read."""

    name: str
    revision: str | None
    patterns: list[str]


DATA_SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".json", ".arrow", ".txt", ".gz", ".zst", ".zip")
"""Endings of files that the library `datasets` reads without code of the data set."""


def hub_data(task: Task, folder: Path) -> HubData | None:
    """The hub data set that `task` reads, or None; paths in the recipe start from `folder`.

    A name is local when it begins with `.`, `/` or `~`, or when it is a folder.
    """
    match task:
        case Gsm8kTask():
            name, patterns = task.data, ["main/*.parquet"]
        case DatasetTask():
            name, patterns = task.path, ["README.md", *(f"*{suffix}" for suffix in DATA_SUFFIXES)]
        case _:
            return None
    is_local = name.startswith((".", "/", "~")) or place_of(name, folder).is_dir()
    return None if is_local else HubData(name, task.revision, patterns)


def data_files(task: Task, folder: Path) -> dict[str, Path]:
    """The local files that `task` reads, by split; none for generated problems and for a hub id.

    Raises DataError when one is missing.
    """
    return _module_of(task).find_files(task, folder) if isinstance(task, QuestionTask) else {}


def read_problems(
    task: Task,
    folder: Path,
    *,
    hub_folder: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[list[Problem], list[Problem]]:
    """Train and test problems; `hub_folder` is where a hub data set was downloaded to.

    `say` is told what was found out about the data's form.
    """
    return _module_of(task).read_problems(task, folder, hub_folder, say)


def _module_of(task: Task) -> TaskModule:
    return cast("TaskModule", import_module(f"{__name__}.{task.kind}"))
