"""The recipe: the only schema and the only defaults. Never imports torch.

`file.py` reads one from YAML. `runtime` and `tracking` cannot change results beyond floating-point rounding;
every other field is part of some step's fingerprint (`plan.py`), which a test enforces leaf by leaf.
"""

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field, JsonValue, ValidationInfo, field_validator

from kdpipe.recipe.models import Student
from kdpipe.recipe.objective import Support
from kdpipe.recipe.runtime import Runtime, Tracking
from kdpipe.recipe.section import ENGINE_ABILITIES, NAME, EngineName, Section, Seed
from kdpipe.recipe.stages import (
    EvaluateSection,
    Keeping,
    KeepTopK,
    RolloutSection,
    TeacherScoreSection,
    TrainSection,
)
from kdpipe.recipe.task import ArithmeticTask, Task
from kdpipe.recipe.teacher import ABSENT, ModelTeacher, ScratchTeacher, SelfTeacher, ServedTeacher, Teacher

__all__ = [
    "ModelTeacher",
    "Recipe",
    "ScratchTeacher",
    "SelfTeacher",
    "ServedTeacher",
    "Student",
    "Teacher",
    "resolved",
]


class Recipe(Section):
    """One experiment: a task, a student, its teachers, and how the student learns from them."""

    name: Annotated[str, Field(pattern=NAME)]
    """Names the run: `<name>-<hash8>`."""
    seed: Seed = 1
    """Every draw derives from it, by stage, round, problem and sample."""
    reproduce: bool = False
    """Runs an objective that check-loss fails, to reproduce what others did."""
    rounds: Annotated[int, Field(ge=1, le=10_000)]
    """Rounds of rollout, teacher-score and train."""
    task: Task
    """The problems, and how answers are graded."""
    student: Student
    """The model that learns."""
    teachers: Annotated[list[Teacher], Field(min_length=1, max_length=16)]
    """The models that score; several are routed by `only` or mixed by `weight`."""
    rollout: RolloutSection = RolloutSection.model_construct()
    """How each round samples."""
    teacher_score: TeacherScoreSection = TeacherScoreSection.model_construct()
    """How the teacher scores and what is kept."""
    train: TrainSection = TrainSection.model_construct()
    """Objective and optimizer."""
    evaluate: EvaluateSection = EvaluateSection.model_construct()
    """What is measured, and when. Changes no training."""
    tracking: Tracking = Tracking.model_construct()
    """MLflow. Not part of any fingerprint."""
    runtime: Runtime = Runtime.model_construct()
    """Hardware, memory, retention. Not part of any fingerprint."""

    @field_validator("teachers")
    @classmethod
    def _own_teachers_compute_alike(cls, teachers: list[Teacher], info: ValidationInfo) -> list[Teacher]:
        """A teacher that is the student has the student's dtype unless another is written.

        The same weights in another dtype give other scores, and are a second model in memory.
        """
        student: Student | None = info.data.get("student")
        if student is None:  # it is wrong itself, which is reported
            return teachers
        own = {"dtype": student.dtype}
        return [
            teacher.model_copy(update=own)
            if isinstance(teacher, SelfTeacher) and teacher.dtype == "auto"
            else teacher
            for teacher in teachers
        ]

    @property
    def teacher(self) -> Teacher:
        """The teacher, or the first of several."""
        return self.teachers[0]

    @property
    def is_routed(self) -> bool:
        """Whether each problem has one of several teachers."""
        return len(self.teachers) > 1 and self.teachers[0].only is not None

    def temperature_of(self, teacher: Teacher) -> float:
        """The temperature of a teacher's distributions: its own, or that of the rollout."""
        return teacher.temperature or self.rollout.temperature

    @property
    def is_mixed(self) -> bool:
        """Whether several teachers score every completion."""
        return len(self.teachers) > 1 and self.teachers[0].only is None

    @property
    def is_served(self) -> bool:
        """Whether every teacher is behind a server, so that `teacher_score.engine` scores none."""
        return all(isinstance(teacher, ServedTeacher) for teacher in self.teachers)

    @property
    def key_names(self) -> frozenset[str]:
        """The environment variables that hold keys of teachers' servers."""
        servers = [teacher.server for teacher in self.teachers if isinstance(teacher, ServedTeacher)]
        return frozenset(server.api_key_env for server in servers if server.api_key_env)

    @property
    def engines(self) -> set[EngineName]:
        """The engines that some step runs."""
        found = {self.rollout.engine, self.evaluate.engine or self.rollout.engine}
        asked = self.train.objective.has_kd or self.evaluate.reverse_kl_problems
        return found | ({self.teacher_score.engine} if asked and not self.is_served else set())

    @property
    def is_graded(self) -> bool:
        """Whether answers are right or wrong, so that there is an accuracy and a reward."""
        return self.task.grader != "none"

    @property
    def grades_teachers(self) -> bool:
        """Whether the teachers answer the test problems too: only what is graded tells who is better."""
        return self.evaluate.teacher and self.is_graded

    @property
    def mixture(self) -> dict[str, float] | None:
        """The share of each teacher by name, in the order of summation; None where they are not mixed."""
        if not self.is_mixed:
            return None
        given = {teacher.name: 1.0 if teacher.weight is None else teacher.weight for teacher in self.teachers}
        return {name: given[name] / sum(given.values()) for name in sorted(given)}

    @property
    def keep(self) -> Keeping:
        """What teacher-score keeps of the teacher beside each token's log-prob."""
        section, support = self.teacher_score, self.train.objective.distribution_support
        if section.keep == "hidden":
            return Keeping(hidden=True)
        if isinstance(section.keep, KeepTopK):
            return Keeping(teacher_top_k=section.keep.top_k)
        if section.keep == "token" or support is None:
            return Keeping()
        if support == "vocabulary" or self.is_mixed:  # the top k of a mixture are those of none of its parts
            return Keeping(hidden=True)
        k = support.union_top_k
        return Keeping(
            teacher_top_k=support.teacher_top_k or k or 0, student_top_k=support.student_top_k or k or 0
        )

    @property
    def ema_decay(self) -> float | None:
        """The decay of the average that each round's train step keeps; None where no teacher is it."""
        decays = (teacher.decay for teacher in self.teachers if isinstance(teacher, SelfTeacher))
        return next((decay for decay in decays if decay is not None), None)

    @property
    def distill_horizon(self) -> int:
        """Optimizer steps over which the distill weight moves."""
        objective = self.train.objective
        rounds = objective.distill_schedule.rounds or objective.kd_rounds or self.rounds
        return rounds * self.train.minibatches * self.train.epochs

    @property
    def has_teacher_text(self) -> bool:
        """Whether the student is trained on what a teacher wrote: in its cold start, or in the rounds."""
        sft, rollout = self.student.sft, self.rollout
        return (sft is not None and sft.text == "teacher") or rollout.off_policy_text == "teacher"

    def faults(self) -> Iterator[str]:
        return (fault for concern in CONCERNS for fault in concern(self))


def resolved(recipe: Recipe) -> dict[str, JsonValue]:
    """Every field of the recipe with defaults filled in, as JSON; a teacher has the fields of every kind."""
    value: dict[str, Any] = recipe.model_dump(mode="json", by_alias=True)
    value["teachers"] = [{**ABSENT, **teacher} for teacher in value["teachers"]]
    return value


# What does not fit between the sections, one function for each concern.


def _kept(recipe: Recipe) -> Iterator[str]:
    section, support = recipe.teacher_score, recipe.train.objective.distribution_support
    if section.keep != "auto" and support is not None:
        enough = section.keep == "hidden" and (support == "vocabulary" or support.teacher_top_k is not None)
        if isinstance(section.keep, KeepTopK) and support != "vocabulary" and not recipe.is_mixed:
            enough = section.keep.top_k == support.teacher_top_k
        if not enough:
            kept = section.keep if isinstance(section.keep, str) else f"{{top_k: {section.keep.top_k}}}"
            yield f"teacher_score.keep {kept} is not what train.objective.kd needs: auto keeps that"
    if section.logprobs == "float16" and not (recipe.keep.teacher_top_k or recipe.keep.student_top_k):
        yield "teacher_score.logprobs goes with a top-k support: nothing else is stored by it"


def _abilities(recipe: Recipe) -> Iterator[str]:
    objective, engine = recipe.train.objective, recipe.teacher_score.engine
    abilities = ENGINE_ABILITIES[engine]
    aliased = objective.has_kd and objective.end_token == "alias"  # noqa: S105 (no password)
    if recipe.is_served:
        return
    other = "" if recipe.is_mixed or aliased else ", or support: {teacher_top_k: k}"
    if (recipe.keep.student_top_k or aliased) and "support" not in abilities:
        yield f"teacher_score.engine {engine} gives no scores of given ids: use hf{other}"
    if recipe.keep.hidden and "hidden" not in abilities:
        yield f"teacher_score.engine {engine} gives no hidden states: use hf{other}"


def _round(recipe: Recipe) -> Iterator[str]:
    made = ["student"] if recipe.student.scratch is not None else []
    made += [f"teacher {each.name!r}" for each in recipe.teachers if isinstance(each, ScratchTeacher)]
    if made and not isinstance(recipe.task, ArithmeticTask):
        yield f"{made[0]}: scratch needs a task with its own tokenizer (arithmetic)"
    if recipe.train.objective.has_rl and recipe.rollout.samples == 1:
        yield "an RL term needs rollout.samples of 2 or more: a group of one has no advantage"
    yield from recipe.train.lone_baselines(recipe.rollout)
    if recipe.train.minibatches > recipe.rollout.rows:
        yield "train.minibatches is larger than the number of completions of a round"


def _ungraded(recipe: Recipe) -> Iterator[str]:
    """What reads a reward or an accuracy, where there is none."""
    if recipe.is_graded:
        return
    objective, section = recipe.train.objective, recipe.evaluate
    for field in objective.reward_fields:
        value, instead = getattr(objective, field), {"kind": "kd", "truncated": "keep or drop"}.get(field)
        yield (
            f"train.objective.{field} {value} needs a reward, and task.grader none gives none: "
            + (f"set it to {instead}" if instead else "remove it")
            + ", or give the task a grader"
        )
    if section.reverse_kl_problems == 0:
        yield (
            "evaluate.reverse_kl_problems 0: with task.grader none held-out reverse KL is all that is measured: set it "
            "to 64 or more, or remove it"
        )
    if section.samples > 1:
        yield (
            f"evaluate.samples {section.samples} is for pass@k and maj@k, and with task.grader none no answer is right "
            "or wrong: set it to 1"
        )
    if recipe.train.control == "self_teacher":
        yield (
            "train.control self_teacher: the student's distance to itself is no result, and task.grader none gives no "
            "other: use control shuffled_teacher"
        )


def _vllm(recipe: Recipe) -> Iterator[str]:
    evaluator = recipe.evaluate.engine or recipe.rollout.engine
    if recipe.student.lora is not None and "vllm" in (recipe.rollout.engine, evaluator):
        yield "engine vllm takes no adapter: with student.lora, rollout and evaluate use engine hf"
    engines = {recipe.teacher_score.engine, *([evaluator] if recipe.grades_teachers else [])}
    for teacher in recipe.teachers:
        if teacher.quantization is not None and "hf" in engines:
            yield (
                f"teacher {teacher.name!r}: quantization goes with engine vllm, and engine hf would run it too: "
                "set teacher_score.engine and evaluate.engine to vllm, or evaluate.teacher to false"
            )


def _off_policy_text(recipe: Recipe) -> Iterator[str]:
    objective, rollout = recipe.train.objective, recipe.rollout
    if rollout.on_policy_fraction == 1:
        idle = {
            "rollout.off_policy_text": rollout.off_policy_text != "reference",
            "train.objective.off_policy_term": objective.off_policy_term is not None,
        }
        for field in (field for field, is_set in idle.items() if is_set):
            yield (
                f"{field} has no effect where the student samples for every prompt: "
                "set rollout.on_policy_fraction below 1, or remove it"
            )
        return
    if not objective.has_kd or objective.kind == "then":
        why = "has rounds without a KD term" if objective.kind == "then" else "has no KD term"
        yield (
            f"rollout.on_policy_fraction below 1 needs an objective with a KD term, since the other text takes its "
            f"weight: kind {objective.kind} {why}; set on_policy_fraction to 1, or take kind kd, kdrl or srpo"
        )
    if objective.has_rl and not rollout.on_policy_prompts:
        yield (
            f"an RL term needs completions of the student: rollout.on_policy_fraction "
            f"{rollout.on_policy_fraction:g} of {rollout.prompts} prompts is none"
        )


def _servers(recipe: Recipe) -> Iterator[str]:
    for teacher in recipe.teachers:
        if isinstance(teacher, ServedTeacher):
            for fault in (*_beyond_scoring(recipe, teacher), *_beyond_sampling(recipe)):
                yield f"teacher {teacher.name!r} is behind a server, which gives {fault}"


def _beyond_scoring(recipe: Recipe, teacher: ServedTeacher) -> Iterator[str]:
    """What a server's scores are, where the recipe asks for others, and what to write instead."""
    if recipe.temperature_of(teacher) != 1:
        asked = "teachers[].temperature" if teacher.temperature else "rollout.temperature"
        yield (
            f"log-probs at temperature 1, and {asked} is not 1: write temperature: 1 for this teacher "
            "(equal weights then do not mean a KL of 0), or set rollout.temperature to 1"
        )
    if recipe.keep.hidden:
        instead = "kd: rkl or k2" if recipe.is_mixed else "support: {teacher_top_k: k}, or kd: rkl or k2"
        yield f"no hidden states and no whole distributions: use {instead}"
    if recipe.keep.student_top_k:
        yield "its own top k and no scores of the student's: use support: {teacher_top_k: k}"
    if recipe.train.objective.has_kd and recipe.train.objective.end_token == "alias":  # noqa: S105 (no password)
        yield "no scores of other ids than those it reads: use end_token: mask"


def _beyond_sampling(recipe: Recipe) -> Iterator[str]:
    """What a server's samples are, where the recipe asks for others, and what to write instead."""
    rollout, section, sft = recipe.rollout, recipe.evaluate, recipe.student.sft
    sampled = {"evaluate.temperature": section.temperature} if recipe.grades_teachers else {}
    if sft is not None and sft.text == "teacher":
        sampled["student.sft.temperature"] = sft.temperature
    if rollout.off_policy_text == "teacher":
        sampled["teachers[].temperature"] = 1.0
    for name, temperature in sampled.items():
        if temperature not in (0, 1) or (temperature and rollout.is_cut):
            other = ", or evaluate.teacher to false" if name.startswith("evaluate") else ""
            yield (
                "log-probs of its samples at temperature 1 and of the whole distribution: set "
                f"{name} to 0, or to 1 without rollout.top_p and top_k{other}"
            )


def _teacher_text(recipe: Recipe) -> Iterator[str]:
    for teacher in recipe.teachers:
        if teacher.sft is not None and teacher.sft.text == "teacher":
            yield (
                f"teacher {teacher.name!r}: sft.text: teacher is for the student; a teacher's own cold start reads "
                "the reference solutions"
            )
    if recipe.has_teacher_text and recipe.is_mixed:
        yield (
            "a mixture of teachers scores text and writes none: give each teacher the problems that it writes for "
            "by only, or take text: reference"
        )
    selves = [teacher for teacher in recipe.teachers if isinstance(teacher, SelfTeacher)]
    if selves and recipe.student.sft is not None and recipe.student.sft.text == "teacher":
        yield (
            f"student.sft.text: teacher {selves[0].name!r} is the student that this cold start makes: "
            "take text: reference, or another teacher"
        )


def _control(recipe: Recipe) -> Iterator[str]:
    control = recipe.train.control
    if control == "none":
        return
    if len(recipe.teachers) > 1 and control != "constant_advantage":
        yield f"train.control {control} goes with a single teacher"
    if not recipe.train.objective.has_kd:
        yield f"train.control {control} needs an objective with a KD term"
    if control == "shuffled_teacher" and recipe.rollout.prompts < 2:
        yield "train.control shuffled_teacher needs rollout.prompts of 2 or more"
    if control == "self_teacher" and not _is_the_sampler(recipe, recipe.teacher):
        yield (
            "train.control self_teacher needs teachers: [{self: current}], without a prompt, template or "
            "temperature of its own"
        )


def _names(recipe: Recipe) -> Iterator[str]:
    names = [teacher.name for teacher in recipe.teachers]
    if twice := next((name for name in names if names.count(name) > 1), None):
        yield f"two teachers are called {twice!r}: give each a name of its own"
    placed = recipe.runtime.placement.teacher
    if isinstance(placed, dict) and (foreign := sorted(placed.keys() - set(names))):
        yield f"runtime.placement.teacher names {foreign[0]!r}, and no teacher has that name: {', '.join(names)}"


def _shares(recipe: Recipe) -> Iterator[str]:
    routed = [teacher.only is not None for teacher in recipe.teachers]
    if routed == [True]:
        yield "only goes with several teachers: a single one teaches every problem"
    if any(routed) and not all(routed):
        lacking = recipe.teachers[routed.index(False)].name
        yield f"teacher {lacking!r} has no only, and others have: give it to all teachers or to none"
    if not recipe.is_mixed and any(teacher.weight is not None for teacher in recipe.teachers):
        yield "weight goes with several teachers without only, which are mixed by it"
    support = recipe.train.objective.distribution_support
    if recipe.is_mixed and isinstance(support, Support) and support.teacher_top_k is None:
        yield (
            "a mixture of teachers is not compared on the student's top k: "
            "use support: vocabulary or {teacher_top_k: k}, which are then the mixture's"
        )


def _averages(recipe: Recipe) -> Iterator[str]:
    decays = {teacher.decay for teacher in recipe.teachers if isinstance(teacher, SelfTeacher)}
    if len(decays - {None}) > 1:
        yield "teachers with self: ema have different decays: one average is kept, give them the same"
    if recipe.ema_decay is not None and recipe.student.lora is not None:
        yield (
            "self: ema averages whole weights, and with student.lora only an adapter is kept of each round: "
            "use self: initial or self: current, or train all weights"
        )


def _signal(recipe: Recipe) -> Iterator[str]:
    silent = [teacher for teacher in recipe.teachers if _is_the_sampler(recipe, teacher)]
    is_meant = recipe.train.control == "self_teacher"
    if silent and not is_meant and (not recipe.is_mixed or len(silent) == len(recipe.teachers)):
        yield (
            f"teacher {silent[0].name!r} would be the very student that samples, so its scores say nothing: "
            "give it a prompt, a template or a temperature of its own"
        )


def _is_the_sampler(recipe: Recipe, teacher: Teacher) -> bool:
    """Whether it scores what the student samples from: equal weights, prompt and temperature."""
    is_student = isinstance(teacher, SelfTeacher) and (teacher.self_ == "current" or teacher.decay == 0)
    has_own_template = bool(teacher.template) and teacher.template != recipe.student.template
    has_own_temperature = teacher.temperature not in (None, recipe.rollout.temperature)
    has_own_prompt = teacher.prompt is not None or teacher.prompt_style != "student" or has_own_template
    return is_student and not (has_own_prompt or has_own_temperature)


def _logged_model(recipe: Recipe) -> Iterator[str]:
    if recipe.tracking.log_model and recipe.student.lora is not None:
        yield (
            "tracking.log_model: a LoRA student's checkpoints hold an adapter and no whole model: remove it, and log "
            "what kdpipe export merges"
        )
    if recipe.tracking.log_model and recipe.student.trust_remote_code:
        yield (
            "tracking.log_model: a student with code of its own (trust_remote_code) would run it where the model is "
            "loaded from MLflow: remove it"
        )


CONCERNS = (
    *(_ungraded, _kept, _abilities, _round, _vllm, _off_policy_text, _servers, _teacher_text),
    *(_control, _names, _shares, _averages, _signal, _logged_model),
)
"""In the order in which they are looked at; of several faults the first is reported."""
