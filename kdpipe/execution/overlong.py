"""All prompts of a run at its start: rendered and counted; what does not fit is refused or left out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from pydantic import JsonValue

from kdpipe.data.rows import Problem
from kdpipe.doctor.lengths import OVERLONG, PromptReader, Split, described
from kdpipe.errors import ArtifactError, DataError, PreflightError
from kdpipe.execution.inputs import Inputs
from kdpipe.execution.roles import Roles
from kdpipe.models.config import context_of, open_config
from kdpipe.models.prompting import Prompt, Text, lost_turns, require_unlike
from kdpipe.models.template import known_arguments
from kdpipe.pipeline.request import Warned
from kdpipe.recipe.roles import STUDENT
from kdpipe.recipe.schema import SelfTeacher, ServedTeacher, Student, Teacher, resolved
from kdpipe.recipe.task import QuestionTask
from kdpipe.stages.settings.model import TeacherSettings
from kdpipe.store.durable import write_json
from kdpipe.store.sealed import seal_value, unseal_value
from kdpipe.store.step import canonical

Problems: TypeAlias = Sequence[Problem]
Splits: TypeAlias = Mapping[Split, Problems]
MEMORY = "memory of prompts"
"""What a run remembers of its prompts: the recipe and data that they were made of, and what is left out."""


def fitting(inputs: Inputs, roles: Roles, train: Problems, test: Problems) -> tuple[Problems, Problems]:
    """The problems of both splits that fit every model that reads them.

    Raises PreflightError where some do not and task.drop_overlong is off, and where unlike problems have one prompt.
    A run that goes on does not count again.
    """
    if not isinstance(inputs.recipe.task, QuestionTask):
        return train, test  # generated problems are short, and unlike
    splits: Splits = {"train": train, "test": test}
    path, key = inputs.run / "prompts.json", _key(inputs, splits)
    dropped = _remembered(path, key)
    if dropped is None:
        dropped = _counted(inputs, roles, splits)
        left_out: dict[str, JsonValue] = {name: [*sorted(ids)] for name, ids in dropped.items()}
        write_json(path, seal_value(MEMORY, {"key": key, **left_out}))
    kept = {
        name: [problem for problem in problems if problem.prompt_id not in dropped[name]]
        for name, problems in splits.items()
    }
    if any(dropped.values()):
        counts = " and ".join(f"{len(ids)} of {len(splits[name])} {name}" for name, ids in dropped.items())
        said = (
            f"task.drop_overlong: {counts} problems are left out, as some model of the run does not hold them"
        )
        if not all(kept.values()):
            raise DataError(f"{said}: nothing remains", hint="lower rollout.max_new_tokens")
        inputs.report.event(Warned(said))
    return kept["train"], kept["test"]


def _counted(inputs: Inputs, roles: Roles, splits: Splits) -> dict[Split, set[str]]:
    """The ids of problems that do not fit some model; raises PreflightError unless they may be dropped."""
    recipe, task = inputs.recipe, inputs.recipe.task
    dropped: dict[Split, set[str]] = {name: set() for name in splits}
    for reader, prompts in _readers(inputs, roles):
        for split, problems in splits.items():
            lengths = reader.lengths(recipe, split, problems)
            found = reader.overlong(lengths)
            if found and not (isinstance(task, QuestionTask) and task.drop_overlong):
                raise PreflightError(described(reader, split, found, len(lengths)), hint=OVERLONG)
            dropped[split] |= {length.problem.prompt_id for length in found}
        if prompts is not None:
            prompts.check(inputs, reader)
    return dropped


class _Prompts:
    """The prompts of one model as they were rendered, each once."""

    def __init__(self, text: Text, own: str | None) -> None:
        self.text = text
        self.own = own
        self.found: dict[int, tuple[Problem, Prompt]] = {}

    def __call__(self, problem: Problem) -> list[int]:
        if id(problem) not in self.found:
            self.found[id(problem)] = problem, self.text.rendered(problem, self.own)
        return self.found[id(problem)][1].ids

    def check(self, inputs: Inputs, reader: PromptReader) -> None:
        """Says which turns are lost; raises PreflightError where unlike problems have one prompt."""
        problems, prompts = [one for one, _ in self.found.values()], [one for _, one in self.found.values()]
        if self.own is None:
            require_unlike(problems, [prompt.ids for prompt in prompts])
        for lost in lost_turns(prompts):
            inputs.report.event(Warned(f"{reader.who}: {lost}"))


def _readers(inputs: Inputs, roles: Roles) -> Iterator[tuple[PromptReader, _Prompts | None]]:
    """The student and the teachers, each with the prompts that it reads alone."""
    recipe, student = inputs.recipe, inputs.recipe.student
    prompts = _Prompts(roles.text_of(inputs, student, inputs.folders.get(STUDENT)), None)
    limit = _limit(inputs, student)
    yield PromptReader("the student", student, limit, prompts.text, prompts), prompts
    for teacher in recipe.teachers:
        settings = TeacherSettings.of(recipe, teacher, recipe.teacher_score.engine)
        who, own_limit = f"teacher {teacher.name!r}", _limit(inputs, teacher)
        if isinstance(teacher, SelfTeacher):
            own_limit = limit
        if settings.reads_own:
            own = _Prompts(_teacher_text(inputs, roles, teacher), teacher.prompt)
            yield PromptReader(who, teacher, own_limit, own.text, own), own
        else:
            yield PromptReader(who, teacher, own_limit, prompts.text, prompts), None


def _teacher_text(inputs: Inputs, roles: Roles, teacher: Teacher) -> Text:
    """The teacher's text, with the template arguments that its own template reads."""
    name = STUDENT if isinstance(teacher, SelfTeacher) else teacher.name
    text = roles.text_of(inputs, teacher, inputs.folders.get(name))
    if teacher.template:
        return text
    known = known_arguments(text.tokenizer, text.style.template_arguments)
    return replace(text, style=replace(text.style, template_arguments=known))


def _limit(inputs: Inputs, model: Student | Teacher) -> int | None:
    """The context of a model that is here, None where it has no end or is not known."""
    if isinstance(model, ServedTeacher | SelfTeacher):
        return None
    scratch = getattr(model, "scratch", None)
    if scratch is not None:
        return int(scratch.max_positions)
    folder = inputs.folders[model.name]
    return context_of(open_config(folder, trust_remote_code=model.trust_remote_code))


def _key(inputs: Inputs, splits: Splits) -> str:
    """What the prompts are made of: the recipe, its models, its problems."""
    found = hashlib.sha256(canonical({"recipe": resolved(inputs.recipe), "models": dict(inputs.identities)}))
    for problems in splits.values():
        for problem in problems:
            found.update(repr(problem).encode())
    return found.hexdigest()


def _remembered(path: Path, key: str) -> dict[Split, set[str]] | None:
    """The ids that an earlier start of the run left out; None where it counted something else."""
    try:
        value = unseal_value(path, path.read_bytes(), kind=MEMORY)
    except (OSError, ArtifactError):
        return None
    if not isinstance(value, dict) or value.get("key") != key:
        return None
    train, test = (value.get(name) for name in ("train", "test"))
    return {
        "train": set(map(str, train)) if isinstance(train, list) else set(),
        "test": set(map(str, test)) if isinstance(test, list) else set(),
    }
