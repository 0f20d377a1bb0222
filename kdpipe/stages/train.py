"""Train: the round's rollouts and scores become `epochs` x `minibatches` optimizer steps on the student.

The rows of an epoch are put in a seeded order and cut into minibatches; each is one optimizer step, whose
loss is a mean over all of its completion tokens, however it is cut into micro-batches. `p_t`, the trainer's
own log-prob at the start of the round, is taken before the first update.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kdpipe.data.payload import COMPLETIONS_FILE
from kdpipe.data.seeds import permutation
from kdpipe.data.tables import COMPLETIONS, write_rows
from kdpipe.errors import StepError
from kdpipe.method.micro_batch import micro_batch_loss
from kdpipe.method.mismatch import ledger, mismatch
from kdpipe.method.mixture import shuffled
from kdpipe.method.objective import (
    NonFiniteError,
    TeacherSupport,
    TokenBatch,
    advantages,
    at_step,
    baselines,
    open_completions,
    shares,
)
from kdpipe.models.batching import Batch, batches_by_tokens, make_batch
from kdpipe.models.folder import write_model
from kdpipe.models.logprobs import head_of, hidden_states, score_tokens
from kdpipe.models.text import Text
from kdpipe.recipe.schema import Objective, SampledTerm
from kdpipe.stages.job import NOTHING_PUBLISHED, Job, mean
from kdpipe.stages.scoring import check_scorable, score_metrics
from kdpipe.stages.sft import apply_gradient, write_state
from kdpipe.store.step import Stage
from kdpipe.training.state import write_trainer

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from kdpipe.data.rows import Rollout
    from kdpipe.data.tables import Scores
    from kdpipe.method.micro_batch import TeacherHidden, TeacherMixture
    from kdpipe.method.mixture import RoundScores
    from kdpipe.training.ema import Average
    from kdpipe.training.trainer import Trainer


@dataclass(frozen=True, slots=True)
class Row:
    """One completion with everything that its loss reads.

    `number` is its place in the round's tables, `proximal` [n] is p_t, `kept` [n] the tokens that count, `taught`
    whether the KD term looks at it, `baseline` that of its group, `is_dropped` says that it does not count at all.
    Text that the student did not sample has no advantage, and takes no part in KD masks and baselines.
    """

    number: int
    rollout: Rollout
    scores: Scores | None
    proximal: npt.NDArray[np.float32]
    advantage: float | None
    kept: npt.NDArray[np.bool_]
    taught: bool
    is_dropped: bool
    baseline: float = 0.0

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.rollout.prompt_token_ids) + len(self.rollout.completion_token_ids)

    @property
    def is_sampled(self) -> bool:
        """Whether the student sampled it."""
        return self.rollout.source == "student"

    @property
    def tokens(self) -> int:
        """Tokens of the completion that count."""
        return int(self.kept.sum())


def train(
    job: Job,
    *,
    rollouts: Sequence[Rollout],
    scores: RoundScores | None,
    text: Text,
    trainer: Trainer,
    dtype: torch.dtype,
    resumed: tuple[int, Path] | None,
    average: Average | None = None,
) -> None:
    """Writes `model/`, `trainer/`, `completions.parquet` and with `average` `ema/`.

    `resumed` is (steps done, checkpoint folder).
    """
    done, checkpoint = resumed or (0, None)
    if scores is not None and job.recipe.train.control == "shuffled_teacher":
        scores = shuffled(scores, rollouts, seed=job.seed, round_number=job.round)
    if scores is not None and job.recipe.is_mixed:
        check_scorable("a teacher of the mixture lacks", [row.scorable for row in scores.rows])
    proximal = (
        _proximal(job, rollouts, text, trainer)
        if checkpoint is None
        else _read_proximal(checkpoint, rollouts)
    )
    rows = _rows(job, rollouts, scores.rows if scores else None, proximal, text)
    plan = minibatches(job, rows)
    job.pulse.start("optimizer steps", len(plan))
    job.pulse.advance(done)
    trainer.begin()
    for number, (_, indices) in enumerate(plan):
        if number < done:
            continue
        metrics = _optimizer_step(job, [rows[i] for i in indices], text, trainer, scores)
        for name, value in metrics.items():
            job.draft.metric(f"train/{name}", value, optimizer_step=_first_step(job, plan) + number)
        job.pulse.advance()
        is_due = (number + 1) % job.recipe.runtime.checkpoint_steps == 0
        if (is_due or job.pulse.stopping) and number + 1 < len(plan):
            job.draft.write_checkpoint(
                number + 1, lambda folder: _write_checkpoint(folder, trainer, text, proximal)
            )
        job.pulse.safe_point()
    trainer.end()
    _write(job, rows, plan, text, trainer, dtype)
    if average is not None:
        job.draft.write(
            "ema", lambda folder: average.write_next(trainer.model, text.tokenizer, folder, dtype=dtype)
        )


def _first_step(job: Job, plan: Sequence[object]) -> int:
    """The number of the round's first optimizer step, counted over the run. A skipped one has its number too."""
    return (job.round - 1) * len(plan) + 1


def minibatches(job: Job, rows: Sequence[Row]) -> list[tuple[int, list[int]]]:
    """(epoch, row indices) of each optimizer step of the round, in order."""
    settings = job.recipe.train
    ids = [f"{row.rollout.prompt_id}/{row.rollout.sample}" for row in rows]
    plan = []
    for epoch in range(settings.epochs):
        order = permutation(ids, job.seed, Stage.TRAIN.value, job.round, epoch)
        for number in range(settings.minibatches):
            start, end = (len(order) * place // settings.minibatches for place in (number, number + 1))
            plan.append((epoch, order[start:end]))
    return plan


# ------------------------------------------------------------------------------------- one optimizer step


def _optimizer_step(
    job: Job, rows: Sequence[Row], text: Text, trainer: Trainer, scores: RoundScores | None
) -> dict[str, float]:
    """One update from `rows`; returns its metrics. Without any token that counts it is skipped."""
    recipe = job.recipe
    objective = recipe.train.objective.in_round(job.round)
    objective = at_step(objective, trainer.step, recipe.distill_horizon)
    left = [row for row in rows if row.tokens]
    if not left:
        return {"skipped": 1.0}
    counts = [None if row.is_dropped else row.tokens for row in rows]
    share_of = dict(
        zip(
            (row.number for row in rows),
            shares(objective, counts, max_new_tokens=recipe.rollout.max_new_tokens),
            strict=True,
        )
    )
    if objective.has_kd and isinstance(objective.kd, SampledTerm) and objective.kd.baseline == "step":
        found = _baselines(objective.kd, left, [0] * len(left))
        left = [replace(row, baseline=value) for row, value in zip(left, found, strict=True)]
    rate, sums = trainer.learning_rate(), dict[str, float]()
    for indices in batches_by_tokens([row.length for row in left], recipe.runtime.train_tokens):
        picked = [left[i] for i in indices]
        try:
            loss, metrics = _micro_batch(job, objective, picked, share_of, text, trainer, scores)
        except NonFiniteError as error:
            raise _located(job, picked, error) from None
        loss.backward()  # type: ignore[no-untyped-call]
        for name, value in {"loss": loss.detach(), **metrics}.items():
            sums[name] = sums.get(name, 0.0) + float(value)
        job.pulse.tokens(sum(len(row.rollout.completion_token_ids) for row in picked))
    norm = apply_gradient(job, trainer, [row.rollout.prompt_id for row in left])
    weight = {"distill_weight": objective.distill_weight} if objective.kind in ("kdrl", "srpo") else {}
    return {"learning_rate": rate, "grad_norm": norm, **weight, **_averages(sums)}


def _micro_batch(
    job: Job,
    objective: Objective,
    rows: Sequence[Row],
    share_of: Mapping[int, float],
    text: Text,
    trainer: Trainer,
    scores: RoundScores | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The share of `rows` in the optimizer step's loss, with its gradient to the student's weights."""
    runtime, device = job.recipe.runtime, trainer.model.device
    batch = _batch(rows, device)
    with trainer.computing():
        return micro_batch_loss(
            objective,
            _tokens(rows, share_of, device),
            batch.target_ids_N,
            hidden_states(trainer.model, batch),
            head_of(trainer.model, num_ids=text.num_ids),
            temperature=job.recipe.rollout.temperature,
            chunk=runtime.head_chunk_tokens,
            teacher=_teacher(objective, rows, scores, device),
        )


def _tokens(rows: Sequence[Row], share_of: Mapping[int, float], device: torch.device) -> TokenBatch:
    """The per-token data of rows, one after another."""

    def column(arrays: Iterable[npt.NDArray[Any]]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(list(arrays))).to(device)

    def spread(values: Iterable[float], dtype: Any = np.float32) -> torch.Tensor:
        return column(np.full(len(row.kept), value, dtype) for row, value in zip(rows, values, strict=True))

    scores = [row.scores for row in rows if row.scores is not None]
    return TokenBatch(
        behaviour=column(_behaviour(row.rollout) for row in rows),
        proximal=column(row.proximal for row in rows),
        advantage=spread(math.nan if row.advantage is None else row.advantage for row in rows),
        kept=column(row.kept for row in rows),
        scorable=column(score.scorable for score in scores)
        if scores
        else spread((1.0 for _ in rows), np.bool_),
        kd_open=spread((row.taught for row in rows), np.bool_),
        share=spread(share_of[row.number] for row in rows),
        lengths=[len(row.kept) for row in rows],
        teacher=column(score.teacher_logprobs for score in scores) if scores else None,
        baseline=spread(row.baseline for row in rows),
        off_policy=spread((not row.is_sampled for row in rows), np.bool_),
    )


def _behaviour(rollout: Rollout) -> npt.NDArray[np.float32]:
    """The b of each completion token [n]; nan where nobody sampled, so that a term that reads it is noticed."""
    if rollout.sampler_logprobs is None:
        return np.full(len(rollout.completion_token_ids), math.nan, np.float32)
    return np.asarray(rollout.sampler_logprobs, np.float32)


def _teacher(
    objective: Objective, rows: Sequence[Row], scores: RoundScores | None, device: torch.device
) -> TeacherSupport | TeacherHidden | TeacherMixture | None:
    """The teacher's distribution at the completion tokens of `rows`, where the objective needs one."""
    support = objective.distribution_support
    if support is None:
        return None
    if scores is not None and scores.has_hidden:
        top_k = 0 if support == "vocabulary" else support.teacher_top_k or 0
        return scores.distribution([row.number for row in rows], top_k=top_k, device=device)
    ids, logprobs, tail = (
        torch.from_numpy(np.concatenate([getattr(row.scores, name) for row in rows])).to(device)
        for name in ("topk_ids", "topk_logprobs", "tail_logprobs")
    )
    return TeacherSupport(logprobs, ids, tail)


def _baselines(kd: SampledTerm, rows: Sequence[Row], scopes: Sequence[Hashable]) -> list[float]:
    """The mean signal of the other completions of each row's scope, from log-probs at the start of the round."""
    pairs = [(row, row.scores) for row in rows if row.scores is not None]
    return baselines(
        kd,
        [torch.from_numpy(scores.teacher_logprobs - row.proximal) for row, scores in pairs],
        [torch.from_numpy(scores.scorable & row.kept & row.taught) for row, scores in pairs],
        scopes,
    )


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


def _located(job: Job, rows: Sequence[Row], error: NonFiniteError) -> StepError:
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


# -------------------------------------------------------------------------------------- the round's rows


def _rows(
    job: Job,
    rollouts: Sequence[Rollout],
    scores: Sequence[Scores] | None,
    proximal: Sequence[npt.NDArray[np.float32]],
    text: Text,
) -> list[Row]:
    """The completions with their advantages and masks.

    What is dropped takes no part in its group's mean either, nor does what the student did not sample.
    """
    objective = job.recipe.train.objective.in_round(job.round)
    truncated = [row.finish_reason == "length" for row in rollouts]
    dropped = [cut and objective.truncated == "drop" for cut in truncated]
    unpaid = [cut and objective.truncated == "no_reward" for cut in truncated]
    correct = [row.correct and not cut for row, cut in zip(rollouts, unpaid, strict=True)]
    own = [number for number, row in enumerate(rollouts) if row.source == "student"]
    counted = [number for number in own if not dropped[number]]
    groups = [rollouts[number].prompt_id for number in counted]
    signal = dict.fromkeys(own, 0.0)
    if objective.has_rl:
        rewards = [0.0 if unpaid[number] else rollouts[number].reward for number in counted]
        signal |= zip(counted, advantages(objective, rewards, groups), strict=True)
    taught = dict.fromkeys(range(len(rollouts)), False)
    taught |= zip(
        counted, open_completions(objective, [correct[number] for number in counted], groups), strict=True
    )
    rows = [
        Row(
            number=number,
            rollout=rollout,
            scores=None if scores is None else scores[number],
            proximal=proximal[number],
            advantage=signal.get(number),
            kept=_kept(objective, rollout, text, is_dropped=dropped[number]),
            taught=taught[number],
            is_dropped=dropped[number],
        )
        for number, rollout in enumerate(rollouts)
    ]
    if objective.has_kd and isinstance(objective.kd, SampledTerm) and objective.kd.baseline == "group":
        found = _baselines(objective.kd, rows, [row.rollout.prompt_id for row in rows])
        rows = [replace(row, baseline=value) for row, value in zip(rows, found, strict=True)]
    return rows


def _kept(objective: Objective, rollout: Rollout, text: Text, *, is_dropped: bool) -> npt.NDArray[np.bool_]:
    """The tokens of a completion that count: all, all but its end token, or none."""
    ids = rollout.completion_token_ids
    kept = np.full(len(ids), not is_dropped, np.bool_)
    if objective.end_token == "mask" and rollout.finish_reason == "stop" and ids and ids[-1] in text.end_ids:  # noqa: S105
        kept[-1] = False
    return kept


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
    job.draft.write("model", lambda folder: write_model(trainer.model, text.tokenizer, folder, dtype=dtype))
    # Frozen weights are as narrow as they are written, and the adapter on them is written as wide as it is.
    masters = trainer.model.dtype != dtype
    job.draft.write(
        "trainer",
        lambda folder: write_trainer(folder, tensors=trainer.tensors(masters=masters), state=trainer.state()),
    )
    if len(job.recipe.teachers) > 1:
        _write_score_totals(job, rows)
    if job.recipe.train.objective.has_rl:
        found = [abs(row.advantage) for row in rows if row.advantage is not None]
        job.draft.metric("train/advantage_abs_mean", mean(found))
    _write_mismatch(job, rows)


def _write_score_totals(job: Job, rows: Sequence[Row]) -> None:
    """What a single teacher's own step would write: of all completions, each against its teacher or the mixture."""
    pairs = [(row.rollout, row.scores) for row in rows if row.scores is not None]
    for name, value in score_metrics(pairs).items():
        job.draft.metric(f"score/{name}", value)


def _write_mismatch(job: Job, rows: Sequence[Row]) -> None:
    """The mismatch ledger of the round (mismatch.py), and what truncated sampling kept."""
    differences = np.concatenate(
        [mismatch(_behaviour(row.rollout), row.proximal) for row in rows if row.is_sampled] or [np.zeros(0)]
    )
    objective = job.recipe.train.objective.in_round(job.round)
    for name, value in ledger(objective, differences).items():
        job.draft.metric(f"train/{name}", value)
    if differences.size:
        rollout = job.recipe.rollout
        if rollout.top_p < 1 or rollout.top_k:
            # b is of the truncated distribution, which is p over the mass it kept.
            job.draft.metric("rollout/kept_mass_mean", float(np.exp(-differences).mean()))
