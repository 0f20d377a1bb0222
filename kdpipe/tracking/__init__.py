"""A mirror of every run in MLflow. Made from files, never read back for results.

The run folder and the store are the truth. `items.py` and `study.py` list what MLflow is to show, each item with a mark
of its contents; `mlflow.json` in the run folder remembers the marks that were sent. What is pending is the list less
what is remembered, for `kdpipe status` as for the mirror.

`Synchronizer`, in a warm process of its own, sends it; `MlflowMirror` asks it from a thread, so that the command
neither imports MLflow nor waits for it. Whatever could not be delivered is delivered by a later command. To send an
item again does no harm: a metric's timestamp is the time its step finished, so that rows that are logged again after
a kill are the same rows, of which an MLflow store keeps one.

Only `run.py` imports MLflow.
"""
