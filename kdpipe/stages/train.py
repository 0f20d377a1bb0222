"""Train: the round's rollouts and scores become `epochs` x `minibatches` optimizer steps on the student.

The rows of an epoch are put in a seeded order and cut into minibatches; each is one optimizer step, whose
loss is a mean over all of its completion tokens, however it is cut into micro-batches. `p_t`, the trainer's
own log-prob at the start of the round, is taken before the first update.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kdpipe.batching import Batch, batches_by_tokens, make_batch
from kdpipe.checkpoints import write_model, write_trainer
from kdpipe.errors import ArtifactError, StepError
from kdpipe.forward import head_of, hidden_states, score_tokens, token_logprobs
from kdpipe.job import Job, Text, mean
from kdpipe.objective import NonFiniteError, TokenBatch, advantages, distribution_term, token_loss
from kdpipe.recipe import JsdTerm
from kdpipe.seeds import permutation
from kdpipe.stages.sft import write_state
from kdpipe.tables import COMPLETIONS, write_rows

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt

    from kdpipe.rows import Rollout
    from kdpipe.tables import Scores
    from kdpipe.trainer import Trainer


@dataclass(frozen=True, slots=True)
class Row:
    """One completion with everything that its loss reads; `proximal` [n] is p_t."""

    rollout: Rollout
    scores: Scores | None
    advantage: float
    proximal: npt.NDArray[np.float32]

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.rollout.prompt_token_ids) + len(self.rollout.completion_token_ids)


def train(
    job: Job,
    *,
    rollouts: Sequence[Rollout],
    scores: Sequence[Scores] | None,
    text: Text,
    trainer: Trainer,
    dtype: torch.dtype,
    resumed: tuple[int, Path] | None,
) -> None:
    """Writes `model/`, `trainer/` and `completions.parquet`; `resumed` is (steps done, checkpoint folder)."""
    done, checkpoint = resumed or (0, None)
    proximal = (
        _proximal(job, rollouts, text, trainer)
        if checkpoint is None
        else _read_proximal(checkpoint, rollouts)
    )
    rows = _rows(job, rollouts, scores, proximal)
    plan = minibatches(job, rows)
    job.pulse.start("optimizer steps", len(plan))
    job.pulse.advance(done)
    trainer.begin()
    for number, (_, indices) in enumerate(plan):
        if number < done:
            continue
        metrics = _optimizer_step(job, [rows[i] for i in indices], text, trainer)
        for name, value in metrics.items():
            job.draft.metric(f"train/{name}", value, optimizer_step=trainer.step)
        job.pulse.advance()
        is_due = (number + 1) % job.recipe.runtime.checkpoint_steps == 0
        if (is_due or job.pulse.stopping) and number + 1 < len(plan):
            job.draft.write_checkpoint(
                number + 1, lambda folder: _write_checkpoint(folder, trainer, text, proximal)
            )
        job.pulse.safe_point()
    trainer.end()
    _write(job, rows, plan, text, trainer, dtype)


def minibatches(job: Job, rows: Sequence[Row]) -> list[tuple[int, list[int]]]:
    """(epoch, row indices) of each optimizer step of the round, in order."""
    settings = job.recipe.train
    ids = [f"{row.rollout.prompt_id}/{row.rollout.sample}" for row in rows]
    plan = []
    for epoch in range(settings.epochs):
        order = permutation(ids, job.seed, "train", job.round, epoch)
        for number in range(settings.minibatches):
            start, end = (len(order) * place // settings.minibatches for place in (number, number + 1))
            plan.append((epoch, order[start:end]))
    return plan


# ------------------------------------------------------------------------------------- one optimizer step


def _optimizer_step(job: Job, rows: Sequence[Row], text: Text, trainer: Trainer) -> dict[str, float]:
    """One update from the token mean over `rows`; returns its metrics. Without any token it is skipped."""
    tokens = sum(len(row.rollout.completion_token_ids) for row in rows)
    if tokens == 0:
        return {"skipped": 1.0}
    rate, sums = trainer.learning_rate(), dict[str, float]()
    for indices in batches_by_tokens([row.length for row in rows], job.recipe.runtime.train_tokens):
        picked = [rows[i] for i in indices]
        try:
            loss, metrics = micro_batch_loss(job, picked, text, trainer, denominator=tokens)
        except NonFiniteError as error:
            raise _located(job, picked, error) from None
        loss.backward()  # type: ignore[no-untyped-call]
        for name, value in {"loss": loss.detach(), **metrics}.items():
            sums[name] = sums.get(name, 0.0) + float(value)
        job.pulse.tokens(sum(len(row.rollout.completion_token_ids) for row in picked))
    norm = trainer.apply()
    return {"learning_rate": rate, "grad_norm": norm, **_averages(sums)}


def micro_batch_loss(
    job: Job, rows: Sequence[Row], text: Text, trainer: Trainer, *, denominator: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The share of `rows` in the optimizer step's loss, with its gradient to the student's weights."""
    objective, runtime = job.recipe.train.objective, job.recipe.runtime
    device = trainer.model.device
    batch = _batch(rows, device)
    columns = _Columns(rows, device)
    kd = objective.kd if objective.has_kd else None

    def divergence(logprobs_CV: torch.Tensor, part: slice) -> torch.Tensor:
        assert isinstance(kd, JsdTerm)
        return distribution_term(
            kd,
            logprobs_CV,
            scorable_N=columns.scorable[part],
            topk_ids_NK=columns.topk("topk_ids")[part],
            topk_logprobs_NK=columns.topk("topk_logprobs")[part],
            tail_N=columns.topk("tail_logprobs")[part],
            offset=part.start,
        )

    with trainer.computing():
        hidden_NH = hidden_states(trainer.model, batch)
        student_N, divergence_N = token_logprobs(
            hidden_NH,
            head_of(trainer.model, num_ids=text.num_ids),
            batch.target_ids_N,
            temperature=job.recipe.rollout.temperature,
            chunk=runtime.head_chunk_tokens,
            extra=divergence if isinstance(kd, JsdTerm) else None,
        )
    tokens = TokenBatch(
        student=student_N,
        behaviour=columns.behaviour,
        proximal=columns.proximal,
        advantage=columns.advantage,
        kept=torch.ones_like(columns.scorable),
        scorable=columns.scorable,
        lengths=batch.counts,
        teacher=columns.teacher,
        divergence=divergence_N,
    )
    return token_loss(objective, tokens, denominator=denominator)


class _Columns:
    """The per-token data of rows, one after another, as tensors [N] or [N, K]."""

    def __init__(self, rows: Sequence[Row], device: torch.device) -> None:
        self._rows = rows
        self._device = device
        self._cache: dict[str, torch.Tensor] = {}
        counts = [len(row.rollout.completion_token_ids) for row in rows]
        self.behaviour = self._tensor([np.asarray(row.rollout.sampler_logprobs, np.float32) for row in rows])
        self.proximal = self._tensor([row.proximal for row in rows])
        self.advantage = self._tensor(
            [np.full(n, row.advantage, np.float32) for row, n in zip(rows, counts, strict=True)]
        )
        scores = [row.scores for row in rows if row.scores is not None]
        self.teacher = self._tensor([score.teacher_logprobs for score in scores]) if scores else None
        self.scorable = (
            self._tensor([score.scorable for score in scores])
            if scores
            else torch.ones(sum(counts), dtype=torch.bool, device=device)
        )

    def topk(self, name: str) -> torch.Tensor:
        """The teacher's top k: `topk_ids`, `topk_logprobs` or `tail_logprobs`."""
        if name not in self._cache:
            self._cache[name] = self._tensor([getattr(row.scores, name) for row in self._rows])
        return self._cache[name]

    def _tensor(self, arrays: Sequence[npt.NDArray[Any]]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(arrays)).to(self._device)


def _averages(sums: dict[str, float]) -> dict[str, float]:
    """Token means of the summed metrics; the loss is one already."""
    kept, kd_tokens = sums.pop("kept_tokens"), sums.pop("kd_tokens", 0.0)
    means = {"loss": sums.pop("loss"), "tokens": kept}
    for name, value in sums.items():
        over = kd_tokens if name.startswith("kd_") else kept
        means[name] = value / over if over else 0.0
    return means


def _located(job: Job, rows: Sequence[Row], error: NonFiniteError) -> StepError:
    """The same error with the prompt and the token that it is about."""
    index = error.index
    for row in rows:
        length = len(row.rollout.completion_token_ids)
        if index < length:
            where = f"round {job.round}, prompt {row.rollout.prompt_id}, sample {row.rollout.sample}, token {index}"
            return StepError(
                f"{where}: {error.found}",
                hint="nothing was published; kdpipe samples shows the round's completions",
            )
        index -= length
    return error


# -------------------------------------------------------------------------------------- the round's rows


def _rows(
    job: Job,
    rollouts: Sequence[Rollout],
    scores: Sequence[Scores] | None,
    proximal: Sequence[npt.NDArray[np.float32]],
) -> list[Row]:
    objective = job.recipe.train.objective
    keys = [(row.prompt_id, row.sample) for row in rollouts]
    if scores is not None and [(score.prompt_id, score.sample) for score in scores] != keys:
        raise ArtifactError(
            f"round {job.round}: scores.parquet and rollouts.parquet hold different rows",
            hint=f"score again: repeat the run with --force teacher-score@{job.round}",
        )
    signal = [0.0] * len(rollouts)
    if objective.has_rl:
        signal = advantages(objective, [row.reward for row in rollouts], [row.prompt_id for row in rollouts])
    aligned: Sequence[Scores | None] = [None] * len(rollouts) if scores is None else scores
    return [Row(*fields) for fields in zip(rollouts, aligned, signal, proximal, strict=True)]


def _proximal(
    job: Job, rollouts: Sequence[Rollout], text: Text, trainer: Trainer
) -> list[npt.NDArray[np.float32]]:
    """p_t of every completion token, [n] per row, from the weights at the start of the round."""
    runtime = job.recipe.runtime
    head = head_of(trainer.model, num_ids=text.num_ids)
    found: dict[int, npt.NDArray[np.float32]] = {}
    lengths = [len(row.prompt_token_ids) + len(row.completion_token_ids) for row in rollouts]
    job.pulse.start("completions", len(rollouts))
    for indices in batches_by_tokens(lengths, runtime.score_tokens):
        batch = _batch_of([rollouts[i] for i in indices], trainer.model.device)
        with torch.no_grad(), trainer.computing():
            hidden = hidden_states(trainer.model, batch)
            scores = score_tokens(
                hidden,
                head,
                batch.target_ids_N,
                temperature=job.recipe.rollout.temperature,
                top_k=0,
                chunk=runtime.head_chunk_tokens,
            )
        pieces = scores.logprobs_N.float().cpu().split(batch.counts)  # type: ignore[no-untyped-call]
        found.update({i: piece.numpy() for i, piece in zip(indices, pieces, strict=True)})
        job.pulse.advance(len(indices))
        job.pulse.safe_point()
    return [found[i] for i in range(len(rollouts))]


def _batch(rows: Sequence[Row], device: torch.device) -> Batch:
    return _batch_of([row.rollout for row in rows], device)


def _batch_of(rollouts: Sequence[Rollout], device: torch.device) -> Batch:
    return make_batch(
        [row.prompt_token_ids for row in rollouts],
        [row.completion_token_ids for row in rollouts],
        device=device,
    )


# ------------------------------------------------------------------------------------------------ writing


def _write_checkpoint(
    folder: Path, trainer: Trainer, text: Text, proximal: Sequence[npt.NDArray[np.float32]]
) -> None:
    write_state(folder, trainer, text, torch.float32)
    np.save(folder / "proximal.npy", np.concatenate(proximal), allow_pickle=False)


def _read_proximal(folder: Path, rollouts: Sequence[Rollout]) -> list[npt.NDArray[np.float32]]:
    flat = np.load(folder / "proximal.npy", allow_pickle=False)
    ends = np.cumsum([len(row.completion_token_ids) for row in rollouts])
    return list(np.split(flat, ends[:-1]))


def _write(
    job: Job,
    rows: Sequence[Row],
    plan: Sequence[tuple[int, list[int]]],
    text: Text,
    trainer: Trainer,
    dtype: torch.dtype,
) -> None:
    first = trainer.step - len(plan)
    completions = [
        {
            "prompt_id": rows[index].rollout.prompt_id,
            "sample": rows[index].rollout.sample,
            "epoch": epoch,
            "optimizer_step": first + number + 1,
            "advantage": rows[index].advantage,
            "kept": True,
            "proximal_logprobs": rows[index].proximal,
        }
        for number, (epoch, indices) in enumerate(plan)
        for index in indices
    ]
    job.draft.write("completions.parquet", lambda path: write_rows(path, completions, COMPLETIONS))
    job.draft.write("model", lambda folder: write_model(trainer.model, text.tokenizer, folder, dtype=dtype))
    masters = dtype != torch.float32
    job.draft.write(
        "trainer",
        lambda folder: write_trainer(folder, tensors=trainer.tensors(masters=masters), state=trainer.state()),
    )
    if job.recipe.train.objective.has_rl:
        job.draft.metric("train/advantage_abs_mean", mean([abs(row.advantage) for row in rows]))
    _write_mismatch(job, rows)


def _write_mismatch(job: Job, rows: Sequence[Row]) -> None:
    """How far the sampler's log-probs b are from the trainer's own p: the engines' disagreement, in nats."""
    differences = np.concatenate(
        [np.asarray(row.rollout.sampler_logprobs, np.float64) - row.proximal for row in rows]
    )
    if differences.size:
        absolute = np.abs(differences)
        job.draft.metric("train/mismatch_nats_mean", float(differences.mean()))
        job.draft.metric("train/mismatch_nats_p99", float(np.quantile(absolute, 0.99)))
        job.draft.metric("train/mismatch_nats_max", float(absolute.max()))
        rollout = job.recipe.rollout
        if rollout.top_p < 1 or rollout.top_k:
            # b is of the truncated distribution, which is p over the mass it kept.
            job.draft.metric("rollout/kept_mass_mean", float(np.exp(-differences).mean()))
