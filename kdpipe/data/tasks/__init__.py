"""Tasks: problems and their grading. The module of a task has the task's `kind` for its name.

It is imported only where the recipe has that task, and where `kdpipe plan` asks for files only if it reads some.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from kdpipe.recipe.place import place_of
from kdpipe.recipe.task import Gsm8kTask, QuestionTask, Task

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


def hub_id(task: Task, folder: Path) -> str | None:
    """The hub data set that `task` reads, or None; paths in the recipe start from `folder`.

    A name is local when it begins with `.`, `/` or `~`, or when it is a folder.
    """
    if (
        not isinstance(task, Gsm8kTask)
        or task.data.startswith((".", "/", "~"))
        or place_of(task.data, folder).is_dir()
    ):
        return None
    return task.data


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
