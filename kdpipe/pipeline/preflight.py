"""`kdpipe doctor RECIPE` as the command line calls it: from a recipe to findings, in a worker. Never imports torch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from kdpipe.pipeline.identities import Sources
from kdpipe.pipeline.project import open_project
from kdpipe.pipeline.runner import PERFORMER, examination, open_worker
from kdpipe.recipe.file import LoadedRecipe
from kdpipe.workers.worker import CLOSE


def examine_recipe(loaded: LoadedRecipe, workspace: Path) -> dict[str, Any]:
    """The doctor's findings on a recipe's models, what it takes, and the free disk, as JSON.

    The models are those that round 1 starts with. One that an sft step has not made yet is stood in for: by its
    weights before that step, or untrained ones. Raises KdpipeError where there is nothing to examine.
    """
    folders = Sources(loaded, workspace).fetch()
    project = open_project(loaded, workspace)
    request = examination(project, folders, 1, depth="full")
    worker = open_worker(project, PERFORMER, log=workspace / "logs" / "doctor.log")
    try:
        result: Any = worker.call(request, on_event=lambda _event: None)
    finally:
        worker.stop(CLOSE)
    workspace.mkdir(parents=True, exist_ok=True)
    return {
        "run": project.run.name,
        "steps": len(project.plan.steps),
        "missing": request["missing"],
        "findings": result["findings"],
        "estimate": result["estimate"],
        "free_disk_bytes": shutil.disk_usage(workspace).free,
    }
