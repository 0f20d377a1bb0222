"""The fields of a recipe and what follows from them."""

from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator

from kdpipe.recipe.models import Student
from kdpipe.recipe.runtime import Runtime, Tracking
from kdpipe.recipe.section import NAME, Count, EngineName, Section, Seed
from kdpipe.recipe.stages import (
    EvaluateSection,
    Keeping,
    KeepTopK,
    RolloutSection,
    TeacherScoreSection,
    TrainSection,
)
from kdpipe.recipe.task import Task
from kdpipe.recipe.teacher import SelfTeacher, ServedTeacher, Teacher


class RecipeFields(Section):
    """A recipe whose sections are valid each by itself; `Recipe` checks that they fit together."""

    name: Annotated[str, Field(pattern=NAME)]
    """Names the run: `<name>-<hash8>`."""
    seed: Seed = 1
    """Every draw derives from it, by stage, round, problem and sample."""
    reproduce: bool = False
    """Runs an objective that check-loss fails, to reproduce what others did."""
    rounds: Count
    """Rounds of rollout, teacher-score and train."""
    task: Task
    """The problems, and how answers are graded."""
    student: Student
    """The model that learns."""
    teachers: Annotated[list[Teacher], Field(min_length=1)]
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
    def engines(self) -> set[EngineName]:
        """The engines that some step runs."""
        found = {self.rollout.engine, self.evaluate.engine or self.rollout.engine}
        asked = self.train.objective.has_kd or self.evaluate.reverse_kl_problems
        return found | ({self.teacher_score.engine} if asked and not self.is_served else set())

    @property
    def mixture(self) -> dict[str, float] | None:
        """The share of each teacher by name, in the order of summation; None where they are not mixed."""
        if not self.is_mixed:
            return None
        given = {teacher.name: 1.0 if teacher.weight is None else teacher.weight for teacher in self.teachers}
        return {name: given[name] / sum(given.values()) for name in sorted(given)}

    @property
    def keep(self) -> "Keeping":
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
