"""Held-out completions scored by each problem's own teacher, or by the mixture of all.

Scores are log-probs of the sampled tokens and, where the engine gives hidden states, the divergence of the two whole
distributions at each position.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from kdpipe.data.tables import TableRow
from kdpipe.engines.handle import ModelHandle
from kdpipe.engines.protocol import ScoreRequest, Scoring
from kdpipe.method.micro_batch import TeacherHidden, TeacherMixture, TeacherPart, reverse_kl
from kdpipe.method.mixture import mixed_logprobs
from kdpipe.models.devices import resolve_device
from kdpipe.models.logprobs import Head
from kdpipe.stages.job import Job
from kdpipe.stages.scoring import Scored, TeacherHandle, Triple, output_head, score_completions, swapped_head
from kdpipe.stages.settings.model import teaches
from kdpipe.stages.settings.stage import EvaluateSettings


def held_out_scores(
    job: Job,
    triples: Sequence[Triple],
    against: Sequence[TeacherHandle],
    exact: Exact | None,
    *,
    weights: Mapping[str, float] | None,
) -> list[TableRow]:
    """What `reverse_kl.parquet` has of each completion's teacher, or of the mixture of all.

    One teacher after another is asked. `weights` are those of a mixture, None where each problem has its own teacher.
    """
    student_hidden = exact.student_hidden(triples) if exact else []
    scored: list[list[tuple[str, Scored]]] = [[] for _ in triples]
    for teacher in against:
        own = [
            index for index, (problem, _, _) in enumerate(triples) if teaches(teacher.settings.only, problem)
        ]
        if not own:
            continue
        found = score_completions(job, [triples[i] for i in own], teacher=teacher, hidden=exact is not None)
        for index, scores in zip(own, found, strict=True):
            scored[index].append((teacher.name, scores))
    divergences = exact.divergences(student_hidden, scored) if exact else [None] * len(triples)
    if exact:
        ids = [problem.prompt_id for problem, _, _ in triples]
        job.require_finite(ids, divergences, "the divergence from the teacher")
    return [_joined(rows, weights, divergence) for rows, divergence in zip(scored, divergences, strict=True)]


def _joined(
    rows: Sequence[tuple[str, Scored]], weights: Mapping[str, float] | None, divergence: Any
) -> TableRow:
    names = [name for name, _ in rows]
    logprobs, scorable = rows[0][1][1].logprobs, rows[0][1][2]
    if weights is not None:
        scores = [(score.logprobs, mask) for _, (_, score, mask) in rows]
        logprobs, scorable = mixed_logprobs(scores, [weights[name] for name in names])
    prompts = [prompt for _, (prompt, _, _) in rows]
    return {
        "teacher_prompt_token_ids": prompts[0],
        "teacher_logprobs": logprobs,
        "scorable": scorable,
        "reverse_kl_nats": divergence,
        "teachers": names,
        "teachers_prompt_token_ids": prompts,
    }


def has_exact(student: ModelHandle, against: Sequence[TeacherHandle]) -> bool:
    """Whether all distributions are at hand; a teacher that lacks ids gives them no probability at all."""
    models = (student, *(teacher.model for teacher in against))
    gives_hidden = all("hidden" in model.open_engine().abilities for model in models)
    return gives_hidden and not any(teacher.vocabulary.unscorable for teacher in against)


class Exact:
    """The whole distributions of student and teachers at each position of the sampled completions."""

    def __init__(
        self, settings: EvaluateSettings, job: Job, student: ModelHandle, against: Sequence[TeacherHandle]
    ) -> None:
        assert settings.rollout is not None
        self._temperature = settings.rollout.temperature
        self._weights = settings.weights
        self._chunk = job.runtime.head_chunk_tokens
        self._student = student
        self._num_ids = student.text.num_ids
        self._device = resolve_device(job.runtime.device)
        self._head = output_head(job, student.source, num_ids=self._num_ids)
        self._teachers = {}
        for teacher in against:
            head = output_head(job, teacher.model.source, num_ids=self._num_ids)
            self._teachers[teacher.name] = (swapped_head(head, teacher.swap), teacher.temperature)

    def student_hidden(self, triples: Sequence[Triple]) -> list[Any]:
        """Hidden states [n, H] of each completion."""
        scores = self._student.score(
            [ScoreRequest(prompt, completion) for _, prompt, completion in triples],
            Scoring(temperature=self._temperature, num_ids=self._num_ids, hidden=True),
            progress=lambda _: None,  # these tokens were counted when they were sampled
        )
        return [score.hidden for score in scores]

    def divergences(
        self, student_hidden: Sequence[Any], scored: Sequence[Sequence[tuple[str, Scored]]]
    ) -> list[Any]:
        """KL(student‖teacher) [n] of each completion, the teacher being its own one or the mixture."""
        lengths = [len(hidden) for hidden in student_hidden]
        teacher: TeacherHidden | TeacherMixture
        if len(self._teachers) == 1:
            [(head, temperature)] = self._teachers.values()
            states = self._tensor([rows[0][1][1].hidden for rows in scored], head)
            teacher = TeacherHidden(states, head, temperature)
        else:
            teacher = self._mixture(scored, lengths)
        hidden_NH = self._tensor(student_hidden, self._head)
        kl_N = reverse_kl(hidden_NH, self._head, teacher, temperature=self._temperature, chunk=self._chunk)
        return list(np.split(kl_N.cpu().numpy(), np.cumsum(lengths)[:-1]))

    def _mixture(
        self, scored: Sequence[Sequence[tuple[str, Scored]]], lengths: Sequence[int]
    ) -> TeacherMixture:
        parts = []
        for name, (head, temperature) in sorted(self._teachers.items()):
            own = [dict(rows).get(name) for rows in scored]
            if not any(own):
                continue
            is_own_N = np.repeat([row is not None for row in own], lengths)
            place_N = torch.from_numpy(np.where(is_own_N, is_own_N.cumsum() - 1, -1)).to(self._device)
            states = self._tensor([row[1].hidden for row in own if row is not None], head)
            weight = 1.0 if self._weights is None else self._weights[name]
            parts.append(TeacherPart(TeacherHidden(states, head, temperature), place_N, math.log(weight)))
        return TeacherMixture(parts, self._num_ids)

    def _tensor(self, hidden: Sequence[Any], head: Head) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(hidden)).to(self._device, head.weight_VH.dtype)
