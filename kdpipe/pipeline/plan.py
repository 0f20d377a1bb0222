"""The ordered steps of a recipe, each with its fingerprint: no files, no clock, no network.

A fingerprint is the sha256 of canonical JSON of everything that decides a step's result: the stage, its format
version, the stage's settings (stages/settings), what its models and data are, the fingerprints of its input steps,
the round and the seed. `FORMATS` is raised whenever a stage's output changes for equal inputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

from pydantic import JsonValue

from kdpipe.errors import RecipeError
from kdpipe.recipe.roles import (
    BASE_ROLE,
    BASELINE_ROLE,
    EMA_ROLE,
    ROLLOUT_ROLE,
    STUDENT,
    STUDENT_ROLE,
    Role,
    RoleKind,
    teacher_role,
)
from kdpipe.recipe.schema import Recipe, SelfTeacher, Student, Teacher, resolved
from kdpipe.recipe.task import QuestionTask
from kdpipe.stages.settings.document import document
from kdpipe.stages.settings.model import TaskSettings
from kdpipe.stages.settings.stage import settings_of
from kdpipe.store.stage import Stage
from kdpipe.store.step import Fields, Input, Step, canonical, step_id_of

FORMATS: dict[Stage, int] = {
    Stage.SFT: 2,
    Stage.ROLLOUT: 4,
    Stage.TEACHER_SCORE: 3,
    Stage.TRAIN: 4,
    Stage.EVALUATE: 7,
}
Inputs: TypeAlias = dict[Role, Input]
UNRESOLVED = "unresolved"


@dataclass(frozen=True, slots=True)
class Identities:
    """What models and data *are*, as opposed to what they are called.

    Each is `{"digest": sha256}` for local files or `{"hub": id, "revision": commit or "unresolved"}`, of a
    teacher behind a server that of its tokenizer beside `"served"`, the name of the model there;
    `models` is keyed by "student" or the teacher's name, `data` by split, `grader` is a user's code that grades.
    """

    models: Mapping[str, Fields]
    data: Mapping[str, Fields]
    grader: Fields | None = None

    def unresolved(self) -> list[str]:
        """Hub names whose commit is not known yet: their fingerprints will change with the first run."""
        return sorted(name for name, commit in self._hub() if commit == UNRESOLVED)

    def pinned(self) -> dict[str, list[str]]:
        """The commits of hub names that are known: one, or one of each revision that the recipe asks for."""
        pins: dict[str, list[str]] = {}
        for name, commit in sorted(self._hub()):
            if commit != UNRESOLVED:
                pins.setdefault(name, []).append(commit)
        return pins

    def _hub(self) -> set[tuple[str, str]]:
        known = (*self.models.values(), *self.data.values())
        return {(str(fields["hub"]), str(fields["revision"])) for fields in known if "hub" in fields}


@dataclass(frozen=True)
class Plan:
    """Every step of the recipe, in the order they run."""

    steps: tuple[Step, ...]

    @cached_property
    def _by_id(self) -> Mapping[str, Step]:
        return {step.id: step for step in self.steps}

    @cached_property
    def _by_round(self) -> Mapping[int, list[Step]]:
        found: dict[int, list[Step]] = {}
        for step in self.steps:
            found.setdefault(step.round, []).append(step)
        return found

    def in_round(self, number: int) -> Sequence[Step]:
        """The steps of one round, in running order."""
        return self._by_round.get(number, [])

    def step(self, step_id: str) -> Step:
        """The step called `step_id`; `evaluate@3` is short for `evaluate:student@3`."""
        stage, at, number = step_id.partition("@")
        for name in (step_id, f"{stage}:{STUDENT}{at}{number}"):
            if name in self._by_id:
                return self._by_id[name]
        near = [step.id for step in self.steps if step.stage == stage.partition(":")[0]]
        hint = f"steps of this plan: {', '.join(near[:6])}{', ...' if len(near) > 6 else ''}" if near else ""
        raise RecipeError(
            f"{step_id}: no such step", hint=hint or "a step is called stage@round, as in rollout@3"
        )

    def ancestors(self, step: Step) -> tuple[Step, ...]:
        """`step` and everything it needs, in running order."""
        wanted = {step.id}
        for candidate in reversed(self.steps):
            if candidate.id in wanted:
                wanted.update(source.step_id for source in candidate.inputs.values())
        return tuple(candidate for candidate in self.steps if candidate.id in wanted)


def run_hash(recipe: Recipe) -> str:
    """Eight hex digits that name a run: the resolved recipe without rounds, runtime and tracking."""
    named: dict[str, Any] = resolved(recipe)
    del named["rounds"], named["runtime"], named["tracking"]
    if named["train"]["control"] == "none":  # runs from before there were controls keep their names
        del named["train"]["control"]
    for teacher in named["teachers"]:
        if teacher["server"] is not None:  # where a server is and how it lets one in do not name a run
            del teacher["server"]["urls"], teacher["server"]["api_key_env"]
    return hashlib.sha256(canonical(named)).hexdigest()[:8]


def make_plan(recipe: Recipe, identities: Identities) -> Plan:
    """The steps of `recipe`, in order: cold starts and evaluations of round 0, then round after round."""
    return _Planner(recipe, identities).plan()


def evaluated(recipe: Recipe, round_number: int) -> bool:
    """Whether the student is evaluated after `round_number`: every so often, and after the last."""
    return round_number % recipe.evaluate.every == 0 or round_number == recipe.rounds


class _Planner:
    """Builds the steps one by one; `steps` holds those built so far by id."""

    def __init__(self, recipe: Recipe, identities: Identities) -> None:
        self.recipe = recipe
        self.identities = identities
        self.steps: dict[str, Step] = {}
        # Few: most rounds have the settings of the others.
        self._documents: list[tuple[object, Fields]] = []

    def plan(self) -> Plan:
        recipe, sft = self.recipe, self.recipe.student.sft
        reads_teacher = sft is not None and sft.text == "teacher"
        if not reads_teacher:
            self._sft(STUDENT, recipe.student)
        for teacher in recipe.teachers:
            self._sft(teacher.name, teacher)
        if reads_teacher:  # the teachers write before the student reads
            self._texts(0)
            self._sft(STUDENT, recipe.student, self._text_inputs(0))
        self._evaluate_student(0)
        for teacher in recipe.teachers if recipe.grades_teachers else ():
            self._evaluate_teacher(teacher)
        for number in range(1, recipe.rounds + 1):
            self._round(number)
        return Plan(tuple(self.steps.values()))

    def _round(self, number: int) -> None:
        recipe = self.recipe
        inputs = self._student(number - 1)
        if recipe.rollout.off_policy_text == "teacher":
            self._texts(number)
            inputs |= self._text_inputs(number)
        named = self._named_student(inputs)
        self._add(Stage.ROLLOUT, number, "", named, inputs, seed=recipe.rollout.seed, split="train")
        for teacher in recipe.teachers if recipe.train.objective.in_round(number).has_kd else ():
            self._teacher_score(number, teacher)
        self._train(number)
        if evaluated(recipe, number):
            self._evaluate_student(number)

    def _sft(self, name: str, model: Student | Teacher, inputs: Inputs | None = None) -> None:
        if not model.has_cold_start:
            return
        identity = {f"{STUDENT if name == STUDENT else 'teacher'}.model": self._identity(name)}
        seed = None if model.sft is None else model.sft.seed
        self._add(Stage.SFT, 0, name, identity, inputs or {}, seed=seed, split="train")

    def _texts(self, number: int) -> None:
        """What each teacher writes: for the student's cold start, or where it does not sample in a round."""
        for teacher in self.recipe.teachers:
            inputs = self._teacher(teacher, max(0, number - 1))
            named = {
                **self._named_teacher(teacher, inputs),
                f"{STUDENT}.model": self._identity(STUDENT),  # whose prompt is answered, in its ids
            }
            seed = self.recipe.rollout.seed
            self._add(Stage.ROLLOUT, number, teacher.name, named, inputs, seed=seed, split="train")

    def _teacher_score(self, number: int, teacher: Teacher) -> None:
        recipe = self.recipe
        model, inputs = self._teacher(teacher, number - 1), {ROLLOUT_ROLE: _input(Stage.ROLLOUT, number)}
        named = self._named_teacher(teacher, model)
        if recipe.keep.student_top_k:  # the student that sampled chooses ids too
            sampler = self._student(number - 1)
            named |= self._named_student(sampler)
            inputs |= sampler
        reads_records = teacher.prompt is not None or teacher.only is not None
        split, subject = "train" if reads_records else None, teacher_role(recipe, teacher).name
        self._add(Stage.TEACHER_SCORE, number, subject, named, inputs | model, split=split)

    def _train(self, number: int) -> None:
        recipe = self.recipe
        inputs = {ROLLOUT_ROLE: _input(Stage.ROLLOUT, number), **self._student(number - 1, trainer=True)}
        named = self._named_student(inputs)
        for teacher in recipe.teachers if recipe.train.objective.in_round(number).has_kd else ():
            role = teacher_role(recipe, teacher)
            inputs[role.as_kind(RoleKind.SCORES)] = _input(Stage.TEACHER_SCORE, number, role.name)
            if recipe.keep.hidden:  # its output head turns hidden states into distributions
                inputs |= self._teacher(teacher, number - 1)
        if recipe.ema_decay is not None and number > 1:
            inputs[EMA_ROLE] = _input(Stage.TRAIN, number - 1, opens=("ema",))
        self._add(Stage.TRAIN, number, "", named, inputs, seed=recipe.train.seed)

    def _evaluate_student(self, number: int) -> None:
        section, inputs = self.recipe.evaluate, self._student(number)
        named = self._named_student(inputs)
        for teacher in self.recipe.teachers if section.reverse_kl_problems else ():
            found = self._teacher(teacher, number)
            named |= self._named_teacher(teacher, found)
            inputs |= found
        if number > 0:
            inputs[BASELINE_ROLE] = _input(Stage.EVALUATE, 0, STUDENT)
        self._add(Stage.EVALUATE, number, STUDENT, named, inputs, seed=section.seed, split="test")

    def _evaluate_teacher(self, teacher: Teacher) -> None:
        inputs = self._teacher(teacher, 0)
        named = self._named_teacher(teacher, inputs)
        inputs[BASELINE_ROLE] = _input(Stage.EVALUATE, 0, STUDENT)
        seed = self.recipe.evaluate.seed
        self._add(Stage.EVALUATE, 0, teacher.name, named, inputs, seed=seed, split="test")

    def _text_inputs(self, number: int) -> Inputs:
        """The inputs of a step that reads what the teachers wrote."""
        roles = [(teacher_role(self.recipe, teacher), teacher.name) for teacher in self.recipe.teachers]
        return {role.as_kind(RoleKind.TEXT): _input(Stage.ROLLOUT, number, name) for role, name in roles}

    def _student(self, number: int, *, trainer: bool = False) -> Inputs:
        if number > 0:
            opens = ("model", "trainer") if trainer else ("model",)
            inputs = {STUDENT_ROLE: _input(Stage.TRAIN, number, opens=opens)}
            has_base = self.recipe.student.lora is not None and self.recipe.student.warmup is None
            if has_base and (below := self._student(0)):
                inputs[BASE_ROLE] = below[STUDENT_ROLE]
            return inputs
        if self.recipe.student.has_cold_start:
            return {STUDENT_ROLE: _input(Stage.SFT, 0, STUDENT, opens=("model",))}
        return {}

    def _teacher(self, teacher: Teacher, number: int) -> Inputs:
        """The teacher that goes with student `number`: only one that is the student itself moves with it."""
        role = teacher_role(self.recipe, teacher)
        match teacher:
            case SelfTeacher(self_="ema") if number > 0:
                return {role: _input(Stage.TRAIN, number, opens=("ema",))}
            case SelfTeacher(self_=which):
                found = self._student(number if which == "current" else 0)
                return {role if name == STUDENT_ROLE else name: source for name, source in found.items()}
            case _ if teacher.has_cold_start:
                return {role: _input(Stage.SFT, 0, teacher.name, opens=("model",))}
        return {}

    def _document(self, settings: object) -> Fields:
        """The settings of a stage as JSON."""
        found = next((known for other, known in self._documents if other == settings), None)
        if found is None:
            found = document(settings)
            self._documents.append((settings, found))
        return found

    def _named_student(self, inputs: Inputs) -> Fields:
        """The identity of the student; None where a step made its weights.

        With an adapter it is that of the model below, as the adapter is all that a train step makes.
        """
        is_made = self.recipe.student.lora is None and STUDENT_ROLE in inputs
        is_made = is_made or self.recipe.student.has_cold_start
        return {f"{STUDENT}.model": None if is_made else self._identity(STUDENT)}

    def _named_teacher(self, teacher: Teacher, inputs: Inputs) -> Fields:
        role = teacher_role(self.recipe, teacher)
        if not isinstance(teacher, SelfTeacher):
            return {f"{role}.model": None if role in inputs else self._identity(teacher.name)}
        is_made = role in inputs if self.recipe.student.lora is None else self.recipe.student.has_cold_start
        return {f"{role}.model": None if is_made else self._identity(STUDENT)}

    def _identity(self, name: str) -> JsonValue:
        return self.identities.models.get(name)

    def _data(self, split: str) -> Fields:
        """The identity of each file of a split, and of train where its problems are shown before a question."""
        task, splits = self.recipe.task, {split}
        if isinstance(task, QuestionTask) and task.few_shot:
            splits.add("train")
        found = self.identities.data
        # A split in several files has a key for each: train/0, train/1.
        return {name: found[name] for name in sorted(found) if name.partition("/")[0] in splits}

    def _add(
        self,
        stage: Stage,
        number: int,
        subject: str,
        named: Fields,
        inputs: Inputs,
        *,
        seed: int | None = None,
        split: str | None = None,
    ) -> None:
        """Adds a step; `named`: models that no step made, `seed`: its section's own, `split`: data it reads."""
        settings = settings_of(self.recipe, stage, number, subject=subject)
        data: Fields = {} if split is None else {"task.data": self._data(split)}
        if isinstance(getattr(settings, "task", None), TaskSettings) and self.identities.grader is not None:
            data["task.grader"] = self.identities.grader
        seed = self.recipe.seed if seed is None else seed
        step_id = step_id_of(stage, subject, number)
        hashed: Fields = {
            "stage": stage,
            "format": FORMATS[stage],
            "round": number,
            "subject": subject,
            "seed": seed,
            "fields": {**self._document(settings), **named, **data},
            "inputs": {str(role): self.steps[source.step_id].fingerprint for role, source in inputs.items()},
        }
        fingerprint = hashlib.sha256(canonical(hashed)).hexdigest()
        self.steps[step_id] = Step(step_id, stage, number, subject, seed, inputs, hashed, fingerprint)


def _input(stage: Stage, number: int, subject: str = "", opens: tuple[str, ...] = ()) -> Input:
    return Input(step_id_of(stage, subject, number), opens)
