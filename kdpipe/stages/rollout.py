"""Rollout: the student samples completions for prompts of the round, and each is graded.

A prompt that it does not sample for gives one row, the reference solution or what a teacher wrote.

Every prompt and seed is derived from (seed, round, prompt id, sample), so that any part can be sampled
again by itself with the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kdpipe.data.payload import ROLLOUTS_FILE
from kdpipe.data.rows import Problem, Rollout
from kdpipe.data.tables import ROLLOUTS, read_rollouts
from kdpipe.engines.handle import ModelHandle
from kdpipe.stages.context import Context
from kdpipe.stages.job import Job, mean
from kdpipe.stages.sampling import Grader, request_for, round_problems, sample_all, sampled_ids, sampling_of
from kdpipe.stages.settings.model import DrawSettings
from kdpipe.stages.settings.stage import RolloutSettings, TextSettings
from kdpipe.stages.teacher_text import write_texts
from kdpipe.store.stage import Stage


def rollout(settings: RolloutSettings | TextSettings, job: Job, context: Context) -> None:
    """Writes `rollouts.parquet`: for each prompt of the round `rollout.samples` completions, or one text.

    The text is what a teacher wrote where the step reads some, else the reference. What a teacher writes is a step of
    this stage too.
    """
    if isinstance(settings, TextSettings):
        write_texts(settings, job, context)
        return
    section = settings.rollout
    student = context.student(section.engine)
    written = {row.prompt_id: row for row in context.texts()}
    grader = Grader(student.text, section.stop, settings.task.headline)
    problems = round_problems(job, section.prompts)
    sampled = sampled_ids(job, problems, section.on_policy_prompts)

    def build(problems: Sequence[Problem]) -> list[Rollout]:
        asked = [problem for problem in problems if problem.prompt_id in sampled]
        own = _sampled(settings, job, asked, student, grader)
        return [
            row
            for problem in problems
            for row in own.get(problem.prompt_id) or [_given(grader, problem, written.get(problem.prompt_id))]
        ]

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


def _sampled(
    settings: RolloutSettings, job: Job, problems: Sequence[Problem], student: ModelHandle, grader: Grader
) -> dict[str, list[Rollout]]:
    """The rows of the completions that the student samples for each problem, by its id."""
    samples, ids = settings.rollout.samples, [problem.prompt_id for problem in problems]
    requests = [
        request_for(
            student.text.prompt(problem),
            samples,
            *(job.seed, Stage.ROLLOUT.value, job.round, problem.prompt_id),
        )
        for problem in problems
    ]
    sampling = sampling_of(DrawSettings.of(settings.rollout), student.text)
    found = sample_all(job, ids, requests, sampling, student)
    return {
        problem.prompt_id: [
            replace(
                grader.row(problem, list(request.prompt_token_ids), completion.token_ids),
                sample=number,
                sampler_logprobs=completion.logprobs,
                finish_reason=completion.finish_reason,
            )
            for number, completion in enumerate(completions)
        ]
        for problem, request, completions in zip(problems, requests, found, strict=True)
    }


def _given(grader: Grader, problem: Problem, written: Rollout | None) -> Rollout:
    """The row of a problem that is not sampled for: what a teacher wrote, or the whole reference solution."""
    prompt = grader.text.prompt(problem)
    if written is not None:
        return replace(written, prompt_token_ids=prompt)  # from here on it follows the student's prompt
    solution = grader.text.reference(problem)
    return replace(grader.row(problem, prompt, solution), source="reference")


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
