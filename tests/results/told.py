"""Measures with known numbers, for what is said of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kdpipe.method.interval import Interval
from kdpipe.pipeline.runs import RunEvent
from kdpipe.recipe.file import LoadedRecipe, load_recipe
from kdpipe.recipe.schema import Recipe, resolved
from kdpipe.results.evaluations import Evaluation, Evaluations
from kdpipe.store.artifacts import MANIFEST
from kdpipe.store.durable import write_json
from kdpipe.store.link import write_link

RECIPE = """
name: told
rounds: 4
task: {kind: jsonl, train: a.jsonl, test: b.jsonl, grader: number}
student: {model: s}
teachers: [{model: t}]
"""
Bounds = tuple[float, float, float]
DOWN, UNCLEAR, UP = (-0.1, -0.2, -0.02), (0.05, -0.02, 0.2), (0.1, 0.02, 0.2)


def loaded_of(folder: Path, *overrides: str, text: str = RECIPE) -> LoadedRecipe:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path, overrides)


def recipe_of(folder: Path, *overrides: str) -> Recipe:
    return loaded_of(folder, *overrides).recipe


def graded(
    number: int,
    accuracy: Bounds | None = None,
    kl: Bounds | None = None,
    *,
    problems: int = 200,
    scored: int = 64,
    model: str = "student",
) -> Mapping[str, Any]:
    """A summary, with the changes of accuracy and of reverse KL since student 0."""
    found: dict[str, Any] = {"model": model, "round": number, "problems": problems, "samples": 1}
    found |= {"accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6, "truncated_fraction": 0.0}
    found |= {"reverse_kl_nats": 0.1, "reverse_kl_low": 0.0, "reverse_kl_high": 0.2}
    found |= {"reverse_kl_problems": scored}
    if accuracy is not None:
        found |= named("accuracy_change", accuracy) | {"accuracy_change_p_value": 0.03}
    return found if kl is None else found | named("reverse_kl_change", kl, unit="_nats")


def named(name: str, bounds: Bounds, *, unit: str = "") -> dict[str, float]:
    return dict(zip((f"{name}{unit}", f"{name}_low", f"{name}_high"), bounds, strict=True))


def evaluated_run(workspace: Path, name: str, recipe: Recipe, *, evaluated: int | None = 4) -> None:
    """Makes a run's folder; its student was evaluated in that round."""
    path = workspace / "runs" / name
    write_json(path / "resolved.json", {"recipe": resolved(recipe)})
    if evaluated is not None:
        entry = workspace / "artifacts" / name
        write_json(entry / MANIFEST, {})
        write_link(path / f"round-{evaluated:03d}" / "evaluate-student", entry)


class Told(Evaluations):
    """Measures of a run that has these evaluations, `left` its steps that are not done, and these events."""

    def __init__(
        self,
        recipe: Recipe,
        summaries: Sequence[Mapping[str, Any]],
        *,
        folder: Path = Path("/nowhere"),
        left: Sequence[str] = (),
        events: Sequence[RunEvent] = (),
        lead: Bounds | None = None,
        share: Bounds | None = None,
        rounds: Mapping[str, dict[int, float]] | None = None,
        made: Mapping[str, list[str]] | None = None,
    ) -> None:
        super().__init__(summaries)
        run = SimpleNamespace(name="told-1", path=folder / "runs" / "told-1", events=lambda: list(events))
        self.project: Any = SimpleNamespace(recipe=recipe, workspace=folder, run=run)
        self.states: Any = [SimpleNamespace(step=SimpleNamespace(id=name), done=False) for name in left]
        self.rounds_done = max([0, *(one.round for one in self.evaluations)])
        self.lead = None if lead is None else Interval(*lead)
        self.rounds, self.made = dict(rounds or {}), dict(made or {})
        self.share = None if share is None else Interval(*share)

    def flips(self, _first: Evaluation, _second: Evaluation) -> tuple[int, int]:
        return 30, 10

    def difference(self, _first: Evaluation, _second: Evaluation) -> Interval | None:
        return self.lead

    def closed(self, _teacher: Evaluation, _before: Evaluation, _after: Evaluation) -> Interval | None:
        return self.share

    def approached(self, _before: Evaluation, _after: Evaluation) -> Interval | None:
        return self.share

    def own_reverse_kl(self) -> dict[int, float]:
        return {}

    def by_round(self, name: str) -> dict[int, float]:
        return self.rounds.get(name, {})

    def provenance(self) -> dict[str, list[str]]:
        return self.made
