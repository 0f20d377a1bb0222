"""What a person sees: plain lines without a terminal, at most 80 columns, and model text that does nothing."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.cli import terminal
from kdpipe.cli.before import plan_lines
from kdpipe.cli.display import JsonLines, Terminal, change_lines, outcome_lines
from kdpipe.cli.round_line import round_line
from kdpipe.cli.terminal import painter
from kdpipe.pipeline.request import Performed, Waiting, Warned
from kdpipe.pipeline.runs import RunFolder
from kdpipe.pipeline.status import State
from kdpipe.results.evaluations import Evaluation
from kdpipe.results.visible_text import visible
from kdpipe.store.step import Step
from kdpipe.workers.pulse import Progressed

SUMMARY = {
    "accuracy": 0.125,
    "accuracy_low": 0.0861,
    "accuracy_high": 0.1781,
    "reverse_kl_nats": 0.4567,
    "reverse_kl_low": 0.4012,
    "reverse_kl_high": 0.5123,
}


def bare(text: str, _style: str) -> str:
    return text


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def step(step_id: str, number: int) -> Step:
    stage, _, rest = step_id.partition("@")[0].partition(":")
    return Step(step_id, stage, number, rest, 0, {}, {}, "f" * 64)  # type: ignore[arg-type]


def state(
    step_id: str, number: int, verdict: Any = "to do", why: str = "", dropped: tuple[str, ...] = ()
) -> State:
    return State(step(step_id, number), verdict, why, None, frozenset(dropped))


def evaluation(number: int, **more: float) -> Evaluation:
    return Evaluation({**SUMMARY, "model": "student", "round": number, **more})


# ------------------------------------------------------------------------------------------- model text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain [red]text[/] é 🙂\tand\nlines", "plain [red]text[/] é 🙂\tand\nlines"),
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("a\rb\x08c\x7f\x9b1m", "a\\x0db\\x08c\\x7f\\x9b1m"),
        ("right\u202eto left\u2066", "right\\u202eto left\\u2066"),
        ("half \ud83d", "half \\ud83d"),
    ],
)
def test_model_text_loses_what_a_terminal_would_act_on(text: str, shown: str) -> None:
    assert visible(text) == shown


@given(st.text())
def test_inert_text_is_printable_and_encodable(text: str) -> None:
    shown = visible(text)
    assert all(character.isprintable() or character in "\n\t" for character in shown)
    shown.encode("utf-8")
    assert visible(shown) == shown


def test_text_of_other_programs_in_a_plan_is_inert() -> None:
    lines = plan_lines("r", [state("train@1", 1, "damaged", "x\x1b[2J")], horizon="", paint=bare)
    assert lines[1].split() == ["train@1", "damaged", "x\\x1b[2J"]


# --------------------------------------------------------------------------------------------- colours


def test_colours_go_to_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert painter(Tty())("x", "red") == "\x1b[31mx\x1b[0m"
    assert painter(io.StringIO())("x", "red") == "x"
    monkeypatch.setenv("NO_COLOR", "1")
    assert painter(Tty())("x", "red") == "x"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert painter(Tty())("x", "red") == "x"


# ---------------------------------------------------------------------------------------------- lines


def test_the_line_of_a_round_fits_80_columns_and_leaves_out_what_was_not_measured() -> None:
    metrics = {
        "score/reverse_kl_nats": -12.3456,
        "rollout/reward_mean": 0.98765,
        "evaluate/accuracy": 1.0,
        "time/rollout_seconds": 40000.0,
        "time/train_seconds": 3661.0,
    }
    line = round_line(290, 290, metrics)
    assert line == "round 290/290  reverse KL -12.346  reward 0.988  accuracy 100.0%  12 h 07 min"
    assert len(line) <= 80
    assert round_line(3, 290, {"rollout/reward_mean": 0.5}) == "round   3/290  reward 0.500  0.0 s"


def test_the_outcome_is_a_table_of_80_columns_with_the_numbers_under_their_names() -> None:
    lines = outcome_lines([evaluation(0), evaluation(290)], bare)
    assert len(lines) == 3
    assert max(map(len, lines)) <= 80
    assert lines[1].split("  ")[0] == "student before"
    assert "12.5%" in lines[1]
    assert lines[2].endswith("0.457 (0.401 to 0.512)")
    for name, value in (("accuracy", "12.5%"), ("95 % interval", "8.6% to 17.8%")):
        assert lines[0].index(name) + len(name) == lines[1].index(value) + len(value)


def test_the_estimate_from_whole_distributions_is_shown_where_there_is_one() -> None:
    exact = {
        "reverse_kl_exact_nats": 0.3111,
        "reverse_kl_exact_low": 0.3012,
        "reverse_kl_exact_high": 0.3234,
    }
    text = "\n".join(outcome_lines([evaluation(0, **exact)], bare))
    assert "0.311 (0.301 to 0.323)" in text
    assert "0.457" not in text


def test_a_model_without_reverse_kl_has_an_empty_place() -> None:
    summary = {name: value for name, value in SUMMARY.items() if not name.startswith("reverse")}
    line = outcome_lines([Evaluation({**summary, "model": "teacher"})], bare)[1]
    assert line == line.rstrip()
    assert line.endswith("8.6% to 17.8%")


def test_changes_are_told_with_their_paired_intervals() -> None:
    lines = change_lines(
        Evaluation(
            {
                "round": 3,
                "problems": 200,
                "reverse_kl_problems": 64,
                "accuracy": 0.5,
                "accuracy_change": 0.25,
                "accuracy_change_low": 0.125,
                "accuracy_change_high": 0.375,
                "accuracy_change_p_value": 0.00012,
                "reverse_kl_change_nats": -0.5,
                "reverse_kl_change_low": -0.75,
                "reverse_kl_change_high": -0.25,
            }
        ),
        4,
    )
    assert lines == [
        "accuracy +25.0 points, paired 95 % interval +12.5 to +37.5, p = 0.00012",
        "held-out reverse KL -0.500 nats, paired 95 % interval -0.750 to -0.250",
        "It worked so far: the student gained 25.0 points and came closer to the teacher; round 3 of 4.",
    ]
    assert change_lines(Evaluation({}), 4) == []


def test_rounds_that_differ_are_told_and_rounds_that_repeat_are_counted() -> None:
    states = [state("rollout@1", 1, "done", dropped=("model", "trainer")), state("train@1", 1, "done")]
    states += [s for n in range(2, 6) for s in (state(f"rollout@{n}", n, "stale", f"train@{n - 1} changes"),)]
    states += [state("rollout@6", 6, "damaged", "no")]
    assert plan_lines("run", states, horizon="the end", paint=bare) == [
        "run: 7 steps, 5 to run",
        "  rollout@1               done    dropped: model, trainer",
        "  train@1                 done",
        "  rollout@2               stale   train@1 changes",
        "  rounds 3 to 5: the same",
        "  rollout@6               damaged no",
        "the end",
    ]


# -------------------------------------------------------------------------------------------- displays


def test_without_a_terminal_progress_is_plain_lines_seconds_apart(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    shown, rollout = Terminal(), step("rollout@1", 1)
    shown.begin(RunFolder(Path("runs/tiny-12345678")), 3, 0)
    shown.step_begins(rollout)
    for done in range(1, 101):
        now[0] += 0.25
        event = Progressed("completions", 200, done, 1000 * done)
        shown.step_event(rollout, event)
    shown.step_ends(rollout, Performed(False, "d", 25.0))
    shown.round_ends(1, 2, {"rollout/reward_mean": 0.5})
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert lines[0] == "tiny-12345678: 3 steps to do"
    assert len(lines) == 2 + 4  # at 5.25, 10.5, 15.75 and 21 seconds
    assert lines[1].startswith("rollout@1: 21/200 completions, 4,000 tokens/s, ")
    assert lines[1].endswith(" left")
    assert lines[-1] == "round 1/2  reward 0.500  0.0 s"


def test_steps_before_the_first_round_leave_a_line_and_waiting_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown, sft = Terminal(), step("sft:student@0", 0)
    shown.step_begins(sft)
    shown.step_event(sft, Waiting())
    shown.step_ends(sft, Performed(True, "d", 0.0))
    shown.step_ends(sft, Performed(False, "d", 61.2))
    assert capsys.readouterr().err.splitlines() == [
        "sft:student@0: another run is making it; waiting to reuse it",
        "sft:student@0: reused from another run",
        "sft:student@0: 1 min 01 s",
    ]


def test_a_warning_of_a_step_is_told_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    event = Warned("two\nlines\x1b[2J")
    Terminal().step_event(step("sft:student@0", 0), event)
    JsonLines().step_event(step("sft:student@0", 0), event)
    captured = capsys.readouterr()
    assert captured.err == "warning: two\nlines\\x1b[2J\n"
    assert json.loads(captured.out) == {"event": "warning", "message": event.text}


def test_a_terminal_gets_a_live_line_that_is_gone_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = Tty()
    monkeypatch.setattr(terminal.sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    shown, rollout = Terminal(), step("rollout@1", 1)
    shown.step_begins(rollout)
    event = Progressed("completions", 200, 7, 1000)
    shown.step_event(rollout, event)
    shown.step_event(rollout, Waiting())
    shown.step_ends(rollout, Performed(False, "d", 1.0))
    text = stream.getvalue()
    assert "7/200 completions" in text
    assert "waiting to reuse it" in text
    assert text.endswith("\x1b[2K")  # the live line is erased
    shown.stop()


def test_json_lines_are_one_document_each_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    shown, rollout = JsonLines(), step("rollout@1", 1)
    shown.begin(RunFolder(Path("runs/tiny-12345678")), 3, 0)
    shown.step_begins(rollout)
    shown.step_event(rollout, Waiting())
    shown.step_ends(rollout, Performed(False, "d", 1.0, 5))
    shown.round_ends(1, 2, {"rollout/reward_mean": 0.5})
    shown.stop()
    captured = capsys.readouterr()
    events = [json.loads(line) for line in captured.out.splitlines()]
    assert [event["event"] for event in events] == ["begin", "step begins", "step ends", "round ends"]
    assert captured.err == ""
