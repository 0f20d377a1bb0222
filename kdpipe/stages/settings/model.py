"""What several stages read: how models are loaded, asked and sampled from, and the task's problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from pydantic import JsonValue

from kdpipe.recipe.roles import SERVER
from kdpipe.recipe.schema import Recipe, SelfTeacher, ServedTeacher, Student, Teacher
from kdpipe.recipe.section import DtypeName, EngineName, PromptStyleName
from kdpipe.recipe.stages import RolloutSection
from kdpipe.recipe.task import AnyGrader, NumberReader, PythonGrader, Task
from kdpipe.store.step import Fields

if TYPE_CHECKING:
    from kdpipe.data.rows import Problem

Routes: TypeAlias = Mapping[str, Sequence[str | int | float]]
FILES = ("data", "path", "revision", "train", "test")
"""Fields that name files and folders: what those hold enters a fingerprint by its digest."""
GRADING = ("grader", "headline", "reward")


@dataclass(frozen=True, slots=True)
class TaskSettings:
    """How problems are made and asked, and how their answers are graded.

    Where numbers are graded `reader` is the task's `reads`: what is trained on reads the reward, an evaluation the
    headline.
    """

    problems: Fields
    grader: AnyGrader
    reads: Literal["headline", "reward"]
    reader: NumberReader | None

    @classmethod
    def of(cls, task: Task, reads: Literal["headline", "reward"]) -> TaskSettings:
        reader: NumberReader = getattr(task, reads)
        return cls(problems_of(task), task.grader, reads, reader if task.grader == "number" else None)

    @property
    def is_graded(self) -> bool:
        return self.grader != "none"

    @property
    def grading(self) -> Fields:
        """How answers are graded, as the recipe has it; a file of code enters by its digest, as data do."""
        if isinstance(self.grader, PythonGrader):
            return {"grader": {"python": self.grader.function}}
        reads: Fields = {} if self.reader is None else {self.reads: self.reader}
        return {"grader": self.grader, **reads}


def problems_of(task: Task) -> Fields:
    """How problems are made and asked, which is all that a stage reads that grades nothing."""
    return {name: getattr(task, name) for name in type(task).model_fields if name not in (*FILES, *GRADING)}


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """How a model is loaded and prompted."""

    dtype: DtypeName
    trust_remote_code: bool
    template: Mapping[str, JsonValue]

    @classmethod
    def of(cls, model: Student | Teacher) -> ModelSettings:
        return cls(model.dtype, model.trust_remote_code, model.template)


@dataclass(frozen=True, slots=True)
class TeacherSettings:
    """How a teacher is loaded, prompted and asked, and by what: an engine here, or its own server.

    `self_` says which student it is, if one. Without a `template` it has the student's. `temperature` is its own or
    the rollout's. `swaps_end_token`: its end of a turn and the student's trade places in its distributions.
    """

    name: str
    self_: Literal["initial", "current", "ema"] | None
    dtype: DtypeName
    trust_remote_code: bool
    quantization: str | None
    template: Mapping[str, JsonValue]
    student_template: Mapping[str, JsonValue]
    prompt: str | None
    prompt_style: PromptStyleName
    only: Routes | None
    temperature: float
    swaps_end_token: bool
    engine: EngineName | Literal["server"]

    @classmethod
    def of(cls, recipe: Recipe, teacher: Teacher, engine: EngineName) -> TeacherSettings:
        """Those of one of the recipe's teachers; `engine` asks it unless it is behind a server."""
        return cls(
            name=teacher.name,
            self_=teacher.self_ if isinstance(teacher, SelfTeacher) else None,
            dtype=teacher.dtype,
            trust_remote_code=teacher.trust_remote_code,
            quantization=teacher.quantization,
            template=teacher.template,
            student_template=recipe.student.template,
            prompt=teacher.prompt,
            prompt_style=teacher.prompt_style,
            only=routes_of(teacher),
            temperature=recipe.temperature_of(teacher),
            swaps_end_token=recipe.train.objective.end_token == "alias",  # noqa: S105 (no password)
            engine=SERVER if isinstance(teacher, ServedTeacher) else engine,
        )

    @property
    def reads_own(self) -> bool:
        """Whether it reads another prompt than the student's."""
        has_template = bool(self.template) and self.template != self.student_template
        return self.prompt is not None or self.prompt_style != "student" or has_template


@dataclass(frozen=True, slots=True)
class SupportSettings:
    """What a support asks of a teacher's vocabulary: all of the student's ids, or as many as `top_k`.

    Not hashed: it lets a teacher through or not, and changes nothing of what that says.
    """

    is_vocabulary: bool
    top_k: int

    @classmethod
    def of(cls, recipe: Recipe) -> SupportSettings:
        support = recipe.train.objective.distribution_support
        return cls(support == "vocabulary", max(recipe.keep.teacher_top_k, recipe.keep.student_top_k))


def routes_of(teacher: Teacher) -> Routes | None:
    """The values of each field by which a teacher is given its problems, in one order; None: it has all."""
    if teacher.only is None:
        return None
    lists = {name: wanted if isinstance(wanted, list) else [wanted] for name, wanted in teacher.only.items()}
    return {name: sorted(set(values), key=str) for name, values in lists.items()}


@dataclass(frozen=True, slots=True)
class DrawSettings:
    """The distribution that tokens are drawn from, and where a completion ends.

    Temperature 0 is greedy decoding, which has no top-p or top-k.
    """

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    stop: Sequence[str]

    @classmethod
    def of(
        cls, rollout: RolloutSection, *, temperature: float | None = None, max_new_tokens: int | None = None
    ) -> DrawSettings:
        """The rollout's, with another temperature or length where one is given."""
        heat = rollout.temperature if temperature is None else temperature
        return cls(
            temperature=heat,
            top_p=rollout.top_p if heat else 1.0,
            top_k=rollout.top_k if heat else 0,
            max_new_tokens=max_new_tokens or rollout.max_new_tokens,
            stop=rollout.stop,
        )


@dataclass(frozen=True, slots=True)
class PromptSettings:
    """How many prompts a round has, and the share of them that the student samples for."""

    prompts: int
    on_policy_fraction: float

    @classmethod
    def of(cls, rollout: RolloutSection) -> PromptSettings:
        return cls(rollout.prompts, rollout.on_policy_fraction)

    @property
    def on_policy_prompts(self) -> int:
        """How many of a round's prompts the student samples for."""
        return round(self.on_policy_fraction * self.prompts)


def teaches(only: Routes | None, problem: Problem) -> bool:
    """Whether the problem's record has the values of a teacher's `only`; without one, always."""
    for name, values in (only or {}).items():
        found = problem.fields.get(name)
        # A column of whole numbers may have become text or floats on its way here.
        if found is None or not any(found == value or str(found) == str(value) for value in values):
            return False
    return True
