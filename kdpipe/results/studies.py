"""A study: runs that one command makes together, such as control arms or the points of a sweep.

    studies/<recipe>-<kind>-<hash8>/ study.json comparison.json comparison.md events.jsonl

It is its set of runs: the same command again goes on with the same study, other runs make another one.

The control arms of a recipe tell where a gain comes from. All arms of a seed begin with the same student and sample
equally much in every round; the store shares whatever does not depend on the arm: teachers, student 0, its evaluation,
the rollouts of round 1. Seeds share the teachers, so that they tell how far the result depends on the student and its
samples.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from pydantic import JsonValue

from kdpipe.errors import RecipeError
from kdpipe.pipeline.project import Project
from kdpipe.pipeline.runs import RunFolder
from kdpipe.recipe.file import LoadedRecipe, read_recipe
from kdpipe.recipe.objective import Objective, SampledTerm
from kdpipe.recipe.schema import Recipe, ScratchTeacher
from kdpipe.recipe.sweep import require_runs
from kdpipe.store.durable import parse_json, write_bytes, write_json
from kdpipe.store.step import canonical

if TYPE_CHECKING:
    from kdpipe.results.comparison import ComparisonRow
    from kdpipe.results.contender import Contender

ArmName = Literal["kd", "rl", "kdrl", "shuffled-teacher", "self-teacher", "constant-advantage"]
ARMS: tuple[ArmName, ...] = get_args(ArmName)
PAIRS: Mapping[str, tuple[ArmName, ...]] = {
    "kdrl": ("rl", "kd"),
    "kd": ("shuffled-teacher", "constant-advantage", "self-teacher"),
}
"""Which arms each is held against: what one source of the gain adds to the others."""
MAX_SEED = 2**31
StudyKind = Literal["arms", "sweep"]
Obstacle = tuple[str, str]
"""Why a recipe cannot have an arm, and what to set."""
STUDIES = "studies"
NOTE = "study.json"
COMPARISON = "comparison.json"
TABLE = "comparison.md"


@dataclass(frozen=True, slots=True)
class Study:
    """A study and its folder; `runs` are what the study calls its runs, by their names.

    `left_out` are the arms that its recipe cannot have, each with the reason.
    """

    path: Path
    kind: StudyKind
    recipe: str
    runs: Mapping[str, str]
    left_out: Sequence[str] = ()

    @property
    def name(self) -> str:
        """`<recipe>-<kind>-<hash8>`."""
        return self.path.name

    def event(self, kind: str, **fields: JsonValue) -> None:
        RunFolder(self.path).event(kind, **fields)

    def comparison(self) -> dict[str, JsonValue] | None:
        """What `keep` kept last, or None."""
        with contextlib.suppress(OSError, ValueError):
            found = parse_json((self.path / COMPARISON).read_bytes())
            if isinstance(found, dict):
                return found
        return None

    def keep(self, rows: Sequence[JsonValue], table: Sequence[str], failed: Sequence[str]) -> None:
        """Keeps the comparison of the runs that ended, its `time` that of the first one that was just so."""
        now: dict[str, JsonValue] = {
            "rows": list(rows),
            "failed": list(failed),
            "left_out": list(self.left_out),
        }
        before = self.comparison()
        if before is not None and {key: before.get(key) for key in now} == now:
            return
        names = [f"* {label}: `{run}`" for run, label in self.runs.items()]
        missing = ["", f"Failed: {'; '.join(failed)}."] if failed else []
        missing += ["", "Left out:", "", *(f"* {one}" for one in self.left_out)] if self.left_out else []
        lines = [f"# {self.recipe}: {self.kind}", "", *table, *missing, "", "Runs:", "", *names]
        write_bytes(self.path / TABLE, ("\n".join(lines) + "\n").encode())
        write_json(self.path / COMPARISON, {**now, "time": time.time()})


def make_study(
    workspace: Path,
    kind: StudyKind,
    *,
    recipe: str,
    runs: Mapping[str, str],
    left_out: Sequence[str] = (),
) -> Study:
    """The study of these runs, by name what it calls each; its folder is there after that."""
    names: list[JsonValue] = [*sorted(runs)]
    digest = hashlib.sha256(canonical(names)).hexdigest()[:8]
    study = Study(workspace / STUDIES / f"{recipe}-{kind}-{digest}", kind, recipe, dict(runs), left_out)
    named: list[JsonValue] = [{"run": run, "label": label} for run, label in runs.items()]
    write_json(study.path / NOTE, {"kind": kind, "recipe": recipe, "runs": named})
    return study


def read_study(path: Path) -> Study | None:
    """The study in this folder, or None where none can be read."""
    try:
        found = parse_json((path / NOTE).read_bytes())
        runs = {str(one["run"]): str(one["label"]) for one in found["runs"]}
        kind = next(kind for kind in get_args(StudyKind) if kind == found["kind"])
        return Study(path, kind, str(found["recipe"]), runs)
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return None


def all_studies(workspace: Path) -> list[Study]:
    """Every study of the workspace, the one begun last first."""
    notes = sorted((workspace / STUDIES).glob(f"*/{NOTE}"), key=lambda path: path.stat().st_mtime)
    found = [read_study(path.parent) for path in reversed(notes)]
    return [study for study in found if study is not None]


@dataclass(frozen=True, slots=True)
class ArmRun:
    """One run of a study: which arm on which seed, and what it changes in the recipe, as `--set` takes it."""

    arm: ArmName
    seed: int
    overrides: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run of a study needs: its steps, those to do, and of these those that an earlier run makes."""

    steps: int
    todo: int
    shared: int


def parse_arms(text: str) -> tuple[ArmName, ...]:
    """The arms named in `a,b,c`, each once, in that order; raises RecipeError."""
    names = dict.fromkeys(name.strip() for name in text.split(","))
    for name in names:
        if name not in ARMS:
            raise RecipeError(f"--arms {text}: {name!r} is no arm", hint=f"arms: {', '.join(ARMS)}")
    return tuple(arm for name in names for arm in ARMS if arm == name)


def possible_arms(loaded: LoadedRecipe) -> tuple[tuple[ArmName, ...], list[RecipeError]]:
    """The arms that a recipe can have, and for each other one why not.

    Raises RecipeError where none is possible.
    """
    found = {arm: obstacle(loaded, arm) for arm in ARMS}
    possible = tuple(arm for arm, error in found.items() if error is None)
    others = [error for error in found.values() if error is not None]
    if not possible:
        raise others[0]
    return possible, others


def arm_runs(loaded: LoadedRecipe, arms: Sequence[ArmName], *, seeds: int) -> list[ArmRun]:
    """The runs of a study, seed after seed from the recipe's own on.

    Raises RecipeError where an arm is not possible.
    """
    recipe = loaded.recipe
    require_runs(seeds * len(arms))
    if recipe.seed + seeds > MAX_SEED:
        raise RecipeError(f"--seeds {seeds}: beyond the largest seed, {MAX_SEED - 1}")
    for error in (obstacle(loaded, arm) for arm in arms):
        if error is not None:
            raise RecipeError(error.message, hint=f"{error.hint}; or leave the arm out of --arms")
    return [
        ArmRun(arm, seed, (f"seed={seed}", *_changes(recipe, arm)))
        for seed in range(recipe.seed, recipe.seed + seeds)
        for arm in arms
    ]


def obstacle(loaded: LoadedRecipe, arm: ArmName) -> RecipeError | None:
    """Why the recipe cannot have this arm, with what to set, or None."""
    recipe = loaded.recipe
    known = _rl_obstacle(recipe) if arm in ("rl", "kdrl") else None
    known = known or (_no_kd_obstacle(recipe) if arm == "rl" else _kd_obstacle(recipe))
    known = known or _control_obstacle(recipe, arm)
    if known is not None:
        why, instead = known
        return RecipeError(f"arm {arm}: {why}", hint=instead)
    changes = _changes(recipe, arm)
    try:
        read_recipe(loaded.text, str(loaded.path), (*loaded.overrides, *changes))
    except RecipeError as error:
        sets = " ".join(f"--set {change}" for change in changes)
        return RecipeError(f"arm {arm}: {sets} does not go with the recipe: {error.message}", hint=error.hint)
    return None


def _rl_obstacle(recipe: Recipe) -> Obstacle | None:
    """What an RL term lacks in the recipe."""
    samples, prompts = recipe.rollout.samples, recipe.rollout.prompts
    if not recipe.is_graded:
        return "task.grader is none, and there is no reward", "give the task a grader"
    if samples == 1:
        fewer = (
            f" --set rollout.prompts={prompts // 4} (as many completions as now)" if prompts % 4 == 0 else ""
        )
        return (
            "rollout.samples is 1, and a group of one has no advantage",
            f"give every arm groups: --set rollout.samples=4{fewer}",
        )
    if recipe.train.objective.rl_weight == 0:
        return "train.objective.rl_weight is 0", "give every arm one: --set train.objective.rl_weight=1"
    return None


def _no_kd_obstacle(recipe: Recipe) -> Obstacle | None:
    """What goes by the KD term's weight, where there is no KD term."""
    rollout = recipe.rollout
    if rollout.on_policy_fraction == 1:
        return None
    unset = ["rollout.on_policy_fraction=1"]
    unset += ["rollout.off_policy_text=reference"] if rollout.off_policy_text != "reference" else []
    unset += ["train.objective.off_policy_term=null"] if recipe.train.objective.off_policy_term else []
    why = "the other text takes the KD term's weight, which this arm has not"
    return (
        f"rollout.on_policy_fraction is {rollout.on_policy_fraction:g}, and {why}",
        f"give no arm other text: {' '.join(f'--set {one}' for one in unset)}",
    )


def _kd_obstacle(recipe: Recipe) -> Obstacle | None:
    """What a KD term lacks in the recipe."""
    objective = recipe.train.objective
    if objective.distill_weight == 0 == (objective.distill_schedule.end or 0):
        return (
            "train.objective.distill_weight is 0",
            "give every arm one: --set train.objective.distill_weight=1",
        )
    return None


def _control_obstacle(recipe: Recipe, arm: ArmName) -> Obstacle | None:
    """What keeps the recipe from being this control."""
    match arm:
        case "shuffled-teacher" if len(recipe.teachers) > 1:
            return "scores are shuffled of a single teacher, and there are several", "name one teacher"
        case "shuffled-teacher" if recipe.rollout.prompts == 1:
            return "rollout.prompts is 1, and there is no other prompt", "--set rollout.prompts=2"
        case "self-teacher" if not recipe.is_graded:
            why = "task.grader is none, and the student's distance to itself is no result"
            return why, "give the task a grader"
        case "self-teacher" if recipe.has_teacher_text:
            why = "the teacher also writes text that the student learns, and the student cannot"
            return why, "take text: reference"
        case "constant-advantage":
            return _constant_obstacle(recipe)
    return None


def _constant_obstacle(recipe: Recipe) -> Obstacle | None:
    """Where a constant cannot stand for the teacher: in text that the student did not sample."""
    rollout, objective = recipe.rollout, recipe.train.objective
    if rollout.on_policy_prompts == 0:
        why = f"rollout.on_policy_fraction is {rollout.on_policy_fraction:g}, and the student samples nothing"
        return why, "let it sample: --set rollout.on_policy_fraction=0.5"
    if rollout.on_policy_fraction < 1 and objective.off_policy_loss == "kd":
        return (
            "other text is compared with the teacher's distribution, which a constant is not",
            "give every arm its cross-entropy: --set train.objective.off_policy_term=cross_entropy",
        )
    return None


def _changes(recipe: Recipe, arm: ArmName) -> list[str]:
    """What makes the recipe this arm; weights and KD term stay, but for a weight that ends at 0."""
    objective = "train.objective"
    plain = [f"{objective}.kd_rounds=null", f"{objective}.mask=none"]
    shared = _teacher_seeds(recipe)
    uncontrolled = [] if recipe.train.control == "none" else ["train.control=none"]
    unkept = [] if recipe.teacher_score.logprobs == "float32" else ["teacher_score.logprobs=float32"]
    alone = [f"{objective}.kind=kd", *plain, *_lasting(recipe.train.objective)]
    taught = [*shared, *alone]
    match arm:
        case "kd":
            return [*taught, *uncontrolled]
        case "rl":
            unscheduled = f"{objective}.distill_schedule={{}}"
            return [*shared, f"{objective}.kind=grpo", *plain, unscheduled, *unkept, *uncontrolled]
        case "kdrl":
            both = [f"{objective}.kind=kdrl", plain[0], f"{objective}.mask={recipe.train.objective.mask}"]
            return [*shared, *both, *uncontrolled]
        case "shuffled-teacher":
            return [*taught, "train.control=shuffled_teacher"]
        case "self-teacher":
            # Neither a headroom over itself nor a distance to itself says anything.
            unasked = ["evaluate.teacher=false", "evaluate.reverse_kl_problems=0"]
            own = [f"teachers=[{{name: {recipe.teacher.name}, self: current}}]", "train.control=self_teacher"]
            return [*alone, *own, *unasked]
        case "constant-advantage":
            term = f"{objective}.kd={json.dumps(_sampled(recipe.train.objective))}"
            return [*taught, term, *unkept, "train.control=constant_advantage"]


def _lasting(objective: Objective) -> list[str]:
    """The larger weight, for all steps, of a schedule with a 0, which leaves such steps to an RL term."""
    if 0 not in (objective.distill_weight, objective.distill_schedule.end):
        return []
    weight = max(objective.distill_weight, objective.distill_schedule.end or 0)
    return ["train.objective.distill_schedule={}", f"train.objective.distill_weight={weight:g}"]


def _sampled(objective: Objective) -> dict[str, JsonValue]:
    """The sampled-token term in which a constant can stand, with the recipe's own treatment of ratios."""
    kept: dict[str, JsonValue] = {}
    if isinstance(objective.kd, SampledTerm):
        kept = objective.kd.model_dump(mode="json", include={"ratio", "decoupled"}, exclude_none=True)
    return {"term": "rkl", **kept}


def _teacher_seeds(recipe: Recipe) -> list[str]:
    """Holds the recipe's seed where a teacher is made, so that all seeds of the study have the same one."""
    found = []
    for number, teacher in enumerate(recipe.teachers):
        if teacher.sft is not None:
            what, seed = "sft", teacher.sft.seed
        elif isinstance(teacher, ScratchTeacher):
            what, seed = "scratch", teacher.scratch.seed
        else:
            continue
        found.append(f"teachers.{number}.{what}.seed={recipe.seed if seed is None else seed}")
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


def arm_rows(contenders: Sequence[tuple[ArmName, Contender]]) -> list[ComparisonRow]:
    """The table: students before training, then the arms with what they gained, and one against another.

    An arm without some seed is compared by what there is, as `compare` does.
    """
    from kdpipe.results.comparison import compare

    rows = compare(
        [replace(one, settings={"arm": arm}) for arm, one in contenders],
        named=lambda group, _: group[0].settings["arm"],
    )
    return [
        _paired(row, [other for other in rows if other.label in PAIRS.get(row.label, ())]) for row in rows
    ]


def _paired(row: ComparisonRow, others: Sequence[ComparisonRow]) -> ComparisonRow:
    """The row with its differences to these, by each measure, in place of that to the first."""
    from kdpipe.results.comparison import difference

    beside = [other.beside for other in others if other.beside is not None]
    return replace(
        row,
        fields="",
        difference=None,
        pairs={other.label: difference(row.contenders, other.contenders) for other in others},
        beside=None if row.beside is None else _paired(row.beside, beside),
    )
