"""A run as a comparison reads it: its students before and after training, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from kdpipe.data.payload import SUMMARY_FILE
from kdpipe.errors import ArtifactError, DataError
from kdpipe.method import statistics
from kdpipe.pipeline.headline import ACCURACY, REVERSE_KL, Headline, headline_of
from kdpipe.pipeline.runs import Link, RunFolder
from kdpipe.pipeline.status import leaves
from kdpipe.recipe.roles import STUDENT
from kdpipe.recipe.schema import Recipe, resolved
from kdpipe.results.evaluations import Evaluation
from kdpipe.results.measures import cost_of, reverse_kl_totals, right_fractions
from kdpipe.store.artifacts import MANIFEST, linked_entry
from kdpipe.store.stage import Stage
from kdpipe.store.step import link_name_of

Divergence = Literal["exact", "sampled", "cut"]
"""A reverse KL of whole distributions, of sampled tokens, or of tokens that top-p or top-k let pass."""
SEEDLESS = ("name", "seed", "tracking", "runtime")


@dataclass(frozen=True, slots=True)
class Contender:
    """A student of one run by one measure, and what the run cost up to it.

    `values` has what each problem adds to the mean that is measured: its fraction of right samples, or its share of
    the held-out reverse KL, whose sum and tokens `totals` then has, measured as `divergence` says. `settings` are the
    recipe's fields, flat, without its name, seed, tracking and runtime; a student's dtype of auto stands there with
    what it was, as machines differ in it. `seconds` and `tokens` are by stage; a reused step costs what it took where
    it was made.

    `beside` is the same student by held-out reverse KL, where that was measured and is not the headline. `before` is
    the run's student before training by the same measure, None where it was not evaluated or is this one.
    """

    run: str
    seed: int
    round: int
    samples: int
    values: Mapping[str, float]
    settings: Mapping[str, str]
    seconds: Mapping[str, float]
    tokens: Mapping[str, float]
    totals: Mapping[str, tuple[float, float]] | None = None
    divergence: Divergence = "exact"
    beside: Contender | None = None
    before: Contender | None = None

    @property
    def headline(self) -> Headline:
        return ACCURACY if self.totals is None else REVERSE_KL

    @property
    def measured(self) -> tuple[Contender, ...]:
        """The student by its headline, and by what was measured beside it."""
        return (self,) if self.beside is None else (self, self.beside)

    def since(self, before: Contender | None) -> Contender:
        """The same after this student before training, by each measure that both have."""
        beside = self.beside and self.beside.since(before and before.beside)
        return replace(self, before=before, beside=beside)


def read_contender(run: RunFolder) -> Contender:
    """The run's last evaluated student, from its folder alone.

    Every table is checked by its digest before it is read. Raises DataError where no student was evaluated, and
    ArtifactError where a table is damaged.
    """
    try:
        recipe = run.recipe()
    except (OSError, ValueError, KeyError, TypeError):
        raise ArtifactError(
            f"{run.path}: its resolved.json is missing or damaged", hint="repeat the run: it is written again"
        ) from None
    links = [link for link in run.links() if (link.target / MANIFEST).exists()]
    evaluated = [link for link in links if link.name == link_name_of(Stage.EVALUATE, STUDENT)]
    if not evaluated:
        raise DataError(f"{run.name}: no student was evaluated yet", hint=f"kdpipe run {run.name}")
    settings = _settings(recipe, links)
    found = {
        link.round: _student(run, recipe, link, links, settings) for link in (evaluated[0], evaluated[-1])
    }
    last = found[evaluated[-1].round]
    return last.since(found.get(0)) if last.round else last


def _settings(recipe: Recipe, links: Sequence[Link]) -> Mapping[str, str]:
    kept = {key: value for key, value in resolved(recipe).items() if key not in SEEDLESS}
    settings = {name: "null" if leaf is None else str(leaf) for name, leaf in leaves(kept)}
    if recipe.student.dtype == "auto":
        settings["student.dtype"] = f"auto ({', '.join(sorted(_dtypes(links)))})"
    return settings


def _dtypes(links: Sequence[Link]) -> set[str]:
    """The numbers in which the student was trained and evaluated."""
    found = set()
    for link in links:
        entry, document = linked_entry(link.target)
        is_student = document["stage"] == Stage.TRAIN or link.name == link_name_of(Stage.EVALUATE, STUDENT)
        if is_student and (manifest := entry.manifest()) is not None:
            found.add(str(manifest.provenance.get("dtype")))
    return found


def _student(
    run: RunFolder, recipe: Recipe, evaluated: Link, links: Sequence[Link], settings: Mapping[str, str]
) -> Contender:
    """The student that was evaluated there, and what the run cost up to that round."""
    entry, _ = linked_entry(evaluated.target)
    seconds, tokens = _costs([link for link in links if link.round <= evaluated.round])

    def contender(
        values: Mapping[str, float], samples: int, totals: Mapping[str, tuple[float, float]] | None = None
    ) -> Contender:
        return Contender(
            run.name, recipe.seed, evaluated.round, samples, values, settings, seconds, tokens, totals
        )

    summary, divergence = entry.read_json(SUMMARY_FILE), None
    if REVERSE_KL.estimate(summary) is not None:
        totals = reverse_kl_totals(entry, several=len(recipe.teachers) > 1)
        sampled: Divergence = "cut" if recipe.rollout.is_cut else "sampled"
        kind = sampled if Evaluation(summary).is_sampled else "exact"
        sums, counts = zip(*totals.values(), strict=True)
        shares = statistics.ratio_shares((sums, counts))
        divergence = replace(contender(dict(zip(totals, shares, strict=True)), 1, totals), divergence=kind)
    if headline_of(summary) is ACCURACY:
        return replace(contender(*right_fractions(entry)), beside=divergence)
    assert divergence is not None
    return divergence


def _costs(links: Sequence[Link]) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Seconds and tokens by stage."""
    seconds, tokens = dict[str, float](), dict[str, float]()
    for link in links:
        entry, document = linked_entry(link.target)
        stage = str(document["stage"])
        took, read = cost_of(entry.metrics())
        seconds[stage] = seconds.get(stage, 0.0) + took
        tokens[stage] = tokens.get(stage, 0.0) + read
    return seconds, tokens
