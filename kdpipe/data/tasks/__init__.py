"""Tasks: problems and their grading. The module of a task is imported only where it is that task.

`kdpipe plan` asks for nothing here but names of files, and would pay for all three modules.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kdpipe.errors import DataError
from kdpipe.recipe.schema import ArithmeticTask, Gsm8kTask, JsonlTask

if TYPE_CHECKING:
    from kdpipe.data.rows import Problem

Task = Gsm8kTask | ArithmeticTask | JsonlTask


def hub_id(task: Task, folder: Path) -> str | None:
    """The hub data set that `task` reads, or None; paths in the recipe start from `folder`.

    A name is local when it begins with `.`, `/` or `~`, or when it is a folder.
    """
    if (
        not isinstance(task, Gsm8kTask)
        or task.data.startswith((".", "/", "~"))
        or (folder / task.data).is_dir()
    ):
        return None
    return task.data


def data_files(task: Task, folder: Path) -> dict[str, Path]:
    """The local files that `task` reads, by split; none for generated problems and for a hub id.

    Raises DataError when one is missing.
    """
    match task:
        case ArithmeticTask():
            return {}
        case Gsm8kTask():
            from kdpipe.data.tasks import gsm8k

            return {} if hub_id(task, folder) else gsm8k.find_files(_local(task.data, folder))
        case JsonlTask():
            files = {"train": _local(task.train, folder), "test": _local(task.test, folder)}
            for split, path in files.items():
                if not path.is_file():
                    raise DataError(
                        f"{path}: no such file", hint=f"task.{split} names it, from the recipe's folder"
                    )
            return files


def read_problems(
    task: Task, folder: Path, *, hub_folder: Path | None = None
) -> tuple[list[Problem], list[Problem]]:
    """Train and test problems; `hub_folder` is where a hub data set was downloaded to."""
    from kdpipe.data.tasks import arithmetic, gsm8k, jsonl

    match task:
        case ArithmeticTask():
            return arithmetic.make_problems(task)
        case Gsm8kTask() if name := hub_id(task, folder):
            if hub_folder is None:
                raise DataError(
                    f"task.data: {name!r} is no folder in {folder}, and no such hub data set was downloaded",
                    hint="give a local folder with train.jsonl and test.jsonl, for example data: ./gsm8k",
                )
            return gsm8k.read_problems(hub_folder)
        case Gsm8kTask():
            return gsm8k.read_problems(_local(task.data, folder))
        case JsonlTask():
            return jsonl.read_problems(task, data_files(task, folder))


def _local(path: str, folder: Path) -> Path:
    return folder / Path(path).expanduser()
