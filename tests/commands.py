"""`kdpipe run` on a tiny recipe as a real command: started, ended from outside, and what must hold after that."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.worlds import events_of

How = Literal["group", "parent", "SIGTERM", "SIGINT", "SIGINT to the group", "SIGHUP to the group"]
Event = dict[str, Any]


@dataclass(frozen=True)
class When:
    """The first new event of this kind, of this step and, for parts, of this number."""

    kind: str
    step: str
    part: int | None = None

    def matches(self, event: Event) -> bool:
        wanted = {"event": self.kind, "step": self.step}
        if self.part is not None:
            wanted["part"] = self.part  # type: ignore[assignment]
        return wanted.items() <= event.items()


@dataclass
class Command:
    """`kdpipe run` on a tiny recipe, in a session of its own so that its processes can be told from others."""

    folder: Path
    workspace: Path
    kills: list[int] = field(default_factory=list)
    """How many events there were at each kill."""
    environment: dict[str, str] = field(default_factory=dict)
    before: list[str] = field(default_factory=list)
    """A program that is to start the command, with its arguments."""

    def events(self) -> list[Event]:
        try:
            return events_of(self.workspace)
        except ValueError:  # no run folder yet
            return []

    def size(self) -> int:
        """Bytes of events so far: asked a thousand times a second, where reading them would take a core."""
        return sum(path.stat().st_size for path in self.workspace.glob("runs/*/events.jsonl"))

    def start(self) -> subprocess.Popen[bytes]:
        command = [
            *self.before,
            sys.executable,
            "-m",
            "kdpipe",
            "run",
            "recipe.yaml",
            "--workspace",
            str(self.workspace),
        ]
        with (self.folder / "output").open("ab") as output:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, **self.environment},
            )

    def kill(self, when: When, how: How) -> None:
        """Starts the command and ends it when the event comes; nothing of it is left alive."""
        seen, size = len(self.events()), self.size()
        process = self.start()
        try:
            while not any(when.matches(event) for event in self.events()[seen:]):
                while self.size() == size:
                    assert process.poll() is None, f"ended before {when}: {self.output()}"
                    time.sleep(0.001)
                size = self.size()
            self._end(process, how)
        finally:
            with_group(process.pid, signal.SIGKILL)
            process.wait()
        self.kills.append(len(self.events()))

    def _end(self, process: subprocess.Popen[bytes], how: How) -> None:
        match how:
            case "group":
                os.killpg(process.pid, signal.SIGKILL)
            case "parent":
                process.kill()
            case "SIGTERM" | "SIGINT":
                process.send_signal(signal.Signals[how])
            case "SIGINT to the group" | "SIGHUP to the group":
                os.killpg(process.pid, signal.Signals[how.partition(" ")[0]])
        code = process.wait(timeout=8)
        expected = {"group": -9, "parent": -9, "SIGTERM": 143, "SIGHUP to the group": 129}.get(how, 130)
        assert code == expected, self.output()
        started = time.monotonic()
        while session := members(process.pid):
            assert time.monotonic() - started < 5, f"{session} outlive their parent"
            time.sleep(0.01)

    def finish(self) -> None:
        process = self.start()
        assert process.wait(timeout=300) == 0, self.output()
        assert members(process.pid) == []

    def output(self) -> str:
        return self.output_whole()[-3000:]

    def output_whole(self) -> str:
        path = self.folder / "output"
        return path.read_text(errors="replace") if path.exists() else ""


def members(session: int) -> list[int]:
    """The live processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _parent, _group, owner = path.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(owner) == session and state not in "ZX":
            found.append(int(path.parent.name))
    return found


def cpu_seconds(pid: int) -> float:
    """User and system seconds of a process; 0 when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def with_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return


def assert_nothing_was_done_twice(events: list[Event], kills: list[int]) -> None:
    """At most one part again after each kill, and no checkpoint interval that had been finished before it."""
    for cut in kills:
        for kind, allowed in (("part started", 1), ("part done", 0), ("checkpoint", 0), ("step done", 0)):
            before = {identity(event) for event in events[:cut] if event["event"] == kind}
            again = {identity(event) for event in events[cut:] if event["event"] == kind} & before
            assert len(again) <= allowed, (kind, cut, again)


def identity(event: Event) -> tuple[str, int | None]:
    return event["step"], event.get("part", event.get("optimizer_step"))


def assert_metrics_are_there_once(workspace: Path) -> None:
    for path in workspace.glob("store/*/*/metrics.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        counts = Counter((row["name"], row["optimizer_step"]) for row in rows)
        assert max(counts.values()) == 1, (path, counts.most_common(2))
        if path.parts[-3] == "train":
            per_round = [row["optimizer_step"] for row in rows if row["name"] == "train/loss"]
            assert len(per_round) == 4
