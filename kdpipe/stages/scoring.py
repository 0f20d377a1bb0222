"""Completions scored by a teacher: its prompts, scores, output head, and ids shared with the student.

Token ids travel from the rollout unchanged; only those that the teacher's vocabulary lacks are cut from what it
reads, and get no score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from kdpipe.data.rows import Problem, Rollout
from kdpipe.data.tables import Scores
from kdpipe.engines.handle import ModelHandle
from kdpipe.engines.protocol import ScoreRequest, Scoring, TokenScores
from kdpipe.errors import PreflightError
from kdpipe.models.devices import resolve_device, resolve_dtype
from kdpipe.models.folder import read_head
from kdpipe.models.logprobs import Head
from kdpipe.models.prompting import Text
from kdpipe.models.source import ModelSource
from kdpipe.models.template import known_arguments
from kdpipe.models.tokenizer import Vocabulary, compare_vocabularies
from kdpipe.stages.job import Job
from kdpipe.stages.settings.model import SupportSettings, TeacherSettings

MAX_UNSCORABLE_FRACTION = 0.01
Triple: TypeAlias = "tuple[Problem, list[int], list[int]]"
"""A problem, the student's prompt, and a completion."""
Scored: TypeAlias = "tuple[list[int], TokenScores, npt.NDArray[np.bool_]]"
"""The teacher's prompt, its scores, and which tokens are scorable."""
Number = TypeVar("Number", bound=np.generic)


@dataclass(frozen=True, slots=True)
class TeacherHandle:
    """A teacher's model, how it is asked, and what it shares with the student.

    `swap` are two ids that trade places in all of its distributions: its own end of a turn and the student's.
    """

    model: ModelHandle
    student: Text
    settings: TeacherSettings
    vocabulary: Vocabulary
    swap: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def temperature(self) -> float:
        return self.settings.temperature

    @property
    def text(self) -> Text:
        return self.model.text

    @property
    def num_ids(self) -> int:
        """Ids over which the teacher's distribution is taken: those that both models have in use."""
        return min(self.vocabulary.student_ids, self.vocabulary.teacher_ids)

    def prompt(self, problem: Problem) -> list[int]:
        return self.prompt_ids(problem, self.student.prompt(problem))

    def prompt_ids(self, problem: Problem, student_prompt: list[int]) -> list[int]:
        """The student's prompt, unless the teacher has its own prompt, style, template or vocabulary."""
        lacks = not self.vocabulary.unscorable.isdisjoint(student_prompt)
        if not self.settings.reads_own and not lacks:
            return student_prompt
        return self.text.prompt(problem, self.settings.prompt)


def as_teacher(
    settings: TeacherSettings, model: ModelHandle, *, student: Text, support: SupportSettings
) -> TeacherHandle:
    """`model` as the student's teacher; raises PreflightError when their vocabularies do not fit."""
    teacher = model.text
    names = ("the student", f"teacher {settings.name!r}")
    vocabulary = compare_vocabularies(
        student.tokenizer, teacher.tokenizer, names=names, num_ids=(student.num_ids, teacher.num_ids)
    )
    num_ids = min(vocabulary.student_ids, vocabulary.teacher_ids)
    if support.is_vocabulary and vocabulary.unscorable:
        raise PreflightError(
            f"{names[1]} lacks {len(vocabulary.unscorable)} of the student's ids, so its distribution over the "
            "whole vocabulary is zero where the student's is not",
            hint="set train.objective.kd.support to {teacher_top_k: 64}: the rest becomes a tail bucket",
        )
    if support.top_k > num_ids:
        raise PreflightError(
            f"a support of {support.top_k} ids, but teacher and student share {num_ids}",
            hint="lower top_k, or use support: vocabulary",
        )
    if not settings.template:  # the student's arguments, as far as another family's template knows them
        known = known_arguments(teacher.tokenizer, teacher.style.template_arguments)
        teacher = replace(teacher, style=replace(teacher.style, template_arguments=known))
    return TeacherHandle(
        model=replace(model, text=teacher),
        student=student,
        settings=settings,
        vocabulary=vocabulary,
        swap=_end_ids(vocabulary, student, teacher, names) if settings.swaps_end_token else None,
    )


def _end_ids(
    vocabulary: Vocabulary, student: Text, teacher: Text, names: tuple[str, str]
) -> tuple[int, int] | None:
    """The ids with which student and teacher end a turn, which `end_token: alias` swaps; None if equal.

    Raises PreflightError where one of the two has no such id: there is no column to swap with.
    """
    ends = (student.end_id, teacher.end_id)
    if ends[0] == ends[1]:
        return None
    num_ids = min(vocabulary.student_ids, vocabulary.teacher_ids)
    for token, of in zip(ends, names, strict=True):
        if token in vocabulary.unscorable or token >= num_ids:
            raise PreflightError(
                f"train.objective.end_token is alias, but id {token}, with which {of} ends a turn, is not one of both",
                hint="set train.objective.end_token to mask",
            )
    return ends


def score_completions(
    job: Job,
    rows: Sequence[Triple],
    *,
    teacher: TeacherHandle,
    top_k: int = 0,
    hidden: bool = False,
    supports: Sequence[npt.NDArray[np.int32]] | None = None,
) -> list[Scored]:
    """Teacher prompt ids, scores and scorable [n] of each (problem, student prompt, completion).

    `supports` [n, S] are ids to score at each token besides its `top_k`. Where a
    token is not scorable its log-probs are 0 and its ids 0.
    """
    lacking, swap = teacher.vocabulary.unscorable, teacher.swap
    prompts = [teacher.prompt_ids(problem, prompt) for problem, prompt, _ in rows]
    masks = [np.array([token not in lacking for token in completion], np.bool_) for _, _, completion in rows]
    requests = []
    for place, (prompt, mask, (_, _, completion)) in enumerate(zip(prompts, masks, rows, strict=True)):
        read = [token for token in completion if token not in lacking]
        support = None if supports is None else swapped(supports[place][mask], swap)
        wanted = swapped(np.array(read, np.int32), swap).tolist() if swap else None
        requests.append(ScoreRequest(prompt, read, support, wanted))
    ids = [problem.prompt_id for problem, _, _ in rows]
    with job.asking(ids):
        scores = teacher.model.score(
            requests,
            Scoring(temperature=teacher.temperature, num_ids=teacher.num_ids, top_k=top_k, hidden=hidden),
            progress=job.pulse.tokens,
        )
    job.require_finite(ids, [score.logprobs for score in scores], f"the log-prob of teacher {teacher.name!r}")
    if swap is not None:  # what the teacher has at one id is the score of the other
        scores = [
            score if score.topk_ids is None else replace(score, topk_ids=swapped(score.topk_ids, swap))
            for score in scores
        ]
    return [
        (prompt, _spread(score, mask), mask)
        for prompt, score, mask in zip(prompts, scores, masks, strict=True)
    ]


def _spread(score: TokenScores, mask: npt.NDArray[np.bool_]) -> TokenScores:
    """Scores of the scorable tokens, put back to their places among all tokens."""
    if mask.all():
        return score

    def place(values: npt.NDArray[Number]) -> npt.NDArray[Number]:
        full = np.zeros((len(mask), *values.shape[1:]), values.dtype)
        full[mask] = values
        return full

    columns: dict[str, Any] = {
        field.name: place(found)
        for field in fields(score)
        if (found := getattr(score, field.name)) is not None
    }
    return TokenScores(**columns)


def swapped(ids: npt.NDArray[np.int32], swap: tuple[int, int] | None) -> npt.NDArray[np.int32]:
    """The ids with the two of `swap` in each other's place."""
    if swap is None:
        return ids
    first, second = swap
    return np.where(ids == first, second, np.where(ids == second, first, ids)).astype(np.int32)


def swapped_head(head: Head, swap: tuple[int, int] | None) -> Head:
    """The output head whose distributions have the columns of two ids swapped, which is to swap its rows."""
    if swap is None:
        return head
    order = torch.arange(head.weight_VH.shape[0], device=head.weight_VH.device)
    order[list(swap)] = order[list(reversed(swap))]
    bias_V = None if head.bias_V is None else head.bias_V[order]
    low_rank = None if head.low_rank is None else replace(head.low_rank, up_VR=head.low_rank.up_VR[order])
    return replace(head, weight_VH=head.weight_VH[order], bias_V=bias_V, low_rank=low_rank)


def output_head(job: Job, source: ModelSource, *, num_ids: int) -> Head:
    """The output head of a model over the first `num_ids` ids, in the dtype in which the model computes."""
    device = resolve_device(job.runtime.device)
    dtype, _ = resolve_dtype(source.dtype, device)
    return read_head(
        source.folder,
        num_ids=num_ids,
        dtype=dtype,
        device=device,
        trust_remote_code=source.trust_remote_code,
        adapter=None if source.adapter is None else source.adapter.folder,
    )


def check_scorable(who: str, masks: Sequence[npt.NDArray[np.bool_]]) -> None:
    """Raises PreflightError when more tokens of a round are not scorable than an oversight would explain."""
    total = sum(len(mask) for mask in masks)
    lacking = total - sum(int(mask.sum()) for mask in masks)
    if total and lacking / total > MAX_UNSCORABLE_FRACTION:
        raise PreflightError(
            f"{who} the ids of {lacking} of {total} sampled tokens "
            f"({lacking / total:.1%}), more than {MAX_UNSCORABLE_FRACTION:.0%}",
            hint="choose a teacher with the student's vocabulary, or a student template that avoids those tokens",
        )


def score_metrics(pairs: Sequence[tuple[Rollout, Scores]]) -> dict[str, float]:
    """Token mean of sampler minus teacher log-prob over scorable tokens, and how many are not scorable."""
    differences = [
        np.asarray(row.sampler_logprobs, np.float64)[score.scorable] - score.teacher_logprobs[score.scorable]
        for row, score in pairs
        if row.sampler_logprobs is not None
    ]
    every = np.concatenate(differences) if differences else np.zeros(0)
    found = {"reverse_kl_nats": float(every.mean())} if every.size else {}
    return {**found, "unscorable_tokens": sum(int((~score.scorable).sum()) for _, score in pairs)}
