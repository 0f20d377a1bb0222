"""Seeds and orders by hashing: never from a global generator, the wall clock or what is left to do."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def derive_seed(*parts: str | int) -> int:
    """A seed in [0, 2**63) that depends on every part and its type."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def permutation(ids: Sequence[str], *seed: str | int) -> list[int]:
    """Indices of `ids` in an order that depends on the seed and the ids, not on their positions."""
    return sorted(range(len(ids)), key=lambda index: (derive_seed(*seed, ids[index]), ids[index]))


def round_indices(ids: Sequence[str], *, prompts: int, round_number: int, seed: int) -> list[int]:
    """The `prompts` indices of round `round_number` (from 1): epoch after epoch of seeded permutations.

    An epoch holds as many whole rounds as fit, so that no id comes twice in a round; the ids left over
    change with every epoch. Raises ValueError when a round wants more prompts than there are ids.
    """
    rounds_per_epoch = len(ids) // prompts
    if rounds_per_epoch == 0:
        raise ValueError(f"a round of {prompts} prompts needs as many problems, and there are {len(ids)}")
    epoch, place = divmod(round_number - 1, rounds_per_epoch)
    order = permutation(ids, seed, "epoch", epoch)
    return order[place * prompts : (place + 1) * prompts]


def chosen_ids(ids: Sequence[str], *, count: int, round_number: int, seed: int) -> frozenset[str]:
    """The `count` of a round's ids that the student samples for; with a larger count the same and others."""
    order = permutation(ids, seed, "on-policy", round_number)
    return frozenset(ids[index] for index in order[:count])
