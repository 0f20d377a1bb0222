"""The student as a logged model: loaded by `mlflow.transformers`, once, of the weights that were trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModel

from kdpipe.errors import ArtifactError, RecipeError
from kdpipe.pipeline.project import Project
from kdpipe.recipe.runtime import Tracking
from kdpipe.tracking.memory import MEMORY, MirrorRequest, database_uri, read_memory
from kdpipe.tracking.pending import is_finished
from tests.mirrored import mirror
from tests.tracker import Server, free_port
from tests.worlds import SMALLEST, load_tiny, run_near

TRACKING = {"enabled": False, "log_model": True}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A finished run of one round that nothing mirrored yet."""
    folder = tmp_path_factory.mktemp("trained")
    return run_near(load_tiny(folder, **SMALLEST, rounds=1, tracking=TRACKING), folder / "out")


@pytest.fixture
def run(trained: Project, mlflow_database: Path, tmp_path: Path) -> Path:
    """The folder of a copy of that run."""
    shutil.copytree(trained.workspace, tmp_path / "out", symlinks=True)
    shutil.copy(mlflow_database, tmp_path / "out" / "mlflow.db")
    return tmp_path / "out" / "runs" / trained.run.name


def request(run: Path, uri: str | None = None) -> MirrorRequest:
    tracking = Tracking(log_model=True, uri=uri)
    return MirrorRequest("run", run, tracking, "FINISHED")


def sync(run: Path, uri: str | None = None) -> None:
    mirror(request(run, uri))


def models(run: Path, uri: str | None = None) -> list[LoggedModel]:
    """The logged models of the run's experiment, each an output of the run."""
    client = MlflowClient(uri or database_uri(run.parents[1] / "mlflow.db"))
    memory = read_memory(run)
    assert memory is not None
    assert memory.run_id is not None
    info = client.get_run(memory.run_id)
    found = list(client.search_logged_models([info.info.experiment_id]))
    outputs = [one.model_id for one in info.outputs.model_outputs] if info.outputs else []
    assert {model.model_id for model in found} <= set(outputs)
    assert len(outputs) == len(set(outputs))
    return found


def require_loads(run: Path, model: LoggedModel) -> None:
    """MLflow opens the logged model with the weights that were trained, and it answers."""
    import mlflow.transformers
    import torch
    from safetensors.torch import load_file

    pipeline = mlflow.transformers.load_model(f"models:/{model.model_id}")
    theirs = pipeline.model.state_dict()
    ours = load_file(run / "round-001" / "train" / "model" / "model.safetensors")
    assert ours.keys() <= theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    [answer] = pipeline("1 + 1", max_new_tokens=2)
    assert isinstance(answer["generated_text"], str)


@pytest.mark.slow
def test_mlflow_loads_the_student_that_was_trained(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database_uri(run.parents[1] / "mlflow.db"))
    sync(run)
    [model] = models(run)
    assert (model.name, model.status) == ("student-round-001", "READY")
    folder = Path(model.artifact_location)
    assert folder.is_relative_to(run.parents[1] / "mlartifacts")
    files = {path.name for path in folder.rglob("*") if path.is_file()}
    assert not [name for name in files if name.endswith((".bin", ".pkl", ".pt", ".pth"))]
    require_loads(run, model)


@pytest.mark.slow
def test_a_server_gives_the_student_that_was_trained(
    run: Path, mlflow_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "server"
    folder.mkdir()
    shutil.copy(mlflow_database, folder / "mlflow.db")
    server = Server(folder, free_port())
    server.start()
    try:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        sync(run, server.uri)
        [model] = models(run, server.uri)
        assert model.artifact_location.startswith("mlflow-artifacts:/")
        require_loads(run, model)
        sync(run, server.uri)
        assert [again.model_id for again in models(run, server.uri)] == [model.model_id]
    finally:
        server.kill()


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_one_model(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        """The end of the process."""

    for moment in ("create_logged_model", "log_model_artifacts", "finalize_logged_model", "log_outputs"):
        real = getattr(MlflowClient, moment)

        def kill(*given: object, real: object = real, **named: object) -> None:
            real(*given, **named)  # type: ignore[operator]
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, moment, kill)
            with pytest.raises(Killed):
                sync(run)
        assert not is_finished(request(run))
    sync(run)
    [model] = models(run)
    assert model.status == "READY"
    assert is_finished(request(run))
    document = json.loads((run / MEMORY).read_text())
    del document["sent"]["student-round-001"]
    (run / MEMORY).write_text(json.dumps(document))
    sync(run)
    assert [one.model_id for one in models(run)] == [model.model_id]


def test_damaged_weights_are_not_logged(run: Path) -> None:
    weights = run / "round-001" / "train" / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        sync(run)
    assert models(run) == []
    memory = read_memory(run)
    assert memory is not None
    assert memory.status == "FINISHED"  # all the rest is there
    assert {"metrics/round-001/train", "recipe.yaml"} <= memory.sent.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student__lora": {"rank": 2}}, "LoRA student"),
        ({"student": {"model": "hub/name", "trust_remote_code": True}}, "trust_remote_code"),
    ],
)
def test_a_student_that_cannot_be_logged_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(RecipeError, match=f"log_model: .*{message}"):
        load_tiny(tmp_path, tracking={"log_model": True}, **changes)
