"""Warm processes: calls, events, errors and deaths cross the border as they should."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kdpipe.errors import ArtifactError, KdpipeError, StepError
from kdpipe.workers import worker as workers
from kdpipe.workers.message import encode
from kdpipe.workers.worker import explained, is_harmless
from tests.worker_targets import Ask, Message, Worker

TARGET = "tests.worker_targets:Echo"
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"PYTHONPATH": str(ROOT)}


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    worker = Worker(TARGET, log=tmp_path / "logs" / "worker.log", environment=ENVIRONMENT)
    yield worker
    worker.kill()


def call(worker: Worker, do: str, **fields: object) -> Message | None:
    return worker.ask({"do": do, **fields}, on_event=lambda _: None)  # type: ignore[dict-item]


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until_gone(pid: int, *, seconds: float) -> float:
    """Seconds until the process was gone; fails after `seconds`."""
    started = time.monotonic()
    while is_alive(pid):
        assert time.monotonic() - started < seconds, f"process {pid} is still there"
        time.sleep(0.01)
    return time.monotonic() - started


def test_calls_are_answered_by_one_warm_process(worker: Worker) -> None:
    first, second = call(worker, "nothing"), call(worker, "nothing", out={"deep": [1, None, "é"]})
    assert first is not None
    assert second is not None
    assert (first["calls"], second["calls"]) == (1, 2)
    assert first["pid"] == second["pid"] != os.getpid()
    assert second["out"] == {"deep": [1, None, "é"]}


def test_a_worker_and_what_it_starts_run_no_module_of_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = os.pathsep.join(["", ".", str(ROOT), "./", ""])  # each of them but one means the working folder
    worker = Worker(TARGET, log=tmp_path / "worker.log", environment={"PYTHONPATH": path})
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    for name in ("queue", "random", "pydantic", "kdpipe"):
        (hostile / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.chdir(hostile)
    result = call(worker, "import queue and random in grandchildren")
    worker.kill()
    assert result is not None
    origins = result["out"]
    assert isinstance(origins, list)
    assert len(origins) == 4
    assert not any(str(origin).startswith(str(hostile)) for origin in origins)
    assert not (tmp_path / "ran").exists()


SECRETS = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "MLFLOW_TRACKING_PASSWORD", "OTHER_API_KEY")


def test_a_worker_has_no_secret_of_its_parent_but_those_that_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*SECRETS, "CANARY", "TOKENIZERS_PARALLELISM", "XKEYBOARD"):
        monkeypatch.setenv(name, "1")
    places: dict[str, Callable[[str], bool]] = {
        "steps": lambda name: name == "CANARY" or is_harmless(name),
        "role": lambda name: name != "CANARY" and is_harmless(name),
        "mirror": lambda name: name != "CANARY",
    }
    for place, inherits in places.items():
        worker = Worker(TARGET, log=tmp_path / "log", environment=ENVIRONMENT, inherits=inherits)
        answer = call(worker, "tell the environment")
        worker.kill()
        assert answer is not None
        has = {*answer["out"]}  # type: ignore[misc]
        assert {"PATH", "TOKENIZERS_PARALLELISM", "XKEYBOARD"} <= has
        assert ("CANARY" in has) == (place == "steps")
        assert has & {*SECRETS} == ({*SECRETS} if place == "mirror" else set())


def test_a_worker_outlives_the_thread_that_started_it(worker: Worker) -> None:
    first: list[Message | None] = []
    helper = threading.Thread(target=lambda: first.append(call(worker, "nothing")))
    helper.start()
    helper.join()
    for _ in range(20):  # the signal comes at once
        answer = call(worker, "nothing")
    assert answer is not None
    assert first[0] is not None
    assert (answer["pid"], answer["calls"]) == (first[0]["pid"], 21)


def test_a_python_that_may_not_be_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "python").write_text("")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    worker = Worker(TARGET, log=tmp_path / "log")
    with pytest.raises(StepError, match="python: Python itself cannot be started: Permission denied"):
        call(worker, "nothing")
    worker = Worker(TARGET, log=tmp_path / "python" / "log")
    with pytest.raises(KdpipeError, match="python"):
        call(worker, "nothing")


def test_a_worker_has_docstrings_though_its_parent_has_none(tmp_path: Path) -> None:
    environment = {**ENVIRONMENT, "PYTHONOPTIMIZE": "2"}
    worker = Worker(TARGET, log=tmp_path / "log", environment=environment)
    answer = call(worker, "tell the environment")
    worker.kill()
    assert answer is not None
    assert "PYTHONOPTIMIZE" not in answer["out"]  # type: ignore[operator]


def test_nothing_starts_before_the_first_call(worker: Worker) -> None:
    worker.stop()
    worker.kill()
    assert not worker.log.exists()


def test_events_arrive_in_order_before_the_result(worker: Worker) -> None:
    events: list[Message] = []
    result = worker.ask({"do": "events", "count": 500}, on_event=events.append)
    assert [event["number"] for event in events] == list(range(500))
    assert result is not None


def test_an_error_crosses_with_its_class_exit_code_and_hint(worker: Worker) -> None:
    with pytest.raises(ArtifactError) as caught:
        call(worker, "artifact error")
    assert caught.value.message == "scores.parquet: damaged"
    assert caught.value.hint == "repeat the run with --force teacher-score@1"
    assert caught.value.exit_code == 5
    answer = call(worker, "nothing")
    assert answer is not None
    assert answer["calls"] == 2, "the worker is still warm"


def test_a_subclass_of_its_own_crosses_as_the_error_that_it_is(worker: Worker) -> None:
    with pytest.raises(StepError) as caught:
        call(worker, "step error")
    assert caught.value.message == "no paper"
    assert caught.value.hint == "buy some"


@pytest.mark.parametrize("do", ["bug", "panic", "unserializable"])
def test_any_other_exception_is_a_step_error_that_names_the_log(worker: Worker, do: str) -> None:
    with pytest.raises(StepError, match=str(worker.log)) as caught:
        call(worker, do)
    assert "bug in kdpipe" in caught.value.hint
    assert "Traceback" in worker.log.read_text()
    if do == "bug":
        assert "ZeroDivisionError: a bug" in caught.value.message
    answer = call(worker, "nothing")
    assert answer is not None
    assert answer["calls"] == 2


@pytest.mark.parametrize(
    ("do", "message", "hint"),
    [
        ("run out of memory", "out of memory: MemoryError", "lower runtime.train_tokens, sample_tokens"),
        ("fill the disk", "/disk/cache: No space left on device", "free some space"),
    ],
)
def test_a_fault_of_the_machine_is_not_called_a_bug(worker: Worker, do: str, message: str, hint: str) -> None:
    with pytest.raises(StepError) as caught:
        call(worker, do)
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert "bug" not in caught.value.hint
    assert "Traceback" in worker.log.read_text(), "whoever looks for it finds where"


def test_torchs_own_want_of_memory_is_known_by_its_text() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    told = explained(caught.value)
    assert isinstance(told, StepError)
    assert told.message.startswith("out of memory: ")
    assert isinstance(explained(torch.OutOfMemoryError("CUDA out of memory")), StepError)
    rust = Exception("No space left on device (os error 28)")  # as tokenizers raise it
    told = explained(rust)
    assert isinstance(told, StepError)
    assert "free some space" in told.hint
    rust = Exception("Cannot allocate memory (os error 12)")
    assert str(explained(rust)) == "out of memory: Cannot allocate memory (os error 12)"
    other = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert explained(other) is other


def test_a_factory_that_fails_is_an_error_and_not_a_hang(tmp_path: Path) -> None:
    worker = Worker("tests.worker_targets:failing", log=tmp_path / "log", environment=ENVIRONMENT)
    try:
        with pytest.raises(ArtifactError, match="cannot be made"):
            call(worker, "nothing")
    finally:
        worker.kill()


def test_a_worker_that_is_killed_is_a_step_error_with_the_end_of_its_log(worker: Worker) -> None:
    first = call(worker, "nothing")
    started = time.monotonic()
    with pytest.raises(StepError, match="CUDA error: unspecified launch failure") as caught:
        call(worker, "die")
    assert time.monotonic() - started < 3
    assert "SIGKILL (the system may be out of memory)" in caught.value.message
    assert caught.value.exit_code == 1
    again = call(worker, "nothing")
    assert first is not None
    assert again is not None
    assert again["calls"] == 1, "a new process"
    assert again["pid"] != first["pid"]


def test_a_worker_that_exits_or_dies_between_calls_is_a_step_error(worker: Worker) -> None:
    with pytest.raises(StepError, match="exit status 7"):
        call(worker, "exit")
    answer = call(worker, "nothing")
    assert answer is not None
    os.kill(int(str(answer["pid"])), signal.SIGKILL)
    wait_until_gone(int(str(answer["pid"])), seconds=5)
    with pytest.raises(StepError, match="SIGKILL"):
        call(worker, "nothing")
    assert call(worker, "nothing") is not None


def test_what_libraries_print_goes_to_the_log(worker: Worker) -> None:
    answer = call(worker, "noise")
    assert answer is not None
    assert answer["calls"] == 1
    log = worker.log.read_text()
    assert "a progress bar without end" in log
    assert "from a child process" in log
    assert '{"error": 1}' in log


def test_a_request_to_stop_reaches_a_safe_point_and_keeps_the_worker(worker: Worker) -> None:
    events: list[Message] = []
    assert worker.ask({"do": "wait"}, on_event=events.append, stop=lambda: bool(events)) is None
    answer = call(worker, "nothing")
    assert answer is not None
    assert answer["calls"] == 2
    assert call(worker, "nothing", out=1) is not None, "the request to stop does not linger"


def test_a_worker_that_reaches_no_safe_point_is_killed(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "STOP_SECONDS", 0.5)
    first = call(worker, "nothing")
    assert first is not None
    events: list[Message] = []
    assert worker.ask({"do": "hang"}, on_event=events.append, stop=lambda: bool(events)) is None
    assert not is_alive(int(str(first["pid"])))


def test_a_worker_that_dies_of_the_signal_that_stops_the_run_is_a_stop(worker: Worker) -> None:
    pids: list[int] = []

    def stop() -> bool:  # as a Ctrl-C does that comes before the worker ignores it
        if worker._process is not None and not pids:
            pids.append(worker._process.pid)
            worker._process.kill()
        return bool(pids)

    assert worker.ask({"do": "wait"}, on_event=lambda _: None, stop=stop) is None
    assert call(worker, "nothing") is not None


def test_a_worker_that_is_still_starting_survives_signals_for_the_group(worker: Worker) -> None:
    pids: list[int] = []

    def stop() -> bool:  # the first look comes a millisecond after the process was made
        if worker._process is not None and not pids:
            pids.append(worker._process.pid)
            os.kill(pids[0], signal.SIGINT)
            os.kill(pids[0], signal.SIGTERM)
        return False

    answer = worker.ask({"do": "nothing"}, on_event=lambda _: None, stop=stop)
    assert answer is not None
    assert [answer["pid"]] == pids
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


def test_signals_for_the_group_leave_the_worker_to_its_parent(worker: Worker) -> None:
    answer = call(worker, "nothing")
    assert answer is not None
    pid = int(str(answer["pid"]))
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGTERM)
    again = call(worker, "nothing")
    assert again is not None
    assert again["pid"] == pid


def test_stop_ends_the_process(worker: Worker) -> None:
    answer = call(worker, "nothing")
    assert answer is not None
    worker.stop()
    assert not is_alive(int(str(answer["pid"])))


LEADER = """
import sys
from pathlib import Path
from tests.worker_targets import Worker
worker = Worker(sys.argv[1], log=Path(sys.argv[2]), leads_group=True)
worker.ask({"do": "start a child"}, on_event=lambda event: print(worker.pid, event["child"], flush=True))
"""


@pytest.mark.parametrize("killed", ["parent", "worker"])
def test_what_the_leader_of_a_group_has_started_ends_with_it_and_with_its_parent(
    tmp_path: Path, killed: str
) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", LEADER, TARGET, str(tmp_path / "log")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **ENVIRONMENT},
    )
    assert parent.stdout is not None
    worker, child = map(int, parent.stdout.readline().split())
    guard = [pid for pid in group_of(worker) if pid not in (worker, child)]
    assert len(guard) == 1
    os.kill({"parent": parent.pid, "worker": worker}[killed], signal.SIGKILL)
    for pid in (worker, child, *guard):
        wait_until_gone(pid, seconds=5)
    parent.wait(timeout=10)  # of the worker's death it hears at once
    parent.stdout.close()


def test_killing_the_leader_of_a_group_leaves_nobody_of_it(tmp_path: Path) -> None:
    worker = Worker(TARGET, log=tmp_path / "log", environment=ENVIRONMENT, leads_group=True)
    events: list[Message] = []
    numbers: list[int] = []

    def see() -> None:
        if events and not numbers:
            assert worker.pid is not None
            numbers.extend(group_of(worker.pid))
            [guard] = [pid for pid in numbers if pid not in (worker.pid, events[0]["child"])]
            os.kill(guard, signal.SIGKILL)  # which is not needed for that
            wait_until_gone(guard, seconds=5)
            worker.kill()

    with pytest.raises((StepError, OSError, ValueError)):  # of a call into what is gone
        worker.ask({"do": "start a child"}, on_event=events.append, tick=see)
    assert len(numbers) == 3
    for pid in numbers:
        wait_until_gone(pid, seconds=5)


def group_of(leader: int) -> list[int]:
    """The live processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _parent, group = path.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(group) == leader and state not in "ZX":
            found.append(int(path.parent.name))
    return found


def test_a_last_call_is_made_before_the_process_ends_and_only_if_there_is_one(tmp_path: Path) -> None:
    worker = Worker(TARGET, log=tmp_path / "log", environment=ENVIRONMENT)
    worker.stop(Ask({"do": "noise"}))
    assert not worker.log.exists()
    call(worker, "nothing")
    worker.stop(Ask({"do": "noise"}))
    assert worker.pid is None
    assert "from a child process" in worker.log.read_text()


def test_a_last_call_that_does_not_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "STOP_SECONDS", 0.3)
    worker = Worker(TARGET, log=tmp_path / "log", environment=ENVIRONMENT)
    call(worker, "nothing")
    pid = worker.pid
    assert pid is not None
    worker.stop(Ask({"do": "hang"}))
    assert not is_alive(pid)


def test_a_long_message_is_put_together_from_its_pieces(worker: Worker) -> None:
    text = "".join(map(str, range(1_000_000)))  # some hundred times what a pipe holds
    answer = call(worker, "nothing", out=text)
    assert answer is not None
    assert answer["out"] == text


PARENT = """
import os, signal, sys
from pathlib import Path
from tests.worker_targets import Worker
worker = Worker(sys.argv[1], log=Path(sys.argv[2]))
def on_event(event):
    print(worker.pid, flush=True)
    if sys.argv[4] == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
worker.ask({"do": sys.argv[3]}, on_event=on_event)
"""


@pytest.mark.parametrize("do", ["wait", "hang", "hold"])
@pytest.mark.parametrize("state", ["running", pytest.param("stopped", marks=pytest.mark.slow)])
def test_a_parent_that_is_killed_takes_its_worker_with_it(tmp_path: Path, do: str, state: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, TARGET, str(tmp_path / "log"), do, state],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **ENVIRONMENT},
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert is_alive(pid)
    parent.kill()
    parent.wait()
    wait_until_gone(pid, seconds=5)


def test_a_worker_whose_pipe_closes_ends_even_in_the_middle_of_a_call(tmp_path: Path) -> None:
    """Where no PR_SET_PDEATHSIG exists, the end of stdin has to do."""
    process = subprocess.Popen(
        [sys.executable, "-m", "kdpipe.workers.worker", TARGET, str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **ENVIRONMENT},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    for piece in encode("call", Ask({"do": "hang"})):
        process.stdin.write(piece)
    process.stdin.flush()
    header = json.loads(process.stdout.readline())
    assert (header["kind"], header["type"]) == ("event", "Tell")
    process.stdin.close()
    assert process.wait(timeout=5) == 0
    process.stdout.close()
