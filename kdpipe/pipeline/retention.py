"""Which weights a run keeps, and dropping the rest, also of what other runs share.

A step costs the same however many rounds are done: a run's links and evaluations are read once, and of another run only
those of one that links an entry about to be dropped.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kdpipe.data.payload import SUMMARY_FILE
from kdpipe.errors import ArtifactError
from kdpipe.pipeline.headline import headline_of
from kdpipe.pipeline.runs import RUNS, RunFolder
from kdpipe.recipe.roles import STUDENT
from kdpipe.recipe.runtime import Keep
from kdpipe.store.artifacts import Entry, linked_entry
from kdpipe.store.link import read_link
from kdpipe.store.locks import is_running
from kdpipe.store.stage import Stage
from kdpipe.store.step import Step, link_name_of

TRAINED, EVALUATED = link_name_of(Stage.TRAIN, None), link_name_of(Stage.EVALUATE, STUDENT)
PAYLOADS = ("model", "trainer", "ema")
"""The folders of a train entry that retention may drop."""


@dataclass(slots=True)
class Holdings:
    """What one run has on disk of the train entries that it links, by round, and its evaluations.

    `scores` are the headlines, such that more is better: accuracy, or held-out reverse KL below 0.
    `counts` is None where the run's recipe is damaged or of another version: it keeps all that it links.
    """

    counts: Keep | None
    entries: dict[int, Path] = field(default_factory=dict)
    payloads: dict[int, set[str]] = field(default_factory=dict)
    scores: dict[int, float] = field(default_factory=dict)

    def note(self, number: int, name: str, folder: Path) -> None:
        """Takes in an entry that the run links under `name` in round `number`."""
        if name == TRAINED:
            self.entries[number] = folder
            self.payloads[number] = {kind for kind in PAYLOADS if (folder / kind).exists()}
        elif name == EVALUATED:
            self.scores.pop(number, None)
            if (score := _score(folder)) is not None:
                self.scores[number] = score

    def kept(self) -> dict[int, set[str]]:
        """The payloads that the run keeps, by round.

        The last rounds by `runtime.keep` that are whole, what is damaged or unfinished among them, and the weights of
        the best and of the last evaluated round.
        """
        if self.counts is None:
            return self.payloads
        kept: dict[int, set[str]] = {number: set() for number in self.payloads}
        counts = {"model": self.counts.weights, "trainer": self.counts.optimizer, "ema": self.counts.weights}
        for kind, count in counts.items():
            for number in self._newest(kind, count):
                kept[number].add(kind)
        for number in self._evaluated() & kept.keys():
            kept[number].add("model")
        return kept

    def _newest(self, kind: str, count: int) -> Iterator[int]:
        """The last `count` rounds that have this payload whole, and those after them."""
        whole = 0
        for number in sorted((n for n, kinds in self.payloads.items() if kind in kinds), reverse=True):
            if whole == count:
                return
            yield number
            whole += _is_whole(self.entries[number], kind)

    def _evaluated(self) -> set[int]:
        """The best evaluated round, the last one, and those whose score cannot be read and may be the best."""
        if not self.scores:
            return set()
        readable = {number: value for number, value in self.scores.items() if value < math.inf}
        best = {max(readable, key=lambda number: (readable[number], number))} if readable else set[int]()
        return {max(self.scores)} | (set(self.scores) - set(readable)) | best


def holdings(run: RunFolder) -> Holdings:
    """What a run has on disk."""
    try:
        counts = run.recipe().runtime.keep
    except (OSError, ValueError, KeyError, TypeError):
        counts = None
    found = Holdings(counts)
    for link in run.links():
        found.note(link.round, link.name, link.target)
    return found


class Retention:
    """Drops what no run keeps and no step ahead opens, as one run goes on.

    `awaits` says whether a step ahead opens a folder of the entry with a fingerprint.
    """

    def __init__(
        self, run: RunFolder, workspace: Path, awaits: Callable[[str, str], bool] = lambda *_: False
    ) -> None:
        self._run = run
        self._workspace = workspace
        self._awaits = awaits
        self._own: Holdings | None = None
        self._left: dict[Path, set[str]] = {}  # what another run keeps is left to it, to drop when it goes on
        self._others: dict[str, tuple[int | None, Holdings]] = {}

    def apply(self, step: Step, entry: Entry) -> None:
        """Takes in a step that was performed, and drops what it makes dispensable; all of the step is durable."""
        if self.note(step, entry):
            for folder, kind in self.droppable():
                with contextlib.suppress(ArtifactError):
                    trained, _ = linked_entry(folder)
                    with trained.locked(lambda: None):
                        freed = trained.drop(kind)
                    if freed:
                        self._run.event("dropped", entry=folder.name, payload=kind, bytes=freed)

    def note(self, step: Step, entry: Entry) -> bool:
        """Takes in a step that was performed; returns whether it may change what is kept."""
        if step.link_name not in (TRAINED, EVALUATED):
            return False
        if self._own is not None:
            self._own.note(step.round, step.link_name, entry.folder)
        for name, (_, known) in self._others.items():
            if self._links(name, step.round, step.link_name, entry.folder):
                known.note(step.round, step.link_name, entry.folder)
        return True

    def droppable(self) -> list[tuple[Path, str]]:
        """(train entry, payload folder) that no run keeps and no step ahead opens; each comes once."""
        if self._own is None:
            self._own = holdings(self._run)
        own, kept = self._own, self._own.kept()
        found = []
        for number in sorted(own.payloads):
            folder = own.entries[number]
            kinds = own.payloads[number] - kept[number] - self._left.get(folder, set())
            if kinds:
                kinds = self._not_awaited(folder, kinds)
            if kinds:
                theirs = self._kept_by_others(number, folder) & kinds
                self._left.setdefault(folder, set()).update(theirs)
                found += [(folder, kind) for kind in PAYLOADS if kind in kinds - theirs]
                own.payloads[number] -= kinds - theirs
            if not own.payloads[number]:
                del own.payloads[number]
        return found

    def _not_awaited(self, folder: Path, kinds: set[str]) -> set[str]:
        try:
            entry, _ = linked_entry(folder)
        except ArtifactError:  # what is damaged stays as it is, for the run that comes upon it to name
            return set()
        return {kind for kind in kinds if not self._awaits(entry.fingerprint, kind)}

    def _kept_by_others(self, number: int, folder: Path) -> set[str]:
        """The payloads of a train entry that other runs keep."""
        kept: set[str] = set()
        for run in os.scandir(self._workspace / RUNS):
            if run.name != self._run.name and self._links(run.name, number, TRAINED, folder):
                kept |= self._holdings_of(RunFolder(Path(run.path))).kept().get(number, set())
        return kept

    def _links(self, run: str, number: int, name: str, folder: Path) -> bool:
        """Whether a run links an entry: it can by one link only, as the round is part of a fingerprint."""
        place = f"{self._workspace}/{RUNS}/{run}/round-{number:03d}/{name}"
        return (read_link(place) or "").rpartition("/")[2] == folder.name

    def _holdings_of(self, run: RunFolder) -> Holdings:
        """What another run has on disk: read again only where it runs now or has been started since."""
        stamp = None
        if not is_running(run.path):
            with contextlib.suppress(OSError):
                stamp = (run.path / "resolved.json").stat().st_mtime_ns
        known = self._others.get(run.name)
        if known is None or stamp is None or known[0] != stamp:
            known = self._others[run.name] = (stamp, holdings(run))
        return known[1]


def _is_whole(folder: Path, kind: str) -> bool:
    """Whether an entry is done and has the files of this payload, by their sizes."""
    try:
        entry, _ = linked_entry(folder)
        manifest = entry.manifest()
    except ArtifactError:
        return False
    if manifest is None or entry.problem(manifest) is not None:
        return False
    own = {file.path for file in manifest.files if file.path.startswith(f"{kind}/")}
    return bool(own) and own.isdisjoint(manifest.dropped)


def _score(folder: Path) -> float | None:
    """The score of an evaluation: None while it is not done, infinite where it is damaged."""
    if not folder.exists():
        return None
    try:
        entry, _ = linked_entry(folder)
        if entry.manifest() is None:
            return None
        summary = entry.read_json(SUMMARY_FILE)
        measure = headline_of(summary)
        estimate = measure.estimate(summary)
        return math.inf if estimate is None else measure.sign * float(estimate)
    except (ArtifactError, ValueError, KeyError, TypeError):
        return math.inf
