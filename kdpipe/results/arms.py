"""The control arms of a recipe, which tell where a gain comes from: the runs they mean, and their table.

All arms of a seed begin with the same student and sample equally much in every round; the store shares whatever
does not depend on the arm: teachers, student 0, its evaluation, the rollouts of round 1. Seeds share the teachers, so
that they tell how far the result depends on the student and its samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from kdpipe.errors import RecipeError
from kdpipe.pipeline.project import Project
from kdpipe.recipe.schema import Recipe, ScratchTeacher
from kdpipe.results.comparison import Contender, Row, compare

ArmName = Literal["kd", "rl", "kdrl", "shuffled-teacher", "self-teacher"]
ARMS: tuple[ArmName, ...] = get_args(ArmName)
BEFORE = "before training"
MAX_SEED = 2**31


@dataclass(frozen=True, slots=True)
class ArmRun:
    """One run of a study: which arm on which seed, and what it changes in the recipe, as `--set` takes it."""

    arm: ArmName
    seed: int
    overrides: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run of a study needs: its steps, those not done, and of these what an earlier run of it makes."""

    steps: int
    todo: int
    shared: int


def parse_arms(text: str) -> tuple[ArmName, ...]:
    """The arms named in `a,b,c`, each once, in that order; raises RecipeError."""
    names = [name.strip() for name in text.split(",")]
    found = []
    for name in dict.fromkeys(names):
        arm = next((arm for arm in ARMS if arm == name), None)
        if arm is None:
            raise RecipeError(f"--arms {text}: {name!r} is no arm", hint=f"arms: {', '.join(ARMS)}")
        found.append(arm)
    return tuple(found)


def arm_runs(recipe: Recipe, arms: Sequence[ArmName], *, seeds: int) -> list[ArmRun]:
    """The runs of a study, seed after seed from the recipe's own on; raises RecipeError where an arm cannot be."""
    if recipe.seed + seeds > MAX_SEED:
        raise RecipeError(f"--seeds {seeds}: beyond the largest seed, {MAX_SEED - 1}")
    for arm in arms:
        _require_possible(recipe, arm)
    return [
        ArmRun(arm, seed, (f"seed={seed}", *_changes(recipe, arm)))
        for seed in range(recipe.seed, recipe.seed + seeds)
        for arm in arms
    ]


def _require_possible(recipe: Recipe, arm: ArmName) -> None:
    samples, prompts = recipe.rollout.samples, recipe.rollout.prompts
    if arm in ("rl", "kdrl") and samples == 1:
        fewer = f" --set rollout.prompts={prompts // 4}" if prompts % 4 == 0 else ""
        raise RecipeError(
            f"arm {arm}: rollout.samples is 1, and a group of one has no advantage",
            hint=f"give every arm groups: --set rollout.samples=4{fewer}"
            + (" (as many completions as now)" if fewer else "")
            + ", or leave arms out with --arms kd,shuffled-teacher,self-teacher",
        )
    if arm == "self-teacher" and recipe.has_teacher_text:
        raise RecipeError(
            "arm self-teacher: the teacher also writes text that the student learns, and the student cannot",
            hint="take text: reference, or leave the arm out with --arms",
        )


def _changes(recipe: Recipe, arm: ArmName) -> list[str]:
    """What makes the recipe this arm. Weights and the KD term stay as they are."""
    objective = "train.objective"
    plain = [f"{objective}.kd_rounds=null", f"{objective}.mask=none"]
    shared = _teacher_seeds(recipe)
    match arm:
        case "kd":
            return [*shared, f"{objective}.kind=kd", *plain]
        case "rl":
            return [*shared, f"{objective}.kind=grpo", *plain, f"{objective}.distill_schedule={{}}"]
        case "kdrl":
            mask = recipe.train.objective.mask
            return [*shared, f"{objective}.kind=kdrl", *plain[:1], f"{objective}.mask={mask}"]
        case "shuffled-teacher":
            return [*shared, f"{objective}.kind=kd", *plain, "train.control=shuffled_teacher"]
        case "self-teacher":
            # Neither a headroom over itself nor a distance to itself says anything.
            unasked = ["evaluate.teacher=false", "evaluate.reverse_kl_problems=0"]
            own = [f"teachers=[{{name: {recipe.teacher.name}, self: current}}]", "train.control=self_teacher"]
            return [f"{objective}.kind=kd", *plain, *own, *unasked]


def _teacher_seeds(recipe: Recipe) -> list[str]:
    """Holds the recipe's seed where a teacher is made, so that all seeds of the study have the same one."""
    found = []
    for number, teacher in enumerate(recipe.teachers):
        place = f"teachers.{number}"
        if teacher.sft is not None:
            seed = recipe.seed if teacher.sft.seed is None else teacher.sft.seed
            found.append(f"{place}.sft.seed={seed}")
        elif isinstance(teacher, ScratchTeacher):
            seed = recipe.seed if teacher.scratch.seed is None else teacher.scratch.seed
            found.append(f"{place}.scratch.seed={seed}")
    return found


def forecast(projects: Sequence[Project], *, rounds: int | None) -> list[Forecast]:
    """What each run of a study needs, in the order they run; `rounds` as in `kdpipe run --rounds`."""
    made: set[str] = set()
    found = []
    for project in projects:
        states = [state for state in project.survey() if rounds is None or state.step.round <= rounds]
        todo = {f"{state.step.stage}/{state.step.fingerprint}" for state in states if not state.done}
        found.append(Forecast(len(states), len(todo), len(todo & made)))
        made |= todo
    return found


def arm_rows(contenders: Sequence[tuple[ArmName, Contender]], before: Sequence[Contender]) -> list[Row]:
    """The table: student 0 of every seed first, then the arms, whose differences to it are what they gain.

    A seed without student 0 or an arm without some seed is compared by what there is, as `compare` does.
    """
    start = [replace(one, settings={"arm": BEFORE}) for one in before]
    named = [replace(one, settings={"arm": arm}) for arm, one in contenders]
    names = dict.fromkeys([BEFORE for _ in start] + [arm for arm, _ in contenders])
    return [replace(row, label=name) for row, name in zip(compare([*start, *named]), names, strict=True)]
