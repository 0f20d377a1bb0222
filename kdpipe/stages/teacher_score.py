"""Teacher-score: the teacher's log-prob of every token that the student sampled, after its own prompt.

The signal of a token is `q_t - s_t`: what the teacher thinks of it, less what the student thinks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kdpipe.data.hidden import to_bytes, write_hidden
from kdpipe.data.payload import HIDDEN_FILE, SCORES_FILE
from kdpipe.data.rows import Rollout
from kdpipe.data.tables import HIDDEN_PART, SCORES, Scores, read_scores, topk_schema
from kdpipe.engines.handle import ModelHandle
from kdpipe.engines.protocol import ScoreRequest, Scoring
from kdpipe.models.folder import head_digest
from kdpipe.models.logprobs import Head
from kdpipe.stages.context import Context
from kdpipe.stages.job import Job
from kdpipe.stages.scoring import (
    Scored,
    TeacherHandle,
    Triple,
    check_scorable,
    output_head,
    score_completions,
    score_metrics,
)
from kdpipe.stages.settings.model import teaches
from kdpipe.stages.settings.stage import ScoreSettings


def teacher_score(settings: ScoreSettings, job: Job, context: Context) -> None:
    """Writes `scores.parquet`, and `hidden.safetensors` where kept: a row for each rollout it teaches."""
    problems = {problem.prompt_id: problem for problem in job.train}
    rollouts = [row for row in context.rollouts() if teaches(settings.teacher.only, problems[row.prompt_id])]
    keep, teacher, student = settings.keep, context.teacher(settings.teacher), None
    if settings.student is not None:  # the model that sampled chooses ids of the support
        student = context.student(settings.teacher.engine, at=settings.teacher)
    head = output_head(job, teacher.model.source, num_ids=teacher.num_ids) if keep.hidden else None

    def build(rows: Sequence[Rollout]) -> list[Scores]:
        triples = [(problems[row.prompt_id], row.prompt_token_ids, row.completion_token_ids) for row in rows]
        supports = None
        if student is not None:
            supports = _most_probable(settings, job, triples, student, num_ids=teacher.num_ids)
        scored = score_completions(
            job, triples, teacher=teacher, top_k=keep.teacher_top_k, hidden=keep.hidden, supports=supports
        )
        return [_score(row, teacher, found, head) for row, found in zip(rows, scored, strict=True)]

    def keep_hidden(parts: Sequence[Path]) -> None:
        if head is not None:
            dtype, digest = head.weight_VH.dtype, head_digest(head)
            width = head.weight_VH.shape[1]
            job.draft.write(
                HIDDEN_FILE,
                lambda path: write_hidden(path, parts, width=width, dtype=dtype, head_sha256=digest),
            )

    has_support = keep.teacher_top_k or keep.student_top_k
    job.in_parts(
        SCORES_FILE,
        rollouts,
        rows_per_item=1,
        build=build,
        schema=topk_schema(settings.logprobs) if has_support else SCORES,
        part_schema=HIDDEN_PART if keep.hidden else None,
        finish=keep_hidden,
    )
    scores = read_scores(job.draft.folder / SCORES_FILE)
    check_scorable(f"teacher {teacher.name!r} lacks", [row.scorable for row in scores])
    prefix = f"score/{teacher.name}" if settings.is_one_of_several else "score"
    for metric, value in score_metrics(list(zip(rollouts, scores, strict=True))).items():
        job.draft.metric(f"{prefix}/{metric}", value)


def _score(row: Rollout, teacher: TeacherHandle, scored: Scored, head: Head | None) -> Scores:
    """The row of `scores.parquet` of one rollout, with its hidden states where there is a `head`."""
    prompt, score, scorable = scored
    hidden = None if head is None or score.hidden is None else to_bytes(score.hidden, head.weight_VH.dtype)
    return Scores(
        prompt_id=row.prompt_id,
        sample=row.sample,
        teacher=teacher.name,
        teacher_prompt_token_ids=prompt,
        teacher_logprobs=score.logprobs,
        scorable=scorable,
        topk_ids=score.topk_ids,
        topk_logprobs=score.topk_logprobs,
        tail_logprobs=score.tail_logprobs,
        hidden=hidden,
    )


def _most_probable(
    settings: ScoreSettings, job: Job, rows: Sequence[Triple], student: ModelHandle, *, num_ids: int
) -> list[npt.NDArray[np.int32]]:
    """The student's most probable ids [n, k] at each token, at the rollout temperature."""
    with job.asking([problem.prompt_id for problem, _, _ in rows]):
        scores = student.score(
            [ScoreRequest(prompt, completion) for _, prompt, completion in rows],
            Scoring(temperature=settings.temperature, num_ids=num_ids, top_k=settings.keep.student_top_k),
            progress=lambda _: None,
        )
    return [score.topk_ids for score in scores if score.topk_ids is not None]
