"""What a stage opens: models in their roles, and what earlier steps wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from kdpipe.data.rows import Graded, Problem, Rollout
from kdpipe.engines.handle import ModelHandle, Runs
from kdpipe.method.mixture import RoundScores
from kdpipe.models.prompting import Text
from kdpipe.stages.scoring import TeacherHandle
from kdpipe.stages.settings.model import TaskSettings, TeacherSettings
from kdpipe.stages.settings.stage import SftSettings, TrainSettings
from kdpipe.training.ema import Average
from kdpipe.training.protocol import Trainer


class Context(Protocol):
    """Opens what one step reads; raises ArtifactError where that is not what was published."""

    def student(self, engine: Runs, *, at: TeacherSettings | None = None) -> ModelHandle:
        """The student, run by `engine`, or by that engine in the place of the teacher `at`."""

    def student_text(self) -> Text:
        """The student's tokenizer and prompts, without its weights."""

    def teacher(self, settings: TeacherSettings) -> TeacherHandle:
        """A teacher, run as its settings say; raises PreflightError unless it fits the student."""

    def grade(self, task: TaskSettings) -> Callable[[str, Problem], Graded]:
        """What grades the text that was written for a problem."""

    def rollouts(self) -> list[Rollout]:
        """The completions of the round."""

    def texts(self) -> list[Rollout]:
        """What the teachers wrote for this step."""

    def scores(self, settings: TrainSettings, rollouts: list[Rollout]) -> RoundScores | None:
        """What the teachers scored in the round; None without a KD term."""

    def baseline(self, *names: str) -> Path | None:
        """The folder of student 0's evaluation, with the files `names`; None for that evaluation itself."""

    def cold_start(self, settings: SftSettings, checkpoint: Path | None) -> tuple[Text, Trainer]:
        """The model of an sft step, with a fresh optimizer or from a checkpoint."""

    def student_trainer(self, settings: TrainSettings, checkpoint: Path | None) -> tuple[Text, Trainer]:
        """The student with its optimizer, as the round before or a checkpoint left them."""

    def average(self, settings: TrainSettings) -> Average | None:
        """The average of the students before this round; None where none is kept."""
