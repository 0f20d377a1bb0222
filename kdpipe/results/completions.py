"""Completions of one step, with the log-probs that student and teacher gave each token.

A table holds columns; tokens are built for the rows that are shown only, so that a round of a million tokens costs as
much as its files. Numbers are those of the files: nothing is scored here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from kdpipe.data.tables import Scores
from kdpipe.results.detokenizer import Detokenizer, TokenText
from kdpipe.results.top_logprobs import KeptStates, Ranked, of_support
from kdpipe.store.step import Step

TableKind = Literal["rollout", "held-out", "answers"]
"""What was sampled to train on; held-out samples that the teacher scored; the held-out answers that were graded."""
Floats: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Token:
    """One token: its log-probs in nats, None where nobody gave one.

    `divergence` is KL(student‖teacher) of the whole distributions here, where that was measured.
    """

    piece: TokenText
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

    was_right: bool | None
    is_right: bool | None
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class CompletionRow:
    """One completion as the tables have it. `question`, `text` and `answer` are model and data text."""

    prompt_id: str
    sample: int
    source: str
    question: str
    expected: str | None
    text: str
    answer: str | None
    is_right: bool | None
    is_truncated: bool

    @property
    def key(self) -> tuple[str, int]:
        """Which completion it is: the problem, and the number of its sample."""
        return self.prompt_id, self.sample


@dataclass(frozen=True, slots=True)
class GradedCompletion(CompletionRow):
    """One completion with its tokens; `teacher` is empty where none scored it."""

    teacher: str
    tokens: tuple[Token, ...]
    change: Change | None


@dataclass(frozen=True, slots=True)
class TokenColumns:
    """Ids and numbers [tokens] of each row; None without any, `teacher` NaN where a token is not scorable."""

    ids: list[npt.NDArray[Any]]
    student: list[Floats | None]
    teacher: list[Floats | None]
    divergence: list[Floats | None]


@dataclass(frozen=True, slots=True)
class CompletionTable:
    """The completions of one step. `places` are the rows' numbers in the scores."""

    kind: TableKind
    step: Step
    rows: Sequence[CompletionRow]
    columns: TokenColumns
    detokenizer: Detokenizer
    scores: dict[int, Scores] = field(default_factory=dict)
    places: dict[int, int] = field(default_factory=dict)
    states: KeptStates | None = None
    changes: dict[tuple[str, int], Change] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def is_graded(self) -> bool:
        return any(row.is_right is not None for row in self.rows)

    @property
    def is_scored(self) -> bool:
        return any(values is not None for values in self.columns.teacher)

    def worst(self, index: int) -> float:
        """The largest disagreement about one scorable token of a row, in nats."""
        student, teacher = self.columns.student[index], self.columns.teacher[index]
        if student is None or teacher is None:
            return 0.0
        gaps = np.abs(student - teacher)
        return float(gaps[~np.isnan(gaps)].max(initial=0.0))

    def flipped(self, index: int) -> bool:
        """Whether the graded answer was right at first and is wrong now, or the other way round."""
        change = self.changes.get(self.rows[index].key)
        return change is not None and change.was_right != change.is_right

    def completion(self, index: int) -> GradedCompletion:
        score = self.scores.get(index)
        return GradedCompletion(
            **asdict(self.rows[index]),
            teacher="" if score is None else score.teacher,
            tokens=self._tokens(index),
            change=self.changes.get(self.rows[index].key),
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
                tuple(
                    (self.detokenizer.after(ids[:place], number), logprob)
                    for number, logprob in ranked[place]
                ),
            )
            for place, piece in enumerate(self.detokenizer.of(ids))
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
