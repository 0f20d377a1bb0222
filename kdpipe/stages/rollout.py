"""Rollout: the student samples completions for prompts of the round, and each is graded.

A prompt that it does not sample for gives one row, the reference solution or what a teacher wrote.

Every prompt and seed is derived from (seed, round, prompt id, sample), so that any part can be sampled
again by itself with the same result.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kdpipe.data.payload import ROLLOUTS_FILE
from kdpipe.data.rows import Rollout
from kdpipe.data.tables import ROLLOUTS, read_rollouts
from kdpipe.models.prompting import reference_completion
from kdpipe.stages.job import Job, mean
from kdpipe.stages.sampling import (
    Grader,
    request_for,
    round_problems,
    sample_all,
    sampled_ids,
    sampling_of,
)
from kdpipe.stages.settings.sampling import DrawSettings
from kdpipe.store.step import Stage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kdpipe.data.rows import Problem
    from kdpipe.engines.handle import ModelHandle
    from kdpipe.engines.protocol import Completion, SampleRequest
    from kdpipe.stages.settings.rollout import RolloutSettings


def rollout(
    settings: RolloutSettings, job: Job, *, student: ModelHandle, given: Sequence[Rollout] = ()
) -> None:
    """Writes `rollouts.parquet`: for each prompt of the round `rollout.samples` completions, or one text.

    `given` is what teachers wrote for the prompts that are not sampled for; without any they give their references.
    """
    section, text = settings.rollout, student.text
    written = {row.prompt_id: row for row in given}
    sampling = sampling_of(DrawSettings.of(section), text)
    grader = Grader(text, section.stop, settings.task.headline)
    problems = round_problems(job, section.prompts)
    sampled = sampled_ids(job, problems, section.on_policy_prompts)

    def build(problems: Sequence[Problem]) -> list[Rollout]:
        requests = {
            problem.prompt_id: request_for(
                text.prompt(problem),
                section.samples,
                job.seed,
                Stage.ROLLOUT.value,
                job.round,
                problem.prompt_id,
            )
            for problem in problems
            if problem.prompt_id in sampled
        }
        found = sample_all(job, list(requests), list(requests.values()), sampling, student)
        answers = dict(zip(requests, found, strict=True))
        rows = []
        for problem in problems:
            if problem.prompt_id in written:
                row = written[problem.prompt_id]  # from here on it follows the student's prompt
                rows.append(replace(row, prompt_token_ids=text.prompt(problem)))
                continue
            if problem.prompt_id not in sampled:
                rows.append(_reference(grader, problem))
                continue
            for number, completion in enumerate(answers[problem.prompt_id]):
                rows.append(_sample(grader, problem, requests[problem.prompt_id], number, completion))
        return rows

    name = ROLLOUTS_FILE
    job.in_parts(
        name,
        problems,
        rows_per_item=section.samples,
        rows_of=lambda problem: section.samples if problem.prompt_id in sampled else 1,
        build=build,
        schema=ROLLOUTS,
    )
    _write_metrics(job, read_rollouts(job.draft.folder / name))


def _sample(
    grader: Grader, problem: Problem, request: SampleRequest, number: int, completion: Completion
) -> Rollout:
    """The row of a completion that the student sampled."""
    row = grader.row(problem, list(request.prompt_token_ids), completion.token_ids)
    return replace(
        row, sample=number, sampler_logprobs=completion.logprobs, finish_reason=completion.finish_reason
    )


def _reference(grader: Grader, problem: Problem) -> Rollout:
    """The row of a problem's reference solution: whole, as nobody sampled it."""
    text = grader.text
    solution = reference_completion(text.tokenizer, problem, end_id=text.end_id)
    return replace(grader.row(problem, text.prompt(problem), solution), source="reference")


def _write_metrics(job: Job, rows: Sequence[Rollout]) -> None:
    """What the student's own samples are like, and for which share of the prompts there are some."""
    own = [row for row in rows if row.source == "student"]
    metric = job.draft.metric
    fraction = len({row.prompt_id for row in own}) / len({row.prompt_id for row in rows})
    metric("rollout/on_policy_fraction", fraction)
    if own:
        metric("rollout/completion_tokens_mean", mean([len(row.completion_token_ids) for row in own]))
        metric("rollout/truncated_fraction", mean([row.finish_reason == "length" for row in own]))
        metric("rollout/reward_mean", mean([row.reward for row in own]))
