"""Completions sampled for problems: which problems a round has, the requests, and the graded rows.

Every prompt and seed is derived from (seed, round, prompt id, sample), so that any part can be sampled
again by itself with the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kdpipe.data.rows import Graded, Problem, Rollout
from kdpipe.data.seeds import chosen_ids, derive_seed, round_indices
from kdpipe.data.tasks.answers import grade
from kdpipe.engines.handle import ModelHandle
from kdpipe.engines.protocol import Completion, SampleRequest, Sampling
from kdpipe.errors import DataError
from kdpipe.models.prompting import Text
from kdpipe.stages.job import Job
from kdpipe.stages.settings.model import DrawSettings, Headline


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
        [problem.prompt_id for problem in problems],
        count=count,
        round_number=job.round,
        seed=job.seed,
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


def sample_all(
    job: Job,
    prompt_ids: Sequence[str],
    requests: Sequence[SampleRequest],
    sampling: Sampling,
    model: ModelHandle,
) -> list[list[Completion]]:
    """The completions of each request; raises StepError where a log-prob is not finite."""
    if not requests:
        return []
    with job.asking(prompt_ids):
        found = model.sample(requests, sampling, progress=job.pulse.tokens)
    for prompt_id, row in zip(prompt_ids, found, strict=True):
        job.require_finite([prompt_id] * len(row), [each.logprobs for each in row], "the sampler's log-prob")
    return found


@dataclass(frozen=True, slots=True)
class Grader:
    """Reads completions as text, up to the first of `stop`, and grades the answer that is the headline."""

    text: Text
    stop: Sequence[str]
    headline: Headline

    def read(self, problem: Problem, token_ids: Sequence[int]) -> tuple[str, Graded]:
        """A completion's text and its grade."""
        string = self.text.completion(token_ids, stop=self.stop)
        return string, grade(string, problem.expected, headline=self.headline)

    def row(self, problem: Problem, prompt: list[int], completion: list[int]) -> Rollout:
        """The row of a completion that ended, with its grade."""
        string, graded = self.read(problem, completion)
        return Rollout(
            prompt_id=problem.prompt_id,
            sample=0,
            question=problem.question,
            expected=problem.expected,
            prompt_token_ids=prompt,
            completion_token_ids=completion,
            sampler_logprobs=None,
            source="student",
            finish_reason="stop",
            text=string,
            answer_strict=graded.answer_strict,
            answer_flexible=graded.answer_flexible,
            correct=graded.correct,
            reward=float(graded.correct),
        )
