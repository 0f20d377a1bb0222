"""Rollout: the student samples completions for the round's prompts, and each is graded.

Every prompt and seed is derived from (seed, round, prompt id, sample), so that any part can be sampled
again by itself with the same result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdpipe.errors import DataError
from kdpipe.job import Job, Text, mean, read_completion, request_for, sampling_of
from kdpipe.rows import Rollout
from kdpipe.seeds import round_indices
from kdpipe.tables import ROLLOUTS, read_rollouts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kdpipe.engine import Engine, ModelSource
    from kdpipe.rows import Problem


def rollout(job: Job, *, text: Text, student: ModelSource, engine: Engine) -> None:
    """Writes `rollouts.parquet`: `rollout.samples` completions of each of the round's prompts."""
    settings = job.recipe.rollout
    sampling = sampling_of(
        job.recipe, text, temperature=settings.temperature, max_new_tokens=settings.max_new_tokens
    )
    engine.load(student)

    def sample(problems: Sequence[Problem]) -> list[Rollout]:
        requests = [
            request_for(
                text.prompt(problem), settings.samples, job.seed, "rollout", job.round, problem.prompt_id
            )
            for problem in problems
        ]
        answers = engine.sample(requests, sampling, progress=job.pulse.tokens)
        rows = []
        for problem, request, completions in zip(problems, requests, answers, strict=True):
            for number, completion in enumerate(completions):
                string, graded = read_completion(job.recipe, text, problem, completion)
                rows.append(
                    Rollout(
                        prompt_id=problem.prompt_id,
                        sample=number,
                        question=problem.question,
                        expected=problem.expected,
                        prompt_token_ids=list(request.prompt_token_ids),
                        completion_token_ids=completion.token_ids,
                        sampler_logprobs=completion.logprobs,
                        source="student",
                        finish_reason=completion.finish_reason,
                        text=string,
                        answer_strict=graded.answer_strict,
                        answer_flexible=graded.answer_flexible,
                        correct=graded.correct,
                        reward=float(graded.correct),
                    )
                )
        return rows

    name = "rollouts.parquet"
    job.in_parts(name, round_problems(job), rows_per_item=settings.samples, build=sample, schema=ROLLOUTS)
    rows = read_rollouts(job.draft.folder / name)
    metric = job.draft.metric
    metric("rollout/completion_tokens_mean", mean([len(row.completion_token_ids) for row in rows]))
    metric("rollout/truncated_fraction", mean([row.finish_reason == "length" for row in rows]))
    metric("rollout/reward_mean", mean([row.reward for row in rows]))


def round_problems(job: Job) -> list[Problem]:
    """The train problems of the round, none twice."""
    ids = [problem.prompt_id for problem in job.train]
    prompts = job.recipe.rollout.prompts
    try:
        chosen = round_indices(ids, prompts=prompts, round_number=job.round, seed=job.seed)
    except ValueError as error:
        raise DataError(
            f"rollout.prompts: {error}", hint=f"set rollout.prompts to {len(ids)} or fewer"
        ) from None
    return [job.train[index] for index in chosen]
