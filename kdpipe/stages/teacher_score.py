"""Teacher-score: the teacher's log-prob of every token that the student sampled, after its own prompt.

The signal of a token is `q_t - s_t`: what the teacher thinks of it, less what the student thinks. Token ids
travel from the rollout unchanged; only those that the teacher's vocabulary lacks are cut from what it
reads, and get no score.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from kdpipe.engine import ScoreRequest, TokenScores
from kdpipe.errors import PreflightError
from kdpipe.job import Job, Text
from kdpipe.prompting import Vocabulary, compare_vocabularies, render_teacher_prompt, used_arguments
from kdpipe.tables import SCORES, SCORES_TOPK, Scores, read_scores

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from kdpipe.engine import Engine, ModelSource
    from kdpipe.rows import Problem, Rollout

MAX_UNSCORABLE_FRACTION = 0.01
Number = TypeVar("Number", bound=np.generic)


@dataclass(frozen=True, slots=True)
class TeacherSide:
    """A teacher as the scoring sees it: its text, what it shares with the student, and how it is asked."""

    name: str
    text: Text
    vocabulary: Vocabulary
    prompt: str | None
    has_own_template: bool
    temperature: float
    top_k: int

    @property
    def num_ids(self) -> int:
        """Ids over which the teacher's distribution is taken: those that both models have in use."""
        return min(self.vocabulary.student_ids, self.vocabulary.teacher_ids)

    def prompt_ids(self, problem: Problem, student_prompt: list[int]) -> list[int]:
        """The student's prompt as it was, unless the teacher has its own prompt, template, or vocabulary."""
        lacks = not self.vocabulary.unscorable.isdisjoint(student_prompt)
        if self.prompt is None and not self.has_own_template and not lacks:
            return student_prompt
        return render_teacher_prompt(self.text.tokenizer, self.text.style, problem, self.prompt)


def teacher_side(job: Job, *, student: Text, teacher: Text) -> TeacherSide:
    """The recipe's teacher, after comparing vocabularies; raises PreflightError when they do not fit."""
    recipe, settings = job.recipe, job.recipe.teacher
    names = ("the student", f"teacher {settings.name!r}")
    vocabulary = compare_vocabularies(student.tokenizer, teacher.tokenizer, names=names)
    num_ids = min(vocabulary.student_ids, vocabulary.teacher_ids)
    top_k = recipe.top_k
    if top_k == "vocabulary":
        if vocabulary.unscorable:
            raise PreflightError(
                f"{names[1]} lacks {len(vocabulary.unscorable)} of the student's ids, so its distribution over the "
                "whole vocabulary is zero where the student's is not",
                hint="set train.objective.kd.support.teacher_top_k to a number: the rest becomes a tail bucket",
            )
        top_k = num_ids
    elif top_k > num_ids:
        raise PreflightError(
            f"the teacher's top {top_k} of {num_ids} shared ids",
            hint="lower teacher_top_k, or say vocabulary",
        )
    if not settings.template:  # the student's arguments, as far as another family's template knows them
        known = used_arguments(teacher.tokenizer, teacher.style.template_arguments)
        teacher = replace(teacher, style=replace(teacher.style, template_arguments=known))
    return TeacherSide(
        name=settings.name,
        text=teacher,
        vocabulary=vocabulary,
        prompt=settings.prompt,
        has_own_template=settings.template != recipe.student.template and bool(settings.template),
        temperature=settings.temperature or recipe.rollout.temperature,
        top_k=top_k,
    )


def teacher_score(
    job: Job, *, rollouts: Sequence[Rollout], teacher: TeacherSide, source: ModelSource, engine: Engine
) -> None:
    """Writes `scores.parquet`: one row per rollout, in the same order."""
    problems = {problem.prompt_id: problem for problem in job.train}
    schema = SCORES_TOPK if teacher.top_k else SCORES
    engine.load(source)

    def build(rows: Sequence[Rollout]) -> list[Scores]:
        pairs = [(problems[row.prompt_id], row.prompt_token_ids, row.completion_token_ids) for row in rows]
        scored = score_completions(job, pairs, teacher=teacher, engine=engine)
        return [
            Scores(
                prompt_id=row.prompt_id,
                sample=row.sample,
                teacher=teacher.name,
                teacher_prompt_token_ids=prompt,
                teacher_logprobs=score.logprobs,
                scorable=scorable,
                topk_ids=score.topk_ids,
                topk_logprobs=score.topk_logprobs,
                tail_logprobs=score.tail_logprobs,
            )
            for row, (prompt, score, scorable) in zip(rows, scored, strict=True)
        ]

    name = "scores.parquet"
    job.in_parts(name, rollouts, rows_per_item=1, build=build, schema=schema)
    scores = read_scores(job.draft.folder / name)
    _check_scorable(teacher, [row.scorable for row in scores])
    differences = [
        np.asarray(row.sampler_logprobs, np.float64)[score.scorable] - score.teacher_logprobs[score.scorable]
        for row, score in zip(rollouts, scores, strict=True)
        if row.sampler_logprobs is not None
    ]
    every = np.concatenate(differences) if differences else np.zeros(0)
    if every.size:
        job.draft.metric("score/reverse_kl_nats", float(every.mean()))
    unscorable = sum(int((~score.scorable).sum()) for score in scores)
    job.draft.metric("score/unscorable_tokens", unscorable)


def score_completions(
    job: Job,
    rows: Sequence[tuple[Problem, list[int], list[int]]],
    *,
    teacher: TeacherSide,
    engine: Engine,
    top_k: int | None = None,
    hidden: bool = False,
) -> list[tuple[list[int], TokenScores, npt.NDArray[np.bool_]]]:
    """Teacher prompt ids, scores and scorable [n] of each (problem, student prompt, completion).

    `engine` holds the teacher. Where a token is not scorable its log-probs are 0 and its ids 0.
    """
    lacking = teacher.vocabulary.unscorable
    prompts = [teacher.prompt_ids(problem, prompt) for problem, prompt, _ in rows]
    masks = [np.array([token not in lacking for token in completion], np.bool_) for _, _, completion in rows]
    requests = [
        ScoreRequest(prompt, [token for token in completion if token not in lacking])
        for prompt, (_, _, completion) in zip(prompts, rows, strict=True)
    ]
    scores = engine.score(
        requests,
        temperature=teacher.temperature,
        num_ids=teacher.num_ids,
        top_k=teacher.top_k if top_k is None else top_k,
        progress=job.pulse.tokens,
        hidden=hidden,
    )
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


def _check_scorable(teacher: TeacherSide, masks: Sequence[npt.NDArray[np.bool_]]) -> None:
    total = sum(len(mask) for mask in masks)
    lacking = total - sum(int(mask.sum()) for mask in masks)
    if total and lacking / total > MAX_UNSCORABLE_FRACTION:
        raise PreflightError(
            f"teacher {teacher.name!r} lacks the ids of {lacking} of {total} sampled tokens "
            f"({lacking / total:.1%}), more than {MAX_UNSCORABLE_FRACTION:.0%}",
            hint="choose a teacher with the student's vocabulary, or a student template that avoids those tokens",
        )
