"""Whether a server still has its weights: its scores of a fixed sequence, kept in the workspace.

Weights behind a server cannot be hashed. What they make of a few ids can be compared, with what it was when a teacher
of this identity was first asked: a net for weights exchanged under a name, not a proof that they are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import JsonValue

from kdpipe.errors import ArtifactError, PreflightError
from kdpipe.store.durable import write_json
from kdpipe.store.sealed import seal_value, unseal_value

FILE = "servers.json"
KIND = "memory of servers"
SAME_NATS = 0.15
"""Mean distance per token up to which two servers may hold the same weights: above what kernels and bfloat16 do."""


def distance(scores: Sequence[float], others: Sequence[float]) -> float:
    """Mean absolute difference of log-probs of the same ids, in nats; inf for unequal lengths."""
    if len(scores) != len(others):
        return float("inf")
    return float(np.abs(np.subtract(scores, others)).mean()) if scores else 0.0


def require_same(workspace: Path, digest: str, *, who: str, scores: Sequence[float]) -> None:
    """Remembers a new teacher's scores; raises PreflightError where a known one's have changed.

    `digest` is what its identity was hashed to: served name, tokenizer and revision.
    """
    path = workspace / FILE
    known = _read(path)
    before = known.get(digest)
    if not isinstance(before, list):
        write_json(path, seal_value(KIND, {**known, digest: [float(score) for score in scores]}))
        return
    apart = distance([float(score) for score in before if isinstance(score, int | float)], scores)
    if apart > SAME_NATS:
        raise PreflightError(
            f"{who}: its server has other weights than those that scored in this workspace before: "
            f"log-probs of the same ids differ by {apart:.2f} nats a token",
            hint="other weights need another teachers[].server.model or revision, or their scores stand beside the old",
        )


def _read(path: Path) -> dict[str, JsonValue]:
    try:
        value = unseal_value(path, path.read_bytes(), kind=KIND)
    except FileNotFoundError:  # nothing was asked in this workspace
        return {}
    except ArtifactError as error:
        raise ArtifactError(
            error.message, hint="put back a copy of it; removing it takes every server as it is now"
        ) from None
    return value if isinstance(value, dict) else {}
