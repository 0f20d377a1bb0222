"""Rollout: the student samples completions for prompts of the round, and each is graded.

A prompt that it does not sample for gives one row, the reference solution or what a teacher wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kdpipe.data.payload import ROLLOUTS_FILE
from kdpipe.data.rows import Problem, Rollout
from kdpipe.data.tables import ROLLOUTS, read_rollouts
from kdpipe.stages.context import Context
from kdpipe.stages.job import Job
from kdpipe.stages.sampling import Grader, round_problems, sample, sampled_ids, sampling_of, write_metrics
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
    grader = Grader(student.text, section.stop, context.grade(settings.task))
    sampling = sampling_of(DrawSettings.of(section), student.text)
    problems = round_problems(job, section.prompts)
    sampled = sampled_ids(job, problems, section.on_policy_prompts)
    purpose = (Stage.ROLLOUT.value, job.round)

    def build(problems: Sequence[Problem]) -> list[Rollout]:
        own: dict[str, list[Rollout]] = {}
        asked = [problem for problem in problems if problem.prompt_id in sampled]
        for one in sample(job, student, asked, student.text.prompt, sampling, section.samples, *purpose):
            row = grader.sampled(*one)
            own.setdefault(row.prompt_id, []).append(row)
        return [
            row
            for problem in problems
            for row in own.get(problem.prompt_id) or [_given(grader, problem, written.get(problem.prompt_id))]
        ]

    job.in_parts(
        ROLLOUTS_FILE,
        problems,
        rows_per_item=section.samples,
        rows_of=lambda problem: section.samples if problem.prompt_id in sampled else 1,
        build=build,
        schema=ROLLOUTS,
    )
    rows = read_rollouts(job.draft.folder / ROLLOUTS_FILE)
    of_student = [row for row in rows if row.source == "student"]
    fraction = len({row.prompt_id for row in of_student}) / len({row.prompt_id for row in rows})
    job.draft.metric("rollout/on_policy_fraction", fraction)
    write_metrics(job, "rollout", of_student)


def _given(grader: Grader, problem: Problem, written: Rollout | None) -> Rollout:
    """The row of a problem that is not sampled for: what a teacher wrote, or the whole reference solution."""
    prompt = grader.text.prompt(problem)
    if written is not None:
        return replace(written, prompt_token_ids=prompt)  # from here on it follows the student's prompt
    return grader.row(problem, prompt, grader.text.reference(problem), source="reference")
