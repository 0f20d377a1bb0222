"""What a completions server answered, believed only after everything in it that can be checked was.

Tokens are looked up by their id, never by their place or text. `prompt_logprobs` says of each position of the prompt
what the model thought of the id there: a completion's scores are those of its place in a prompt that ends with it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import JsonValue

from kdpipe.engines.protocol import Completion, Sampling, Scoring, TokenScores
from kdpipe.errors import EngineError

TOLERANCE_NATS = 1e-4
MASS_TOLERANCE = 1e-3
MINUS_INFINITY = -9999.0  # vLLM's stand-in, since JSON has none
FINITE = 1e9  # no log-prob is as far from 0, and vLLM's stand-in is nearer
MAX_RANK = 2**31
TAIL_FLOOR = 2.0**-23  # what one less a sum of float32 can tell from 0
_WRONG_SERVER = (
    "kdpipe needs what vLLM's server answers to prompt_logprobs and return_token_ids; old ones lack it"
)


class MoreIdsNeeded(Exception):
    """Among the most probable ids are `count` that do not count here: as many more have to be asked for."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.count = count


@dataclass(frozen=True, slots=True)
class _RankedLogprob:
    """What a reply says of one id at one position."""

    token: int
    logprob: float
    rank: int


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that a server lists: its context length where it tells, and all names of the same weights."""

    context: int | None
    names: frozenset[str]


def served_model(answer: dict[str, JsonValue], model: str, *, where: str) -> ServedModel:
    """The model of that name in a server's list; raises EngineError where the list has none."""
    data, roots, lengths = answer.get("data"), dict[str, JsonValue](), dict[str, JsonValue]()
    for row in data if isinstance(data, list) else [data]:
        name = row.get("id") if isinstance(row, dict) else None
        if not isinstance(row, dict) or not isinstance(name, str):
            raise EngineError(f"{where}/models: lists no models, expected data with an id for each")
        roots[name], lengths[name] = row.get("root"), row.get("max_model_len")
    if model not in roots:
        raise EngineError(
            f"{where}: serves {', '.join(sorted(roots)) or 'nothing'}, not {model!r}",
            hint="write the name that it serves in teachers[].server.model, or start it with that name",
        )
    # vLLM gives replies the first of the names that it was started with.
    same = {name for name, root in roots.items() if isinstance(root, str) and root == roots[model]}
    length = lengths[model]
    return ServedModel(length if isinstance(length, int) else None, frozenset({model} | same))


def read_scores(
    answer: dict[str, JsonValue],
    ids: Sequence[int],
    scoring: Scoring,
    *,
    start: int,
    asked: int,
    names: Collection[str],
    where: str,
) -> TokenScores:
    """The scores of `ids` from `start` on, of a reply to which they were the prompt and `asked` the top k.

    Raises EngineError on a reply that cannot be right, MoreIdsNeeded where its `asked` ids hold fewer than the top k
    of the ids in use. With all of these at hand they are normalised; else other ids keep their mass, in the tail.
    """
    choice = _choice(answer, ids, names=names, where=where)
    rows = choice.get("prompt_logprobs")
    if not isinstance(rows, list):
        raise EngineError(f"{where}: no prompt_logprobs in its reply", hint=_WRONG_SERVER)
    if len(rows) != len(ids) or rows[0] is not None:
        first = "nothing" if rows and rows[0] is None else "something"
        raise EngineError(
            f"{where}: prompt_logprobs of {len(rows)} positions with {first} for the first, "
            f"expected {len(ids)} with nothing for the first"
        )
    found = []
    for position, token in enumerate(ids[1:], start=1):
        row = rows[position]
        if not isinstance(row, dict) or str(token) not in row:
            raise EngineError(
                f"{where}: position {position} has no log-prob of its own id {token}",
                hint="scores that are shifted or of another prompt look like this: they are not used",
            )
        found.append((row, token, f"{where}: position {position}"))
    scored = [_position(row, token, asked=asked, where=place) for row, token, place in found[start - 1 :]]
    if not scoring.top_k:
        return TokenScores(np.array([own.logprob for own, _ in scored], np.float32))
    return _with_top_k(scored, top_k=scoring.top_k, num_ids=scoring.num_ids)


def _position(
    row: dict[str, JsonValue], token: int, *, asked: int, where: str
) -> tuple[_RankedLogprob, list[_RankedLogprob]]:
    """The entry of the position's own id, and the `asked` most probable ones, best first."""
    entries = [_entry(key, value, where=where) for key, value in row.items()]
    own = next(entry for entry in entries if entry.token == token)
    top = sorted((entry for entry in entries if entry.rank <= asked), key=lambda entry: entry.rank)
    if [entry.rank for entry in top] != list(range(1, asked + 1)):
        ranks = [entry.rank for entry in top]
        raise EngineError(f"{where}: of the {asked} most probable ids it gives ranks {ranks}")
    falling = [entry.logprob for entry in top] + ([own.logprob] if own.rank > asked else [])
    if any(after > before + TOLERANCE_NATS for before, after in itertools.pairwise(falling)):
        raise EngineError(f"{where}: a less probable rank has the higher log-prob")
    if own.rank * math.exp(own.logprob) > 1 + MASS_TOLERANCE:
        raise EngineError(
            f"{where}: log-prob {own.logprob:.4f} at rank {own.rank}: so many ids as probable have more than all mass"
        )
    if sum(map(math.exp, falling)) > 1 + MASS_TOLERANCE:
        raise EngineError(f"{where}: its probabilities sum to more than 1")
    return own, top


def _entry(key: str, value: Any, *, where: str) -> _RankedLogprob:
    if not isinstance(value, dict) or not (len(key) < 10 and key.isdecimal() and str(int(key)) == key):
        raise EngineError(f"{where}: an entry that is no id with its log-prob")
    logprob, rank = value.get("logprob"), value.get("rank")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank < MAX_RANK:
        raise EngineError(f"{where}: id {key} has no rank of 1 or more")
    return _RankedLogprob(int(key), _logprob(logprob, where=f"{where}: id {key}"), rank)


def _logprob(value: Any, *, where: str) -> float:
    """A log-prob that can be one: a finite number, at most 0 but for rounding."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) < FINITE:  # compared, as an integer may be too large for a float
        raise EngineError(f"{where}: its log-prob is {value!r}, expected a finite number")
    if value > TOLERANCE_NATS:
        raise EngineError(f"{where}: its log-prob is {value:g}, expected 0 or less")
    if value <= MINUS_INFINITY:
        raise EngineError(f"{where}: has no probability at all (log-prob {value:g})")
    return min(float(value), 0.0)


def _with_top_k(
    found: Sequence[tuple[_RankedLogprob, list[_RankedLogprob]]], *, top_k: int, num_ids: int
) -> TokenScores:
    shape = (len(found), top_k)
    ids, logprobs = np.zeros(shape, np.int32), np.zeros(shape, np.float64)
    for t, (_, top) in enumerate(found):
        kept = [entry for entry in top if entry.token < num_ids]
        if len(kept) < top_k:
            raise MoreIdsNeeded(top_k - len(kept))
        kept = sorted(kept[:top_k], key=lambda entry: (-entry.logprob, entry.token))
        ids[t], logprobs[t] = [entry.token for entry in kept], [entry.logprob for entry in kept]
    own = np.array([entry.logprob for entry, _ in found])
    mass = np.exp(logprobs).sum(axis=1)
    if top_k == num_ids:  # every id that counts is here, so their distribution is known exactly
        own, logprobs = own - np.log(mass), logprobs - np.log(mass)[:, None]
        tail = np.full(len(found), -np.inf)
    else:
        tail = np.log(np.maximum(1 - mass, TAIL_FLOOR))
    return TokenScores(own.astype(np.float32), ids, logprobs.astype(np.float32), tail.astype(np.float32))


def read_completion(
    answer: dict[str, JsonValue],
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    names: Collection[str],
    where: str,
) -> Completion:
    """The completion that a reply holds; raises EngineError on one that was not sampled as asked."""
    choice = _choice(answer, prompt, names=names, where=where)
    ids = _ids(choice.get("token_ids"))
    if ids is None:
        raise EngineError(f"{where}: no token_ids in its reply", hint=_WRONG_SERVER)
    said = choice.get("logprobs")
    tokens, values = (
        (said.get("tokens"), said.get("token_logprobs")) if isinstance(said, dict) else (None, None)
    )
    if not isinstance(values, list) or tokens != [f"token_id:{token}" for token in ids]:
        raise EngineError(f"{where}: its log-probs are not of the {len(ids)} ids that it sampled")
    if len(values) != len(ids):
        raise EngineError(f"{where}: {len(values)} log-probs for {len(ids)} ids")
    logprobs = [_logprob(value, where=f"{where}: token {t}") for t, value in enumerate(values)]
    foreign = [token for token in ids if token >= sampling.num_ids]
    if foreign:
        raise EngineError(
            f"{where}: it sampled id {foreign[0]}, and only ids below {sampling.num_ids} count here",
            hint="no server is kept from drawing padding, or ids that the student lacks: take a teacher without them",
        )
    reason = choice.get("finish_reason")
    ended = bool(ids) and ids[-1] in sampling.end_ids
    whole = len(ids) == sampling.max_new_tokens
    if not ids or any(token in sampling.end_ids for token in ids[:-1]) or len(ids) > sampling.max_new_tokens:
        raise EngineError(f"{where}: a completion of {len(ids)} tokens that does not end where it was to")
    if reason == "stop" and (ended or sampling.stop):
        return Completion(ids, logprobs, "stop")
    if reason == "length" and whole and not ended:
        return Completion(ids, logprobs, "length")
    raise EngineError(
        f"{where}: ended for {reason!r} after {len(ids)} tokens, the last of them id {ids[-1]}; "
        f"expected stop at one of {list(sampling.end_ids)[:8]}, or length at {sampling.max_new_tokens}"
    )


def _choice(
    answer: dict[str, JsonValue], prompt: Sequence[int], *, names: Collection[str], where: str
) -> dict[str, JsonValue]:
    """The only choice of a reply, its model and prompt ids compared with what was asked."""
    name = answer.get("model")
    if not isinstance(name, str) or name not in names:
        raise EngineError(
            f"{where}: answers as model {name!r}, asked was {' or '.join(map(repr, sorted(names)))}",
            hint=f"if that is the model, write its name: teachers[].server.model: {name}",
        )
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise EngineError(f"{where}: expected one choice in its reply")
    choice: dict[str, JsonValue] = choices[0]
    echoed = _ids(choice.get("prompt_token_ids"))
    if echoed is None:
        raise EngineError(f"{where}: its reply does not repeat the ids of the prompt", hint=_WRONG_SERVER)
    if echoed != list(prompt):
        raise EngineError(
            f"{where}: read other ids than it was sent: {len(echoed)} of them, sent were {len(prompt)}"
        )
    return choice


def _ids(value: Any) -> list[int] | None:
    """A list of token ids, or None where it is none."""
    are_ids = isinstance(value, list) and all(type(token) is int and token >= 0 for token in value)
    return value if are_ids else None
