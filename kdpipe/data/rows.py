"""The rows that travel between stages, and their invariants. No tensors, no paths.

Alignment, everywhere: index t of a per-token list is completion token t. Log-probs are in nats and
belong to the *sampled* token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length"]
Source = Literal["student", "reference", "teacher"]
TurnRole = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says in a conversation."""

    role: TurnRole
    content: str


@dataclass(frozen=True, slots=True)
class Problem:
    """One question with its reference, if it has one.

    `expected` is the reference answer as text (a number for GSM8K), `solution` the reference text that
    ends in it; both are None for a prompt alone. `prompt_id` is `<task>/<split>/<row>` or the record's own `id`.
    `fields` are the record's other texts and numbers by name, `turns` what was said before the question: a system
    turn at most as the first.
    """

    prompt_id: str
    question: str
    expected: str | None
    solution: str | None
    fields: Mapping[str, str | int | float] = field(default_factory=dict)
    turns: tuple[Turn, ...] = ()

    @property
    def normalized(self) -> tuple[str, ...]:
        """What is said up to the question, less case and blanks: problems of equal texts are one problem."""
        said = [turn.content for turn in self.turns if turn.role != "system"]
        return tuple(" ".join(text.casefold().split()) for text in (*said, self.question))


@dataclass(frozen=True, slots=True)
class Graded:
    """What a grader read in one text, whether that is right, and the reward.

    All are None where nothing is graded. `answer` is what the reader in use read; the strict and the flexible answer
    are there where numbers are graded.
    """

    answer: str | None
    correct: bool | None
    reward: float | None
    answer_strict: str | None = None
    answer_flexible: str | None = None


@dataclass(frozen=True, slots=True)
class Rollout:
    """One row of `rollouts.parquet`: a completion, its behaviour log-probs and its grade.

    `completion_token_ids` holds the final end token when `finish_reason` is `stop`; `text` does not.
    `sampler_logprobs` are at the sampling temperature, None unless `source` is `student`.
    """

    prompt_id: str
    sample: int
    question: str
    expected: str | None
    prompt_token_ids: list[int]
    completion_token_ids: list[int]
    sampler_logprobs: list[float] | None
    source: Source
    finish_reason: FinishReason
    text: str
    answer_strict: str | None
    answer_flexible: str | None
    answer: str | None
    correct: bool | None
    reward: float | None

    def __post_init__(self) -> None:
        if not self.prompt_token_ids:
            raise ValueError(f"{self.prompt_id}: a prompt has at least one token")
        if self.sampler_logprobs is not None and len(self.sampler_logprobs) != len(self.completion_token_ids):
            raise ValueError(
                f"{self.prompt_id}, sample {self.sample}: {len(self.sampler_logprobs)} sampler "
                f"log-probs for {len(self.completion_token_ids)} completion tokens"
            )
