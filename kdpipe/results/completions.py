"""Completions with what student and teacher thought of each token, from the tables of one step.

A batch holds columns; tokens are built for the rows that are shown only, so that a round of a million tokens costs as
much as its files. Numbers are those of the files: nothing is scored here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from kdpipe.data.payload import GRADES_FILE, REVERSE_KL_FILE, ROLLOUTS_FILE, SCORES_FILE
from kdpipe.data.tables import (
    GRADES,
    REVERSE_KL,
    REVERSE_KL_OF_SEVERAL,
    ROLLOUTS,
    Scores,
    read_lists,
    read_rows,
    read_scores,
)
from kdpipe.data.tasks.answers import grade
from kdpipe.errors import RecipeError
from kdpipe.pipeline.identities import Sources
from kdpipe.pipeline.project import Project
from kdpipe.recipe.roles import STUDENT, teacher_role
from kdpipe.results.alternatives import KeptStates, Ranked, of_support, open_states
from kdpipe.results.pieces import Piece, Pieces
from kdpipe.store.step import Stage, Step, step_id_of

Kind = Literal["rollout", "held-out", "answers"]
"""What was sampled to train on; held-out samples that the teacher scored; the held-out answers that were graded."""
Floats: TypeAlias = npt.NDArray[np.float64]
PLAIN = (
    "prompt_id",
    "sample",
    "question",
    "expected",
    "finish_reason",
    "text",
    "answer_strict",
    "answer_flexible",
    "correct",
)


@dataclass(frozen=True, slots=True)
class Token:
    """One token: its log-probs in nats, None where nobody gave one.

    `divergence` is KL(student‖teacher) of the whole distributions here, where that was measured.
    """

    piece: Piece
    student: float | None
    teacher: float | None
    divergence: float | None
    alternatives: tuple[tuple[str, float], ...]

    @property
    def gap(self) -> float | None:
        """What the token adds to the reverse KL: student minus teacher log-prob."""
        return None if self.student is None or self.teacher is None else self.student - self.teacher


@dataclass(frozen=True, slots=True)
class Change:
    """The graded answers to one held-out problem, of student 0 and of the student evaluated."""

    was_right: bool
    is_right: bool
    before: str
    after: str

    @property
    def flipped(self) -> bool:
        """Whether the grade differs."""
        return self.was_right != self.is_right


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion for reading. `question`, `text` and pieces are model and data text."""

    prompt_id: str
    sample: int
    source: str
    question: str
    expected: str
    text: str
    answer: str | None
    is_right: bool
    is_truncated: bool
    teacher: str
    tokens: tuple[Token, ...]
    change: Change | None


@dataclass(frozen=True, slots=True)
class _Columns:
    """What the tables say of each row; `teacher` is NaN where a token is not scorable."""

    ids: list[npt.NDArray[Any]]
    student: list[Floats | None]
    teacher: list[Floats | None]
    divergence: list[Floats | None]


@dataclass(frozen=True, slots=True)
class Batch:
    """The completions of one step."""

    kind: Kind
    step: Step
    rows: list[dict[str, Any]]
    columns: _Columns
    pieces: Pieces
    scores: dict[int, Scores] = field(default_factory=dict)
    places: dict[int, int] = field(default_factory=dict)  # of a row, that in the scores
    states: KeptStates | None = None
    changes: dict[tuple[str, int], Change] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def is_scored(self) -> bool:
        """Whether a teacher scored any of it."""
        return any(values is not None for values in self.columns.teacher)

    def gaps(self, index: int) -> Floats:
        """Student minus teacher log-prob at the scorable tokens of a row."""
        student, teacher = self.columns.student[index], self.columns.teacher[index]
        if student is None or teacher is None:
            return np.zeros(0)
        found = student - teacher
        return found[~np.isnan(found)]

    def worst(self, index: int) -> float:
        """The largest disagreement about one token of a row, in nats."""
        return float(np.abs(self.gaps(index)).max(initial=0.0))

    def is_right(self, index: int) -> bool:
        """Whether the row's own text has the right answer."""
        return bool(self.rows[index]["correct"])

    def change(self, index: int) -> Change | None:
        """The graded answers to the row's problem, where there are two to compare."""
        row = self.rows[index]
        return self.changes.get((row["prompt_id"], row["sample"]))

    def flipped(self, index: int) -> bool:
        """Whether the graded answer was right at first and is wrong now, or the other way round."""
        change = self.change(index)
        return change is not None and change.flipped

    def completion(self, index: int, *, headline: str) -> Completion:
        """A row with its tokens."""
        row = self.rows[index]
        score = self.scores.get(index)
        return Completion(
            prompt_id=row["prompt_id"],
            sample=row["sample"],
            source=row.get("source", "student"),
            question=row["question"],
            expected=row["expected"],
            text=row["text"],
            answer=row[f"answer_{headline}"],
            is_right=self.is_right(index),
            is_truncated=row["finish_reason"] == "length",
            teacher="" if score is None else score.teacher,
            tokens=self._tokens(index),
            change=self.change(index),
        )

    def _tokens(self, index: int) -> tuple[Token, ...]:
        columns = self.columns
        ids: list[int] = columns.ids[index].tolist()
        ranked = self._ranked(index) or [[] for _ in ids]
        return tuple(
            Token(
                piece,
                _value(columns.student[index], place),
                _value(columns.teacher[index], place),
                _value(columns.divergence[index], place),
                tuple((self.pieces.after(ids[:place], number), logprob) for number, logprob in ranked[place]),
            )
            for place, piece in enumerate(self.pieces.of(ids))
        )

    def _ranked(self, index: int) -> list[Ranked] | None:
        score = self.scores.get(index)
        if score is None:
            return None
        if (found := of_support(score)) is not None:
            return found
        if self.states is None:
            return None
        return self.states.of(self.places[index], self.columns.ids[index], score.teacher_logprobs)


def _value(values: Floats | None, place: int) -> float | None:
    if values is None or math.isnan(value := float(values[place])):
        return None
    return value


# --------------------------------------------------------------------------------------------- reading


class Reader:
    """Reads the batches of a project from these steps, which are done."""

    def __init__(self, project: Project, done: Sequence[Step]) -> None:
        self.project = project
        self._done = {step.id: step for step in done}
        self._pieces: Pieces | None = None

    @property
    def pieces(self) -> Pieces:
        """The student's tokenizer, as far as it is on this machine."""
        if self._pieces is None:
            self._pieces = Pieces(_tokenizer_file(self.project, self._done))
        return self._pieces

    def rollout_rounds(self) -> list[int]:
        """Rounds whose rollouts are there."""
        return [
            step.round for step in self._done.values() if step.stage == Stage.ROLLOUT and not step.subject
        ]

    def evaluated_rounds(self) -> list[int]:
        """Rounds whose student was evaluated."""
        return [
            step.round
            for step in self._done.values()
            if step.stage == Stage.EVALUATE and step.subject == STUDENT
        ]

    def scored_round(self) -> int | None:
        """The last round whose rollouts are scored by all of its teachers, or else the last that was sampled."""
        rounds = self.rollout_rounds()
        scored = [number for number in rounds if self._score_steps(number)]
        return max(scored or rounds, default=None)

    def rollout(self, number: int) -> Batch:
        """What was sampled to train round `number`, with the teachers' scores where they are there."""
        step = self._step(step_id_of(Stage.ROLLOUT, None, number))
        path = self._file(step, ROLLOUTS_FILE)
        rows = read_rows(path, ROLLOUTS, columns=[*PLAIN, "source"])
        student = _floats(read_lists(path, ROLLOUTS, "sampler_logprobs"))
        teacher, scores, places, states = self._teachers(number, rows)
        ids = [values for values in read_lists(path, ROLLOUTS, "completion_token_ids") if values is not None]
        columns = _Columns(ids, student, teacher, [None] * len(rows))
        return Batch("rollout", step, rows, columns, self.pieces, scores, places, states)

    def held_out(self, number: int) -> Batch | None:
        """The held-out samples of student `number` that the teacher scored; None where none were."""
        step = self._step(step_id_of(Stage.EVALUATE, STUDENT, number))
        if not (self._folder(step) / REVERSE_KL_FILE).exists():
            return None
        path = self._file(step, REVERSE_KL_FILE)
        schema = REVERSE_KL if len(self.project.recipe.teachers) == 1 else REVERSE_KL_OF_SEVERAL
        rows = read_rows(path, schema, columns=["prompt_id", "sample"])
        ids = [values for values in read_lists(path, schema, "completion_token_ids") if values is not None]
        prompts = read_lists(path, schema, "prompt_token_ids")
        known = {row["prompt_id"]: row for row in self._grades(number)}
        for row, completion, prompt in zip(rows, ids, prompts, strict=True):
            self._describe(row, completion, [] if prompt is None else prompt, known.get(row["prompt_id"]))
        teacher = [
            _masked(values, mask)
            for values, mask in zip(
                read_lists(path, schema, "teacher_logprobs"),
                read_lists(path, schema, "scorable"),
                strict=True,
            )
        ]
        columns = _Columns(
            ids,
            _floats(read_lists(path, schema, "sampler_logprobs")),
            teacher,
            _floats(read_lists(path, schema, "reverse_kl_nats")),
        )
        return Batch("held-out", step, rows, columns, self.pieces, changes=self._changes(number))

    def answers(self, number: int) -> Batch:
        """The graded held-out answers of student `number`; the teacher did not score these."""
        step = self._step(step_id_of(Stage.EVALUATE, STUDENT, number))
        path = self._file(step, GRADES_FILE)
        rows = self._grades(number)
        ids = [values for values in read_lists(path, GRADES, "completion_token_ids") if values is not None]
        nothing: list[Floats | None] = [None] * len(rows)
        # Log-probs at temperature 1 of greedy answers are no sampler's: they are not compared with anything.
        columns = _Columns(ids, nothing, nothing, nothing)
        return Batch("answers", step, rows, columns, self.pieces, changes=self._changes(number))

    # the parts of it

    def _step(self, step_id: str) -> Step:
        if step_id not in self._done:
            raise RecipeError(
                f"{step_id}: is not done", hint=f"kdpipe plan {self.project.named}  says what is"
            )
        return self._done[step_id]

    def _folder(self, step: Step) -> Path:
        return self.project.store.entry(step).folder

    def _file(self, step: Step, name: str) -> Path:
        """The path of a file whose sha256 was compared."""
        return self.project.store.entry(step).opened(name) / name

    def _score_steps(self, number: int) -> list[Step]:
        """The steps that scored a round, or none unless all are done."""
        steps = [
            step
            for step in self.project.plan.steps
            if step.stage == Stage.TEACHER_SCORE and step.round == number
        ]
        return steps if all(step.id in self._done for step in steps) else []

    def _grades(self, number: int) -> list[dict[str, Any]]:
        step = self._step(step_id_of(Stage.EVALUATE, STUDENT, number))
        return read_rows(self._file(step, GRADES_FILE), GRADES, columns=list(PLAIN))

    def _changes(self, number: int) -> dict[tuple[str, int], Change]:
        """By problem and sample; evaluations sample a problem alike in every round, so that they are pairs."""
        if number == 0 or 0 not in self.evaluated_rounds():
            return {}
        before = {(row["prompt_id"], row["sample"]): row for row in self._grades(0)}
        return {
            key: Change(before[key]["correct"], row["correct"], before[key]["text"], row["text"])
            for row in self._grades(number)
            if (key := (row["prompt_id"], row["sample"])) in before
        }

    def _describe(
        self,
        row: dict[str, Any],
        completion: npt.NDArray[Any],
        prompt: npt.NDArray[Any] | list[int],
        known: dict[str, Any] | None,
    ) -> None:
        """Adds to a held-out sample what its table leaves out: question, text and grade of this very sample."""
        recipe = self.project.recipe
        text = self.pieces.text(completion.tolist())
        for stop in recipe.rollout.stop:
            text = text.partition(stop)[0]
        row["text"] = text
        row["question"] = known["question"] if known else self.pieces.text(list(prompt))
        row["expected"] = known["expected"] if known else ""
        graded = grade(text, known["expected"], headline=recipe.task.headline) if known else None
        row["answer_strict"] = graded.answer_strict if graded else None
        row["answer_flexible"] = graded.answer_flexible if graded else None
        row["correct"] = graded is not None and graded.correct
        is_cut = len(completion) >= recipe.rollout.max_new_tokens
        ended = self.pieces.of(completion[-1:].tolist())
        row["finish_reason"] = "length" if is_cut and not (ended and ended[0].kind == "special") else "stop"

    def _teachers(
        self, number: int, rows: Sequence[dict[str, Any]]
    ) -> tuple[list[Floats | None], dict[int, Scores], dict[int, int], KeptStates | None]:
        """The teacher's log-prob at each token of each row; scores by row, their places, one teacher's states."""
        recipe = self.project.recipe
        numbers = {(row["prompt_id"], row["sample"]): index for index, row in enumerate(rows)}
        terms: dict[int, list[Floats]] = {}
        scores: dict[int, Scores] = {}
        places: dict[int, int] = {}
        steps = self._score_steps(number)
        for step in steps:
            for place, row in enumerate(read_scores(self._file(step, SCORES_FILE))):
                index = numbers[row.prompt_id, row.sample]
                weight = math.log(recipe.weights[row.teacher]) if recipe.is_mixed else 0.0
                logprobs = _masked(row.teacher_logprobs, row.scorable)
                assert logprobs is not None
                terms.setdefault(index, []).append(logprobs + weight)
                if not recipe.is_mixed:  # of a mixture the alternatives are those of none of its parts
                    scores[index], places[index] = row, place
        teacher: list[Floats | None] = [
            np.logaddexp.reduce(terms[index]) if index in terms else None for index in range(len(rows))
        ]
        states = self._states(steps[0]) if len(steps) == 1 else None
        return teacher, scores, places, states

    def _states(self, step: Step) -> KeptStates | None:
        recipe = self.project.recipe
        swaps = recipe.train.objective.end_token == "alias"  # noqa: S105 (no password)
        if not recipe.keep.hidden or swaps or not self.pieces.knows_text:
            return None
        teacher = recipe.teachers[0]
        source = step.inputs.get(teacher_role(recipe, teacher))
        if source is None:
            return None
        model = self._folder(self.project.plan.step(source.step_id)) / (
            source.opens[0] if source.opens else "model"
        )
        return open_states(
            self._folder(step),
            model,
            temperature=teacher.temperature or recipe.rollout.temperature,
            num_ids=self.pieces.num_ids,
        )


def _tokenizer_file(project: Project, done: dict[str, Step]) -> Path | None:
    """The tokenizer.json of the newest student that is there, or of the model that it began with."""
    made = [
        step
        for step in done.values()
        if step.stage == Stage.TRAIN or (step.stage == Stage.SFT and step.subject == STUDENT)
    ]
    for step in reversed(made):
        entry = project.store.entry(step)
        manifest = entry.manifest()
        name = "model/tokenizer.json"
        if manifest and name not in manifest.dropped and any(file.path == name for file in manifest.files):
            return entry.opened(name) / name
    return Sources(project.loaded, project.workspace).tokenizer_file(STUDENT)


def _floats(values: Sequence[npt.NDArray[Any] | None]) -> list[Floats | None]:
    return [None if value is None else value.astype(np.float64) for value in values]


def _masked(values: npt.NDArray[Any] | None, scorable: npt.NDArray[Any] | None) -> Floats | None:
    """The log-probs with NaN where the teacher has no such id."""
    if values is None or scorable is None:
        return None
    return np.where(scorable.astype(bool), values.astype(np.float64), np.nan)
