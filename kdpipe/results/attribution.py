"""Which other runs of the workspace tell what a run's result owes to its seed and to its teacher."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from kdpipe.pipeline.project import Project
from kdpipe.pipeline.runs import RunFolder, all_runs
from kdpipe.recipe.roles import STUDENT
from kdpipe.recipe.schema import resolved
from kdpipe.results.studies import STUDIES, all_studies
from kdpipe.store.artifacts import MANIFEST
from kdpipe.store.durable import parse_json
from kdpipe.store.link import linked_folder
from kdpipe.store.stage import Stage
from kdpipe.store.step import canonical, link_name_of

NO_SETTINGS = ("name", "seed", "tracking", "runtime")
OF_ARMS = {
    "train": ("control",),
    "evaluate": ("teacher", "reverse_kl_problems"),
    "objective": ("kind", "kd_rounds", "mask", "distill_schedule"),
}
"""What tells the control arms of one recipe apart, beside their teachers."""


@dataclass(frozen=True, slots=True)
class Controls:
    """The seeds that a recipe was run with, its control arms, and the folder of their study.

    A run counts where it was evaluated in the same round.
    """

    seeds: tuple[int, ...]
    runs: tuple[str, ...]
    arms: tuple[str, ...] = ()
    study: str | None = None


def controls_of(project: Project, number: int) -> Controls:
    """Those of a project whose student of this round was evaluated."""
    own = resolved(project.recipe)
    found = {run.name: recipe for run in all_runs(project.workspace) if (recipe := _evaluated(run, number))}
    found[project.run.name] = own
    same = {name: recipe for name, recipe in found.items() if _settings(recipe) == _settings(own)}
    for study in all_studies(project.workspace):
        related = {name for name in study.runs if name in found and _base(found[name]) == _base(own)}
        labels = (
            label.partition(",")[0] for name, label in study.runs.items() if name in related - same.keys()
        )
        if study.kind == "arms" and (arms := tuple(dict.fromkeys(labels))):
            return Controls(*_seeds(same), arms, f"{STUDIES}/{study.name}")
    return Controls(*_seeds(same))


def _seeds(runs: Mapping[str, Mapping[str, Any]]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The seeds, and a run of each."""
    by_seed = {int(recipe["seed"]): name for name, recipe in runs.items()}
    return tuple(sorted(by_seed)), tuple(by_seed[seed] for seed in sorted(by_seed))


def _evaluated(run: RunFolder, number: int) -> dict[str, Any] | None:
    """The recipe of a run whose student was evaluated in this round."""
    place = run.path / f"round-{number:03d}" / link_name_of(Stage.EVALUATE, STUDENT)
    entry = linked_folder(place)
    if entry is None or not (entry / MANIFEST).exists():
        return None
    try:
        recipe: dict[str, Any] = parse_json((run.path / "resolved.json").read_bytes())["recipe"]
        return recipe
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _settings(recipe: Mapping[str, Any]) -> bytes:
    """All that makes two runs the same recipe but for their seeds."""
    kept = {name: value for name, value in recipe.items() if name not in NO_SETTINGS}
    return canonical({**kept, "teachers": [_unseeded(teacher) for teacher in recipe["teachers"]]})


def _unseeded(teacher: Mapping[str, Any]) -> dict[str, Any]:
    """A teacher without the seed that it is made with, which a study holds and a recipe may leave open."""
    made = {part: {**teacher[part], "seed": None} for part in ("sft", "scratch") if teacher.get(part)}
    return {**teacher, **made}


def _base(recipe: Mapping[str, Any]) -> bytes:
    """All that the control arms of one recipe have in common."""
    kept = {name: value for name, value in recipe.items() if name not in (*NO_SETTINGS, "teachers")}
    train = _without(kept["train"], OF_ARMS["train"])
    train["objective"] = _without(train["objective"], OF_ARMS["objective"])
    return canonical({**kept, "train": train, "evaluate": _without(kept["evaluate"], OF_ARMS["evaluate"])})


def _without(section: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in section.items() if name not in names}
