"""The held-out reverse KL of each problem, as `reverse_kl.parquet` has it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kdpipe.data.tables import TableRow

Totals = tuple[list[float], list[float]]
"""A sum in nats and the number of its tokens, for each problem."""
COLUMNS = ["prompt_id", "sampler_logprobs", "teacher_logprobs", "scorable", "reverse_kl_nats"]
"""What is read here."""


def sampled_totals(rows: Sequence[TableRow]) -> Totals:
    """Sampler minus teacher log-prob over scorable tokens."""
    sums, counts = [], []
    for row in rows:
        mask = np.asarray(row["scorable"], bool)
        difference = np.subtract(row["sampler_logprobs"], row["teacher_logprobs"], dtype=np.float64)
        sums.append(float(difference[mask].sum()))
        counts.append(float(mask.sum()))
    return sums, counts


def exact_totals(rows: Sequence[TableRow]) -> Totals | None:
    """KL of the two whole distributions over positions; None where it was not measured."""
    values = [row["reverse_kl_nats"] for row in rows]
    if any(value is None for value in values):
        return None
    sums = [float(np.sum(value, dtype=np.float64)) for value in values]
    return sums, [float(len(value)) for value in values]


def with_tokens(rows: Sequence[TableRow], others: Sequence[TableRow]) -> list[TableRow]:
    """The rows of the problems that have a scorable token in both, so that no resample is without any."""
    return [
        row
        for row, other in zip(rows, others, strict=True)
        if np.any(row["scorable"]) and np.any(other["scorable"])
    ]
