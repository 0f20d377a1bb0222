"""Teacher text: completions that a teacher samples, for a cold start or for prompts of a round.

They are an artifact of their own, `rollouts.parquet` with `source` teacher and no sampler log-probs. Sequence-level
knowledge distillation (Kim and Rush 2016) is cross-entropy on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kdpipe.data.payload import ROLLOUTS_FILE
from kdpipe.data.rows import Problem, Rollout
from kdpipe.data.tables import ROLLOUTS, read_rollouts
from kdpipe.engines.protocol import Completion
from kdpipe.errors import PreflightError
from kdpipe.models.prompting import Text
from kdpipe.stages.context import Context
from kdpipe.stages.job import Job
from kdpipe.stages.sampling import Grader, round_problems, sample, sampled_ids, sampling_of, write_metrics
from kdpipe.stages.scoring import TeacherHandle
from kdpipe.stages.settings.model import teaches
from kdpipe.stages.settings.stage import TextSettings


def write_texts(settings: TextSettings, job: Job, context: Context) -> None:
    """Writes `rollouts.parquet`: what the teacher samples for those of the problems that it teaches.

    In round 0 the problems are those of the student's cold start, else those of the round that the student does not
    sample for. `prompt_token_ids` are the teacher's, after which it was sampled; `completion_token_ids` are what the
    student shall read, with its own end token in the place of the teacher's. Raises PreflightError when the teacher's
    vocabulary lets it write what the student has no ids for.
    """
    teacher, student = context.teacher(settings.teacher), context.student_text()
    # It cannot draw what the student has no id for.
    sampling = replace(sampling_of(settings.rollout, teacher.text), num_ids=teacher.num_ids)
    grader = Grader(student, settings.rollout.stop, context.grade(settings.task))
    _require_end(teacher)
    known = frozenset(student.tokenizer.get_vocab().values())
    problems = [problem for problem in _problems(settings, job) if teaches(settings.teacher.only, problem)]

    def build(problems: Sequence[Problem]) -> list[Rollout]:
        rows = []
        purpose = ("teacher text", teacher.name, job.round)
        for problem, number, prompt, completion in sample(
            job, teacher.model, problems, teacher.prompt, sampling, settings.samples, *purpose
        ):
            ids, reason = _for_student(completion, teacher, student), completion.finish_reason
            _require_known(ids, known, teacher, problem)
            row = grader.row(problem, prompt, ids, source="teacher", sample=number, finish_reason=reason)
            rows.append(row)
        return rows

    job.in_parts(ROLLOUTS_FILE, problems, rows_per_item=settings.samples, build=build, schema=ROLLOUTS)
    write_metrics(job, f"rollout/{teacher.name}", read_rollouts(job.draft.folder / ROLLOUTS_FILE))


def _problems(settings: TextSettings, job: Job) -> list[Problem]:
    if settings.prompts is None:
        return list(job.train[: settings.problems])
    problems = round_problems(job, settings.prompts.prompts)
    sampled = sampled_ids(job, problems, settings.prompts.on_policy_prompts)
    return [problem for problem in problems if problem.prompt_id not in sampled]


def _for_student(completion: Completion, teacher: TeacherHandle, student: Text) -> list[int]:
    """The ids of a completion, ending as the student ends its turns where the teacher ended its own."""
    *ids, last = completion.token_ids
    is_foreign = last in teacher.text.end_ids and last not in student.end_ids
    return [*ids, student.end_id if is_foreign and completion.finish_reason == "stop" else last]


def _require_end(teacher: TeacherHandle) -> None:
    if not any(token < teacher.num_ids for token in teacher.text.end_ids):
        raise PreflightError(
            f"teacher {teacher.name!r} ends its turns with {', '.join(map(str, teacher.text.end_ids))}, ids that the "
            f"student lacks: restricted to the student's {teacher.num_ids} ids its text would never end",
            hint="take reference text, or a teacher with the student's vocabulary",
        )


def _require_known(
    ids: Sequence[int], known: frozenset[int], teacher: TeacherHandle, problem: Problem
) -> None:
    if foreign := sorted({*ids} - known):
        raise PreflightError(
            f"teacher {teacher.name!r} wrote id {foreign[0]} for {problem.prompt_id}: the student's tokenizer lacks it",
            hint="take reference text, or a teacher with the student's vocabulary",
        )
