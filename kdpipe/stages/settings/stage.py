"""What each stage reads, one class for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from kdpipe.recipe.models import Lora, Scratch, Sft
from kdpipe.recipe.roles import STUDENT
from kdpipe.recipe.schema import Recipe, ScratchTeacher, Student, Teacher
from kdpipe.recipe.section import EngineName, PromptStyleName
from kdpipe.recipe.stages import Keeping, RolloutSection, TrainSection
from kdpipe.stages.settings.document import named
from kdpipe.stages.settings.model import (
    DrawSettings,
    ModelSettings,
    PromptSettings,
    Routes,
    TaskSettings,
    TeacherSettings,
    problems_of,
    routes_of,
)
from kdpipe.store.stage import Stage
from kdpipe.store.step import Fields


@dataclass(frozen=True, slots=True)
class ColdStart(ModelSettings):
    """A model before its cold start, and the cold start: None keeps a scratch model as initialised.

    `lora` is the adapter that it trains in place of all weights.
    """

    scratch: Scratch | None
    sft: Sft | None
    lora: Lora | None
    only: Routes | None
    prompt_style: PromptStyleName


def _begun(recipe: Recipe, lora: Lora | None) -> Lora | None:
    """An adapter that begins, with the seed of its first weights."""
    seed = recipe.seed if lora is None or lora.seed is None else lora.seed
    return None if lora is None else lora.model_copy(update={"seed": seed})


@dataclass(frozen=True, slots=True)
class SftSettings:
    """The cold start of the student or of a teacher, the other being None."""

    task: Fields
    student: ColdStart | None
    teacher: ColdStart | None

    @classmethod
    def of(cls, recipe: Recipe, model: Student | Teacher) -> SftSettings:
        is_student = isinstance(model, Student)
        start = ColdStart(
            dtype=model.dtype,
            trust_remote_code=model.trust_remote_code,
            template=model.template,
            scratch=model.scratch if isinstance(model, Student | ScratchTeacher) else None,
            sft=None if model.sft is None else model.sft.model_copy(update={"seed": None}),
            lora=_begun(recipe, recipe.student.warmup) if is_student else None,
            only=None if isinstance(model, Student) else routes_of(model),
            prompt_style="student" if isinstance(model, Student) else model.prompt_style,
        )
        task = problems_of(recipe.task)
        return cls(task, start if is_student else None, None if is_student else start)

    @property
    def model(self) -> ColdStart:
        """The one that is there."""
        found = self.student or self.teacher
        assert found is not None
        return found


@dataclass(frozen=True, slots=True)
class TextSettings:
    """How a teacher writes for the first `problems` of a cold start, or for the `prompts` of a round."""

    task: TaskSettings
    teacher: TeacherSettings
    student: ModelSettings
    rollout: DrawSettings
    samples: int
    problems: int | None = field(metadata=named("student.sft.problems"))
    prompts: PromptSettings | None

    @classmethod
    def of(cls, recipe: Recipe, number: int, teacher: Teacher) -> TextSettings:
        """The settings of round `number`; 0 is the student's cold start."""
        sft, rollout = recipe.student.sft if number == 0 else None, recipe.rollout
        settings = TeacherSettings.of(recipe, teacher, rollout.engine)
        heat = sft.temperature if sft else settings.temperature
        return cls(
            task=TaskSettings.of(recipe.task, "reward"),
            teacher=settings,
            student=ModelSettings.of(recipe.student),
            rollout=DrawSettings.of(rollout, temperature=heat),
            samples=sft.samples if sft else 1,
            problems=sft.problems if sft else None,
            prompts=PromptSettings.of(rollout) if number else None,
        )


@dataclass(frozen=True, slots=True)
class RolloutSettings:
    """How the student samples, and how its completions are graded. The seed is the step's."""

    task: TaskSettings
    student: ModelSettings
    rollout: RolloutSection

    @classmethod
    def of(cls, recipe: Recipe) -> RolloutSettings:
        rollout = recipe.rollout.model_copy(update={"seed": None})
        return cls(TaskSettings.of(recipe.task, "reward"), ModelSettings.of(recipe.student), rollout)


@dataclass(frozen=True, slots=True)
class ScoreSettings:
    """How a teacher scores, and what is kept of it, log-probs of a support in the dtype `logprobs`.

    `is_one_of_several` names its metrics by the teacher. `student` is there where it chooses ids of
    the support, at the `temperature` of the rollout.
    """

    task: Fields
    teacher: TeacherSettings
    keep: Keeping = field(metadata=named("teacher_score.keep"))
    logprobs: Literal["float32", "float16"] = field(metadata=named("teacher_score.logprobs"))
    student: ModelSettings | None
    temperature: float = field(metadata=named("rollout.temperature"))
    is_one_of_several: bool

    @classmethod
    def of(cls, recipe: Recipe, teacher: Teacher) -> ScoreSettings:
        keep = recipe.keep
        return cls(
            task=problems_of(recipe.task),
            teacher=TeacherSettings.of(recipe, teacher, recipe.teacher_score.engine),
            keep=keep,
            logprobs=recipe.teacher_score.logprobs,
            student=ModelSettings.of(recipe.student) if keep.student_top_k else None,
            temperature=recipe.rollout.temperature,
            is_one_of_several=len(recipe.teachers) > 1,
        )


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """How a round becomes optimizer steps. Its `train.objective` is that of the round.

    `distill_horizon` are the optimizer steps over which a distill weight moves, `weights` those of a mixture,
    `lora` the adapter that begins in this round, `ema_decay` that of the average which is kept. Where some round has an
    RL term (`has_rl`) all have its metrics.
    """

    train: TrainSection
    rollout: DrawSettings
    student: ModelSettings
    lora: Lora | None = field(metadata=named("student.lora"))
    reproduce: bool
    distill_horizon: int = field(metadata=named("train.distill_horizon"))
    weights: Mapping[str, float] | None = field(metadata=named("teachers.weights"))
    has_several_teachers: bool
    has_rl: bool
    ema_decay: float | None = field(metadata=named("teachers.decay"))

    @classmethod
    def of(cls, recipe: Recipe, number: int) -> TrainSettings:
        objective = recipe.train.objective.in_round(number)
        if recipe.rollout.on_policy_fraction < 1:  # what it leaves to be inferred
            objective = objective.model_copy(update={"off_policy_term": objective.off_policy_loss})
        begins = (
            number == 1 and recipe.student.warmup is None
        )  # others go on with the adapter of the step before
        moves = objective.distill_schedule.kind != "constant"
        optimizer = recipe.train.optimizer
        rounds = None if optimizer.schedule == "constant" else optimizer.schedule_rounds or recipe.rounds
        optimizer = optimizer.model_copy(update={"schedule_rounds": rounds})
        section = {"objective": objective, "optimizer": optimizer, "seed": None}  # the seed is the step's
        return cls(
            train=recipe.train.model_copy(update=section),
            rollout=DrawSettings.of(recipe.rollout),
            student=ModelSettings.of(recipe.student),
            lora=_begun(recipe, recipe.student.lora) if begins else None,
            reproduce=recipe.reproduce,
            distill_horizon=recipe.distill_horizon if moves else 1,
            weights=recipe.mixture if objective.has_kd else None,
            has_several_teachers=len(recipe.teachers) > 1,
            has_rl=recipe.train.objective.has_rl,
            ema_decay=recipe.ema_decay,
        )


@dataclass(frozen=True, slots=True)
class EvaluateSettings:
    """How a model answers the first `problems` test problems; `teacher` is None for the student.

    The student's completions for `reverse_kl_problems`, drawn as the rollout's, are scored by `teachers`, by name;
    `weights` are those of a mixture, None where each problem has its own teacher.
    """

    task: TaskSettings
    student: ModelSettings | None
    teacher: TeacherSettings | None
    evaluate: DrawSettings
    engine: EngineName = field(metadata=named("evaluate.engine"))
    problems: int | None = field(metadata=named("evaluate.problems"))
    samples: int = field(metadata=named("evaluate.samples"))
    reverse_kl_problems: int = field(metadata=named("evaluate.reverse_kl_problems"))
    rollout: DrawSettings | None
    teachers: Mapping[str, TeacherSettings]
    weights: Mapping[str, float] | None = field(metadata=named("teachers.weights"))

    @classmethod
    def of(cls, recipe: Recipe, teacher: Teacher | None = None) -> EvaluateSettings:
        """The settings of every evaluation of the student, or of `teacher`."""
        section, rollout = recipe.evaluate, recipe.rollout
        engine = section.engine or rollout.engine
        reverse_kl_problems = section.reverse_kl_problems if teacher is None else 0
        scorer, scorers = recipe.teacher_score.engine, recipe.teachers if reverse_kl_problems else []
        return cls(
            task=TaskSettings.of(recipe.task, "headline"),
            student=ModelSettings.of(recipe.student) if teacher is None else None,
            teacher=None if teacher is None else TeacherSettings.of(recipe, teacher, engine),
            evaluate=DrawSettings.of(
                rollout, temperature=section.temperature, max_new_tokens=section.max_new_tokens
            ),
            engine=engine,
            problems=section.problems,
            samples=section.samples,
            reverse_kl_problems=reverse_kl_problems,
            rollout=DrawSettings.of(rollout) if scorers else None,
            teachers={each.name: TeacherSettings.of(recipe, each, scorer) for each in scorers},
            weights=recipe.mixture if scorers else None,
        )


StageSettings: TypeAlias = (
    SftSettings | RolloutSettings | TextSettings | ScoreSettings | TrainSettings | EvaluateSettings
)


def settings_of(recipe: Recipe, stage: Stage, number: int, *, subject: str) -> StageSettings:
    """What a step of round `number` reads; `subject` is the model that it is about, if named."""
    teachers = {teacher.name: teacher for teacher in recipe.teachers}
    match stage:
        case Stage.SFT:
            return SftSettings.of(recipe, recipe.student if subject == STUDENT else teachers[subject])
        case Stage.ROLLOUT:
            return (
                TextSettings.of(recipe, number, teachers[subject]) if subject else RolloutSettings.of(recipe)
            )
        case Stage.TEACHER_SCORE:
            return ScoreSettings.of(recipe, teachers.get(subject) or recipe.teacher)
        case Stage.TRAIN:
            return TrainSettings.of(recipe, number)
        case Stage.EVALUATE:
            return EvaluateSettings.of(recipe, teachers.get(subject))
