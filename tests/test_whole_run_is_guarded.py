"""One real run of the command, with a server that echoes its key, failures and a kill; and what it left anywhere.

Nothing it wrote or said holds a secret, nothing was changed outside the workspace, nothing was unpickled.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from kdpipe.data.tasks.arithmetic import words
from kdpipe.models.source import ModelSource
from kdpipe.models.tokenizer import arithmetic_tokenizer, num_ids_in_use
from kdpipe.pipeline.request import PERFORMER
from tests.auditing import Noted, audited, listing, noted
from tests.fakes import FakeEngine
from tests.nasty_texts import NASTY, acting
from tests.serving import MODEL, Reply, Served, serve
from tests.worlds import tiny_recipe

pytestmark = pytest.mark.slow

KEY = "sk-canary-5550123456789"
OTHERS = {
    "HF_TOKEN": "hf_canaryAAAAAAAAAAAA",
    "AWS_SECRET_ACCESS_KEY": "canary/aws/BBBBBBBB",
    "PLAIN": "canary-CCCC",
}
NUM_IDS = num_ids_in_use(arithmetic_tokenizer(words()))
PROMPT = "{question} " + " ".join(
    NASTY[name] for name in ("link to elsewhere", "script", "rich markup", "isolates")
)
COMMANDS = [
    ["plan"],
    ["status"],
    ["samples", "--limit", "3"],
    ["verify", "--full"],
    ["check"],
]


@dataclass
class Left:
    """What the commands left: folders, what they said, and what was noted of them."""

    folder: Path
    workspace: Path
    said: list[tuple[list[str], int, str]]
    events: list[Noted]
    before: dict[str, tuple[int, int]]
    after: dict[str, tuple[int, int]]


class Command:
    """The real command line in an environment with secrets, told on by audit hooks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = folder / "recipe.yaml"
        self.said: list[tuple[list[str], int, str]] = []
        self.process: subprocess.Popen[str] | None = None
        temporary = folder / "tmp"
        temporary.mkdir()
        kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        self.environment = {
            **kept,
            **audited(folder / "audit"),
            **OTHERS,
            "HOME": str(folder / "home"),
            "TMPDIR": str(temporary),
            "OMP_NUM_THREADS": "1",
            "CANARY": KEY,
        }
        (folder / "home").mkdir()
        (folder / "here").mkdir()

    def __call__(self, *arguments: str) -> int:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kdpipe.cli.app", *arguments],
            cwd=self.folder / "here",
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        said, _ = self.process.communicate(timeout=300)
        self.said.append(([*arguments], self.process.returncode, said))
        return self.process.returncode

    def kill_worker(self) -> None:
        """Kills the process that performs steps."""
        assert self.process is not None
        parent = str(self.process.pid).encode()
        [worker] = (
            int(status.parent.name)
            for status in Path("/proc").glob("[0-9]*/status")
            if b"PPid:\t" + parent + b"\n" in _bytes(status)
            and PERFORMER.encode() in _bytes(status.parent / "cmdline")
        )
        os.kill(worker, signal.SIGKILL)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def echoing(number: int, reply: Reply) -> Reply:
    """Fails from the third request on, with the key in its words."""
    said = {"error": {"message": f"Bearer {KEY} is over its quota; Authorization: {KEY}"}}
    return reply if number < 3 else Reply(said, 500)


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Left:
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "tokenizer").mkdir()
    arithmetic_tokenizer(words()).save_pretrained(folder / "tokenizer")
    engine = FakeEngine(num_rows=NUM_IDS, max_positions=4096)
    engine.load(ModelSource(folder, "teacher"))
    command = Command(folder)
    workspace = folder / "out"
    with serve(engine, rows=NUM_IDS, context=4096, key=KEY) as served:
        write_recipe(command.recipe, served)
        before = listing(folder, without=(workspace, folder / "tmp", folder / "audit"))
        place = ["--workspace", str(workspace)]
        run = ["run", str(command.recipe), *place]
        served.key = "another-key"  # so that the reply of 401 repeats what it got
        assert command(*run) == 1
        served.key, served.twist = KEY, echoing
        assert command(*run) == 1
        first = len(served.bodies)

        def killing(number: int, reply: Reply) -> Reply:
            if number == first + 2:
                command.kill_worker()
            return reply

        served.twist = killing
        assert command(*run) == 1
        assert command(*run) == 0
        for name, *more in COMMANDS:
            assert command(name, str(command.recipe), *(place if name != "check" else []), *more) == 0
        assert command("export", str(command.recipe), str(folder / "exported"), *place) == 0
        assert command("gc", *place) == 0
    after = listing(folder, without=(workspace, folder / "tmp", folder / "audit", folder / "exported"))
    return Left(folder, workspace, command.said, noted(folder / "audit"), before, after)


def write_recipe(path: Path, served: Served) -> None:
    server = {"urls": [served.url], "model": MODEL, "tokenizer": "./tokenizer", "api_key_env": "CANARY"}
    document = tiny_recipe(
        rounds=1,
        teachers=[{"server": server, "prompt": PROMPT}],
        evaluate={"teacher": False, "reverse_kl_problems": 2},
        rollout__stop=[NASTY["clear screen"], NASTY["right to left override"]],
        runtime__server={"retries": 0, "concurrency": 1, "max_failures": 1},
        tracking={"enabled": True},
    )
    path.write_text(yaml.safe_dump(document))


def test_a_failure_that_echoes_the_key_is_told_without_it(left: Left) -> None:
    refused, failed, killed, finished = (said for _, _, said in left.said[:4])
    assert "the key in CANARY goes to http://127.0.0.1:" in refused
    assert "HTTP 401" in refused
    assert "***" in refused
    assert "HTTP 500" in failed
    assert "***" in failed
    assert "the worker died: signal SIGKILL" in killed
    assert "student after round 1" in finished


def test_no_secret_is_in_anything_that_was_said_or_written(left: Left) -> None:
    secrets = [KEY, *OTHERS.values()]
    said = "".join(text for _, _, text in left.said)
    assert [secret for secret in secrets if secret in said] == []
    files = [p for p in left.folder.rglob("*") if p.is_file() and not p.is_symlink()]
    names = {path.name for path in files}
    assert names >= {
        "resolved.json",
        "environment.json",
        "events.jsonl",
        "worker.log",
        "tracking.log",
        "mlflow.db",
    }
    assert any("mlartifacts" in path.parts for path in files)
    for path in files:
        data = path.read_bytes()
        if path.suffix == ".parquet":  # compressed
            data += json.dumps(pq.read_table(path).to_pydict(), default=str).encode()
        assert [secret for secret in secrets if secret.encode() in data] == [], path


def test_what_is_known_of_the_machine_is_no_copy_of_its_environment(left: Left) -> None:
    [path] = left.workspace.glob("runs/*/environment.json")
    found = json.loads(path.read_text())
    assert "PATH" not in found
    assert all(value not in found.values() for value in os.environ.values() if len(value) > 8)


def test_text_from_a_recipe_does_nothing_in_a_terminal(left: Left) -> None:
    assert acting("".join(text for _, _, text in left.said)) == set()


def test_text_from_a_recipe_arrives_in_mlflow_as_it_is(left: Left) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{left.workspace / 'mlflow.db'}")
    [experiment] = [found for found in client.search_experiments() if found.name == "tiny"]
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["teachers.0.prompt"] == PROMPT
    assert run.data.metrics["Headline/evaluate.accuracy"] >= 0


def test_nothing_is_changed_outside_the_workspace_and_the_export(left: Left) -> None:
    assert left.after == left.before  # what libraries in C wrote counts here: recipe, home and working folder
    allowed = [left.workspace, left.folder / "exported", left.folder / ".tmp-exported", left.folder / "tmp"]
    outside = {
        (event.event, event.name)
        for event in left.events
        if event.event != "pickle.find_class"
        and not any(Path(event.name).is_relative_to(place) for place in allowed)
        and not event.name.startswith(("/dev/", "/proc/self/"))
        and (event.event, event.name) != ("os.mkdir", str(left.folder))  # export's, of what is there already
    }
    assert outside == set()
    assert sum(event.event == "os.rename" for event in left.events) > 20
    assert {event.argv[1] for event in left.events if len(event.argv) > 1} >= {"run", "export"}


def test_temporary_files_are_gone(left: Left) -> None:
    assert listing(left.folder / "tmp") == {}


def test_nothing_is_unpickled(left: Left) -> None:
    found = {
        (event.name, tuple(event.stack[:4])) for event in left.events if event.event == "pickle.find_class"
    }
    assert found == set()
