"""Calls the stage of a step with what it reads: role handles, rows of earlier steps, a trainer."""

from __future__ import annotations

from dataclasses import replace

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
from kdpipe.recipe.schema import Recipe, Student, Teacher
from kdpipe.stages.evaluate import evaluate, graded_problems
from kdpipe.stages.job import Job
from kdpipe.stages.rollout import rollout
from kdpipe.stages.routing import teaches
from kdpipe.stages.scoring import TeacherHandle, output_head, swapped_head
from kdpipe.stages.sft import sft
from kdpipe.stages.teacher_score import teacher_score
from kdpipe.stages.teacher_text import write_texts
from kdpipe.stages.train import train
from kdpipe.store.step import Stage
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
                teacher = self._roles.teacher(inputs, inputs.own_role(), self._recipe.rollout.engine)
                write_texts(job, teacher=teacher, student=self._roles.text(inputs, STUDENT_ROLE))
            case Stage.ROLLOUT:
                student = self._roles.open(inputs, STUDENT_ROLE, self._recipe.rollout.engine)
                rollout(job, student=student, given=inputs.texts())
            case Stage.TEACHER_SCORE:
                self._teacher_score(inputs, job)
            case Stage.TRAIN:
                return self._train(inputs, job)
            case Stage.EVALUATE:
                self._evaluate(inputs, job)
        return None

    def _sft(self, inputs: Inputs, job: Job) -> LocalTrainer:
        self._engines.make_room()
        model = inputs.settings(inputs.own_role())
        if not isinstance(model, Student):
            job = replace(job, train=[problem for problem in job.train if teaches(model, problem)])
        folder = inputs.folders.get(inputs.step.subject)
        text = self._roles.text_of(folder, model.template, trust=model.trust_remote_code)
        done, checkpoint = job.draft.checkpoint() or (0, None)
        trainer = self._trainers.cold_start(inputs, text, checkpoint)
        settings = model.sft
        written = inputs.texts() if settings is not None and settings.text == "teacher" else None
        sft(job, settings=settings, text=text, trainer=trainer, resumed=done, written=written)
        return trainer

    def _teacher_score(self, inputs: Inputs, job: Job) -> None:
        rows = read_rollouts(inputs.opened(ROLLOUT_ROLE, ROLLOUTS_FILE))
        role, engine, student = inputs.own_role(), self._recipe.teacher_score.engine, None
        teacher = self._roles.teacher(inputs, role, engine)
        if self._recipe.keep.student_top_k:
            student = self._roles.open(inputs, STUDENT_ROLE, engine, at=role)
        teacher_score(job, rollouts=rows, teacher=teacher, student=student)

    def _train(self, inputs: Inputs, job: Job) -> LocalTrainer:
        self._engines.make_room()
        rows = read_rollouts(inputs.opened(ROLLOUT_ROLE, ROLLOUTS_FILE))
        has_scores = any(role.kind is RoleKind.SCORES for role in inputs.steps)
        scores = self._round_scores(inputs, job, rows) if has_scores else None
        text, resumed = self._roles.text(inputs, STUDENT_ROLE), job.draft.checkpoint()
        trainer = self._trainers.student(inputs, text, resumed[1] if resumed else None)
        train(
            job,
            rollouts=rows,
            scores=scores,
            text=text,
            trainer=trainer,
            resumed=resumed,
            average=self._trainers.average(inputs),
        )
        return trainer

    def _round_scores(self, inputs: Inputs, job: Job, rollouts: list[Rollout]) -> RoundScores:
        """What every teacher scored, in the order of their names, so that a mixture is summed in one order."""
        found = []
        for teacher in sorted(self._recipe.teachers, key=lambda teacher: teacher.name):
            role = teacher_role(self._recipe, teacher).as_kind(RoleKind.SCORES)
            rows = read_scores(inputs.opened(role, SCORES_FILE))
            hidden = self._hidden_teacher(inputs, job, teacher) if self._recipe.keep.hidden else None
            found.append(TeacherScores(teacher.name, rows, hidden))
        return join_scores(rollouts, found, weights=self._recipe.mixture, round_number=inputs.step.round)

    def _hidden_teacher(self, inputs: Inputs, job: Job, settings: Teacher) -> HiddenTeacher:
        """The teacher's kept states with its output head, which is all that is read of its weights."""
        role = teacher_role(self._recipe, settings)
        teacher = self._roles.teacher(inputs, role, self._recipe.teacher_score.engine)
        head = output_head(job, teacher.model.source, num_ids=teacher.num_ids)
        path = inputs.opened(role.as_kind(RoleKind.SCORES), HIDDEN_FILE)
        file = HiddenFile(path, head_sha256=head_digest(head))
        return HiddenTeacher(file, swapped_head(head, teacher.swap), teacher.temperature)

    def _evaluate(self, inputs: Inputs, job: Job) -> None:
        baseline, against = None, list[TeacherHandle]()
        if BASELINE_ROLE in inputs.steps:
            baseline = inputs.opened(BASELINE_ROLE, GRADES_FILE, REVERSE_KL_FILE, folder=True)
        role, settings = inputs.own_role(), self._recipe.evaluate
        engine = settings.engine or self._recipe.rollout.engine
        if role == STUDENT_ROLE:
            model, problems = self._roles.open(inputs, role, engine), graded_problems(job, None)
            prompt = model.text.prompt
            if settings.reverse_kl_problems:
                scorer = self._recipe.teacher_score.engine
                roles = [teacher_role(self._recipe, teacher) for teacher in self._recipe.teachers]
                against = [self._roles.teacher(inputs, role, scorer) for role in roles]
        else:
            teacher, student = (
                self._roles.teacher(inputs, role, engine),
                self._roles.text(inputs, STUDENT_ROLE),
            )
            model, problems = teacher.model, graded_problems(job, teacher.settings)

            def prompt(problem: Problem) -> list[int]:
                return teacher.prompt_ids(problem, student.prompt(problem))

        evaluate(
            job,
            subject=inputs.step.subject,
            model=model,
            prompt=prompt,
            problems=problems,
            against=against,
            baseline=baseline,
        )
