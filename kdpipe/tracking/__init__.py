"""A mirror of every run in MLflow. Made from files, never read back for results.

The run folder and the store are the truth. `Synchronizer`, in a warm process of its own, makes one MLflow run
equal to them; `MlflowMirror` asks it from a thread, so that the command neither imports MLflow nor waits for
it. Whatever could not be delivered is delivered by a later command.

What makes it repeatable: `mlflow.json` in the run folder knows the MLflow run and which steps it has, and a
metric's timestamp is the time its step finished, so that rows logged again after a kill are the same rows,
of which an MLflow store keeps one.

`mlflow_run.py` is the only door to the library; no other module names it.
"""

from __future__ import annotations

from kdpipe.tracking.mirror import begin_study, end_study, open_mirror, settle
from kdpipe.tracking.page import serve_ui
from kdpipe.tracking.standing import pending, waiting

__all__ = ["begin_study", "end_study", "open_mirror", "pending", "serve_ui", "settle", "waiting"]
