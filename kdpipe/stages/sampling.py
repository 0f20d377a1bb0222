"""Completions sampled for problems: which problems a round has, the requests, and the graded rows.

Every prompt and seed is derived from (seed, round, prompt id, sample), so that any part can be sampled
again by itself with the same result.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TypeAlias

import numpy as np

from kdpipe.data.rows import FinishReason, Graded, Problem, Rollout, Source
from kdpipe.data.seeds import chosen_ids, derive_seed, round_indices
from kdpipe.engines.handle import ModelHandle
from kdpipe.engines.protocol import Completion, SampleRequest, Sampling
from kdpipe.errors import DataError
from kdpipe.method import statistics
from kdpipe.method.interval import Interval
from kdpipe.models.prompting import Text
from kdpipe.stages.job import Job, mean
from kdpipe.stages.settings.model import DrawSettings

Sampled: TypeAlias = tuple[Problem, int, list[int], Completion]
"""A problem, the number of the sample, the prompt, and what was sampled after it."""


def round_problems(job: Job, prompts: int) -> list[Problem]:
    """The `prompts` train problems of the round, none twice."""
    ids = [problem.prompt_id for problem in job.train]
    try:
        chosen = round_indices(ids, prompts=prompts, round_number=job.round, seed=job.seed)
    except ValueError as error:
        raise DataError(
            f"rollout.prompts: {error}", hint=f"set rollout.prompts to {len(ids)} or fewer"
        ) from None
    return [job.train[index] for index in chosen]


def sampled_ids(job: Job, problems: Sequence[Problem], count: int) -> frozenset[str]:
    """Which `count` of the round's problems the student samples for."""
    return chosen_ids(
        [problem.prompt_id for problem in problems], count=count, round_number=job.round, seed=job.seed
    )


def request_for(prompt: list[int], samples: int, *seed: str | int) -> SampleRequest:
    """A request whose seeds depend on `seed` and the sample's number."""
    return SampleRequest(prompt, tuple(derive_seed(*seed, sample) for sample in range(samples)))


def sampling_of(draws: DrawSettings, text: Text) -> Sampling:
    """How the engine samples from a model with that text."""
    return Sampling(
        temperature=draws.temperature,
        max_new_tokens=draws.max_new_tokens,
        end_ids=text.end_ids,
        num_ids=text.num_ids,
        top_p=draws.top_p,
        top_k=draws.top_k,
        stop=tuple(draws.stop),
    )


def sample(
    job: Job,
    model: ModelHandle,
    problems: Sequence[Problem],
    prompt: Callable[[Problem], list[int]],
    sampling: Sampling,
    samples: int,
    *purpose: str | int,
) -> list[Sampled]:
    """`samples` completions of each problem.

    Their seeds depend on the job's seed, `purpose`, the problem and the number of the sample. Raises StepError where a
    log-prob is not finite.
    """
    if not problems:
        return []
    ids = [problem.prompt_id for problem in problems]
    prompts = [prompt(problem) for problem in problems]
    requests = [
        request_for(tokens, samples, job.seed, *purpose, name)
        for tokens, name in zip(prompts, ids, strict=True)
    ]
    with job.asking(ids):
        answers = model.sample(requests, sampling, progress=job.pulse.tokens)
    found = [
        (problem, number, tokens, completion)
        for problem, tokens, completions in zip(problems, prompts, answers, strict=True)
        for number, completion in enumerate(completions)
    ]
    logprobs = [completion.logprobs for _, _, _, completion in found]
    job.require_finite([problem.prompt_id for problem, *_ in found], logprobs, "the sampler's log-prob")
    return found


def write_metrics(job: Job, prefix: str, rows: Sequence[Rollout]) -> None:
    """What sampled texts are like; nothing where there are none."""
    if rows:
        lengths = [len(row.completion_token_ids) for row in rows]
        job.draft.metric(f"{prefix}/completion_tokens_mean", mean(lengths))
        job.draft.metric(
            f"{prefix}/truncated_fraction", mean([row.finish_reason == "length" for row in rows])
        )
        graded = [(row.prompt_id, row.reward) for row in rows if row.reward is not None]
        if graded:
            job.draft.metric(f"{prefix}/reward_mean", mean([reward for _, reward in graded]))
            by_prompt = defaultdict[str, list[float]](list)
            for prompt_id, reward in graded:
                by_prompt[prompt_id].append(reward)
            if found := _over_prompts([mean(rewards) for rewards in by_prompt.values()]):
                job.draft.metric(f"{prefix}/reward_low", found.low)
                job.draft.metric(f"{prefix}/reward_high", found.high)


def _over_prompts(rewards: Sequence[float]) -> Interval | None:
    """The interval of their mean for other prompts; None where so few prompts tell nothing of it."""
    if all(0 <= reward <= 1 for reward in rewards):
        return statistics.wilson(rewards)
    found = statistics.pooled(np.array([rewards])) if len(rewards) > 1 else None
    return found if found and found.low < found.high else None


@dataclass(frozen=True, slots=True)
class Grader:
    """Reads completions as text, up to the first of `stop`, and grades them."""

    text: Text
    stop: Sequence[str]
    grade: Callable[[str, Problem], Graded]

    def sampled(self, problem: Problem, number: int, prompt: list[int], completion: Completion) -> Rollout:
        """The row of what the model samples for itself."""
        own, reason = completion.logprobs, completion.finish_reason
        ids = completion.token_ids
        return self.row(
            problem, prompt, ids, source="student", sample=number, logprobs=own, finish_reason=reason
        )

    def row(
        self,
        problem: Problem,
        prompt: list[int],
        ids: list[int],
        *,
        source: Source,
        sample: int = 0,
        logprobs: list[float] | None = None,
        finish_reason: FinishReason = "stop",
    ) -> Rollout:
        string = self.text.completion(ids, stop=self.stop)
        graded = self.grade(string, problem)
        return Rollout(
            prompt_id=problem.prompt_id,
            sample=sample,
            question=problem.question,
            expected=problem.expected,
            prompt_token_ids=prompt,
            completion_token_ids=ids,
            sampler_logprobs=logprobs,
            source=source,
            finish_reason=finish_reason,
            text=string,
            **asdict(graded),
        )
