"""Samples in a terminal: what is chosen, that tokens carry their own numbers, and that model text stays text."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from kdpipe.cli.app import app
from kdpipe.cli.transcript import EDGES, STUDENT_SURER, TEACHER_SURER, transcript_lines
from kdpipe.errors import RecipeError
from kdpipe.pipeline.project import Project
from kdpipe.results.completions import Change, CompletionRow, GradedCompletion, Token
from kdpipe.results.detokenizer import TokenText
from kdpipe.results.samples import Choice, Sample, Samples, choose_samples, samples_json
from tests.worlds import load_tiny, run_near


def bare(text: str, _style: str) -> str:
    return text


def choice(**changes: Any) -> Choice:
    return Choice(
        **{
            "round": None,
            "wrong": False,
            "flipped": False,
            "worst": False,
            "held_out": False,
            "limit": 99,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A finished run of two rounds that keeps ids with the teacher's log-probs."""
    folder = tmp_path_factory.mktemp("samples")
    objective = {"kind": "kd", "kd": {"term": "jsd", "beta": 1.0, "support": {"teacher_top_k": 6}}}
    loaded = load_tiny(folder, rounds=2, train__objective=objective)
    return run_near(loaded, folder / "out")


def table(project: Project, step_id: str, name: str) -> list[dict[str, Any]]:
    entry = project.store.entry(project.plan.step(step_id))
    rows: list[dict[str, Any]] = pq.read_table(entry.folder / name).to_pylist()
    return rows


# ------------------------------------------------------------------------------------------ what is chosen


def test_tokens_carry_the_numbers_of_the_tables(project: Project) -> None:
    found = choose_samples(project, choice())
    assert found.step == "rollout@2"
    rollouts = table(project, "rollout@2", "rollouts.parquet")
    scores = {
        (row["prompt_id"], row["sample"]): row for row in table(project, "teacher-score@2", "scores.parquet")
    }
    assert len(found.shown) == len(rollouts) == 16
    for row, sample in zip(rollouts, found.shown, strict=True):
        completion = sample.completion
        score = scores[row["prompt_id"], row["sample"]]
        assert completion.prompt_id == row["prompt_id"]
        assert [token.student for token in completion.tokens] == row["sampler_logprobs"]
        assert [token.teacher for token in completion.tokens] == score["teacher_logprobs"]
        ranked = [
            list(zip(*pair, strict=True))
            for pair in zip(score["topk_ids"], score["topk_logprobs"], strict=True)
        ]
        for token, pairs in zip(completion.tokens, ranked, strict=True):
            best = sorted((logprob for _, logprob in pairs), reverse=True)[:5]
            assert [logprob for _, logprob in token.alternatives] == best
        assert sample.mismatch["mismatch_nats_max"] < 1e-4


def test_the_pieces_of_a_completion_are_its_text(project: Project) -> None:
    for sample in choose_samples(project, choice()).shown:
        pieces = [token.piece for token in sample.completion.tokens]
        assert "".join(piece.text for piece in pieces if piece.kind == "text") == sample.completion.text


def test_worst_comes_first_and_wrong_leaves_out_what_is_right(project: Project) -> None:
    found = choose_samples(project, choice(worst=True)).shown
    largest = [max(abs(token.gap or 0) for token in one.completion.tokens) for one in found]
    assert largest == sorted(largest, reverse=True)
    assert len(set(largest)) > 1
    wrong = choose_samples(project, choice(wrong=True))
    right = sum(one.completion.is_right for one in found)
    assert wrong.matching == len(found) - right
    assert not any(one.completion.is_right for one in wrong.shown)


def test_held_out_samples_have_the_divergence_of_their_table(project: Project) -> None:
    found = choose_samples(project, choice(held_out=True, round=1))
    assert found.step == "evaluate:student@1"
    rows = table(project, "evaluate:student@1", "reverse_kl.parquet")
    assert len(rows) == len(found.shown) == 4
    for row, sample in zip(rows, found.shown, strict=True):
        tokens = sample.completion.tokens
        assert [token.teacher for token in tokens] == row["teacher_logprobs"]
        assert [token.divergence for token in tokens] == row["reverse_kl_nats"]
        assert sample.completion.change is not None


def test_flipped_answers_are_those_graded_otherwise_than_at_first(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tiny students answer nothing right: a grade of student 0 is turned round where it is read.
    from kdpipe.results.reader import Reader

    grades = Reader._grades

    def turned(reader: Reader, number: int) -> list[CompletionRow]:
        rows = grades(reader, number)
        if number == 0:
            rows[3] = replace(rows[3], is_right=not rows[3].is_right)
        return rows

    before = choose_samples(project, choice(flipped=True)).shown
    monkeypatch.setattr(Reader, "_grades", turned)
    after = choose_samples(project, choice(flipped=True)).shown
    third = table(project, "evaluate:student@0", "grades.parquet")[3]["prompt_id"]
    changed = {one.completion.prompt_id for one in before} ^ {one.completion.prompt_id for one in after}
    assert changed == {third}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (choice(round=7), "round 7: nothing was sampled"),
        (choice(round=7, held_out=True), "student 7: nothing"),
        (choice(round=0, flipped=True), "student 0 is what later"),
    ],
)
def test_what_is_not_there_is_said(project: Project, wanted: Choice, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        choose_samples(project, wanted)


def test_json_has_every_token_with_its_numbers(project: Project) -> None:
    document = json.loads(json.dumps(samples_json(choose_samples(project, choice(limit=1)))))
    [sample] = document["samples"]
    assert document["completions"] == 16
    token = sample["tokens"][0]
    assert token["difference_nats"] == token["student_logprob"] - token["teacher_logprob"]
    assert len(token["teacher_alternatives"]) == 5


# --------------------------------------------------------------------------------------------- how it looks


def tokens(*pairs: tuple[str, float | None]) -> tuple[Token, ...]:
    return tuple(
        Token(TokenText(text, "text"), -0.5, None if gap is None else -0.5 - gap, None, ())
        for text, gap in pairs
    )


def completion(**changes: Any) -> GradedCompletion:
    return GradedCompletion(
        **{
            "prompt_id": "a/0",
            "sample": 0,
            "source": "student",
            "question": "How many?",
            "expected": "4",
            "text": "It is 5",
            "answer": "5",
            "is_right": False,
            "is_truncated": False,
            "teacher": "teacher",
            "tokens": tokens(("It", 0.0), (" is", -2.0), (" 5", 5.0)),
            "change": None,
            **changes,
        }
    )


def lines_of(one: GradedCompletion, *, coloured: bool = False, **mismatch: float) -> list[str]:
    found = Samples("rollout@1", 1, 1, [Sample(one, mismatch, len(one.tokens))])
    return transcript_lines(found, bare, coloured=coloured)


def test_a_token_has_the_colour_of_its_side_and_size() -> None:
    shown = "\n".join(lines_of(completion(), coloured=True))
    assert f"It\x1b[{TEACHER_SURER[2]}m is\x1b[0m\x1b[{STUDENT_SURER[3]}m 5\x1b[0m" in shown


@pytest.mark.parametrize("level", range(4))
def test_a_shade_begins_at_its_edge(level: int) -> None:
    below, at = EDGES[level] - 1e-6, EDGES[level] + 1e-6
    shown = "\n".join(lines_of(completion(tokens=tokens((" below", below), (" at", at))), coloured=True))
    assert f"\x1b[{STUDENT_SURER[level]}m at\x1b[0m" in shown
    assert f"\x1b[{STUDENT_SURER[level]}m below" not in shown


def test_piped_output_has_no_codes_and_lists_the_largest_disagreements_as_numbers() -> None:
    lines = lines_of(completion())
    assert not any("\x1b" in line for line in lines)
    assert "  > It is 5" in lines
    assert "  reverse KL +1.000 nats a token, mean of 3" in lines
    listed = [line.split() for line in lines if re.match(r" +\d+  '", line)]
    assert [(row[0], row[3], row[4]) for row in listed] == [("1", "-2.000", "nats"), ("2", "+5.000", "nats")]
    assert any("+5.000 nats" in line and f"{100 * math.exp(-5.5):.1f}%" in line for line in lines)


def test_lines_are_broken_between_tokens_and_fit_80_columns() -> None:
    words = tokens(*[(f" word{number}", 0.2) for number in range(60)], ("\n", 0.0), (" 漢字" * 30, 1.0))
    lines = lines_of(completion(tokens=words, question="long " * 60), coloured=False)
    assert max(map(len, lines)) <= 80
    text = [line.removeprefix("  > ") for line in lines if line.startswith("  > ")]
    assert all(word.isdigit() for line in text[:6] for word in re.findall(r"word(\S+)", line))
    assert "".join(text) == "".join(token.piece.text for token in words).replace("\n", "")


def test_a_completion_cannot_reach_the_terminal_nor_pass_for_our_own_words() -> None:
    nasty = "[red]4[/red] \x1b[2J\n\nround 9/9  accuracy 100.0%"
    for one in (
        completion(prompt_id="evil\x1b[31m/0", text=nasty, question="How?\x1b]0;owned\x07", tokens=()),
        completion(prompt_id="evil\x1b[31m/0", tokens=tokens((nasty, 0.3), ("\u202e", 5.0))),
        completion(change=Change(True, False, nasty, nasty), tokens=()),
    ):
        shown = lines_of(one)
        assert not any("\x1b" in line or "\x07" in line or "\u202e" in line for line in shown)
        ours = [line for line in shown if "[red]" in line or "round 9/9" in line]
        assert ours
        assert all(line.startswith(("  > ", "  : ", "    ")) for line in ours)


def test_reference_text_does_not_pass_for_a_sample() -> None:
    headings = [lines_of(completion(source=source))[2] for source in ("reference", "student", "teacher")]
    assert headings == [
        "a/0 reference text: wrong",
        "a/0 sample 0: wrong",
        "a/0 sample 0 of the teacher: wrong",
    ]


def test_a_completion_without_an_answer_is_told_so() -> None:
    lines = lines_of(completion(answer=None, is_truncated=True, tokens=()))
    assert lines[-1] == "  expected 4, no answer, cut at the length limit"


def test_a_completion_that_was_trained_on_shows_its_mismatch() -> None:
    ledger = {"mismatch_nats_mean": -1.25e-7, "mismatch_nats_max": 0.031, "mismatch_acted_tokens": 1}
    shown = " ".join(line.strip() for line in lines_of(completion(), **ledger)[-2:])
    wanted = "sampler minus trainer: mean -1.2e-07, at most 3.1e-02 nats; controls act on 1 of 3 tokens"
    assert shown == wanted


def test_the_command_is_plain_where_piped(project: Project) -> None:
    args = ["samples", str(project.loaded.path), "--workspace", str(project.workspace), "--worst"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    assert max(map(len, result.output.splitlines())) <= 80
