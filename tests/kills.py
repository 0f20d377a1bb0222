"""Ends a real `kdpipe run`, its workers and its MLflow store included, at drawn moments; finds what was lost by it.

A chain is one run: commands are started and ended until one of them finishes by itself. Which moments are drawn
follows from the seed; what the command is doing then is up to the machine, and is written down.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.commands import (
    Command,
    assert_nothing_was_done_twice,
    cpu_seconds,
    members,
    with_group,
)
from tests.disk_watch import DiskWatch, spin
from tests.worlds import leftovers, payload_digests, write_recipe

Target = Literal["moment", "parquet", "tensors", "manifest", "MLflow", "notes"]
Victim = Literal["all", "command", "worker", "mirror"]
How = Literal["SIGKILL", "SIGTERM", "SIGHUP", "SIGINT", "SIGINT to the group"]

AIMED: tuple[Target, ...] = ("parquet", "tensors", "manifest", "MLflow", "notes")
SERVED = {"worker": b"kdpipe.execution.executor:Performer", "mirror": b"kdpipe.tracking.synchronizer:serve"}
TENSOR_FOLDERS = (".tmp-model", ".tmp-trainer", ".tmp-ema", ".tmp-step-")
STOP_SECONDS = 8.0
DEAD_WORKER_SECONDS = 70.0
"""After a worker was killed: MLflow is told that the run failed, and is given 60 seconds for it."""
AT_ONCE_SECONDS = 5.0
ORPHAN_SECONDS = 5.0
NOT_MIRRORED = "not everything is mirrored yet"
MAX_MIRRORED_LATER = 3
MAX_KILLS = 6
"""Of one chain; then the command is left alone."""


def is_in(target: Target, path: Path) -> bool:
    """Whether a change to this path is one of those that `target` aims at."""
    match target:
        case "parquet":
            return path.name.startswith(".tmp-") and path.suffix == ".parquet"
        case "tensors":
            return any(part.startswith(TENSOR_FOLDERS) for part in path.parts)
        case "manifest":
            return path.name == ".tmp-manifest.json"
        case "MLflow":
            return path.name.startswith(("mlflow.db", ".tmp-mlflow"))
        case "notes":
            return path.name in ("events.jsonl", ".tmp-fingerprint.json", ".tmp-metrics.jsonl")
        case "moment":
            return False


@dataclass(frozen=True)
class Drawn:
    """How one command is to be ended: `how`, whom, and when.

    `at` is a fraction of the unbroken run's duration, or of its changes that `target` aims at; `delay` seconds later
    it happens. Duration is counted in CPU seconds of all its processes, so that other work on the machine moves no
    moment. With `again`, a second signal follows after so many seconds.
    """

    how: How
    victim: Victim
    target: Target
    at: float
    delay: float
    again: float | None = None


def draw(dice: random.Random, *, by_signals: bool) -> Drawn:
    """The next end."""
    if by_signals:
        how = dice.choice(("SIGTERM", "SIGHUP", "SIGINT", "SIGINT to the group"))
        again = dice.uniform(0, 0.5) if dice.random() < 0.3 else None
        return Drawn(how, "command", "moment", dice.random(), dice.uniform(0, 0.02), again)
    target = "moment" if dice.random() < 0.5 else dice.choice(AIMED)
    others: list[Victim] = ["command", "mirror"] if target == "MLflow" else ["command", "worker"]
    if target == "moment":
        others = ["command", "worker", "mirror"]
    victim = "all" if dice.random() < 0.5 else dice.choice(others)
    delay = dice.uniform(0, 0.02 if target == "moment" else 0.0005)
    return Drawn("SIGKILL", victim, target, dice.random(), delay)


@dataclass
class Ended:
    """What was seen when a command was ended."""

    how: How
    victim: Victim
    target: Target
    code: int
    seconds: float
    """From the kill or the signal until nobody of the command was left."""
    second_signal: bool
    doing: str
    drafts: list[str]
    wrong: list[str] = field(default_factory=list)


@dataclass
class Chain:
    """One run that was ended several times: what happened, and every loss that was found after it."""

    number: int
    ended: list[Ended] = field(default_factory=list)
    events: int = 0
    losses: list[str] = field(default_factory=list)
    mirrored_later: int = 0
    """Commands beyond the one that finished, as that said that MLflow had not got everything."""
    seconds: float = 0.0


@dataclass(frozen=True)
class Unbroken:
    """What a run leaves that nothing ended."""

    seconds: float
    cpu_seconds: float
    changes: dict[Target, int]
    digests: dict[str, str]
    events: Counter[tuple[str, str, Any]]
    metrics: dict[tuple[str, int], float]


class Study:
    """A recipe of 10,000 parameters, its unbroken run, and chains of broken ones."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder = folder
        write_recipe(folder, **{"tracking": {"enabled": True}, **changes})
        command = Command(folder, folder / "unbroken")
        started, counts, used = time.monotonic(), Counter[Target](), 0.0
        with DiskWatch(command.workspace) as watch:
            process = command.start()
            while process.poll() is None:
                used = max(used, sum(map(cpu_seconds, members(process.pid))))
                for path in watch.changes(0.1):
                    counts.update(target for target in AIMED if is_in(target, path))
        assert process.returncode == 0, command.output()
        assert NOT_MIRRORED not in command.output(), (
            "too busy a machine: not even the unbroken run was mirrored"
        )
        self.unbroken = Unbroken(
            round(time.monotonic() - started, 2),
            round(used, 2),
            dict(counts),
            payload_digests(command.workspace),
            tally(command.events()),
            mirrored(command.workspace),
        )

    def chain(self, number: int, dice: random.Random, *, by_signals: bool = False) -> Chain:
        """Ends a run again and again, at most MAX_KILLS times, and compares what it leaves with the unbroken one."""
        started = time.monotonic()
        folder = self.folder / f"chain-{number}"
        folder.mkdir()
        (folder / "recipe.yaml").write_text((self.folder / "recipe.yaml").read_text())
        command, chain, code, said = Command(folder, folder / "out"), Chain(number), -1, 0
        while len(chain.ended) < MAX_KILLS and code != 0:
            drawn = draw(dice, by_signals=by_signals)
            said = len(command.output_whole())
            code, ended = self._end(command, drawn)
            if ended is not None:
                chain.ended.append(ended)
                chain.losses += ended.wrong
        while code != 0 or NOT_MIRRORED in command.output_whole()[said:]:
            chain.mirrored_later += code == 0
            said = len(command.output_whole())
            process = command.start()
            code = process.wait()
            chain.losses += gone(process)
            if code != 0 or chain.mirrored_later > MAX_MIRRORED_LATER:
                break
        if code != 0:
            chain.losses.append(f"the last command ended with {code}: {command.output()[-600:]}")
        else:
            chain.losses += losses(command, self.unbroken, was_stopped=by_signals)
        chain.events = len(command.events())
        chain.seconds = round(time.monotonic() - started, 1)
        return chain

    def _end(self, command: Command, drawn: Drawn) -> tuple[int, Ended | None]:
        """The exit code, and what was seen; nothing of it when the command finished before it could be ended."""
        output = len(command.output_whole())
        with DiskWatch(command.workspace) as watch:
            process = command.start()
            if not self._is_time(process, watch, drawn):
                return process.wait(), None
        spin(drawn.delay)
        if process.poll() is not None:
            return process.returncode, None
        started = time.monotonic()
        victim = strike(process, drawn)
        second = drawn.again is not None and _waited(process, drawn.again) is None
        if second:
            process.send_signal(signal.SIGTERM)
        code = process.wait(
            timeout=600
        )  # of a mirror killed the command goes on, on a busy machine for minutes
        wrong = gone(process)
        seconds = round(time.monotonic() - started, 2)
        command.kills.append(len(command.events()))
        said = command.output_whole()[output:]
        if "KeyboardInterrupt" in said and "kdpipe" not in said:  # Python itself was only starting
            return code, None
        if code == 0 and (drawn.how != "SIGKILL" or victim in ("mirror", "worker")):
            return 0, None if drawn.how != "SIGKILL" else self._seen(
                command, drawn, victim, code, seconds, wrong
            )
        wrong += unexpected(drawn, victim, code, said)
        limit = AT_ONCE_SECONDS if second else DEAD_WORKER_SECONDS if victim == "worker" else STOP_SECONDS
        if seconds > limit:
            wrong.append(f"{drawn.how}: {seconds} s until it had ended, at most {limit} are promised")
        if drawn.how != "SIGKILL":
            wrong += untold(command.workspace, is_done=self._is_done(command))
        ended = self._seen(command, drawn, victim, code, seconds, wrong)
        ended.second_signal = second
        return code, ended

    def _seen(
        self, command: Command, drawn: Drawn, victim: Victim, code: int, seconds: float, wrong: list[str]
    ) -> Ended:
        events = command.events()
        doing = f"{events[-1]['event']}, {events[-1].get('step', '')}" if events else "starting"
        return Ended(
            drawn.how, victim, drawn.target, code, seconds, False, doing, drafts(command.workspace), wrong
        )

    def _is_done(self, command: Command) -> bool:
        """Whether a signal came when every step was done, so that there was nothing but MLflow to wait for."""
        done = {event["step"] for event in command.events() if event["event"] == "step done"}
        return {step for event, step, _ in self.unbroken.events if event == "step done"} <= done

    def _is_time(self, process: subprocess.Popen[bytes], watch: DiskWatch, drawn: Drawn) -> bool:
        """Waits for the drawn moment; False when the command ended before it."""
        if drawn.target == "moment":
            return _has_used(process, drawn.at * self.unbroken.cpu_seconds)
        count = 1 + int(drawn.at * self.unbroken.changes.get(drawn.target, 0) / 3)  # a resume has less to do
        target = drawn.target
        alive: Callable[[], bool] = lambda: process.poll() is None  # noqa: E731
        return watch.wait(lambda path: is_in(target, path), count=count, alive=alive) is not None


def _has_used(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Waits until the command's processes have used so much CPU time; False when it ended before."""
    for number in itertools.count():
        if number % 10 == 0:  # who they are is asked less often: it means to read all of /proc
            pids = members(process.pid)
        if sum(map(cpu_seconds, pids)) >= seconds:
            break
        if _waited(process, 0.02) is not None:
            return False
    return process.poll() is None


def _waited(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit code, or None when it is still running after so many seconds."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(timeout=seconds)
    return None


def strike(process: subprocess.Popen[bytes], drawn: Drawn) -> Victim:
    """Ends whom was drawn, or the command when that process is not there yet; returns who it was."""
    match drawn.how:
        case "SIGTERM" | "SIGHUP" | "SIGINT":
            process.send_signal(signal.Signals[drawn.how])
            return "command"
        case "SIGINT to the group":
            os.killpg(process.pid, signal.SIGINT)
            return "command"
        case "SIGKILL" if drawn.victim == "all":
            with_group(process.pid, signal.SIGKILL)
            return "all"
    for pid in members(process.pid) if drawn.victim in SERVED else ():
        with contextlib.suppress(OSError):
            if SERVED[drawn.victim] in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                os.kill(pid, signal.SIGKILL)
                return drawn.victim
    process.kill()
    return "command"


def gone(process: subprocess.Popen[bytes]) -> list[str]:
    """A loss when processes of the command outlive it by more than ORPHAN_SECONDS; they are ended then."""
    started = time.monotonic()
    while left := members(process.pid):
        if time.monotonic() - started > ORPHAN_SECONDS:
            with_group(process.pid, signal.SIGKILL)
            return [f"orphans: {left}"]
        time.sleep(0.002)
    return []


def unexpected(drawn: Drawn, victim: Victim, code: int, said: str) -> list[str]:
    """Losses in the exit code, and in what was said to the user."""
    match drawn.how:
        case "SIGKILL" if victim == "worker":
            wanted = [1]
        case "SIGKILL":
            wanted = [-9]
        case "SIGTERM":
            wanted = [143, -15]  # the latter before anything began
        case "SIGHUP":
            wanted = [129, -1] if drawn.again is None else [129, 143, -1, -15]
        case _:
            wanted = [130, -2] if drawn.again is None else [130, 143, -2, -15]
    found = [] if code in wanted else [f"{drawn.how} of {victim}: exit code {code}, expected {wanted[0]}"]
    if "Traceback" in said:
        found.append(f"{drawn.how} of {victim}: a traceback: {said[-600:]}")
    if code > 0 and "to continue: " not in said:
        found.append(f"{drawn.how} of {victim}: it does not say how to continue: {said[-300:]}")
    return found


def drafts(workspace: Path) -> list[str]:
    """What stands half written: names of drafts, and MLflow's journal when a transaction was open."""
    found = sorted({path.name for path in workspace.rglob(".tmp-*")})
    journal = workspace / "mlflow.db-journal"
    with contextlib.suppress(FileNotFoundError):
        if journal.stat().st_size:
            found.append(journal.name)
    return found


# ------------------------------------------------------------------------------------------------ losses


def losses(command: Command, unbroken: Unbroken, *, was_stopped: bool = False) -> list[str]:
    """All that a finished run lost, left behind or did twice; a stop by a signal may write one checkpoint more."""
    workspace, found = command.workspace, []
    digests = payload_digests(workspace)
    if digests != unbroken.digests:
        differ = sorted({step for step, _ in digests.items() ^ unbroken.digests.items()})
        found.append(f"other digests: {differ}")
    if left := leftovers(workspace):
        found.append(f"left behind: {[str(path.relative_to(workspace)) for path in left]}")
    if (workspace / "mlflow.db-journal").exists():
        found.append("left behind: mlflow.db-journal")
    events = command.events()
    try:
        assert_nothing_was_done_twice(events, command.kills)
    except AssertionError as error:
        found.append(f"done again: {error}")
    found += inconsistent(events, unbroken, was_stopped=was_stopped)
    metrics = mirrored(workspace)
    for name, step in unbroken.metrics.keys() - metrics.keys():
        if not name.startswith("speed/"):  # a resume that finds every part there has sampled nothing itself
            found.append(f"MLflow: {name} at step {step} is missing")
    for name, step in metrics.keys() - unbroken.metrics.keys():
        found.append(f"MLflow: {name} at step {step} was not expected")
    for place, value in unbroken.metrics.items():
        is_measured = place[0].startswith(("time/", "speed/"))
        if not is_measured and metrics.get(place, value) != value:
            found.append(f"MLflow: {place} is {metrics[place]}, unbroken {value}")
    return found + twice(workspace) + unfinished(workspace)


def tally(events: Sequence[dict[str, Any]]) -> Counter[tuple[str, str, Any]]:
    """How often each thing happened; not times."""
    return Counter(
        (event["event"], event.get("step", ""), event.get("part", event.get("optimizer_step")))
        for event in events
    )


def inconsistent(events: Sequence[dict[str, Any]], unbroken: Unbroken, *, was_stopped: bool) -> list[str]:
    """Steps that were performed twice, ended before they started, or never started; pieces that nobody knows."""
    found = []
    for kind, step, piece in tally(events).keys() - unbroken.events.keys():
        if kind not in (("step stopped", "checkpoint") if was_stopped else ()):
            found.append(f"events: {kind} of {step} {piece} was not expected")
    for step in {step for kind, step, _ in unbroken.events if kind == "step started"}:
        kinds = [event["event"] for event in events if event.get("step") == step]
        if "step started" not in kinds:
            found.append(f"events: {step} never started")
        elif "step done" in kinds and kinds.index("step done") < kinds.index("step started"):
            found.append(f"events: {step} was done before it started")
        performed = [e for e in events if e["event"] == "step done" and e["step"] == step and not e["reused"]]
        if len(performed) > 1:
            found.append(f"events: {step} was performed {len(performed)} times")
    return found


def _rows(workspace: Path, query: str) -> list[tuple[Any, ...]]:
    """What the workspace's MLflow database says; read as a file, without MLflow."""
    path = workspace / "mlflow.db"
    if not path.exists():
        return []
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        return database.execute(query).fetchall()


def mirrored(workspace: Path) -> dict[tuple[str, int], float]:
    """Every metric in MLflow: (name, step) -> value."""
    return {
        (name, step): value for name, step, value in _rows(workspace, "select key, step, value from metrics")
    }


def twice(workspace: Path) -> list[str]:
    """Metrics that MLflow has more than once, and MLflow runs beyond the one."""
    query = "select key, step, count(*) from metrics group by key, step having count(*) > 1"
    found = [
        f"MLflow: {name} at step {step} is there {count} times"
        for name, step, count in _rows(workspace, query)
    ]
    runs = _rows(workspace, "select name from runs")
    return found if len(runs) == 1 else [*found, f"MLflow: {len(runs)} runs"]


def unfinished(workspace: Path) -> list[str]:
    """An MLflow run that does not say FINISHED although its command did."""
    return [
        f"MLflow: status {status}"
        for (status,) in _rows(workspace, "select status from runs")
        if status != "FINISHED"
    ]


def untold(workspace: Path, *, is_done: bool) -> list[str]:
    """A stopped run that MLflow neither shows as KILLED nor is noted to become so; FINISHED where all was done."""
    ends = {"KILLED", "FINISHED"} if is_done else {"KILLED"}
    for path in workspace.glob("runs/*/mlflow.json"):
        record = json.loads(path.read_text())
        shown = _rows(workspace, "select status from runs")
        if shown and not ends & {record["wanted"], *(status for (status,) in shown)}:
            return [f"MLflow shows {shown[0][0]}, and {record['wanted']} is noted, after a signal"]
    return []
