"""What every stage gets beside its settings: round and seed, problems, and a draft to write to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from kdpipe.data.rows import Problem
from kdpipe.data.tables import merge, write_rows
from kdpipe.errors import EngineError, StepError
from kdpipe.recipe.runtime import Runtime
from kdpipe.store.artifacts import Draft
from kdpipe.workers.pulse import Pulse

Item = TypeVar("Item")
NAMED_PROMPTS = 8
NOTHING_PUBLISHED = (
    "nothing of this step was published, and all steps before it are kept; fix what makes the number, "
    "then the same command continues"
)


@dataclass(frozen=True, slots=True)
class Job:
    """One step's round and seed, the task's problems, the draft to write, and how the step runs.

    `runtime` changes no result beyond rounding.
    """

    runtime: Runtime
    round: int
    seed: int
    train: Sequence[Problem]
    test: Sequence[Problem]
    draft: Draft
    pulse: Pulse

    def in_parts(
        self,
        name: str,
        items: Sequence[Item],
        *,
        rows_per_item: int,
        build: Callable[[Sequence[Item]], Sequence[Any]],
        schema: pa.Schema,
        first: int = 0,
        part_schema: pa.Schema | None = None,
        finish: Callable[[Sequence[Path]], None] = lambda _: None,
        rows_of: Callable[[Item], int] | None = None,
    ) -> int:
        """Writes payload table `name` from the rows that `build` makes of the items, part by part.

        Parts hold whole items, are cut by the settings alone and numbered from `first`, so that a resumed step
        repeats the same batches; those that an earlier attempt finished are not built again. Parts may have
        columns (`part_schema`) that the table has not: `finish` sees their files before. An item has at most
        `rows_per_item` rows, and so many unless `rows_of` says less. Returns the number of the next free part.
        """
        size = max(1, self.runtime.part_rows // rows_per_item)
        paths: list[Path] = []
        counts = [rows_per_item if rows_of is None else rows_of(item) for item in items]
        self.pulse.start("completions", sum(counts))
        for start in range(0, len(items), size):
            piece = items[start : start + size]
            path = self.draft.part(
                first + len(paths),
                lambda path: write_rows(path, build(piece), part_schema or schema),  # noqa: B023
            )
            paths.append(path)
            self.pulse.advance(sum(counts[start : start + size]))
            self.pulse.safe_point()
        finish(paths)
        self.draft.write(name, lambda path: merge(paths, path, schema))
        return first + len(paths)

    @contextlib.contextmanager
    def asking(self, prompt_ids: Sequence[str]) -> Iterator[None]:
        """Makes an engine's error, while this is open, name the round and the prompt instead of the request."""
        try:
            yield
        except EngineError as error:
            if error.request is None:
                raise
            where = f"round {self.round}, prompt {prompt_ids[error.request]}"
            hint = f"{error.hint}; {NOTHING_PUBLISHED}" if error.hint else NOTHING_PUBLISHED
            raise type(error)(f"{where}: {error.what}", hint=hint) from None

    @contextlib.contextmanager
    def updating(self, prompt_ids: Sequence[str]) -> Iterator[None]:
        """Makes a trainer's StepError, while this is open, name the round and the prompts."""
        try:
            yield
        except StepError as error:
            names = sorted(set(prompt_ids))
            more = f" and {len(names) - NAMED_PROMPTS} more" if len(names) > NAMED_PROMPTS else ""
            about = f"round {self.round}, prompts {', '.join(names[:NAMED_PROMPTS])}{more}"
            raise StepError(f"{about}: {error.message}", hint=f"{error.hint}; {NOTHING_PUBLISHED}") from None

    def end_optimizer_step(self, done: int, *, of: int, write: Callable[[Path], None]) -> None:
        """Counts an optimizer step, writes a checkpoint where one is due, and lets the step be stopped here.

        `done` of `of` optimizer steps are taken. After the last none is written: what follows is the payload.
        """
        self.pulse.advance()
        is_due = done % self.runtime.checkpoint_steps == 0
        if (is_due or self.pulse.stopping) and done < of:
            self.draft.write_checkpoint(done, write)
        self.pulse.safe_point()

    def require_finite(self, prompt_ids: Sequence[str], values: Sequence[Any], what: str) -> None:
        """Raises StepError with round, prompt and token unless every number [n] of every completion is finite."""
        for prompt_id, row in zip(prompt_ids, values, strict=True):
            bad = ~np.isfinite(np.asarray(row, np.float64))
            if bad.any():
                token = int(bad.argmax())
                where = f"round {self.round}, prompt {prompt_id}, token {token}"
                raise StepError(f"{where}: {what} is {row[token]}", hint=NOTHING_PUBLISHED)


def mean(values: Sequence[float]) -> float:
    """The mean; 0 of nothing."""
    return sum(values) / len(values) if values else 0.0
