"""Sft: the cold start of a model by cross-entropy on reference solutions or teachers' text.

Only completion tokens are learned. With no `sft` in the recipe it writes a scratch model as it was initialised.
Prompts are rendered as rollout renders them, so that what follows a prompt means the same later.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch

from kdpipe.data.rows import Problem, Rollout
from kdpipe.data.seeds import permutation
from kdpipe.models.batching import batches_by_tokens, make_batch
from kdpipe.models.logprobs import Head, token_logprobs
from kdpipe.models.prompting import Text
from kdpipe.recipe.models import Sft
from kdpipe.stages.context import Context
from kdpipe.stages.job import Job
from kdpipe.stages.settings.model import teaches
from kdpipe.stages.settings.stage import SftSettings
from kdpipe.store.stage import Stage
from kdpipe.training.protocol import Trainer

METRIC_EVERY = 20
Example = tuple[list[int], list[int]]


def sft(settings: SftSettings, job: Job, context: Context) -> None:
    """Writes `model/` and `trainer/` after all optimizer steps; a checkpoint's are done already."""
    resumed, checkpoint = job.draft.checkpoint() or (0, None)
    text, trainer = context.cold_start(settings, checkpoint)
    if (section := settings.model.sft) is not None:
        problems = [problem for problem in job.train if teaches(settings.model.only, problem)]
        written = context.texts() if section.text == "teacher" else None
        examples = _examples(text, problems[: section.problems], written)
        _train(job, section, examples, text, trainer, resumed)
    job.draft.write("model", lambda folder: trainer.write_weights(folder, text.tokenizer))
    job.draft.write("trainer", trainer.write_state)


def _train(
    job: Job, settings: Sft, examples: Mapping[str, Example], text: Text, trainer: Trainer, resumed: int
) -> None:
    ids = tuple(examples)
    job.pulse.start("optimizer steps", settings.steps)
    job.pulse.advance(resumed)
    trainer.begin()
    for step in range(resumed, settings.steps):
        chosen = [ids[i] for i in _batch_indices(ids, step=step, size=settings.batch, seed=job.seed)]
        loss, tokens = _gradient(job, trainer, [examples[name] for name in chosen])
        with job.updating(chosen):
            update = trainer.apply()
        if (step + 1) % METRIC_EVERY == 0 or step + 1 == settings.steps:
            job.draft.metric("sft/loss", loss, optimizer_step=step + 1)
            job.draft.metric("sft/grad_norm", update.gradient_norm, optimizer_step=step + 1)
        job.pulse.tokens(tokens)
        job.end_optimizer_step(
            step + 1, of=settings.steps, write=lambda folder: trainer.write_checkpoint(folder, text.tokenizer)
        )
    trainer.end()


def _examples(
    text: Text, problems: Sequence[Problem], written: Sequence[Rollout] | None
) -> dict[str, Example]:
    """Prompt and completion of each example, by an id of its own."""
    if written is None:
        return {p.prompt_id: (text.prompt(p), text.reference(p)) for p in problems}
    prompts = {problem.prompt_id: text.prompt(problem) for problem in problems}
    return {
        f"{row.prompt_id}/{row.sample}": (prompts[row.prompt_id], row.completion_token_ids) for row in written
    }


def _batch_indices(ids: tuple[str, ...], *, step: int, size: int, seed: int) -> list[int]:
    """The examples of one optimizer step: consecutive pieces of seeded permutations, epoch after epoch."""
    indices: list[int] = []
    while len(indices) < size:
        epoch, at = divmod(step * size + len(indices), len(ids))
        indices += _epoch_order(ids, epoch, seed)[at : at + size - len(indices)]
    return indices


@functools.lru_cache(maxsize=2)
def _epoch_order(ids: tuple[str, ...], epoch: int, seed: int) -> list[int]:
    return permutation(ids, seed, Stage.SFT.value, epoch)


def _gradient(job: Job, trainer: Trainer, examples: Sequence[Example]) -> tuple[float, int]:
    """Adds the gradient of the token-mean cross-entropy; returns the loss and the number of its tokens."""
    runtime = job.runtime
    tokens = sum(len(completion) for _, completion in examples)
    lengths = [len(prompt) + len(completion) for prompt, completion in examples]
    total = 0.0
    for indices in batches_by_tokens(lengths, runtime.train_tokens):
        prompts, completions = zip(*(examples[i] for i in indices), strict=True)
        batch = make_batch(prompts, completions, device=trainer.device)
        loss = functools.partial(
            _cross_entropy, batch.target_ids_N, num_tokens=tokens, chunk=runtime.head_chunk_tokens
        )
        total += trainer.accumulate(batch, loss)["loss"]
    return total, tokens


def _cross_entropy(
    ids_N: torch.Tensor, hidden_NH: torch.Tensor, head: Head, *, num_tokens: int, chunk: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The share of these tokens in the mean over the step's `num_tokens`."""
    logprobs_N, _ = token_logprobs(hidden_NH, head, ids_N, temperature=1.0, chunk=chunk)
    return -logprobs_N.sum() / num_tokens, {}
