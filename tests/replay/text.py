"""Which problems a round has, in which order steps see them, prompts as token ids, and the numbers in answers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

from tests.replay.reading import Record

LAST_NUMBER = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
"""That of lm-evaluation-harness, gsm8k, flexible-extract."""


def order(names: Sequence[str], *seed: str | int) -> list[int]:
    """Indices of the names in the order of the hashes of seed and name."""

    def key(index: int) -> tuple[int, str]:
        parts = "\x1f".join(f"{type(part).__name__}:{part}" for part in (*seed, names[index]))
        return int.from_bytes(hashlib.sha256(parts.encode()).digest()[:8], "big") >> 1, names[index]

    return sorted(range(len(names)), key=key)


def round_prompts(names: Sequence[str], *, prompts: int, number: int, seed: int) -> list[str]:
    """The prompts of a round: epoch after epoch, each in an order of its own, in whole rounds."""
    epoch, place = divmod(number - 1, len(names) // prompts)
    found = order(names, seed, "epoch", epoch)[place * prompts : (place + 1) * prompts]
    return [names[index] for index in found]


def render(
    tokenizer: Any, task: Mapping[str, Any], problem: Mapping[str, Any], own: str | None = None
) -> list[int]:
    """The ids of a problem's prompt; `own` is a teacher's text with names of fields in braces."""
    text = question_of(problem)
    if own is not None:
        fields = {**problem, "question": text, "solution": problem.get("answer")}
        text = re.sub(r"{(\w+)}", lambda match: str(fields[match[1]]), own)
    elif task["instruction"]:
        text = f"{task['instruction']}\n\n{text}"
    if task["prompt"] == "plain":
        shown = text.removesuffix("\n") + "\n"
    else:
        turns = [{"role": "user", "content": text}]
        shown = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    found: list[int] = tokenizer.encode(shown, add_special_tokens=False)
    return found


def reference(tokenizer: Any, problem: Mapping[str, Any]) -> list[int]:
    """The reference solution as a completion."""
    return [*tokenizer.encode(problem["answer"], add_special_tokens=False), tokenizer.eos_token_id]


def batches(problems: Sequence[Record], section: Mapping[str, Any], seed: int) -> Iterator[list[Record]]:
    """The problems of each step of a cold start: pieces of one order after another."""
    names, seen = [problem["prompt_id"] for problem in problems], list[int]()
    while len(seen) < section["steps"] * section["batch"]:
        seen += order(names, seed, "sft", len(seen) // len(names))
    for step in range(section["steps"]):
        yield [problems[index] for index in seen[step * section["batch"] :][: section["batch"]]]


def question_of(problem: Mapping[str, Any]) -> str:
    return str(problem["question"] if "question" in problem else problem["prompt"])


def last_number(text: str) -> Decimal | None:
    """The number that a text ends with, as lm-evaluation-harness reads it."""
    found = [match[0] for match in LAST_NUMBER.finditer(text)]
    plain = found[-1].replace("$", "").replace(",", "").rstrip(".") if found else ""
    return Decimal(plain) if re.fullmatch(r"-?\d+(\.\d+)?|-?\.\d+", plain) else None


def answered(problem: Mapping[str, Any]) -> Decimal:
    """The number of a problem's reference."""
    return Decimal(str(problem["answer"]).rpartition("####")[2].strip())
