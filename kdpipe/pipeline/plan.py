"""Recipe -> the ordered steps it means, each with its fingerprint. Pure: no files, no clock, no network.

A fingerprint is the sha256 of canonical JSON of everything that decides a step's result: the stage, its
format version, the recipe fields it reads, the identity of models and data, the fingerprints of its input
steps, the round and the seed. `FORMATS` is raised whenever a stage's output changes for equal inputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import JsonValue

from kdpipe.errors import RecipeError
from kdpipe.recipe.roles import (
    BASE_ROLE,
    BASELINE_ROLE,
    EMA_ROLE,
    ROLLOUT_ROLE,
    SERVER,
    STUDENT,
    STUDENT_ROLE,
    Role,
    RoleKind,
    teacher_role,
)
from kdpipe.recipe.schema import (
    Gsm8kTask,
    JsonlTask,
    Recipe,
    SelfTeacher,
    ServedTeacher,
    Sft,
    Student,
    Teacher,
    resolved,
)
from kdpipe.store.step import Fields, Input, Stage, Step, canonical, step_id_of

FORMATS: dict[Stage, int] = {
    Stage.SFT: 1,
    Stage.ROLLOUT: 1,
    Stage.TEACHER_SCORE: 2,
    Stage.TRAIN: 3,
    Stage.EVALUATE: 3,
}
UNRESOLVED = "unresolved"


@dataclass(frozen=True, slots=True)
class Identities:
    """What models and data *are*, as opposed to what they are called.

    Each is `{"digest": sha256}` for local files or `{"hub": id, "revision": commit or "unresolved"}`, of a
    teacher behind a server that of its tokenizer beside `"served"`, the name of the model there;
    `models` is keyed by "student" or the teacher's name, `data` by split.
    """

    models: Mapping[str, Fields]
    data: Mapping[str, Fields]

    def unresolved(self) -> list[str]:
        """Hub names whose commit is not known yet: their fingerprints will change with the first run."""
        found = {
            str(fields["hub"])
            for fields in (*self.models.values(), *self.data.values())
            if _is_unresolved(fields)
        }
        return sorted(found)


@dataclass(frozen=True, slots=True)
class Plan:
    """Every step of the recipe, in the order they run."""

    steps: tuple[Step, ...]

    def step(self, step_id: str) -> Step:
        """The step called `step_id`; `evaluate@3` is short for `evaluate:student@3`."""
        stage, at, number = step_id.partition("@")
        wanted = {step_id, f"{stage}:{STUDENT}{at}{number}"}
        for step in self.steps:
            if step.id in wanted:
                return step
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


def _is_unresolved(fields: Fields) -> bool:
    return fields.get("revision") == UNRESOLVED


def run_hash(recipe: Recipe) -> str:
    """Eight hex digits that name a run: the resolved recipe without rounds, runtime and tracking."""
    document: dict[str, Any] = _without(resolved(recipe), "rounds", "runtime", "tracking")
    document["train"] = _train_settings(document["train"])
    for teacher in document["teachers"]:
        if teacher["server"] is not None:  # where a server is and how it lets one in do not name a run
            teacher["server"] = _without(teacher["server"], "urls", "api_key_env")
    return hashlib.sha256(canonical(document)).hexdigest()[:8]


def _train_settings(section: dict[str, Any]) -> dict[str, Any]:
    """The section without a control that is none: runs from before there were controls keep their names and steps."""
    return _without(section, "control") if section["control"] == "none" else section


def make_plan(recipe: Recipe, identities: Identities) -> Plan:
    """The steps of `recipe`, in order: cold starts and evaluations of round 0, then round after round."""
    return _Planner(recipe, identities).plan()


def evaluated(recipe: Recipe, round_number: int) -> bool:
    """Whether the student is evaluated after `round_number`: every so often, and after the last."""
    return round_number % recipe.evaluate.every == 0 or round_number == recipe.rounds


class _Planner:
    """Builds the steps one by one; `steps` holds those built so far by id.

    `sections` is the recipe as JSON, made once: a section of its own costs pydantic a serializer, every round a dump.
    """

    def __init__(self, recipe: Recipe, identities: Identities) -> None:
        self.recipe = recipe
        self.sections: dict[str, Any] = resolved(recipe)
        self.identities = identities
        self.steps: dict[str, Step] = {}

    def plan(self) -> Plan:
        recipe = self.recipe
        models: list[tuple[str, Student | Teacher]] = [(STUDENT, recipe.student)]
        models += [(teacher.name, teacher) for teacher in recipe.teachers]
        if _reads_teacher(recipe.student.sft):  # the teachers write before the student reads
            models = [*models[1:], models[0]]
        for name, model in models:
            if name == STUDENT and _reads_teacher(recipe.student.sft):
                self._teacher_texts(0)
            if model.has_cold_start:
                self._sft(name, model)
        self._evaluate_student(0)
        for teacher in recipe.teachers if recipe.evaluate.teacher else ():
            self._evaluate_teacher(teacher)
        for number in range(1, recipe.rounds + 1):
            if recipe.rollout.off_policy_text == "teacher":
                self._teacher_texts(number)
            self._rollout(number)
            for teacher in recipe.teachers if recipe.train.objective.in_round(number).has_kd else ():
                self._teacher_score(number, teacher)
            self._train(number)
            if evaluated(recipe, number):
                self._evaluate_student(number)
        return Plan(tuple(self.steps.values()))

    # Each stage lists what it reads, under the names that the recipe uses.

    def _sft(self, name: str, model: Student | Teacher) -> None:
        where = STUDENT if name == STUDENT else "teacher"
        dumped = self._dumped(name)
        seed = model.sft.seed if model.sft is not None else None
        fields: Fields = {
            **self._task(split="train", headline=False),
            f"{where}.model": self._identity(name),
            f"{where}.scratch": dumped["scratch"],
            f"{where}.dtype": model.dtype,
            f"{where}.trust_remote_code": model.trust_remote_code,
            f"{where}.template": model.template,
            f"{where}.sft": _without(dumped["sft"], "seed") if dumped["sft"] else None,
        }
        if not isinstance(model, Student) and model.only is not None:  # a specialist learns what it teaches
            fields[f"{where}.only"] = _routes(model)
        inputs = self._texts(0) if name == STUDENT and _reads_teacher(model.sft) else {}
        self._add(Stage.SFT, 0, name, self._seed(seed), fields, inputs)

    def _teacher_texts(self, number: int) -> None:
        """What each teacher writes: for the student's cold start, or where it does not sample in a round."""
        recipe = self.recipe
        own = (
            ("seed", "samples")
            if number
            else ("seed", "samples", "prompts", "temperature", "on_policy_fraction")
        )
        for teacher in recipe.teachers:
            fields: Fields = {
                **self._task(split="train"),
                **self._teacher_fields(teacher, max(0, number - 1)),
                **self._student_fields(0),
                "student.model": self._identity(STUDENT),  # whose prompt is answered, in its ids
                "rollout": _without(self.sections["rollout"], *own),
            }
            if isinstance(teacher, ServedTeacher):
                fields["rollout"] = {**_without(self.sections["rollout"], *own), "engine": SERVER}
            if number == 0:
                sft = self._dumped(STUDENT)["sft"]
                fields["student.sft"] = {name: sft[name] for name in ("problems", "samples", "temperature")}
            inputs = self._teacher_model(teacher, max(0, number - 1))
            self._add(Stage.ROLLOUT, number, teacher.name, self._seed(recipe.rollout.seed), fields, inputs)

    def _texts(self, number: int) -> dict[Role, Input]:
        """The inputs of a step that reads what the teachers wrote."""
        return {
            teacher_role(self.recipe, teacher).as_kind(RoleKind.TEXT): _input(
                Stage.ROLLOUT, number, teacher.name
            )
            for teacher in self.recipe.teachers
        }

    def _rollout(self, number: int) -> None:
        fields: Fields = {
            **self._task(split="train"),
            **self._student_fields(number - 1),
            "rollout": _without(self.sections["rollout"], "seed"),
        }
        seed = self._seed(self.recipe.rollout.seed)
        inputs = self._student_model(number - 1)
        if self.recipe.rollout.off_policy_text == "teacher":
            inputs |= self._texts(number)
        self._add(Stage.ROLLOUT, number, "", seed, fields, inputs)

    def _teacher_score(self, number: int, teacher: Teacher) -> None:
        recipe = self.recipe
        reads_records = teacher.prompt is not None or teacher.only is not None
        fields: Fields = {
            **self._teacher_fields(teacher, number - 1),
            **(self._task(split="train") if reads_records else self._task_settings(headline=False)),
            "teacher_score.engine": self._scorer(teacher),
            "teacher_score.keep": asdict(recipe.keep),
            "teacher_score.logprobs": recipe.teacher_score.logprobs,
            "rollout.temperature": recipe.rollout.temperature,
            "student.template": recipe.student.template,
        }
        fields |= self._alias()
        inputs = {
            ROLLOUT_ROLE: _input(Stage.ROLLOUT, number),
            **self._teacher_model(teacher, number - 1),
        }
        if recipe.keep.student_top_k:  # the student that sampled chooses ids too
            fields |= self._student_fields(number - 1)
            inputs |= self._student_model(number - 1)
        subject = "" if len(recipe.teachers) == 1 else teacher.name
        self._add(Stage.TEACHER_SCORE, number, subject, recipe.seed, fields, inputs)

    def _train(self, number: int) -> None:
        recipe = self.recipe
        train = _train_settings(_without(self.sections["train"], "seed"))
        horizon = recipe.train.optimizer.schedule_rounds or recipe.rounds
        constant = recipe.train.optimizer.schedule == "constant"
        optimizer = {**train["optimizer"], "schedule_rounds": None if constant else horizon}
        objective = recipe.train.objective.in_round(number)
        phase = {**train["objective"], "kind": objective.kind, "kd_rounds": objective.kd_rounds}
        if objective.distill_schedule.kind != "constant":
            phase["distill_schedule"] = {**phase["distill_schedule"], "rounds": recipe.distill_horizon}
        if recipe.rollout.on_policy_fraction < 1:
            phase["off_policy_term"] = objective.off_policy_loss
        fields: Fields = {
            "train": {**train, "optimizer": optimizer, "objective": phase},
            "reproduce": recipe.reproduce,
            "rollout.temperature": recipe.rollout.temperature,
            **self._student_fields(number - 1),
        }
        if recipe.student.lora is not None and number == 1:  # later rounds go on with the adapter of this one
            lora = recipe.student.lora
            fields["student.lora"] = {**lora.model_dump(mode="json"), "seed": self._seed(lora.seed)}
        if objective.normalization == "fixed" and objective.fixed_length is None:
            fields["rollout.max_new_tokens"] = recipe.rollout.max_new_tokens
        inputs = {
            ROLLOUT_ROLE: _input(Stage.ROLLOUT, number),
            **self._student_model(number - 1, trainer=True),
        }
        if objective.has_kd:
            for teacher in recipe.teachers:
                role = teacher_role(recipe, teacher)
                inputs[role.as_kind(RoleKind.SCORES)] = _input(Stage.TEACHER_SCORE, number, role.name)
                if recipe.keep.hidden:  # its output head turns hidden states into distributions
                    inputs |= self._teacher_model(teacher, number - 1)
            fields |= self._mixture()
        if recipe.ema_decay is not None:
            fields["ema.decay"] = recipe.ema_decay
            if number > 1:
                inputs[EMA_ROLE] = _input(Stage.TRAIN, number - 1, opens=("ema",))
        self._add(Stage.TRAIN, number, "", self._seed(recipe.train.seed), fields, inputs)

    def _evaluate_student(self, number: int) -> None:
        recipe, section = self.recipe, self.recipe.evaluate
        fields: Fields = {
            **self._task(split="test"),
            **self._student_fields(number),
            **self._evaluate_settings(),
            "evaluate.reverse_kl_problems": section.reverse_kl_problems,
        }
        inputs = dict(self._student_model(number))
        if section.reverse_kl_problems:
            unread = ("seed", "prompts", "samples", "on_policy_fraction", "off_policy_text", "engine")
            rollout = _without(self.sections["rollout"], *unread)
            scorers = {self._scorer(teacher) for teacher in recipe.teachers}
            fields |= {"rollout": rollout, "teacher_score.engine": "+".join(sorted(scorers))}
            fields |= self._mixture() | self._alias()
            for teacher in recipe.teachers:
                fields |= self._teacher_fields(teacher, number)
                inputs |= self._teacher_model(teacher, number)
        if number > 0:
            inputs[BASELINE_ROLE] = _input(Stage.EVALUATE, 0, STUDENT)
        self._add(Stage.EVALUATE, number, STUDENT, self._seed(section.seed), fields, inputs)

    def _evaluate_teacher(self, teacher: Teacher) -> None:
        recipe = self.recipe
        fields: Fields = {
            **self._task(split="test"),
            **self._teacher_fields(teacher, 0),
            **self._evaluate_settings(),
            "student.template": recipe.student.template,
        }
        if isinstance(teacher, ServedTeacher):
            fields["evaluate.engine"] = SERVER
        inputs = {
            **self._teacher_model(teacher, 0),
            BASELINE_ROLE: _input(Stage.EVALUATE, 0, STUDENT),
        }
        self._add(Stage.EVALUATE, 0, teacher.name, self._seed(recipe.evaluate.seed), fields, inputs)

    # What several stages read.

    def _seed(self, own: int | None) -> int:
        return self.recipe.seed if own is None else own

    def _dumped(self, name: str) -> dict[str, Any]:
        """The section of the student or a teacher, as JSON."""
        found = next((section for section in self.sections["teachers"] if section["name"] == name), None)
        section: dict[str, Any] = self.sections["student"] if found is None else found
        return section

    def _identity(self, name: str) -> JsonValue:
        return self.identities.models.get(name)

    def _task_settings(self, *, headline: bool = True) -> Fields:
        paths = ("data", "revision", "train", "test")  # names; what they hold enters by its digest
        return {"task": _without(self.sections["task"], *paths, *(() if headline else ("headline",)))}

    def _task(self, *, split: str, headline: bool = True) -> Fields:
        task = self.recipe.task
        splits = {split}
        if isinstance(task, Gsm8kTask | JsonlTask) and task.few_shot:
            splits.add("train")
        found = self.identities.data
        # A split in several files has a key for each: train/0, train/1.
        data: Fields = {name: found[name] for name in sorted(found) if name.partition("/")[0] in splits}
        return {**self._task_settings(headline=headline), "task.data": data}

    def _student_fields(self, number: int) -> Fields:
        """The student as loaded; its identity enters here only where no step made it."""
        student = self.recipe.student
        # What a step makes of a model with an adapter is the adapter: the model below it is named all the same.
        made = self._student_model(0 if student.lora is not None else number)
        return {
            "student.model": None if made else self._identity(STUDENT),
            "student.dtype": student.dtype,
            "student.trust_remote_code": student.trust_remote_code,
            "student.template": student.template,
        }

    def _student_model(self, number: int, *, trainer: bool = False) -> dict[Role, Input]:
        if number > 0:
            inputs = {
                STUDENT_ROLE: Input(
                    step_id_of(Stage.TRAIN, None, number), ("model", "trainer") if trainer else ("model",)
                )
            }
            if self.recipe.student.lora is not None and (below := self._student_model(0)):
                inputs[BASE_ROLE] = below[STUDENT_ROLE]
            return inputs
        if self.recipe.student.has_cold_start:
            return {STUDENT_ROLE: _input(Stage.SFT, 0, STUDENT, opens=("model",))}
        return {}

    def _teacher_model(self, teacher: Teacher, number: int) -> dict[Role, Input]:
        """The teacher that goes with student `number`: only one that is the student itself moves with it."""
        role = teacher_role(self.recipe, teacher)
        match teacher:
            case SelfTeacher(self_="ema") if number > 0:
                return {role: _input(Stage.TRAIN, number, opens=("ema",))}
            case SelfTeacher(self_=which):
                found = self._student_model(number if which == "current" else 0)
                return {role if name == STUDENT_ROLE else name: source for name, source in found.items()}
            case _ if teacher.has_cold_start:
                return {role: _input(Stage.SFT, 0, teacher.name, opens=("model",))}
        return {}

    def _teacher_fields(self, teacher: Teacher, number: int) -> Fields:
        is_student = isinstance(teacher, SelfTeacher)
        identity = self._identity(STUDENT if is_student else teacher.name)
        own = ("model", "revision", "scratch", "sft", "only", "weight", "decay", "server")
        role = teacher_role(self.recipe, teacher)
        is_adapter = is_student and self.recipe.student.lora is not None
        made = self._student_model(0) if is_adapter else self._teacher_model(teacher, number)
        fields: Fields = {
            str(role): _without(self._dumped(teacher.name), *own),
            f"{role}.model": None if made else identity,
        }
        return fields if teacher.only is None else {**fields, f"{role}.only": _routes(teacher)}

    def _scorer(self, teacher: Teacher) -> str:
        """What scores for a teacher: the engine that the recipe names, or the teacher's own server."""
        return SERVER if isinstance(teacher, ServedTeacher) else self.recipe.teacher_score.engine

    def _alias(self) -> Fields:
        """Only where it is asked for: `mask` and `keep` change nothing of what the teacher says."""
        end_token = self.recipe.train.objective.end_token
        return {"train.objective.end_token": end_token} if end_token == "alias" else {}  # noqa: S105

    def _mixture(self) -> Fields:
        """The weights of a mixture, sorted by name as it is summed."""
        weights = self.recipe.weights
        return (
            {"teachers.weights": {name: weights[name] for name in sorted(weights)}}
            if self.recipe.is_mixed
            else {}
        )

    def _evaluate_settings(self) -> Fields:
        section, rollout = self.recipe.evaluate, self.recipe.rollout
        # Greedy decoding reads neither top-p nor top-k.
        cut: Fields = {"top_p": rollout.top_p, "top_k": rollout.top_k} if section.temperature else {}
        return {
            "evaluate.engine": section.engine or rollout.engine,
            "evaluate.problems": section.problems,
            "evaluate.samples": section.samples,
            "evaluate.temperature": section.temperature,
            "evaluate.max_new_tokens": section.max_new_tokens or rollout.max_new_tokens,
            "rollout": {"stop": list(rollout.stop), **cut},
        }

    def _add(
        self, stage: Stage, number: int, subject: str, seed: int, fields: Fields, inputs: dict[Role, Input]
    ) -> None:
        step_id = step_id_of(stage, subject, number)
        document: Fields = {
            "stage": stage,
            "format": FORMATS[stage],
            "round": number,
            "subject": subject,
            "seed": seed,
            "fields": fields,
            "inputs": {str(role): self.steps[source.step_id].fingerprint for role, source in inputs.items()},
        }
        fingerprint = hashlib.sha256(canonical(document)).hexdigest()
        self.steps[step_id] = Step(step_id, stage, number, subject, seed, inputs, document, fingerprint)


def _input(stage: Stage, number: int, subject: str = "", opens: tuple[str, ...] = ()) -> Input:
    return Input(step_id_of(stage, subject, number), opens)


def _without(section: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in section.items() if name not in names}


def _routes(teacher: Teacher) -> JsonValue:
    """`only` as it is understood: a value is a list of one, and their order means nothing."""
    routes: dict[str, JsonValue] = {}
    for name, wanted in (teacher.only or {}).items():
        values = wanted if isinstance(wanted, list) else [wanted]
        routes[name] = list[JsonValue](sorted({str(value) for value in values}))
    return routes


def _reads_teacher(sft: Sft | None) -> bool:
    """Whether a cold start is on what teachers write."""
    return sft is not None and sft.text == "teacher"
