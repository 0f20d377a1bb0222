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
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from pydantic import JsonValue

from kdpipe.errors import RecipeError
from kdpipe.pipeline.project import Project
from kdpipe.pipeline.runs import RunFolder
from kdpipe.recipe.schema import Recipe, ScratchTeacher
from kdpipe.recipe.sweep import require_runs
from kdpipe.store.durable import parse_json, write_bytes, write_json
from kdpipe.store.step import canonical

if TYPE_CHECKING:
    from kdpipe.results.comparison import ComparisonRow, Contender

ArmName = Literal["kd", "rl", "kdrl", "shuffled-teacher", "self-teacher"]
ARMS: tuple[ArmName, ...] = get_args(ArmName)
BEFORE = "before training"
MAX_SEED = 2**31
StudyKind = Literal["arms", "sweep"]
STUDIES = "studies"
NOTE = "study.json"
COMPARISON = "comparison.json"
TABLE = "comparison.md"


@dataclass(frozen=True, slots=True)
class Study:
    """A study and its folder; `runs` are what the study calls its runs, by their names."""

    path: Path
    kind: StudyKind
    recipe: str
    runs: Mapping[str, str]

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
        now: dict[str, JsonValue] = {"rows": list(rows), "failed": list(failed)}
        before = self.comparison()
        if before is not None and {key: before.get(key) for key in now} == now:
            return
        names = [f"* {label}: `{run}`" for run, label in self.runs.items()]
        missing = ["", f"Failed: {'; '.join(failed)}."] if failed else []
        lines = [f"# {self.recipe}: {self.kind}", "", *table, *missing, "", "Runs:", "", *names]
        write_bytes(self.path / TABLE, ("\n".join(lines) + "\n").encode())
        write_json(self.path / COMPARISON, {**now, "time": time.time()})


def make_study(workspace: Path, kind: StudyKind, *, recipe: str, runs: Mapping[str, str]) -> Study:
    """The study of these runs, by name what it calls each; its folder is there after that."""
    names: list[JsonValue] = [*sorted(runs)]
    digest = hashlib.sha256(canonical(names)).hexdigest()[:8]
    study = Study(workspace / STUDIES / f"{recipe}-{kind}-{digest}", kind, recipe, dict(runs))
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


def arm_runs(recipe: Recipe, arms: Sequence[ArmName], *, seeds: int) -> list[ArmRun]:
    """The runs of a study, seed after seed from the recipe's own on.

    Raises RecipeError where an arm is not possible.
    """
    require_runs(seeds * len(arms))
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
    possible: tuple[ArmName, ...] = ("kd", "shuffled-teacher")
    if not recipe.is_graded and arm not in possible:
        why = (
            "the student's distance to itself is no result" if arm == "self-teacher" else "there is no reward"
        )
        raise RecipeError(
            f"arm {arm}: task.grader is none, and {why}", hint=f"leave it out: --arms {','.join(possible)}"
        )
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


def arm_rows(
    contenders: Sequence[tuple[ArmName, Contender]], before: Sequence[Contender]
) -> list[ComparisonRow]:
    """The table: student 0 of every seed first, then the arms, whose differences to it are what they gain.

    A seed without student 0 or an arm without some seed is compared by what there is, as `compare` does.
    """
    from kdpipe.results.comparison import compare

    start = [replace(one, settings={"arm": BEFORE}) for one in before]
    named = [replace(one, settings={"arm": arm}) for arm, one in contenders]
    names = dict.fromkeys([BEFORE for _ in start] + [arm for arm, _ in contenders])
    return [replace(row, label=name) for row, name in zip(compare([*start, *named]), names, strict=True)]
