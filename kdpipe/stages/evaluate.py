"""Evaluate: held-out accuracy with its interval, and held-out reverse KL against the teacher.

Reverse KL is estimated twice from the same completions: by the sampled tokens, `s_t - q_t`, and where the
engine gives hidden states by KL(student‖teacher) of the two whole distributions at each position. Both have
the same expectation (given a prefix, the second is the mean of the first), the second much less variance.

Seeds leave the round out and the subset leaves the seed out, so that any two evaluations of one recipe are
paired problem by problem. The unit of every interval is the problem.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pyarrow as pa
from pydantic import JsonValue

from kdpipe.data.divergence import exact_totals, sampled_totals, with_tokens
from kdpipe.data.graders import vote
from kdpipe.data.graders.number import is_number
from kdpipe.data.payload import GRADES_FILE, REVERSE_KL_FILE, SUMMARY_FILE
from kdpipe.data.rows import Problem, Rollout
from kdpipe.data.seeds import permutation
from kdpipe.data.tables import GRADES, REVERSE_KL, REVERSE_KL_OF_SEVERAL, TableRow, read_rows
from kdpipe.engines.handle import ModelHandle
from kdpipe.errors import DataError, StepError
from kdpipe.method import statistics
from kdpipe.method.interval import Interval
from kdpipe.recipe.roles import STUDENT
from kdpipe.recipe.task import NumberReader, PythonGrader
from kdpipe.stages.context import Context
from kdpipe.stages.held_out import Exact, has_exact, held_out_scores
from kdpipe.stages.job import Job, mean
from kdpipe.stages.sampling import Grader, sample, sampling_of
from kdpipe.stages.scoring import TeacherHandle
from kdpipe.stages.settings.model import teaches
from kdpipe.stages.settings.stage import EvaluateSettings
from kdpipe.store.stage import Stage

Rows = list[TableRow]
HARNESS_READERS: tuple[NumberReader, ...] = ("strict", "flexible")
STAGE = Stage.EVALUATE.value


def evaluate(settings: EvaluateSettings, job: Job, context: Context) -> None:
    """Writes `grades.parquet`, `summary.json` and, with `settings.teachers`, `reverse_kl.parquet`.

    It is compared with student 0's evaluation problem by problem. Raises StepError where nothing is graded and no token
    can be scored: there would be no result.
    """
    baseline = context.baseline(GRADES_FILE, REVERSE_KL_FILE)
    if settings.teacher is None:
        name, model = STUDENT, context.student(settings.engine)
        prompt: Callable[[Problem], list[int]] = model.text.prompt
    else:
        teacher = context.teacher(settings.teacher)
        name, model, prompt = teacher.name, teacher.model, teacher.prompt
    against = [context.teacher(one) for one in settings.teachers.values()]
    grader = Grader(model.text, settings.evaluate.stop, context.grade(settings.task))
    grades, free = _grades(settings, job, model, prompt, grader)
    summary: dict[str, JsonValue] = {"model": name, "round": job.round, **_answers(settings, grades)}
    if settings.task.is_graded and baseline is not None:
        summary |= _accuracy_change(grades, read_rows(baseline / GRADES_FILE, GRADES))
    if against:
        schema = REVERSE_KL if len(against) == 1 else REVERSE_KL_OF_SEVERAL
        rows = _reverse_kl_rows(settings, job, model, against, schema=schema, first_part=free)
        summary |= _reverse_kl(rows)
        summary["reverse_kl_problems"] = _scored(rows, required=not settings.task.is_graded)
        if baseline is not None:
            summary |= _reverse_kl(rows, read_rows(baseline / REVERSE_KL_FILE, schema))
    job.draft.write_json(SUMMARY_FILE, summary)
    for metric, value in summary.items():
        if isinstance(value, int | float) and metric != "round":
            job.draft.metric(f"evaluate/{metric}", value)


def subset(problems: Sequence[Problem], count: int | None) -> list[Problem]:
    """The first `count` test problems of an order that depends on nothing but their ids; None: all."""
    order = permutation([problem.prompt_id for problem in problems], STAGE)
    return [problems[index] for index in order[:count]]


def _graded_problems(settings: EvaluateSettings, test: Sequence[Problem]) -> list[Problem]:
    """The test problems that the student is graded on, or those of them that the teacher teaches."""
    problems = subset(test, settings.problems)
    if settings.teacher is None:
        return problems
    own = [problem for problem in problems if teaches(settings.teacher.only, problem)]
    if not own:
        raise DataError(
            f"teacher {settings.teacher.name!r} teaches none of the {len(problems)} test problems that are evaluated",
            hint="raise evaluate.problems, add such problems to test, or set evaluate.teacher to false",
        )
    return own


def _grades(
    settings: EvaluateSettings,
    job: Job,
    model: ModelHandle,
    prompt: Callable[[Problem], list[int]],
    grader: Grader,
) -> tuple[Rows, int]:
    sampling, problems = sampling_of(settings.evaluate, model.text), _graded_problems(settings, job.test)

    def build(problems: Sequence[Problem]) -> list[Rollout]:
        drawn = sample(job, model, problems, prompt, sampling, settings.samples, STAGE, "grade")
        return [grader.sampled(*one) for one in drawn]

    free = job.in_parts(GRADES_FILE, problems, rows_per_item=settings.samples, build=build, schema=GRADES)
    return read_rows(job.draft.folder / GRADES_FILE, GRADES), free


def _answers(settings: EvaluateSettings, grades: Rows) -> dict[str, JsonValue]:
    """What the answers are like, and how many are right where that is known."""
    by_problem = _by_problem(grades)
    is_graded = settings.task.is_graded
    summary: dict[str, JsonValue] = {
        "problems": len(by_problem),
        "samples": settings.samples,
        **(_accuracy(settings, grades, by_problem) if is_graded else {}),
        "truncated_fraction": mean([row["finish_reason"] == "length" for row in grades]),
        "completion_tokens_mean": mean([len(row["completion_token_ids"]) for row in grades]),
    }
    return summary | (_several_samples(settings, list(by_problem.values())) if is_graded else {})


def _accuracy(
    settings: EvaluateSettings, grades: Rows, by_problem: Mapping[str, Rows]
) -> dict[str, JsonValue]:
    interval = statistics.wilson([mean([row["correct"] for row in rows]) for rows in by_problem.values()])
    return {
        **_named("accuracy", interval),
        **_accuracies_of_numbers(settings, grades),
        **_mean_reward(settings, grades),
    }


def _several_samples(settings: EvaluateSettings, groups: Sequence[Rows]) -> dict[str, JsonValue]:
    """pass@k and maj@k for k = 2, 4, 8, ... and all samples, with Wilson's intervals over problems."""
    samples = settings.samples
    correct = [sum(row["correct"] for row in rows) for rows in groups]
    summary: dict[str, JsonValue] = {}
    for k in sample_counts(samples):
        passed = [statistics.pass_at_k(samples, n, k) for n in correct]
        summary |= _named(f"pass_at_{k}", statistics.wilson(passed))
        if not isinstance(
            settings.task.grader, PythonGrader
        ):  # which tells no answer that could be voted for
            voted = [_majority(rows, k, settings.task.reader) for rows in groups]
            summary |= _named(f"maj_at_{k}", statistics.wilson(voted))
    return summary


def sample_counts(samples: int) -> list[int]:
    """The k of pass@k and maj@k: powers of two from 2 that are below `samples`, and `samples`."""
    return [1 << power for power in range(1, samples.bit_length()) if 1 << power < samples] + (
        [samples] if samples > 1 else []
    )


def _accuracies_of_numbers(settings: EvaluateSettings, grades: Rows) -> dict[str, JsonValue]:
    """The accuracies by the two answers that lm-evaluation-harness reads, whichever is the headline."""
    if settings.task.grader != "number":
        return {}
    return {
        f"accuracy_{reader}": mean(
            [is_number(row[f"answer_{reader}"], row["expected"], reader=reader) for row in grades]
        )
        for reader in HARNESS_READERS
    }


def _mean_reward(settings: EvaluateSettings, grades: Rows) -> dict[str, JsonValue]:
    """The mean reward by a user's code, whose rewards may lie between wrong and right."""
    is_own = isinstance(settings.task.grader, PythonGrader)
    return {"reward_mean": mean([row["reward"] for row in grades])} if is_own else {}


def _majority(rows: Rows, k: int, reader: NumberReader | None) -> float:
    votes = [vote(row["answer"], reader=reader) for row in rows]
    return statistics.majority_at_k(votes, [row["correct"] for row in rows], k)


def _accuracy_change(grades: Rows, before: Rows) -> dict[str, JsonValue]:
    """The paired difference to student 0, and its p-value where problems are right or wrong as a whole."""
    now, then = _by_problem(grades), _by_problem(before)
    shared = sorted(now.keys() & then.keys())
    first = [mean([row["correct"] for row in now[key]]) for key in shared]
    second = [mean([row["correct"] for row in then[key]]) for key in shared]
    summary = _named("accuracy_change", statistics.paired_difference(first, second))
    if (changed := statistics.flips(first, second)) is not None:
        summary["accuracy_change_p_value"] = statistics.score_p_value(*changed)
    return summary


def _by_problem(rows: Rows) -> dict[str, Rows]:
    groups: dict[str, Rows] = {}
    for row in rows:
        groups.setdefault(row["prompt_id"], []).append(row)
    return groups


def _reverse_kl_rows(
    settings: EvaluateSettings,
    job: Job,
    model: ModelHandle,
    against: Sequence[TeacherHandle],
    *,
    schema: pa.Schema,
    first_part: int,
) -> Rows:
    """Held-out prompts sampled at the rollout temperature, scored by the teachers after their own prompts."""
    assert settings.rollout is not None
    sampling = sampling_of(settings.rollout, model.text)
    exact = Exact(settings, job, model, against) if has_exact(model, against) else None

    def build(problems: Sequence[Problem]) -> Rows:
        sampled = sample(job, model, problems, model.text.prompt, sampling, 1, STAGE, "reverse KL")
        triples = [
            (problem, prompt_ids, completion.token_ids) for problem, _, prompt_ids, completion in sampled
        ]
        found = held_out_scores(job, triples, against, exact, weights=settings.weights)
        return [
            {
                "prompt_id": problem.prompt_id,
                "sample": number,
                "prompt_token_ids": prompt_ids,
                "completion_token_ids": completion.token_ids,
                "sampler_logprobs": completion.logprobs,
                **scores,
            }
            for (problem, number, prompt_ids, completion), scores in zip(sampled, found, strict=True)
        ]

    problems = subset(job.test, settings.reverse_kl_problems)
    job.in_parts(REVERSE_KL_FILE, problems, rows_per_item=1, build=build, schema=schema, first=first_part)
    return read_rows(job.draft.folder / REVERSE_KL_FILE, schema)


def _reverse_kl(rows: Rows, before: Rows | None = None) -> dict[str, JsonValue]:
    """The held-out reverse KL; with `before` its paired difference, over the problems of both."""
    change = "" if before is None else "_change"
    pairs = [(rows, rows)] if before is None else [(rows, before), (before, rows)]
    both = [with_tokens(*pair) for pair in pairs]
    if not both[0]:
        return {}
    found = _named(f"reverse_kl{change}", statistics.token_mean(*map(sampled_totals, both)), unit="_nats")
    exact = [totals for each in both if (totals := exact_totals(each)) is not None]
    if len(exact) == len(both):
        found |= _named(f"reverse_kl_exact{change}", statistics.token_mean(*exact), unit="_nats")
    return found


def _scored(rows: Rows, *, required: bool) -> int:
    """How many problems have a token that a teacher scored; raises StepError where none has that must."""
    if (found := len(with_tokens(rows, rows))) or not required:
        return found
    raise StepError(
        f"no token of {len(rows)} held-out samples can be scored by a teacher, so there is no reverse KL",
        hint="kdpipe doctor compares the vocabularies of student and teachers",
    )


def _named(name: str, interval: Interval, *, unit: str = "") -> dict[str, JsonValue]:
    """An estimate and its interval, as a summary has them."""
    return {f"{name}{unit}": interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}
