"""What the stage of a step asks for: role handles, rows of earlier steps, a trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from kdpipe.data.graders import grade, is_judged
from kdpipe.data.graders.judge import Judge
from kdpipe.data.hidden import HiddenFile
from kdpipe.data.payload import HIDDEN_FILE, ROLLOUTS_FILE, SCORES_FILE
from kdpipe.data.rows import Graded, Problem, Rollout
from kdpipe.data.tables import read_rollouts, read_scores
from kdpipe.engines.handle import ModelHandle, Runs
from kdpipe.execution.inputs import Inputs
from kdpipe.execution.placement import Engines
from kdpipe.execution.roles import Roles
from kdpipe.execution.trainers import Trainers
from kdpipe.method.mixture import HiddenTeacher, RoundScores, TeacherScores, join_scores
from kdpipe.models.folder import head_digest
from kdpipe.models.prompting import Text
from kdpipe.recipe.roles import BASELINE_ROLE, ROLLOUT_ROLE, STUDENT_ROLE, Role, RoleKind
from kdpipe.recipe.task import AnyGrader
from kdpipe.stages.context import Context
from kdpipe.stages.job import Job
from kdpipe.stages.scoring import TeacherHandle, output_head, swapped_head
from kdpipe.stages.settings.model import TaskSettings, TeacherSettings
from kdpipe.stages.settings.stage import SftSettings, TrainSettings, settings_of
from kdpipe.store.stage import Stage
from kdpipe.training.ema import Average
from kdpipe.training.local import LocalTrainer


@dataclass(slots=True)
class StepContext:
    """The `Context` of one step. `trained` is the trainer that its stage asked for, if any."""

    inputs: Inputs
    job: Job
    engines: Engines
    roles: Roles
    trainers: Trainers
    judge: Callable[[Inputs, AnyGrader], Judge]
    trained: LocalTrainer | None = None

    def perform(self) -> None:
        """Writes the step's draft by its stage: the function of kdpipe.stages that has the stage's name."""
        step = self.inputs.step
        name = step.stage.name.lower()
        stage: Callable[[Any, Job, Context], None] = getattr(import_module(f"kdpipe.stages.{name}"), name)
        settings = settings_of(self.inputs.recipe, step.stage, step.round, subject=step.subject)
        if step.stage in (Stage.SFT, Stage.TRAIN):  # what trains has the trainer's device to itself
            self.engines.make_room()
        stage(settings, self.job, self)

    def student(self, engine: Runs, *, at: TeacherSettings | None = None) -> ModelHandle:
        place = None if at is None else self._role(at)
        return self.roles.open(self.inputs, STUDENT_ROLE, engine, at=place)

    def student_text(self) -> Text:
        return self.roles.text(self.inputs, STUDENT_ROLE)

    def teacher(self, settings: TeacherSettings) -> TeacherHandle:
        return self.roles.teacher(self.inputs, self._role(settings), settings)

    def grade(self, task: TaskSettings) -> Callable[[str, Problem], Graded]:
        if is_judged(task.grader):
            return self.judge(self.inputs, task.grader).grade
        return lambda text, problem: grade(
            text, problem.expected, grader=task.grader, reader=task.reader, question=problem.question
        )

    def rollouts(self) -> list[Rollout]:
        return read_rollouts(self.inputs.opened(ROLLOUT_ROLE, ROLLOUTS_FILE))

    def texts(self) -> list[Rollout]:
        roles = [role for role in self.inputs.steps if role.kind is RoleKind.TEXT]
        return [row for role in roles for row in read_rollouts(self.inputs.opened(role, ROLLOUTS_FILE))]

    def scores(self, settings: TrainSettings, rollouts: list[Rollout]) -> RoundScores | None:
        inputs, found = self.inputs, []
        if not any(role.kind is RoleKind.SCORES for role in inputs.steps):
            return None
        # In the order of their names, so that a mixture is summed in one order.
        for teacher in sorted(inputs.recipe.teachers, key=lambda teacher: teacher.name):
            asked = TeacherSettings.of(inputs.recipe, teacher, inputs.recipe.teacher_score.engine)
            rows = read_scores(inputs.opened(self._role(asked).as_kind(RoleKind.SCORES), SCORES_FILE))
            hidden = self._hidden(asked) if inputs.recipe.keep.hidden else None
            found.append(TeacherScores(teacher.name, rows, hidden))
        return join_scores(rollouts, found, weights=settings.weights, round_number=inputs.step.round)

    def _hidden(self, settings: TeacherSettings) -> HiddenTeacher:
        """A teacher's kept states with its output head, which is all that is read of its weights."""
        teacher = self.teacher(settings)
        head = output_head(self.job, teacher.model.source, num_ids=teacher.num_ids)
        path = self.inputs.opened(self._role(settings).as_kind(RoleKind.SCORES), HIDDEN_FILE)
        file = HiddenFile(path, head_sha256=head_digest(head))
        return HiddenTeacher(file, swapped_head(head, teacher.swap), teacher.temperature)

    def baseline(self, *names: str) -> Path | None:
        if BASELINE_ROLE not in self.inputs.steps:
            return None
        return self.inputs.opened(BASELINE_ROLE, *names, folder=True)

    def cold_start(self, settings: SftSettings, checkpoint: Path | None) -> tuple[Text, LocalTrainer]:
        model, folder = settings.model, self.inputs.folders.get(self.inputs.step.subject)
        named = self.inputs.model(self.inputs.step.subject)
        text = self.roles.text_of(self.inputs, named, folder, dict(model.template))
        self.trained = self.trainers.cold_start(self.inputs, settings, text, checkpoint)
        return text, self.trained

    def student_trainer(self, settings: TrainSettings, checkpoint: Path | None) -> tuple[Text, LocalTrainer]:
        text = self.student_text()
        self.trained = self.trainers.student(self.inputs, settings, text, checkpoint)
        return text, self.trained

    def average(self, settings: TrainSettings) -> Average | None:
        return self.trainers.average(self.inputs, settings)

    def _role(self, settings: TeacherSettings) -> Role:
        return Role(RoleKind.TEACHER, settings.name if len(self.inputs.recipe.teachers) > 1 else "")
