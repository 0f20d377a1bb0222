"""The completions that `kdpipe samples` shows: of a round's rollouts, or of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import JsonValue

from kdpipe.data.payload import COMPLETIONS_FILE
from kdpipe.data.tables import COMPLETIONS, read_lists, read_rows
from kdpipe.errors import RecipeError
from kdpipe.method.mismatch import acted, ledger, mismatch
from kdpipe.pipeline.project import Project
from kdpipe.results.completions import CompletionTable, GradedCompletion, Token
from kdpipe.results.reader import Reader
from kdpipe.store.stage import Stage
from kdpipe.store.step import step_id_of


@dataclass(frozen=True, slots=True)
class Choice:
    """What was asked for; `round` None is the newest there is."""

    round: int | None
    wrong: bool
    flipped: bool
    worst: bool
    held_out: bool
    limit: int


@dataclass(frozen=True, slots=True)
class Sample:
    """A completion, and what sampler and trainer disagree about once it was trained on (see mismatch.py)."""

    completion: GradedCompletion
    mismatch: dict[str, float]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Samples:
    """Those of one step that were asked for; `matching` of its `total` would be, without a limit."""

    step: str
    total: int
    matching: int
    shown: list[Sample]


def choose_samples(project: Project, choice: Choice) -> Samples:
    """The completions of that choice. Raises RecipeError where there are none to choose from."""
    for flag, is_asked in (("--wrong", choice.wrong), ("--flipped", choice.flipped)):
        if is_asked and not project.recipe.is_graded:
            raise RecipeError(
                f"{flag}: task.grader is none, so no answer is right or wrong",
                hint="--worst shows those about which student and teacher disagree most",
            )
    reader = Reader(project, [step for step in project.plan.steps if project.store.entry(step).manifest()])
    table = _table(reader, choice)
    found = [
        index
        for index, row in enumerate(table.rows)
        if not (choice.wrong and row.is_right) and (table.flipped(index) or not choice.flipped)
    ]
    if choice.worst:
        found.sort(key=table.worst, reverse=True)
    ledgers = _ledgers(project, table) if table.kind == "rollout" else {}
    shown = [
        Sample(table.completion(index), ledgers.get(index, {}), len(table.columns.ids[index]))
        for index in found[: choice.limit]
    ]
    return Samples(table.step.id, len(table), len(found), shown)


def _table(reader: Reader, choice: Choice) -> CompletionTable:
    """The completions to choose from: held-out ones if asked for, and of round 0, which has no others."""
    recipe = reader.project.named
    if not (choice.held_out or choice.flipped or choice.round == 0):
        rounds = reader.rollout_rounds
        number = max(rounds, default=None) if choice.round is None else choice.round
        if number in rounds:
            return reader.rollout(number)
        if choice.round is not None:
            raise RecipeError(f"round {choice.round}: nothing was sampled yet", hint=f"kdpipe run {recipe}")
    rounds = reader.evaluated_rounds
    number = max(rounds, default=None) if choice.round is None else choice.round
    if number is None or number not in rounds:
        which = "nothing" if number is None else f"student {number}: nothing"
        raise RecipeError(f"{which} was sampled or evaluated yet", hint=f"kdpipe run {recipe}")
    if choice.flipped and number == 0:
        raise RecipeError(
            "--flipped: student 0 is what later students are compared with", hint="leave --round out"
        )
    held_out = reader.held_out(number) if choice.held_out or choice.worst else None
    if choice.held_out and held_out is None:
        raise RecipeError(
            f"student {number}: the teacher scored no held-out samples of it",
            hint="evaluate.reverse_kl_problems says how many problems are sampled for that",
        )
    return held_out or reader.answers(number)


def _ledgers(project: Project, table: CompletionTable) -> dict[int, dict[str, float]]:
    """What the sampler and the trainer disagree about, of each row that was trained on."""
    number = table.step.round
    entry = project.store.entry(project.plan.step(step_id_of(Stage.TRAIN, None, number)))
    if entry.manifest() is None:
        return {}
    path = entry.opened(COMPLETIONS_FILE) / COMPLETIONS_FILE
    keys = read_rows(path, COMPLETIONS, columns=["prompt_id", "sample"])
    values = read_lists(path, COMPLETIONS, "proximal_logprobs")
    proximal = {(row["prompt_id"], row["sample"]): found for row, found in zip(keys, values, strict=True)}
    objective = project.recipe.train.objective.in_round(number)
    ledgers = {}
    for index, row in enumerate(table.rows):
        known, sampler = proximal.get(row.key), table.columns.student[index]
        if known is None or sampler is None:
            continue
        differences = mismatch(sampler, known)
        tokens = int(acted(objective, differences).sum())
        ledgers[index] = {**ledger(objective, differences), "mismatch_acted_tokens": tokens}
    return ledgers


def samples_json(found: Samples) -> dict[str, JsonValue]:
    """All of it as one document."""
    return {
        "step": found.step,
        "completions": found.total,
        "matching": found.matching,
        "samples": [_sample_json(sample) for sample in found.shown],
    }


def _sample_json(sample: Sample) -> dict[str, JsonValue]:
    completion = sample.completion
    document: dict[str, JsonValue] = {
        "prompt_id": completion.prompt_id,
        "sample": completion.sample,
        "source": completion.source,
        "question": completion.question,
        "expected": completion.expected,
        "text": completion.text,
        "answer": completion.answer,
        "correct": completion.is_right,
        "truncated": completion.is_truncated,
        "tokens": [_token_json(token) for token in completion.tokens],
        **sample.mismatch,
    }
    if completion.change is not None:
        document["graded_before"] = {"correct": completion.change.was_right, "text": completion.change.before}
        document["graded_now"] = {"correct": completion.change.is_right, "text": completion.change.after}
    return document


def _token_json(token: Token) -> dict[str, JsonValue]:
    """A token with its numbers in nats; those that nobody gave are left out."""
    numbers = {
        "student_logprob": token.student,
        "teacher_logprob": token.teacher,
        "difference_nats": token.gap,
        "divergence_nats": token.divergence,
    }
    document: dict[str, JsonValue] = {"text": token.piece.text, "kind": token.piece.kind}
    document |= {name: value for name, value in numbers.items() if value is not None}
    if token.alternatives:
        document["teacher_alternatives"] = [
            {"text": text, "logprob": logprob} for text, logprob in token.alternatives
        ]
    return document
