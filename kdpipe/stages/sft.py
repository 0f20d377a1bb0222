"""Sft: the cold start of a model by cross-entropy on reference solutions or teachers' text, completion tokens only.

With no `sft` in the recipe it writes a scratch model as it was initialised. Prompts are rendered as rollout
renders them, so that what follows a prompt means the same later.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from kdpipe.data.seeds import permutation
from kdpipe.errors import StepError
from kdpipe.models.batching import batches_by_tokens, make_batch
from kdpipe.models.folder import write_model
from kdpipe.models.logprobs import head_of, hidden_states, token_logprobs
from kdpipe.models.prompting import reference_completion
from kdpipe.models.text import Text
from kdpipe.stages.job import NOTHING_PUBLISHED, Job
from kdpipe.store.step import Stage
from kdpipe.training.state import write_trainer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kdpipe.data.rows import Problem, Rollout
    from kdpipe.recipe.schema import Sft
    from kdpipe.training.trainer import Trainer

METRIC_EVERY = 20
NAMED_PROMPTS = 8
Example = tuple[list[int], list[int]]


def sft(
    job: Job,
    *,
    settings: Sft | None,
    text: Text,
    trainer: Trainer,
    dtype: torch.dtype,
    resumed: int,
    written: Sequence[Rollout] | None = None,
) -> None:
    """Writes `model/` and `trainer/` after `settings.steps` optimizer steps, the first `resumed` done already.

    `written` is what teachers wrote for the problems, which it reads in place of the reference solutions.
    """
    if settings is not None:
        found = _examples(text, job.train[: settings.problems], written)
        ids, examples = tuple(found), list(found.values())
        job.pulse.start("optimizer steps", settings.steps)
        job.pulse.advance(resumed)
        trainer.begin()
        for step in range(resumed, settings.steps):
            chosen = _batch_indices(ids, step=step, size=settings.batch, seed=job.seed)
            loss, tokens = _gradient(trainer, [examples[i] for i in chosen], text=text, job=job)
            norm = apply_gradient(job, trainer, [ids[i] for i in chosen])
            if (step + 1) % METRIC_EVERY == 0 or step + 1 == settings.steps:
                job.draft.metric("sft/loss", loss, optimizer_step=step + 1)
                job.draft.metric("sft/grad_norm", norm, optimizer_step=step + 1)
            job.pulse.tokens(tokens)
            job.pulse.advance()
            is_due = (step + 1) % job.recipe.runtime.checkpoint_steps == 0
            if (is_due or job.pulse.stopping) and step + 1 < settings.steps:
                job.draft.write_checkpoint(
                    step + 1, lambda folder: write_state(folder, trainer, text, torch.float32)
                )
            job.pulse.safe_point()
        trainer.end()
    job.draft.write("model", lambda folder: write_model(trainer.model, text.tokenizer, folder, dtype=dtype))
    masters = dtype != torch.float32
    job.draft.write(
        "trainer",
        lambda folder: write_trainer(folder, tensors=trainer.tensors(masters=masters), state=trainer.state()),
    )


def apply_gradient(job: Job, trainer: Trainer, prompt_ids: Sequence[str]) -> float:
    """One optimizer step; returns the gradient's norm. Raises StepError that names the prompts unless it is finite."""
    try:
        return trainer.apply()
    except StepError as error:
        names = sorted(set(prompt_ids))
        more = f" and {len(names) - NAMED_PROMPTS} more" if len(names) > NAMED_PROMPTS else ""
        about = f"round {job.round}, prompts {', '.join(names[:NAMED_PROMPTS])}{more}"
        raise StepError(f"{about}: {error.message}", hint=f"{error.hint}; {NOTHING_PUBLISHED}") from None


def _examples(
    text: Text, problems: Sequence[Problem], written: Sequence[Rollout] | None
) -> dict[str, Example]:
    """What is trained on, by an id that is each one's own: the student's prompt, and what should follow it."""
    if written is None:
        return {
            p.prompt_id: (text.prompt(p), reference_completion(text.tokenizer, p, end_id=text.end_id))
            for p in problems
        }
    prompts = {problem.prompt_id: text.prompt(problem) for problem in problems}
    return {
        f"{row.prompt_id}/{row.sample}": (prompts[row.prompt_id], row.completion_token_ids) for row in written
    }


def write_state(folder: Path, trainer: Trainer, text: Text, dtype: torch.dtype) -> None:
    """Everything that continues a step in the middle: weights at full width and the optimizer."""
    write_model(trainer.model, text.tokenizer, folder / "model", dtype=dtype)
    write_trainer(folder / "trainer", tensors=trainer.tensors(masters=False), state=trainer.state())


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


def _gradient(trainer: Trainer, examples: Sequence[Example], *, text: Text, job: Job) -> tuple[float, int]:
    """Adds the gradient of the token-mean cross-entropy; returns the loss and the number of its tokens."""
    tokens = sum(len(completion) for _, completion in examples)
    lengths = [len(prompt) + len(completion) for prompt, completion in examples]
    total = 0.0
    head = head_of(trainer.model, num_ids=text.num_ids)
    for indices in batches_by_tokens(lengths, job.recipe.runtime.train_tokens):
        batch = make_batch(
            [examples[i][0] for i in indices], [examples[i][1] for i in indices], device=trainer.model.device
        )
        with trainer.computing():
            hidden = hidden_states(trainer.model, batch)
            logprobs, _ = token_logprobs(
                hidden, head, batch.target_ids_N, temperature=1.0, chunk=job.recipe.runtime.head_chunk_tokens
            )
        loss = -logprobs.sum() / tokens
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total, tokens
