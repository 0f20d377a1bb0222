"""Reads the completions of a project's steps, with the teacher's scores where they are there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kdpipe.data.graders import UNGRADED, grade, is_judged
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
from kdpipe.errors import RecipeError
from kdpipe.pipeline.identities import Sources
from kdpipe.pipeline.project import Project
from kdpipe.recipe.roles import STUDENT, teacher_role
from kdpipe.results.completions import Change, CompletionRow, CompletionTable, Floats, TokenColumns
from kdpipe.results.detokenizer import Detokenizer
from kdpipe.results.top_logprobs import KeptStates, open_states
from kdpipe.store.stage import Stage
from kdpipe.store.step import Step, step_id_of

KEY = ("prompt_id", "sample")
PLAIN = (*KEY, "question", "expected", "finish_reason", "text", "answer", "correct")


class Reader:
    """Reads the completions of a project from these steps, which are done."""

    def __init__(self, project: Project, done: Sequence[Step]) -> None:
        self.project = project
        self._done = {step.id: step for step in done}
        self.rollout_rounds = [one.round for one in done if one.stage == Stage.ROLLOUT and not one.subject]
        self.evaluated_rounds = [
            one.round for one in done if one.stage == Stage.EVALUATE and one.subject == STUDENT
        ]

    @cached_property
    def detokenizer(self) -> Detokenizer:
        """The student's tokenizer, as far as it is on this machine."""
        return Detokenizer(_tokenizer_file(self.project, self._done))

    def scored_round(self) -> int | None:
        """The last round whose rollouts are scored by all of its teachers, or else the last that was sampled."""
        rounds = self.rollout_rounds
        scored = [number for number in rounds if self._score_steps(number)]
        return max(scored or rounds, default=None)

    def rollout(self, number: int) -> CompletionTable:
        """What was sampled to train round `number`, with the teachers' scores where they are there."""
        step = self._step(step_id_of(Stage.ROLLOUT, None, number))
        path = self._file(step, ROLLOUTS_FILE)
        rows = self._rows(path, ROLLOUTS, "source")
        student = _floats(read_lists(path, ROLLOUTS, "sampler_logprobs"))
        teacher, scores, places, states = self._teachers(number, rows)
        columns = TokenColumns(_ids(path, ROLLOUTS), student, teacher, [None] * len(rows))
        return CompletionTable("rollout", step, rows, columns, self.detokenizer, scores, places, states)

    def held_out(self, number: int) -> CompletionTable | None:
        """The held-out samples of student `number` that the teacher scored; None where none were."""
        step = self._step(step_id_of(Stage.EVALUATE, STUDENT, number))
        if not (self._folder(step) / REVERSE_KL_FILE).exists():
            return None
        path = self._file(step, REVERSE_KL_FILE)
        schema = REVERSE_KL if len(self.project.recipe.teachers) == 1 else REVERSE_KL_OF_SEVERAL
        ids, prompts = _ids(path, schema), _ids(path, schema, "prompt_token_ids")
        known = {row.prompt_id: row for row in self._grades(number)}
        keys = [(row["prompt_id"], row["sample"]) for row in read_rows(path, schema, columns=[*KEY])]
        rows = [
            self._sampled_row(key, known.get(key[0]), completion=own.tolist(), prompt=prompt.tolist())
            for key, own, prompt in zip(keys, ids, prompts, strict=True)
        ]
        student, teacher, scorable, divergence = (
            read_lists(path, schema, name)
            for name in ("sampler_logprobs", "teacher_logprobs", "scorable", "reverse_kl_nats")
        )
        masked = [_masked(values, mask) for values, mask in zip(teacher, scorable, strict=True)]
        columns = TokenColumns(ids, _floats(student), masked, _floats(divergence))
        changes = self._changes(number)
        return CompletionTable("held-out", step, rows, columns, self.detokenizer, changes=changes)

    def answers(self, number: int) -> CompletionTable:
        """The graded held-out answers of student `number`; the teacher did not score these."""
        step = self._step(step_id_of(Stage.EVALUATE, STUDENT, number))
        rows = self._grades(number)
        nothing: list[Floats | None] = [None] * len(rows)
        # Log-probs at temperature 1 of greedy answers are no sampler's: they are not compared with anything.
        columns = TokenColumns(_ids(self._file(step, GRADES_FILE), GRADES), nothing, nothing, nothing)
        changes = self._changes(number)
        return CompletionTable("answers", step, rows, columns, self.detokenizer, changes=changes)

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

    def _rows(self, path: Path, schema: pa.Schema, *more: str) -> list[CompletionRow]:
        return [
            CompletionRow(
                prompt_id=row["prompt_id"],
                sample=row["sample"],
                source=row.get("source", "student"),
                question=row["question"],
                expected=row["expected"],
                text=row["text"],
                answer=row["answer"],
                is_right=row["correct"],
                is_truncated=row["finish_reason"] == "length",
            )
            for row in read_rows(path, schema, columns=[*PLAIN, *more])
        ]

    def _grades(self, number: int) -> list[CompletionRow]:
        step = self._step(step_id_of(Stage.EVALUATE, STUDENT, number))
        return self._rows(self._file(step, GRADES_FILE), GRADES)

    def _changes(self, number: int) -> dict[tuple[str, int], Change]:
        """By problem and sample; evaluations sample a problem alike in every round, so that they are pairs."""
        if number == 0 or 0 not in self.evaluated_rounds:
            return {}
        before = {row.key: row for row in self._grades(0)}
        return {
            row.key: Change(first.is_right, row.is_right, first.text, row.text)
            for row in self._grades(number)
            if (first := before.get(row.key)) is not None
        }

    def _sampled_row(
        self, key: tuple[str, int], known: CompletionRow | None, *, completion: list[int], prompt: list[int]
    ) -> CompletionRow:
        """A held-out sample with what its table leaves out: question, text and grade of this very sample."""
        recipe = self.project.recipe
        text = self.detokenizer.text(completion)
        for stop in recipe.rollout.stop:
            text = text.partition(stop)[0]
        task, graded = recipe.task, UNGRADED
        if known is not None and not is_judged(task.grader):  # nobody's code runs to show a sample
            graded = grade(
                text, known.expected, grader=task.grader, reader=task.headline, question=known.question
            )
        ended = self.detokenizer.of(completion[-1:])
        is_full = len(completion) >= recipe.rollout.max_new_tokens
        return CompletionRow(
            *key,
            source="student",
            question=self.detokenizer.text(prompt) if known is None else known.question,
            expected=None if known is None else known.expected,
            text=text,
            answer=graded.answer,
            is_right=graded.correct,
            is_truncated=is_full and not (ended and ended[0].kind == "special"),
        )

    def _teachers(
        self, number: int, rows: Sequence[CompletionRow]
    ) -> tuple[list[Floats | None], dict[int, Scores], dict[int, int], KeptStates | None]:
        """The teacher's log-prob at each token of each row; scores by row, their places, one teacher's states."""
        mixture = self.project.recipe.mixture
        numbers = {row.key: index for index, row in enumerate(rows)}
        terms: dict[int, list[Floats]] = {}
        scores: dict[int, Scores] = {}
        places: dict[int, int] = {}
        steps = self._score_steps(number)
        for step in steps:
            for place, row in enumerate(read_scores(self._file(step, SCORES_FILE))):
                index = numbers[row.prompt_id, row.sample]
                weight = math.log(mixture[row.teacher]) if mixture else 0.0
                logprobs = _masked(row.teacher_logprobs, row.scorable)
                assert logprobs is not None
                terms.setdefault(index, []).append(logprobs + weight)
                if mixture is None:  # of a mixture the alternatives are those of none of its parts
                    scores[index], places[index] = row, place
        teacher: list[Floats | None] = [
            np.logaddexp.reduce(terms[index]) if index in terms else None for index in range(len(rows))
        ]
        states = self._states(steps[0]) if len(steps) == 1 else None
        return teacher, scores, places, states

    def _states(self, step: Step) -> KeptStates | None:
        recipe = self.project.recipe
        swaps = recipe.train.objective.end_token == "alias"  # noqa: S105 (no password)
        if not recipe.keep.hidden or swaps or not self.detokenizer.num_ids:
            return None
        teacher = recipe.teachers[0]
        source = step.inputs.get(teacher_role(recipe, teacher))
        if source is None:
            return None
        made = self._folder(self.project.plan.step(source.step_id))
        model = made / (source.opens[0] if source.opens else "model")
        temperature, num_ids = recipe.temperature_of(teacher), self.detokenizer.num_ids
        return open_states(self._folder(step), model, temperature=temperature, num_ids=num_ids)


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


def _ids(path: Path, schema: pa.Schema, column: str = "completion_token_ids") -> list[npt.NDArray[Any]]:
    return [values for values in read_lists(path, schema, column) if values is not None]


def _floats(values: Sequence[npt.NDArray[Any] | None]) -> list[Floats | None]:
    return [None if value is None else value.astype(np.float64) for value in values]


def _masked(values: npt.NDArray[Any] | None, scorable: npt.NDArray[Any] | None) -> Floats | None:
    """The log-probs with NaN where the teacher has no such id."""
    if values is None or scorable is None:
        return None
    return np.where(scorable.astype(bool), values.astype(np.float64), np.nan)
