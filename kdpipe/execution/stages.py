"""Calls the stage of a step with what it reads: role handles, rows of earlier steps, a trainer."""

from __future__ import annotations

from kdpipe.data.hidden import HiddenFile
from kdpipe.data.payload import GRADES_FILE, HIDDEN_FILE, REVERSE_KL_FILE, ROLLOUTS_FILE, SCORES_FILE
from kdpipe.data.rows import Problem, Rollout
from kdpipe.data.tables import read_rollouts, read_scores
from kdpipe.execution.inputs import Inputs
from kdpipe.execution.placement import Engines
from kdpipe.execution.roles import Roles
from kdpipe.execution.trainers import Trainers
from kdpipe.method.mixture import HiddenTeacher, RoundScores, TeacherScores, join_scores
from kdpipe.models.folder import head_digest
from kdpipe.recipe.roles import BASELINE_ROLE, ROLLOUT_ROLE, STUDENT_ROLE, RoleKind, teacher_role
from kdpipe.recipe.schema import Recipe, Teacher
from kdpipe.stages.evaluate import evaluate, graded_problems
from kdpipe.stages.job import Job
from kdpipe.stages.rollout import rollout
from kdpipe.stages.scoring import TeacherHandle, output_head, swapped_head
from kdpipe.stages.settings.model import TeacherSettings
from kdpipe.stages.settings.stage import (
    EvaluateSettings,
    RolloutSettings,
    ScoreSettings,
    SftSettings,
    TextSettings,
    TrainSettings,
)
from kdpipe.stages.sft import sft
from kdpipe.stages.teacher_score import teacher_score
from kdpipe.stages.teacher_text import write_texts
from kdpipe.stages.train import train
from kdpipe.store.stage import Stage
from kdpipe.training.local import LocalTrainer


class Stages:
    """The five stages over the roles and trainers of a recipe."""

    def __init__(self, recipe: Recipe, *, engines: Engines, roles: Roles, trainers: Trainers) -> None:
        self._recipe = recipe
        self._engines = engines
        self._roles = roles
        self._trainers = trainers

    def perform(self, inputs: Inputs, job: Job) -> LocalTrainer | None:
        """Writes the step's draft; returns the trainer of what it trained, if anything."""
        match inputs.step.stage:
            case Stage.SFT:
                return self._sft(inputs, job)
            case Stage.ROLLOUT if inputs.step.subject:
                self._text(inputs, job)
            case Stage.ROLLOUT:
                student = self._roles.open(inputs, STUDENT_ROLE, self._recipe.rollout.engine)
                rollout(RolloutSettings.of(self._recipe), job, student=student, given=inputs.texts())
            case Stage.TEACHER_SCORE:
                self._teacher_score(inputs, job)
            case Stage.TRAIN:
                return self._train(inputs, job)
            case Stage.EVALUATE:
                self._evaluate(inputs, job)
        return None

    def _sft(self, inputs: Inputs, job: Job) -> LocalTrainer:
        self._engines.make_room()
        settings = SftSettings.of(self._recipe, inputs.settings(inputs.own_role()))
        model, folder = settings.model, inputs.folders.get(inputs.step.subject)
        text = self._roles.text_of(folder, dict(model.template), trust=model.trust_remote_code)
        done, checkpoint = job.draft.checkpoint() or (0, None)
        trainer = self._trainers.cold_start(inputs, settings, text, checkpoint)
        written = inputs.texts() if model.sft is not None and model.sft.text == "teacher" else None
        sft(settings, job, text=text, trainer=trainer, resumed=done, written=written)
        return trainer

    def _text(self, inputs: Inputs, job: Job) -> None:
        settings = TextSettings.of(self._recipe, inputs.step.round, inputs.own_teacher())
        teacher = self._roles.teacher(inputs, inputs.own_role(), settings.teacher)
        write_texts(settings, job, teacher=teacher, student=self._roles.text(inputs, STUDENT_ROLE))

    def _teacher_score(self, inputs: Inputs, job: Job) -> None:
        rows = read_rollouts(inputs.opened(ROLLOUT_ROLE, ROLLOUTS_FILE))
        settings, role, student = (
            ScoreSettings.of(self._recipe, inputs.own_teacher()),
            inputs.own_role(),
            None,
        )
        teacher = self._roles.teacher(inputs, role, settings.teacher)
        if settings.student is not None:
            student = self._roles.open(inputs, STUDENT_ROLE, settings.teacher.engine, at=role)
        teacher_score(settings, job, rollouts=rows, teacher=teacher, student=student)

    def _train(self, inputs: Inputs, job: Job) -> LocalTrainer:
        self._engines.make_room()
        settings = TrainSettings.of(self._recipe, inputs.step.round)
        rows = read_rollouts(inputs.opened(ROLLOUT_ROLE, ROLLOUTS_FILE))
        has_scores = any(role.kind is RoleKind.SCORES for role in inputs.steps)
        scores = self._round_scores(inputs, job, settings, rows) if has_scores else None
        text, resumed = self._roles.text(inputs, STUDENT_ROLE), job.draft.checkpoint()
        trainer = self._trainers.student(inputs, settings, text, resumed[1] if resumed else None)
        train(
            settings,
            job,
            rollouts=rows,
            scores=scores,
            text=text,
            trainer=trainer,
            resumed=resumed,
            average=self._trainers.average(inputs, settings),
        )
        return trainer

    def _round_scores(
        self, inputs: Inputs, job: Job, settings: TrainSettings, rollouts: list[Rollout]
    ) -> RoundScores:
        """What every teacher scored, in the order of their names, so that a mixture is summed in one order."""
        found = []
        for teacher in sorted(self._recipe.teachers, key=lambda teacher: teacher.name):
            role = teacher_role(self._recipe, teacher).as_kind(RoleKind.SCORES)
            rows = read_scores(inputs.opened(role, SCORES_FILE))
            hidden = self._hidden_teacher(inputs, job, teacher) if self._recipe.keep.hidden else None
            found.append(TeacherScores(teacher.name, rows, hidden))
        return join_scores(rollouts, found, weights=settings.weights, round_number=inputs.step.round)

    def _hidden_teacher(self, inputs: Inputs, job: Job, settings: Teacher) -> HiddenTeacher:
        """The teacher's kept states with its output head, which is all that is read of its weights."""
        role = teacher_role(self._recipe, settings)
        asked = TeacherSettings.of(self._recipe, settings, self._recipe.teacher_score.engine)
        teacher = self._roles.teacher(inputs, role, asked)
        head = output_head(job, teacher.model.source, num_ids=teacher.num_ids)
        path = inputs.opened(role.as_kind(RoleKind.SCORES), HIDDEN_FILE)
        file = HiddenFile(path, head_sha256=head_digest(head))
        return HiddenTeacher(file, swapped_head(head, teacher.swap), teacher.temperature)

    def _evaluate(self, inputs: Inputs, job: Job) -> None:
        baseline, against = None, list[TeacherHandle]()
        if BASELINE_ROLE in inputs.steps:
            baseline = inputs.opened(BASELINE_ROLE, GRADES_FILE, REVERSE_KL_FILE, folder=True)
        role = inputs.own_role()
        settings = EvaluateSettings.of(self._recipe, None if role == STUDENT_ROLE else inputs.own_teacher())
        if settings.teacher is None:
            model = self._roles.open(inputs, role, settings.engine)
            prompt = model.text.prompt
            against = [
                self._roles.teacher(inputs, teacher_role(self._recipe, one), settings.teachers[one.name])
                for one in self._recipe.teachers
                if one.name in settings.teachers
            ]
        else:
            teacher = self._roles.teacher(inputs, role, settings.teacher)
            model, student = teacher.model, self._roles.text(inputs, STUDENT_ROLE)

            def prompt(problem: Problem) -> list[int]:
                return teacher.prompt_ids(problem, student.prompt(problem))

        evaluate(
            settings,
            job,
            subject=inputs.step.subject,
            model=model,
            prompt=prompt,
            problems=graded_problems(settings, job.test),
            against=against,
            baseline=baseline,
        )
