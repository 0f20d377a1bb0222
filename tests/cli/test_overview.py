"""Status at a glance: the grid of real plans, a run seen while it goes on, and a watch that ends by itself."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kdpipe.cli import terminal
from kdpipe.cli.overview import grid_lines, overview, progress_line, seconds_left, status_lines
from kdpipe.pipeline.progress import PROGRESS, ProgressFile, read_progress
from kdpipe.pipeline.project import open_project
from kdpipe.pipeline.runs import RunEvent, RunFolder
from kdpipe.results.measures import Measures
from kdpipe.results.verdict import verdict
from kdpipe.workers.pulse import Progressed
from tests.worlds import Watcher, load_tiny, run_near


def plain(text: str, _style: object) -> str:
    return text


def marks_of(lines: list[str], name: str) -> str:
    return "".join(line.removeprefix(f"  {name}").strip() for line in lines if line.startswith(f"  {name} "))


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A finished run of one round, and what another process saw of it at its first progress of train@1."""
    folder = tmp_path_factory.mktemp("overview")
    loaded = load_tiny(folder, rounds=1)
    watcher = Watcher()
    found: dict[str, Any] = {"folder": folder}

    def look(step: str, event: dict[str, Any]) -> None:
        if step != "train@1" or event["kind"] != "progress" or "live" in found or not event["done"]:
            return
        command = [sys.executable, "-m", "kdpipe.cli.app", "status", str(folder / "recipe.yaml")]
        result = subprocess.run(
            [*command, "--workspace", str(folder), "--json"], capture_output=True, text=True, check=True
        )
        found["live"] = json.loads(result.stdout)

    watcher.on_event = look
    run_near(loaded, folder, watcher=watcher)
    return found


def test_a_run_is_seen_from_another_process_while_it_goes_on(seen: dict[str, Any]) -> None:
    live = seen["live"]
    assert live["running"] is True
    assert live["current"] == live["progress"]["step"] == "train@1"
    assert live["progress"]["total"] >= live["progress"]["done"] >= 0
    assert live["grid"]["rollout"] == {"1": "done"}
    assert live["grid"]["train"] == {"1": "running"}
    assert live["grid"]["evaluate-student"] == {"0": "done", "1": "to do"}


def test_a_finished_run_is_done_everywhere_and_leaves_no_progress(seen: dict[str, Any]) -> None:
    project = open_project(load_tiny(seen["folder"], rounds=1), seen["folder"])
    found = overview(project)
    assert not found.running
    assert {cell for row in found.to_json()["grid"].values() for cell in row.values()} == {"done"}
    assert found.to_json()["result"] == verdict(Measures(project)).headline
    assert found.result in status_lines(found, plain)
    assert not (project.run.path / PROGRESS).exists()


def test_a_longer_and_a_changed_recipe_show_what_is_left_and_what_is_stale(seen: dict[str, Any]) -> None:
    further = overview(open_project(load_tiny(seen["folder"], rounds=3), seen["folder"]))
    assert further.result is not None
    so_far = further.result
    assert so_far.endswith("; round 1 of 3.")
    further.project.run.event("step started", step="train@2")
    assert f"{so_far.removesuffix('.')}, then it broke off in train@2." in status_lines(further, plain)
    longer = grid_lines(further, plain)
    assert marks_of(longer, "train") == "#.."
    changed = load_tiny(seen["folder"], rounds=1, train__optimizer={"learning_rate": 0.5})
    lines = grid_lines(overview(open_project(changed, seen["folder"])), plain)
    assert marks_of(lines, "rollout") == "#"
    assert marks_of(lines, "train") == "~"
    load_tiny(seen["folder"], rounds=1)


def test_a_grid_of_130_rounds_fits_80_columns_and_shows_each_once(tmp_path: Path) -> None:
    lines = grid_lines(overview(open_project(load_tiny(tmp_path, rounds=130), tmp_path)), plain)
    assert max(map(len, lines)) <= 80
    assert marks_of(lines, "rollout") == "." * 130
    numbers = [int(number) for line in lines if line.startswith("  round ") for number in line.split()[1:]]
    assert numbers == list(range(0, 131, 10))


def test_progress_tells_rate_and_time_left_and_is_written_once_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = 100.0
    monkeypatch.setattr("kdpipe.pipeline.progress.time.monotonic", lambda: clock)
    file = ProgressFile(tmp_path)
    file.note("rollout@1", Progressed("completions", done=0, total=50, tokens=0))
    clock = 100.5
    file.note("rollout@1", Progressed("completions", done=5, total=50, tokens=100))
    early = read_progress(tmp_path)
    assert early is not None
    assert (early.done, early.tokens_per_second, early.seconds_left) == (0, None, None)
    clock = 102.0
    file.note("rollout@1", Progressed("completions", done=10, total=50, tokens=200))
    found = read_progress(tmp_path)
    assert found is not None
    assert (found.done, found.tokens_per_second, found.seconds_left) == (10, 100.0, 8.0)
    file.clear()
    assert list(tmp_path.iterdir()) == []


def test_what_a_kill_left_of_a_progress_is_gone_after_the_next_command(seen: dict[str, Any]) -> None:
    loaded = load_tiny(seen["folder"], rounds=1)
    run = open_project(loaded, seen["folder"]).run.path
    for name in (PROGRESS, f".tmp-{PROGRESS}"):
        (run / name).write_text("{")
    run_near(loaded, seen["folder"])
    assert [path.name for path in run.iterdir() if PROGRESS in path.name] == []


def test_a_torn_or_foreign_progress_is_none_and_a_refusing_disk_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / PROGRESS).write_text('{"step": "x"')
    assert read_progress(tmp_path) is None
    (tmp_path / PROGRESS).write_text('{"other": 1}')
    assert read_progress(tmp_path) is None
    ProgressFile(tmp_path / "missing").note("train@1", Progressed("steps", done=0, total=5, tokens=0))


def test_watching_prints_what_changed_and_ends_with_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal.time, "sleep", lambda _seconds: None)
    looks = iter([(["run", "1 of 2"], True), (["run", "2 of 2"], True), (["run", "2 of 2"], False)])
    terminal.watch_lines(lambda: next(looks))
    assert capsys.readouterr().out.splitlines() == ["run", "1 of 2", "2 of 2"]


def test_ctrl_c_leaves_a_watch_quietly(capsys: pytest.CaptureFixture[str]) -> None:
    def look() -> tuple[list[str], bool]:
        raise KeyboardInterrupt

    terminal.watch_lines(look)
    assert capsys.readouterr().err == ""


def test_the_line_says_how_old_the_last_report_is(seen: dict[str, Any]) -> None:
    from dataclasses import replace

    from kdpipe.pipeline.progress import Progress

    at = Progress("train@1", "optimizer steps", 2, 8, 1234.5, 61.0, time.time() - 30)
    found = replace(overview(open_project(load_tiny(seen["folder"], rounds=1), seen["folder"])), progress=at)
    assert progress_line(found).startswith(
        "now: train@1, 2/8 optimizer steps, 1,234 tokens/s, 1 min left, reported 30 s"
    )


def event(kind: str, step: str, at: float, *, reused: bool = False) -> RunEvent:
    return RunEvent(at, kind, step, reused)


def test_time_left_is_what_each_stage_took_times_what_is_to_do(seen: dict[str, Any]) -> None:
    """Round 1 is done of three: rollout took 2 s, scores 3 s, training 20 s, evaluation 5 s."""
    states = overview(open_project(load_tiny(seen["folder"], rounds=3), seen["folder"])).states
    names = {"rollout@1": 2.0, "teacher-score@1": 3.0, "train@1": 20.0, "evaluate:student@1": 5.0}
    events = list[RunEvent]()
    for step, seconds in names.items():
        events += [event("step started", step, 100.0), event("step done", step, 100.0 + seconds)]
    evaluations = [state for state in states if state.step.id.startswith("evaluate:student@")]
    to_do = sum(state.verdict != "done" for state in evaluations)
    whole = 2 * (2 + 3 + 20) + 5 * to_do
    assert seconds_left(states, events, now=200.0) == whole
    begun = [*events, event("step started", "train@2", 200.0)]
    assert seconds_left(states, begun, now=208.0) == whole - 8
    assert seconds_left(states, begun, now=900.0) == whole - 20  # no step takes less than nothing
    assert seconds_left(states, events[2:], now=200.0) is None  # no rollout yet: nobody knows
    reused = [
        *events,
        event("step started", "rollout@1", 0.0),
        event("step done", "rollout@1", 90.0, reused=True),
    ]
    assert seconds_left(states, reused, now=200.0) == whole
    stopped = [*events, event("step started", "rollout@2", 0.0), event("step stopped", "rollout@2", 90.0)]
    assert seconds_left(states, stopped, now=200.0) == whole


def test_a_line_of_events_without_time_or_kind_is_left_out(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.event("step started", step="train@2")
    with run.events_path.open("a") as file:
        file.write('{"event": "step done", "step": "train@2"}\n{"time": 5.0}\n{"time": 5.0, "event"')
    assert [(event.kind, event.step) for event in run.events()] == [("step started", "train@2")]


def test_a_run_with_nothing_to_do_has_no_time_left(seen: dict[str, Any]) -> None:
    project = open_project(load_tiny(seen["folder"], rounds=1), seen["folder"])
    assert seconds_left(overview(project).states, project.run.events(), now=time.time()) is None


def test_the_line_says_how_long_the_whole_run_takes_still(seen: dict[str, Any]) -> None:
    from dataclasses import replace

    found = overview(open_project(load_tiny(seen["folder"], rounds=1), seen["folder"]))
    found = replace(found, current="train@1", seconds_left=125.0)
    assert progress_line(found) == "now: train@1; the whole run: about 2 min 05 s left"
