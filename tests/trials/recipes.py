"""Recipes whose numbers, texts and sizes nobody would write: each is refused, or taken, within two seconds."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

from tests.trials.trial import DONE, USAGE, Trial

FIELDS = (
    "seed",
    "rounds",
    "task.train_problems",
    "task.max_operand",
    "rollout.prompts",
    "rollout.samples",
    "rollout.max_new_tokens",
    "rollout.temperature",
    "train.minibatches",
    "train.epochs",
    "train.optimizer.learning_rate",
    "evaluate.problems",
    "evaluate.every",
    "student.scratch.hidden_size",
    "student.scratch.num_layers",
    "student.sft.steps",
    "student.sft.batch",
    "runtime.part_rows",
    "runtime.threads",
    "name",
)
VALUES = (
    "100000000",
    "9223372036854775807",
    "1e400",
    "-1",
    "0",
    "1.5",
    ".nan",
    "1" * 5000,
    "[[]]",
    "{a: {b: c}}",
    '"\\ud800"',
    '"\\0"',
    "yes",
)
LIMIT_SECONDS = 2.0


def big(text: Callable[[], str]) -> Callable[[Path], object]:
    """Adds a text to the recipe file."""
    return lambda folder: (folder / "recipe.yaml").open("a").write(text())


FILES: dict[str, Callable[[Path], object]] = {
    "a list of 500,000 numbers": big(lambda: f"extra: {json.dumps(list(range(500_000)))}\n"),
    "a list of 100,000 numbers where a count is due": big(lambda: f"seeds: {json.dumps([1] * 100_000)}\n"),
    "100,000 unknown keys": big(lambda: "".join(f"k{number}: 1\n" for number in range(100_000))),
    "10,000 unknown keys": big(lambda: "".join(f"k{number}: 1\n" for number in range(10_000))),
    "a text of 10 MB": big(lambda: f"extra: {'a' * 10_000_000}\n"),
    "a comment of 10 MB": big(lambda: f"# {'a' * 10_000_000}\n"),
    "100,000 levels": big(lambda: f"extra: {'[' * 100_000}{']' * 100_000}\n"),
    "500 levels": big(lambda: f"extra: {'[' * 500}{']' * 500}\n"),
    "aliases that double": big(
        lambda: "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
    ),
    "an anchor to itself": big(lambda: "extra: &a [*a]\n"),
    "an unknown tag": big(lambda: "extra: !!python/object/apply:os.system ['touch OWNED']\n"),
    "a null": lambda folder: (folder / "recipe.yaml").write_bytes(b"name: a\0b\n"),
    "UTF-16": lambda folder: (folder / "recipe.yaml").write_text("name: a\n", encoding="utf-16"),
    "no UTF-8": lambda folder: (folder / "recipe.yaml").write_bytes(b"name: \xff\xfe\xfa\n"),
    "nothing": lambda folder: (folder / "recipe.yaml").write_bytes(b""),
    "two documents": big(lambda: "---\nname: b\n"),
    "tabs": big(lambda: "\textra: 1\n"),
    "merge keys": big(lambda: "extra: {<<: 5}\n"),
    "a date": big(lambda: "extra: 2001-99-99\n"),
    "a base 60 number": big(lambda: "extra: 190:20:30\n"),
}


def trials() -> Iterator[Trial]:
    allowed = frozenset({DONE, USAGE})
    for field, value in product(FIELDS, VALUES):
        override = shlex.quote(f"{field}={value}")
        yield Trial(
            "recipes",
            f"{field}={value[:20]}",
            f"kdpipe plan recipe.yaml --set {override}",
            allowed,
            seconds=LIMIT_SECONDS,
        )
    for (name, prepare), command in product(FILES.items(), ("check", "plan")):
        yield Trial(
            "recipes",
            f"{command}: {name}",
            f"kdpipe {command} recipe.yaml",
            frozenset({USAGE}),
            prepare,
            seconds=LIMIT_SECONDS,
        )
