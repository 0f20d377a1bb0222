"""Train: `epochs` x `minibatches` optimizer steps on the student from a round's rollouts and scores.

The rows of an epoch are put in a seeded order and cut into minibatches; each is one optimizer step, whose
loss is a mean over all of its completion tokens, however it is cut into micro-batches. `p_t`, the trainer's
own log-prob at the start of the round, is taken before the first update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from kdpipe.data.payload import COMPLETIONS_FILE
from kdpipe.data.rows import Rollout
from kdpipe.data.seeds import permutation
from kdpipe.data.tables import COMPLETIONS, write_rows
from kdpipe.errors import StepError
from kdpipe.method.micro_batch import micro_batch_loss
from kdpipe.method.mismatch import ledger, mismatch
from kdpipe.method.mixture import RoundScores, shuffled
from kdpipe.method.objective import at_step
from kdpipe.method.token_batch import NonFiniteError
from kdpipe.models.batching import Batch, batches_by_tokens, make_batch
from kdpipe.models.prompting import Text
from kdpipe.recipe.objective import Objective
from kdpipe.recipe.stages import TrainSection
from kdpipe.stages.context import Context
from kdpipe.stages.experience import (
    Experience,
    experiences,
    share_of,
    teacher_distribution,
    token_batch,
    with_baselines,
)
from kdpipe.stages.job import NOTHING_PUBLISHED, Job, mean
from kdpipe.stages.scoring import check_scorable, score_metrics
from kdpipe.stages.settings.stage import TrainSettings
from kdpipe.store.stage import Stage
from kdpipe.training.protocol import Trainer

CONSTANT_ADVANTAGE = -1.0
"""Nats in the place of q - s, with the control of that name: as if the teacher found every token e times too likely."""


def train(settings: TrainSettings, job: Job, context: Context) -> None:
    """Writes `model/`, `trainer/`, `completions.parquet` and, where an average is kept, `ema/`."""
    rollouts = context.rollouts()
    scores = _checked(settings, job, rollouts, context.scores(settings, rollouts))
    done, checkpoint = job.draft.checkpoint() or (0, None)
    text, trainer = context.student_trainer(settings, checkpoint)
    average = context.average(settings)
    if checkpoint is None:
        proximal = _proximal(settings, job, rollouts, trainer)
    else:
        ends = np.cumsum([len(row.completion_token_ids) for row in rollouts])
        proximal = np.split(np.load(checkpoint / "proximal.npy", allow_pickle=False), ends[:-1])
    rows = experiences(
        settings.train.objective,
        rollouts,
        scores.rows if scores else None,
        proximal=proximal,
        end_ids=text.end_ids,
    )
    plan = minibatches(settings.train, job, rows)

    def write_checkpoint(folder: Path) -> None:
        trainer.write_checkpoint(folder, text.tokenizer)
        np.save(folder / "proximal.npy", np.concatenate(proximal), allow_pickle=False)

    job.pulse.start("optimizer steps", len(plan))
    job.pulse.advance(done)
    updates = _RoundUpdates(settings, job, trainer, scores)
    trainer.begin()
    for number, (_, indices) in enumerate(plan[done:], start=done):
        metrics = updates.step([rows[i] for i in indices])
        for name, value in metrics.items():
            job.draft.metric(f"train/{name}", value, optimizer_step=_first_step(job, plan) + number)
        job.end_optimizer_step(number + 1, of=len(plan), write=write_checkpoint)
    trainer.end()
    _write(settings, job, rows, plan, text, trainer)
    if average is not None:
        job.draft.write("ema", lambda folder: average.write_next(trainer.weights(), text.tokenizer, folder))


def _checked(
    settings: TrainSettings, job: Job, rollouts: Sequence[Rollout], scores: RoundScores | None
) -> RoundScores | None:
    """The scores as `train.control` has them; raises PreflightError when a mixture lacks too many tokens."""
    if scores is None:
        return None
    if settings.train.control == "shuffled_teacher":
        scores = shuffled(scores, rollouts, seed=job.seed, round_number=job.round)
    if settings.weights is not None:
        check_scorable("a teacher of the mixture lacks", [row.scorable for row in scores.rows])
    return scores


def _first_step(job: Job, plan: Sequence[object]) -> int:
    """The number of the round's first optimizer step in the run; skipped steps are counted."""
    return (job.round - 1) * len(plan) + 1


def minibatches(section: TrainSection, job: Job, rows: Sequence[Experience]) -> list[tuple[int, list[int]]]:
    """(epoch, row indices) of each optimizer step of the round, in order."""
    ids = [f"{row.rollout.prompt_id}/{row.rollout.sample}" for row in rows]
    plan = []
    for epoch in range(section.epochs):
        order = permutation(ids, job.seed, Stage.TRAIN.value, job.round, epoch)
        for number in range(section.minibatches):
            start, end = (len(order) * place // section.minibatches for place in (number, number + 1))
            plan.append((epoch, order[start:end]))
    return plan


@dataclass(frozen=True, slots=True)
class _RoundUpdates:
    """The optimizer steps of a round, and what all of them read."""

    settings: TrainSettings
    job: Job
    trainer: Trainer
    scores: RoundScores | None

    def step(self, rows: Sequence[Experience]) -> dict[str, float]:
        """Metrics of one optimizer step on `rows`, which is skipped without a token that counts or any signal."""
        settings, trainer = self.settings, self.trainer
        objective = at_step(settings.train.objective, trainer.step, settings.distill_horizon)
        left = [row for row in rows if row.tokens]
        if not left:
            return {"skipped": 1.0}
        sums = self._accumulated(
            objective,
            with_baselines(objective, left, "step"),
            share_of(objective, rows, max_new_tokens=settings.rollout.max_new_tokens),
        )
        signal, rounding = (sums.pop(name, 0.0) for name in ("signal_tokens", "rounding_tokens"))
        with self.job.updating([row.rollout.prompt_id for row in left]):
            update = trainer.apply(is_rounding=rounding > 0 and signal == 0)
        found = {"learning_rate": update.learning_rate, "grad_norm": update.gradient_norm}
        if update.is_skipped:
            found["skipped"] = 1.0
        if objective.kind in ("kdrl", "srpo"):
            found["distill_weight"] = objective.distill_weight
        return found | _averages(sums)

    def _accumulated(
        self, objective: Objective, rows: Sequence[Experience], share: Mapping[int, float]
    ) -> dict[str, float]:
        """Loss and metrics of the rows as sums, after adding up the gradients of their micro-batches."""
        sums = dict[str, float]()
        for indices in batches_by_tokens([row.length for row in rows], self.job.runtime.train_tokens):
            picked = [rows[i] for i in indices]
            try:
                found = self._micro_batch(objective, picked, share)
            except NonFiniteError as error:
                raise _located(self.job, picked, error) from None
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + value
            self.job.pulse.tokens(sum(len(row.rollout.completion_token_ids) for row in picked))
        return sums

    def _micro_batch(
        self, objective: Objective, rows: Sequence[Experience], share: Mapping[int, float]
    ) -> dict[str, float]:
        """Loss and metrics of one micro-batch as sums, after adding its gradient."""
        device = self.trainer.device
        signal = CONSTANT_ADVANTAGE if self.settings.train.control == "constant_advantage" else None
        batch = _batch([row.rollout for row in rows], device)
        loss = partial(
            micro_batch_loss,
            objective,
            token_batch(rows, share, device, signal=signal),
            batch.target_ids_N,
            temperature=self.settings.rollout.temperature,
            chunk=self.job.runtime.head_chunk_tokens,
            teacher=teacher_distribution(objective, rows, self.scores, device),
        )
        return self.trainer.accumulate(batch, loss)


def _averages(sums: dict[str, float]) -> dict[str, float]:
    """Token means of the summed metrics; the loss is one already."""
    kept, sampled = sums.pop("kept_tokens"), sums.pop("sampled_tokens")
    kd_tokens, given = sums.pop("kd_tokens", 0.0), sums.pop("off_policy_tokens", 0.0)
    means = {"loss": sums.pop("loss"), "tokens": kept}
    if not given:
        sums.pop("off_policy_loss", None)
    for name, value in sums.items():
        over = kd_tokens if name.startswith("kd_") else given if name.startswith("off_policy_") else sampled
        means[name] = value / over if over else 0.0
    return means


def _located(job: Job, rows: Sequence[Experience], error: NonFiniteError) -> StepError:
    """The same error with the prompt and the token that it is about."""
    index = error.index
    for row in rows:
        length = len(row.rollout.completion_token_ids)
        if index < length:
            where = f"round {job.round}, prompt {row.rollout.prompt_id}, sample {row.rollout.sample}, token {index}"
            return StepError(
                f"{where}: {error.found}",
                hint=f"{NOTHING_PUBLISHED} (kdpipe samples shows the round's completions)",
            )
        index -= length
    return error


def _proximal(
    settings: TrainSettings, job: Job, rollouts: Sequence[Rollout], trainer: Trainer
) -> list[npt.NDArray[np.float32]]:
    """p_t of every completion token, [n] per row, from the weights at the start of the round."""
    runtime = job.runtime
    found: dict[int, npt.NDArray[np.float32]] = {}
    lengths = [len(row.prompt_token_ids) + len(row.completion_token_ids) for row in rollouts]
    job.pulse.start("completions", len(rollouts))
    for indices in batches_by_tokens(lengths, runtime.score_tokens):
        batch = _batch([rollouts[i] for i in indices], trainer.device)
        logprobs_N = trainer.logprobs(
            batch, temperature=settings.rollout.temperature, chunk=runtime.head_chunk_tokens
        )
        pieces = np.split(logprobs_N.numpy(), np.cumsum(batch.counts)[:-1])
        found.update(zip(indices, pieces, strict=True))
        job.pulse.advance(len(indices))
        job.pulse.safe_point()
    return [found[i] for i in range(len(rollouts))]


def _batch(rollouts: Sequence[Rollout], device: torch.device) -> Batch:
    return make_batch(
        [row.prompt_token_ids for row in rollouts],
        [row.completion_token_ids for row in rollouts],
        device=device,
    )


def _write(
    settings: TrainSettings,
    job: Job,
    rows: Sequence[Experience],
    plan: Sequence[tuple[int, list[int]]],
    text: Text,
    trainer: Trainer,
) -> None:
    completions = [
        {
            "prompt_id": rows[index].rollout.prompt_id,
            "sample": rows[index].rollout.sample,
            "epoch": epoch,
            "optimizer_step": _first_step(job, plan) + number,
            "advantage": rows[index].advantage,
            "kept": rows[index].tokens > 0,
            "proximal_logprobs": rows[index].proximal,
        }
        for number, (epoch, indices) in enumerate(plan)
        for index in indices
    ]
    job.draft.write(COMPLETIONS_FILE, lambda path: write_rows(path, completions, COMPLETIONS))
    job.draft.write("model", lambda folder: trainer.write_weights(folder, text.tokenizer))
    job.draft.write("trainer", trainer.write_state)
    if settings.has_several_teachers:  # of all completions, each against its teacher or the mixture
        pairs = [(row.rollout, row.scores) for row in rows if row.scores is not None]
        for name, value in score_metrics(pairs).items():
            job.draft.metric(f"score/{name}", value)
    if settings.has_rl:
        found = [abs(row.advantage) for row in rows if row.advantage is not None]
        job.draft.metric("train/advantage_abs_mean", mean(found))
    _write_mismatch(settings, job, rows)


def _write_mismatch(settings: TrainSettings, job: Job, rows: Sequence[Experience]) -> None:
    """The mismatch ledger of the round (mismatch.py), and what truncated sampling kept."""
    differences = np.concatenate(
        [mismatch(row.behaviour, row.proximal) for row in rows if row.is_sampled] or [np.zeros(0)]
    )
    for name, value in ledger(settings.train.objective, differences).items():
        job.draft.metric(f"train/{name}", value)
    if differences.size and (settings.rollout.top_p < 1 or settings.rollout.top_k):
        # b is of the truncated distribution, which is p over the mass it kept.
        job.draft.metric("rollout/kept_mass_mean", float(np.exp(-differences).mean()))
