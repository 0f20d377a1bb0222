"""A real MLflow server that is down, dies, is slow or refuses: the run neither stops nor waits, and nothing is lost."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import kdpipe.pipeline.request
from kdpipe.cli.app import app
from kdpipe.pipeline.project import Project, open_project
from kdpipe.pipeline.runner import Request, run
from kdpipe.tracking.mirror import LOG, QUIET_SECONDS, open_mirror
from kdpipe.tracking.pending import pending, unsettled
from kdpipe.tracking.steps import BOUNDS, done_steps, metric_name
from tests.tracker import Proxy, Server, free_port
from tests.worlds import SMALLEST, NearWorker, Watcher, load_tiny, write_recipe

pytestmark = pytest.mark.slow

SIZES = SMALLEST | {"rounds": 2}
SMALL_SECONDS = QUIET_SECONDS + 3
"""What a server that does not answer may cost a run: patience at its end, and the mirror's share of two cores."""


@pytest.fixture
def server(mlflow_database: Path, tmp_path: Path) -> Iterator[Server]:
    """A server that is not started yet."""
    folder = tmp_path / "server"
    folder.mkdir()
    shutil.copy(mlflow_database, folder / "mlflow.db")
    server = Server(folder, free_port())
    yield server
    server.kill()


@dataclass(frozen=True)
class World:
    """A tiny recipe whose runs are mirrored to `uri`."""

    folder: Path
    uri: str

    def loaded(self, **tracked: Any) -> Any:
        where = tracked or {"enabled": True, "uri": self.uri}
        return load_tiny(self.folder, **SIZES, tracking=where)

    def run(self, watcher: Watcher | None = None, workspace: str = "out", *, enabled: bool = True) -> None:
        """Runs it, mirrored or not."""
        run(
            self.loaded() if enabled else self.loaded(enabled=False),
            self.folder / workspace,
            lambda _project: Request(),
            display=watcher or Watcher(),
            open_mirror=open_mirror,
        )

    def mirror(self) -> None:
        """Repeats the command until MLflow has everything: each one delivers what its patience is enough for."""
        for _ in range(6):
            self.run()
            if self.pending() == 0 and not unsettled(self.folder / "out"):
                return

    def rounds_seconds(
        self, watcher: Watcher, *, enabled: bool, met: Callable[[], bool] = lambda: True
    ) -> float:
        """Runs it; returns the seconds from its first rollout to its end, the rollout held until `met`."""
        started: list[float] = []

        def begin(step: str, _event: dict[str, Any]) -> None:
            if step == "rollout@1" and not started:
                wait_until(met)
                started.append(time.monotonic())

        watcher.on_event = begin
        self.run(watcher, "out" if enabled else "unmirrored", enabled=enabled)
        return time.monotonic() - started[0]

    @property
    def project(self) -> Project:
        return open_project(self.loaded(), self.folder / "out")

    def pending(self) -> int:
        return pending(self.project.run.path)

    def status(self) -> str:
        recipe = write_recipe(self.folder, **SIZES, tracking={"enabled": True, "uri": self.uri})
        result = CliRunner().invoke(app, ["status", str(recipe), "--workspace", str(self.folder / "out")])
        assert result.exit_code == 0, result.output
        return result.stdout

    def expected(self) -> set[tuple[str, int, float]]:
        """Every metric of every finished step as MLflow is to show it."""
        found = set()
        for step in done_steps(self.project.run.path):
            for row in step.entry.metrics():
                if row.name.endswith(BOUNDS):
                    continue
                at, per_step = row.optimizer_step, row.optimizer_step is not None
                name = metric_name(row.name, stage=step.stage, subject=step.subject, per_step=per_step)
                found.add((name, step.round if at is None else at, row.value))
        return found


def wait_until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def near(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's own worker is in this process; the mirror's is not."""
    monkeypatch.setattr(kdpipe.pipeline.request, "Worker", NearWorker)


def require_everything_once(world: World, server: Server) -> None:
    """MLflow has every metric of the run once, in one run, which is finished."""
    assert world.pending() == 0
    metrics, expected = server.metrics(), world.expected()
    assert set(metrics) == expected
    assert set(metrics.values()) == {1}
    assert server.query("select status from runs") == [("FINISHED",)]
    assert "not in MLflow" not in world.status()


def test_a_server_that_is_down_from_the_start_gets_everything_later(tmp_path: Path, server: Server) -> None:
    world, watcher = World(tmp_path, server.uri), Watcher()
    without = world.rounds_seconds(Watcher(), enabled=False)

    def was_refused() -> bool:
        log = world.project.run.path / LOG
        return log.exists() and "not mirrored" in log.read_text()

    took = world.rounds_seconds(watcher, enabled=True, met=was_refused)
    print(f"without {without:.1f} s, with a server that is down {took:.1f} s")
    assert took - without < SMALL_SECONDS
    assert watcher.performed == [step.id for step in world.project.plan.steps]
    assert [text for text in watcher.warnings if "not everything is mirrored" in text]
    steps = len(world.project.plan.steps)
    assert world.pending() == steps
    assert f"{steps} steps are not in MLflow yet: the next run mirrors them" in world.status()
    server.start()
    world.mirror()
    require_everything_once(world, server)


def test_a_server_that_dies_in_the_middle_gets_the_rest_later(tmp_path: Path, server: Server) -> None:
    server.start()
    world, watcher = World(tmp_path, server.uri), Watcher()

    def kill(step: str, _event: dict[str, Any]) -> None:
        if step == "rollout@1" and server.process is not None:
            wait_until(lambda: bool(server.metrics()))
            server.kill()

    watcher.on_event = kill
    world.run(watcher)
    assert watcher.performed == [step.id for step in world.project.plan.steps]
    assert server.process is None
    assert 0 < len(server.metrics()) < len(world.expected())
    assert world.pending() > 0
    server.start()
    world.mirror()
    require_everything_once(world, server)


def test_a_server_of_ten_seconds_a_call_does_not_slow_the_run(tmp_path: Path, server: Server) -> None:
    server.start()
    with Proxy(server, seconds=10).running() as proxy:
        world, watcher = World(tmp_path, proxy.uri), Watcher()
        without = world.rounds_seconds(Watcher(), enabled=False)
        took = world.rounds_seconds(watcher, enabled=True, met=lambda: proxy.calls > 0)
        print(f"without {without:.1f} s, with a server of 10 s a call {took:.1f} s, {proxy.calls} calls")
        assert took - without < SMALL_SECONDS
        assert world.pending() == len(world.project.plan.steps)
        proxy.seconds = 0
        world.mirror()
        require_everything_once(world, server)


def test_a_param_that_is_refused_keeps_nothing_else_back(tmp_path: Path, server: Server) -> None:
    server.start()
    with Proxy(server, refused="rollout.prompts").running() as proxy:
        world = World(tmp_path, proxy.uri)
        world.mirror()
        require_everything_once(world, server)
        assert "refused the params rollout.prompts" in world.status()
        names = {name for (name,) in server.query("select key from params")}
        assert "rollout.prompts" not in names
        assert {"rollout.samples", "train.minibatches"} <= names
        proxy.refused = None
        world.mirror()
        assert server.query("select value from params where key = 'rollout.prompts'") == [("4",)]
        assert "refused" not in world.status()
        require_everything_once(world, server)


def test_a_study_whose_server_is_down_neither_stops_nor_waits_and_is_nested_later(
    tmp_path: Path, server: Server
) -> None:
    recipe = write_recipe(tmp_path, **SIZES, tracking={"enabled": True, "uri": server.uri})
    command = ["run", str(recipe), "--workspace", str(tmp_path / "out")]
    command += ["--sweep", "train.optimizer.learning_rate=1e-3,2e-3"]

    def seconds_and_output(*more: str) -> tuple[float, str]:
        begun = time.monotonic()
        result = CliRunner().invoke(app, [*command, *more])
        assert result.exit_code == 0, result.output
        return time.monotonic() - begun, result.output

    without, _ = seconds_and_output("--set", "tracking.enabled=false")
    shutil.rmtree(tmp_path / "out")
    took, output = seconds_and_output()
    print(f"without {without:.1f} s, with a server that is down {took:.1f} s")
    assert took - without < 3 * SMALL_SECONDS  # two runs and the study itself
    assert "not all of the study is mirrored yet" in output
    server.start()
    for _ in range(6):
        seconds_and_output()
        if not unsettled(tmp_path / "out"):
            break
    statuses = server.query("select name, status from runs order by name")
    assert [status for _, status in statuses] == ["FINISHED"] * 3
    [(parent,)] = server.query("select distinct value from tags where key = 'mlflow.parentRunId'")
    [(name, children)] = server.query(
        "select name, (select count(*) from tags where key = 'mlflow.parentRunId') "
        f"from runs where run_uuid = '{parent}'"
    )
    assert name.startswith("tiny-sweep-")
    assert children == 2
    # Of both points, and of the student before training, which they share.
    assert server.query("select count(*) from metrics where key like 'study/%/accuracy'") == [(3,)]
    assert max(server.metrics().values()) <= 2  # of the two runs
