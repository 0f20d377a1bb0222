"""The completions of the token view as compact JSON, as many as fit: the page has a bound and says what it left out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, repeat, zip_longest
from typing import Any

from kdpipe.report.markup import visible
from kdpipe.results.completions import Batch, Completion, Token

MAX_COMPLETIONS = 300
"""Of one batch."""
MAX_TOKENS = 1500
"""Of one completion: what follows is counted and left out."""
UNITS = 10_000
"""Log-probs are written as whole numbers of ten-thousandths of a nat."""


@dataclass(frozen=True, slots=True)
class Titled:
    """A batch with what the page says of it."""

    key: str
    title: str
    note: str
    batch: Batch


def token_data(batches: list[Titled], *, headline: str, max_bytes: int) -> dict[str, Any]:
    """The document that the page's script reads, of at most `max_bytes` as JSON.

    Completions are taken from the batches in turn, in each from the wrong, right and truncated ones in turn, those with
    the largest disagreement first.
    """
    table: dict[tuple[str, str], int] = {}
    sets = [
        {
            "key": titled.key,
            "title": titled.title,
            "note": titled.note,
            "scored": titled.batch.is_scored,
            "flips": bool(titled.batch.changes),
            "total": len(titled.batch),
            "items": [],
        }
        for titled in batches
    ]
    left = max_bytes - len(json.dumps(sets)) - 100
    orders = [zip(repeat(number), _order(titled.batch)) for number, titled in enumerate(batches)]
    for number, index in filter(None, chain.from_iterable(zip_longest(*orders))):
        before = len(table)
        item = _item(batches[number].batch.completion(index, headline=headline), index, table)
        added = list(table)[before:]
        left -= _size(item) + sum(_size(_piece(*key)) for key in added)
        if left < 0:
            for key in added:
                del table[key]
            break
        sets[number]["items"].append(item)
    return {"sets": sets, "pieces": [_piece(*key) for key in table]}


def _size(value: Any) -> int:
    # What `embedded` escapes is longer there: counted as if every such character were in the way.
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return len(text.encode()) + 5 * sum(text.count(character) for character in "<>&") + 1


def _order(batch: Batch) -> Iterator[int]:
    """The rows worth showing, by turns."""
    ranked = sorted(range(len(batch)), key=batch.worst, reverse=True)
    groups: dict[str, list[int]] = {"flipped": [], "truncated": [], "wrong": [], "right": []}
    for index in ranked:
        groups[_group(batch, index)].append(index)
    turns = chain.from_iterable(zip_longest(*groups.values()))
    for count, index in enumerate(index for index in turns if index is not None):
        if count == MAX_COMPLETIONS:
            return
        yield index


def _group(batch: Batch, index: int) -> str:
    if batch.flipped(index):
        return "flipped"
    if batch.rows[index]["finish_reason"] == "length":
        return "truncated"
    return "right" if batch.is_right(index) else "wrong"


def _item(completion: Completion, index: int, table: dict[tuple[str, str], int]) -> dict[str, Any]:
    """One completion; `index` is its place in the table that it is from."""
    tokens = completion.tokens[:MAX_TOKENS]
    change = completion.change
    item: dict[str, Any] = {
        "i": index,
        "id": visible(completion.prompt_id),
        "n": completion.sample,
        "q": visible(completion.question),
        "e": visible(completion.expected),
        "a": None if completion.answer is None else visible(completion.answer),
        "ok": completion.is_right,
        "cut": completion.is_truncated,
        "src": completion.source,
        "p": [_place(visible(token.piece.text), token.piece.kind, table) for token in tokens],
        "more": len(completion.tokens) - len(tokens),
    }
    if completion.teacher:
        item["by"] = visible(completion.teacher)
    if any(token.student is not None for token in tokens):
        item["s"] = [_units(token.student) for token in tokens]
    if any(token.teacher is not None for token in tokens):
        item["t"] = [_units(token.teacher) for token in tokens]
    if any(token.divergence is not None for token in tokens):
        item["d"] = [_units(token.divergence) for token in tokens]
    if any(token.alternatives for token in tokens):
        item["alt"] = [_alternatives(token, table) for token in tokens]
    if change is not None:
        item |= {"was": change.was_right, "is": change.is_right}
        item |= {"before": visible(change.before), "after": visible(change.after)}
    return item


def _alternatives(token: Token, table: dict[tuple[str, str], int]) -> list[int | None]:
    """Piece and log-prob by turns: half the size of pairs."""
    return list(
        chain.from_iterable(
            (_place(visible(text), "text", table), _units(logprob)) for text, logprob in token.alternatives
        )
    )


def _place(text: str, kind: str, table: dict[tuple[str, str], int]) -> int:
    return table.setdefault((text, kind), len(table))


def _piece(text: str, kind: str) -> str | list[str]:
    return text if kind == "text" else [text, kind]


def _units(value: float | None) -> int | None:
    return None if value is None else round(UNITS * value)
