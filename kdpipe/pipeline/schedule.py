"""Which step may run next, and what the steps ahead will open. Pure: knows no file, process or clock.

A step may run once all that it reads is finished. The runner finishes each step before it asks for the next one; asked
again before that, a schedule gives a step that waits for none of those at work.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Collection, Iterable

from kdpipe.pipeline.plan import Plan
from kdpipe.store.step import Step


class Schedule:
    """The steps of one command, in the order of the plan as far as what they read allows.

    `pending` has the ids of all steps of the plan that will be performed: those not done, and those to perform again.
    """

    def __init__(self, plan: Plan, steps: Collection[Step], pending: Iterable[str]) -> None:
        self._plan = plan
        self._position = {step.id: number for number, step in enumerate(plan.steps)}
        self._readers: dict[str, list[Step]] = {step.id: [] for step in plan.steps}
        for step in plan.steps:
            for source in step.inputs.values():
                self._readers[source.step_id].append(step)
        asked = {step.id for step in steps}
        self._missing = {
            step.id: sum(source.step_id in asked for source in step.inputs.values()) for step in steps
        }
        self._ready = [self._position[step_id] for step_id, missing in self._missing.items() if not missing]
        heapq.heapify(self._ready)
        self._finished: set[str] = set()
        self._pending: set[str] = set()
        self._reached: set[str] = set()
        self._awaited: Counter[tuple[str, str]] = Counter()
        for step_id in pending:
            self._await(step_id)

    def next(self) -> Step | None:
        """The first step that may run; None where each one has run or waits for one at work."""
        return self._plan.steps[heapq.heappop(self._ready)] if self._ready else None

    def finish(self, step: Step, *, changed: bool = False) -> None:
        """Notes that a step is done; `changed`: its result is not the one that its readers were made from."""
        self._finished.add(step.id)
        if step.id in self._pending:
            self._pending.remove(step.id)
            self._awaited.subtract(self._opened(step))
        for reader in self._readers[step.id]:
            if reader.id in self._missing:
                self._missing[reader.id] -= 1
                if not self._missing[reader.id]:
                    heapq.heappush(self._ready, self._position[reader.id])
            if changed:
                self._await_with_readers(reader)

    def awaits(self, fingerprint: str, name: str) -> bool:
        """Whether a step that will be performed opens folder `name` of the entry with this fingerprint."""
        return self._awaited[fingerprint, name] > 0

    def sorted(self, step_ids: Iterable[str]) -> list[Step]:
        """Steps of the plan by their ids, in running order."""
        return [self._plan.steps[number] for number in sorted(map(self._position.__getitem__, step_ids))]

    def _await_with_readers(self, step: Step) -> None:
        """Expects a step, and all that directly or indirectly read it, to be performed."""
        found = [step]
        while found:
            step = found.pop()
            if step.id not in self._finished and step.id not in self._reached:
                self._reached.add(step.id)
                self._await(step.id)
                found += self._readers[step.id]

    def _await(self, step_id: str) -> None:
        if step_id not in self._pending:
            self._pending.add(step_id)
            self._awaited.update(self._opened(self._plan.step(step_id)))

    def _opened(self, step: Step) -> list[tuple[str, str]]:
        """(fingerprint, folder) of everything that a step opens."""
        sources = [(self._plan.step(source.step_id), source.opens) for source in step.inputs.values()]
        return [(source.fingerprint, name) for source, names in sources for name in names]


def must_restore(plan: Plan, step_ids: Iterable[str], dropped: Callable[[Step], Collection[str]]) -> set[str]:
    """Done steps to perform again before those in `step_ids`, which open what retention dropped of them.

    Directly or by way of each other. `dropped` gives the folders of a done step's payload that retention has removed.
    """
    found: set[str] = set()
    pending = list(step_ids)
    while pending:
        for source in plan.step(pending.pop()).inputs.values():
            if source.step_id not in found and set(source.opens) & set(dropped(plan.step(source.step_id))):
                found.add(source.step_id)
                pending.append(source.step_id)
    return found
