"""What every test shares: one thread for torch, here and in workers, since tiny tensors only wait for a second one.

And no waiting for the disk: tests kill processes, not machines, and what a process wrote outlives it unflushed.
Nor is garbage looked for among the million objects that libraries and collected tests are, nor often: a tenth of a
suite's time went into that.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_variable] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(Path(__file__).parents[1] / ".hypothesis")
os.fsync = lambda _descriptor: None
gc.disable()  # until everything is imported and collected
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background ignores Ctrl-C, and so would every command that a test starts there to end it so.
    signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST = (
    "test_machine_faults.py",
    "test_kills.py",
    "test_whole_run_is_guarded.py",
    "test_roles.py",
    "test_tracking_outage.py",
    "test_crash.py",
    "test_hostile_folder.py",
    "test_doctor.py",
    "test_runner.py",
    "test_damage.py",
    "test_check_loss.py",
    "test_tracking.py",
    "test_cli.py",
    "test_workers.py",
    "test_house.py",
    "test_lora.py",
    "test_engine_contract.py",
    "test_server_teacher.py",
    "test_from_files.py",
    "test_report.py",
    "test_plan.py",
    "test_bad_input.py",
    "test_fuzz.py",
    "test_several_teachers.py",
)
"""Files that take longest, in one suite or another: begun first, so that no process is left with one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session", autouse=True)
def working_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty working folder: the `kdpipe-out` of whoever runs the tests is neither read nor written."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cwd")
        patch.chdir(folder)
        yield folder


@pytest.fixture(autouse=True)
def _working_folder_stays_empty(working_folder: Path) -> Iterator[None]:
    yield
    assert os.listdir(working_folder) == [], "a test writes into the working folder"  # noqa: PTH208 (each test asks)


@pytest.fixture(scope="session")
def mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database as the first mirroring of a workspace makes it: seconds of MLflow's migrations, once in all."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    made = shared / "mlflow-template"
    from kdpipe.store.locks import locked

    with locked(shared / "mlflow-template.lock"):
        if not made.exists():
            from kdpipe.tracking.run import make_database

            folder = tmp_path_factory.mktemp("template")
            make_database(folder)
            assert sorted(path.name for path in folder.iterdir() if path.suffix != ".lock") == ["mlflow.db"]
            folder.rename(made)
    return made / "mlflow.db"


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)
    gc.enable()
