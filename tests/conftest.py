"""What every test shares: one thread for torch, here and in workers, since tiny tensors only wait for a second one.

And no waiting for the disk: tests kill processes, not machines, and what a process wrote outlives it unflushed.
Nor is garbage looked for among the million objects that libraries and collected tests are.
"""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path

import pytest

for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_variable] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.fsync = lambda _descriptor: None
gc.disable()  # until everything is imported and collected
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background ignores Ctrl-C, and so would every command that a test starts there to end it so.
    signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST = (
    "test_machine_faults.py",
    "test_kills.py",
    "test_check_loss.py",
    "test_several_teachers.py",
    "test_tracking.py",
    "test_plan.py",
    "test_moving_teachers.py",
    "test_runner.py",
    "test_from_files.py",
    "test_crash.py",
)
"""Files that take ten seconds or more: begun first, so that no process is left with one when the others are done."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database as the first mirroring of a workspace makes it: seconds of MLflow's migrations, once."""
    from kdpipe.tracking.mlflow_run import make_database

    folder = tmp_path_factory.mktemp("template")
    make_database(folder)
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".lock") == ["mlflow.db"]
    return folder / "mlflow.db"


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
