"""The completions of the token view as compact JSON, as many as fit; the page says what is left out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat, zip_longest
from typing import TypeAlias

from kdpipe.results.completions import CompletionTable, GradedCompletion, Token
from kdpipe.results.reader import Reader
from kdpipe.results.visible_text import visible

MAX_COMPLETIONS = 300
"""Of one table."""
MAX_TOKENS = 1500
"""Of one completion: what follows is counted and left out."""
UNITS = 10_000
"""Log-probs are written as whole numbers of ten-thousandths of a nat."""
Numbered: TypeAlias = "dict[tuple[str, str], int]"
"""The text and kind of each token with its number in the document, so that each text stands there once."""


@dataclass(frozen=True, slots=True)
class Titled:
    """Completions with what the page says of them."""

    key: str
    title: str
    note: str
    completions: CompletionTable


def titled_completions(reader: Reader) -> list[Titled]:
    """The newest that a teacher scored, those of before, and the graded answers: the most telling first."""
    evaluated, number = sorted(reader.evaluated_rounds), reader.scored_round()
    found = [
        reader.held_out(evaluated[-1]) if evaluated else None,
        None if number is None else reader.rollout(number),
        reader.held_out(0) if len(evaluated) > 1 and evaluated[0] == 0 else None,
        reader.answers(evaluated[-1]) if evaluated else None,
    ]
    return [_titled(completions) for completions in found if completions is not None]


def _titled(completions: CompletionTable) -> Titled:
    number, changes = completions.step.round, completions.changes
    match completions.kind:
        case "held-out":
            who = f"student {number}" if number else "student before"
            title = f"Held out, {who}"
            note = f"Held-out problems, sampled by {who} at the rollout temperature"
            note += "; right or wrong is that sample." if completions.is_graded else "."
            if changes and completions.is_graded:
                note += (
                    " Flipped: its graded answer was right at first and is wrong now, or the other way round."
                )
        case "answers":
            title = f"{'Graded answers' if completions.is_graded else 'Answers'}, student {number}"
            pairs = ", beside the answer before training" if changes else ""
            note = f"The {title.partition(',')[0].lower()} of student {number}{pairs}."
            note += " The teacher did not score these texts."
        case _:  # sampled to train on
            title = f"Training, round {number}"
            note = f"What student {number - 1} sampled, and student {number} was trained on."
            note += "" if completions.is_scored else " No teacher scored it."
    return Titled(f"{completions.kind}-{number}", title, note, completions)


def token_data(sets: Sequence[Titled], *, max_bytes: int) -> dict[str, object]:
    """The document that the page's script reads, of at most `max_bytes` as JSON.

    Completions are taken from the sets in turn, in each from the wrong, right and truncated ones in turn, those with
    the largest disagreement first.
    """
    numbered: Numbered = {}
    heads = [_head(titled) for titled in sets]
    items: list[list[dict[str, object]]] = [[] for _ in sets]
    left = max_bytes - len(json.dumps(heads)) - 100
    orders = [zip(repeat(number), _order(titled.completions)) for number, titled in enumerate(sets)]
    for number, index in filter(None, chain.from_iterable(zip_longest(*orders))):
        before = len(numbered)
        item = _item(sets[number].completions.completion(index), index, numbered)
        added = list(numbered)[before:]
        left -= _size(item) + sum(_size(_piece(*key)) for key in added)
        if left < 0:
            for key in added:
                del numbered[key]
            break
        items[number].append(item)
    return {
        "sets": [{**head, "items": own} for head, own in zip(heads, items, strict=True)],
        "pieces": [_piece(*key) for key in numbered],
    }


def _head(titled: Titled) -> Mapping[str, object]:
    completions = titled.completions
    return {
        "key": titled.key,
        "title": titled.title,
        "note": titled.note,
        "scored": completions.is_scored,
        "graded": completions.is_graded,
        "flips": bool(completions.changes),
        "total": len(completions),
        "items": [],
    }


def _size(value: object) -> int:
    # What the page escapes in JSON is longer there: counted as if every such character were in the way.
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return len(text.encode()) + 5 * sum(text.count(character) for character in "<>&") + 1


def _order(completions: CompletionTable) -> Iterator[int]:
    """The rows worth showing, by turns."""
    ranked = sorted(range(len(completions)), key=completions.worst, reverse=True)
    groups: dict[str, list[int]] = {"flipped": [], "truncated": [], "wrong": [], "right": []}
    for index in ranked:
        groups[_group(completions, index)].append(index)
    turns = chain.from_iterable(zip_longest(*groups.values()))
    return islice((index for index in turns if index is not None), MAX_COMPLETIONS)


def _group(completions: CompletionTable, index: int) -> str:
    row = completions.rows[index]
    if completions.flipped(index):
        return "flipped"
    if row.is_truncated:
        return "truncated"
    return "right" if row.is_right else "wrong"


def _item(completion: GradedCompletion, index: int, numbered: Numbered) -> dict[str, object]:
    """One completion; `index` is its place in the table that it is from."""
    tokens = completion.tokens[:MAX_TOKENS]
    change = completion.change
    item: dict[str, object] = {
        "i": index,
        "id": visible(completion.prompt_id),
        "n": completion.sample,
        "q": visible(completion.question),
        "e": visible(completion.expected or ""),
        "a": None if completion.answer is None else visible(completion.answer),
        "ok": completion.is_right,
        "cut": completion.is_truncated,
        "src": completion.source,
        "p": [_number(token.piece.text, token.piece.kind, numbered) for token in tokens],
        "more": len(completion.tokens) - len(tokens),
    }
    if completion.teacher:
        item["by"] = visible(completion.teacher)
    columns = {
        "s": [token.student for token in tokens],
        "t": [token.teacher for token in tokens],
        "d": [token.divergence for token in tokens],
    }
    for name, values in columns.items():
        if any(value is not None for value in values):
            item[name] = [_units(value) for value in values]
    if any(token.alternatives for token in tokens):
        item["alt"] = [_alternatives(token, numbered) for token in tokens]
    if change is not None:
        item |= {"was": change.was_right, "is": change.is_right}
        item |= {"before": visible(change.before), "after": visible(change.after)}
    return item


def _alternatives(token: Token, numbered: Numbered) -> list[int | None]:
    """Text and log-prob by turns: half the size of pairs."""
    pairs = ((_number(text, "text", numbered), _units(logprob)) for text, logprob in token.alternatives)
    return list(chain.from_iterable(pairs))


def _number(text: str, kind: str, numbered: Numbered) -> int:
    return numbered.setdefault((visible(text), kind), len(numbered))


def _piece(text: str, kind: str) -> str | list[str]:
    return text if kind == "text" else [text, kind]


def _units(value: float | None) -> int | None:
    return None if value is None else round(UNITS * value)
