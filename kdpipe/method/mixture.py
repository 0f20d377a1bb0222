"""A round's scores joined to its completions: of each one's teacher, or of the mixture of all.

A mixture is one of distributions, `q = log sum_i w_i exp(q_i)`: averaged log-probs would not be one. A token is
scorable where all of its teachers have it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from kdpipe.data.hidden import HiddenFile
from kdpipe.data.rows import Rollout
from kdpipe.data.seeds import permutation
from kdpipe.data.tables import Scores
from kdpipe.errors import ArtifactError, StepError
from kdpipe.method.micro_batch import TeacherHidden, TeacherMixture, TeacherPart
from kdpipe.models.logprobs import Head


@dataclass(frozen=True, slots=True)
class HiddenTeacher:
    """A teacher's kept hidden states with what turns them into distributions."""

    file: HiddenFile
    head: Head
    temperature: float


@dataclass(frozen=True, slots=True)
class TeacherScores:
    """What one teacher scored of a round, with its hidden states where they are kept."""

    name: str
    rows: Sequence[Scores]
    hidden: HiddenTeacher | None = None


@dataclass(frozen=True, slots=True)
class Donor:
    """Source of a completion's shuffled scores: the donor's row and, for each token [n], its position."""

    number: int
    positions: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RoundScores:
    """The scores of every completion of a round, in the order of its rollouts.

    `places[i]` maps a completion's number to its row in the scores of teacher i. `donors` are the sources of shuffled
    scores; `rows` are shuffled already.
    """

    rows: Sequence[Scores]
    teachers: Sequence[TeacherScores]
    places: Sequence[Mapping[int, int]]
    weights: Mapping[str, float] | None
    donors: Sequence[Donor] | None = None

    def distribution(
        self, numbers: Sequence[int], *, top_k: int, device: torch.device
    ) -> TeacherHidden | TeacherMixture:
        """The teachers' distributions at the tokens of these completions, from hidden states."""
        if self.donors is not None:
            [teacher], [place] = self.teachers, self.places  # recipes shuffle a single teacher only
            kept = teacher.hidden
            assert kept is not None
            donors = [self.donors[number] for number in numbers]
            states = [kept.file.rows([place[donor.number]])[donor.positions] for donor in donors]
            return TeacherHidden(torch.cat(states).to(device), kept.head, kept.temperature, top_k)
        parts = [
            part
            for teacher, place in zip(self.teachers, self.places, strict=True)
            if (part := self._part(teacher, place, numbers, device)) is not None
        ]
        if len(self.teachers) == 1:
            return replace(parts[0].states, top_k=top_k)
        num_ids = max(t.hidden.head.weight_VH.shape[0] for t in self.teachers if t.hidden is not None)
        return TeacherMixture(parts, num_ids, top_k)

    def _part(
        self, teacher: TeacherScores, place: Mapping[int, int], numbers: Sequence[int], device: torch.device
    ) -> TeacherPart | None:
        own = [number for number in numbers if number in place]
        if not own or teacher.hidden is None:
            return None
        states = teacher.hidden.file.rows([place[number] for number in own]).to(device)
        tokens = [np.full(len(self.rows[number].scorable), number in place) for number in numbers]
        is_own_N = np.concatenate(tokens)
        place_N = np.where(is_own_N, is_own_N.cumsum() - 1, -1)
        return TeacherPart(
            TeacherHidden(states, teacher.hidden.head, teacher.hidden.temperature),
            torch.from_numpy(place_N).to(device),
            0.0 if self.weights is None else math.log(self.weights[teacher.name]),
        )


def join_scores(
    rollouts: Sequence[Rollout],
    teachers: Sequence[TeacherScores],
    *,
    weights: Mapping[str, float] | None,
    round_number: int,
) -> RoundScores:
    """The scores of each completion: of its one teacher, or with `weights` of the mixture of all.

    Raises ArtifactError when a completion lacks a score, has one too many, or a score belongs to no completion.
    """
    numbers = {(row.prompt_id, row.sample): number for number, row in enumerate(rollouts)}
    places: list[dict[int, int]] = []
    for teacher in teachers:
        place: dict[int, int] = {}
        for index, row in enumerate(teacher.rows):
            number = numbers.get((row.prompt_id, row.sample))
            if number is None or number in place:
                what = "occurs twice" if number is not None else "is not among its rollouts"
                raise _wrong(round_number, row, f"{what} in the scores of {teacher.name!r}")
            place[number] = index
        places.append(place)
    wanted = 1 if weights is None else len(teachers)
    rows = []
    for number, rollout in enumerate(rollouts):
        found = {
            teacher.name: teacher.rows[place[number]]
            for teacher, place in zip(teachers, places, strict=True)
            if number in place
        }
        if len(found) != wanted:
            names = ", ".join(found) or "no teacher"
            what = f"is scored by {names}, expected {'one' if weights is None else f'all {wanted}'}"
            raise _wrong(round_number, rollout, what)
        rows.append(next(iter(found.values())) if weights is None else _mixed(found, weights))
    return RoundScores(_equally_wide(rows), teachers, places, weights)


def _wrong(round_number: int, row: Rollout | Scores, what: str) -> ArtifactError:
    return ArtifactError(
        f"round {round_number}: scores and rollouts hold different rows: {row.prompt_id}, sample {row.sample} {what}",
        hint=f"score again: repeat the run with --force for the teacher-score steps of round {round_number}",
    )


def _mixed(found: Mapping[str, Scores], weights: Mapping[str, float]) -> Scores:
    """One row of the mixture, without any support."""
    rows = list(found.values())
    logprobs, scorable = mixed_logprobs(
        [(row.teacher_logprobs, row.scorable) for row in rows], [weights[name] for name in found]
    )
    return Scores(
        prompt_id=rows[0].prompt_id,
        sample=rows[0].sample,
        teacher=" + ".join(found),
        teacher_prompt_token_ids=[],
        teacher_logprobs=logprobs,
        scorable=scorable,
    )


def mixed_logprobs(
    rows: Sequence[tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]], weights: Sequence[float]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """`log sum_i w_i exp(q_i)` [n] of the teachers' log-probs and masks [n], 0 where not all have the id."""
    terms = [one.astype(np.float64) + math.log(w) for (one, _), w in zip(rows, weights, strict=True)]
    scorable = np.logical_and.reduce([mask for _, mask in rows])
    return np.where(scorable, np.logaddexp.reduce(terms), 0).astype(np.float32), scorable


def _equally_wide(rows: list[Scores]) -> list[Scores]:
    """The rows with supports of one width: two teachers with few ids may have unions of different ones."""
    widths = {row.topk_ids.shape[1] for row in rows if row.topk_ids is not None}
    if len(widths) < 2:
        return rows
    padded = []
    for row in rows:
        assert row.topk_ids is not None
        assert row.topk_logprobs is not None
        more = ((0, 0), (0, max(widths) - row.topk_ids.shape[1]))
        ids = np.pad(row.topk_ids, more, constant_values=-1)
        logprobs = np.pad(row.topk_logprobs, more, constant_values=-np.inf)
        padded.append(replace(row, topk_ids=ids, topk_logprobs=logprobs))
    return padded


def shuffled(
    scores: RoundScores, rollouts: Sequence[Rollout], *, seed: int, round_number: int
) -> RoundScores:
    """The scores in which position t takes position t, wrapped, of another prompt's completion.

    Its sampled-token log-prob, support and hidden state stay together: a distribution is a real one of the teacher, at
    another prefix. The same teacher says as much and as surely, and nothing of it is about the text that is trained on.
    """
    lengths = [len(row.completion_token_ids) for row in rollouts]
    donors = donors_of([row.prompt_id for row in rollouts], lengths, seed=seed, round_number=round_number)
    rows = [
        _taken(own, scores.rows[donor.number], donor.positions)
        for own, donor in zip(scores.rows, donors, strict=True)
    ]
    return replace(scores, rows=rows, donors=donors)


def donors_of(
    prompt_ids: Sequence[str], lengths: Sequence[int], *, seed: int, round_number: int
) -> list[Donor]:
    """The donor of each completion: of the next prompt with any token in a seeded order.

    Raises StepError when no other prompt has a token.
    """
    members: defaultdict[str, list[int]] = defaultdict(list)
    for number, prompt_id in enumerate(prompt_ids):
        members[prompt_id].append(number)
    names = sorted(members)
    order = [names[index] for index in permutation(names, seed, "shuffled-teacher", round_number)]
    givers = {name: [number for number in members[name] if lengths[number]] for name in order}
    found: dict[int, Donor] = {}
    for place, name in enumerate(order):
        others = order[place + 1 :] + order[:place]
        giving = next((givers[other] for other in others if givers[other]), None)
        if giving is None:
            raise StepError(
                f"round {round_number}: no prompt but {name} has a completion with tokens, and a shuffled teacher "
                "needs another",
                hint="raise rollout.prompts",
            )
        for rank, number in enumerate(members[name]):
            donor = giving[rank % len(giving)]
            found[number] = Donor(donor, np.arange(lengths[number]) % lengths[donor])
    return [found[number] for number in range(len(prompt_ids))]


def _taken(own: Scores, donor: Scores, positions: npt.NDArray[np.int64]) -> Scores:
    """The row of `own` with what the teacher said at `positions` of the donor."""
    return replace(
        own,
        teacher_logprobs=donor.teacher_logprobs[positions],
        scorable=donor.scorable[positions],
        topk_ids=None if donor.topk_ids is None else donor.topk_ids[positions],
        topk_logprobs=None if donor.topk_logprobs is None else donor.topk_logprobs[positions],
        tail_logprobs=None if donor.tail_logprobs is None else donor.tail_logprobs[positions],
    )
