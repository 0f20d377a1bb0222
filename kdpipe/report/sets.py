"""Which completions the page shows: the newest that a teacher scored, those of before, and the graded answers."""

from __future__ import annotations

from kdpipe.report.tokens_data import Titled
from kdpipe.results.completions import Batch, Reader


def titled_batches(reader: Reader) -> list[Titled]:
    """The batches that are there, the most telling first."""
    evaluated = sorted(reader.evaluated_rounds())
    found = []
    if evaluated and (batch := reader.held_out(evaluated[-1])) is not None:
        found.append(_held_out(batch))
    if (number := reader.scored_round()) is not None:
        found.append(_rollout(reader.rollout(number)))
    if len(evaluated) > 1 and evaluated[0] == 0 and (batch := reader.held_out(0)) is not None:
        found.append(_held_out(batch))
    if evaluated:
        found.append(_answers(reader.answers(evaluated[-1])))
    return found


def _held_out(batch: Batch) -> Titled:
    number = batch.step.round
    who = "student before" if number == 0 else f"student {number}"
    flips = (
        " Flipped: its graded answer was right at first and is wrong now, or the other way round."
        if batch.changes
        else ""
    )
    note = f"Held-out problems, sampled by {who} at the rollout temperature; right or wrong is that sample.{flips}"
    return Titled(f"held-out-{number}", f"Held out, {who}", note, batch)


def _rollout(batch: Batch) -> Titled:
    number = batch.step.round
    scored = "" if batch.is_scored else " No teacher scored it."
    note = f"What student {number - 1} sampled, and student {number} was trained on.{scored}"
    return Titled(f"rollout-{number}", f"Training, round {number}", note, batch)


def _answers(batch: Batch) -> Titled:
    number = batch.step.round
    pairs = ", beside the answer before training" if batch.changes else ""
    note = f"The graded answers of student {number}{pairs}. The teacher did not score these texts."
    return Titled(f"answers-{number}", f"Graded answers, student {number}", note, batch)
