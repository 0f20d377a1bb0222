"""Checks that every problem has its teacher and answer, and every record what a prompt names."""

from __future__ import annotations

from collections.abc import Sequence

from kdpipe.data.rows import Problem
from kdpipe.errors import DataError
from kdpipe.models.prompting import prompt_values
from kdpipe.recipe.schema import Recipe, Teacher
from kdpipe.recipe.teacher import OwnTeacher
from kdpipe.stages.settings.model import routes_of, teaches

MAX_SHOWN = 3


def check_records(recipe: Recipe, train: Sequence[Problem], test: Sequence[Problem]) -> None:
    """Raises DataError where a problem in use has not one teacher (or all), or lacks a field or an answer."""
    _check_solutions(recipe, train)
    section = recipe.evaluate
    # Specialists read their own problems in a cold start, whatever is trained on later.
    asked = recipe.train.objective.has_kd or recipe.is_routed or recipe.has_teacher_text
    splits = {"train": train} if asked else {}
    if recipe.grades_teachers or section.reverse_kl_problems:
        splits["test"] = test
    for split, problems in splits.items():
        if recipe.is_routed:
            _check_routes(recipe, split, problems)
        for teacher in recipe.teachers:
            for problem in problems:
                if teaches(routes_of(teacher), problem):
                    _check_prompt(teacher, problem)


def _check_solutions(recipe: Recipe, train: Sequence[Problem]) -> None:
    """Raises DataError where a text without which something cannot be trained is in no record."""
    starts = [("student.sft", recipe.student.sft)]
    starts += [
        (f"the sft of teacher {one.name!r}", one.sft)
        for one in recipe.teachers
        if isinstance(one, OwnTeacher)
    ]
    readers = [name for name, sft in starts if sft is not None and sft.text == "reference"]
    if recipe.rollout.on_policy_fraction < 1 and recipe.rollout.off_policy_text == "reference":
        readers.append("rollout.off_policy_text: reference")
    unsolved = [problem for problem in train if problem.solution is None]
    if readers and unsolved:
        raise DataError(
            f"{readers[0]} trains on reference solutions, and {len(unsolved)} of {len(train)} train problems have "
            f"none: {', '.join(problem.prompt_id for problem in unsolved[:MAX_SHOWN])}",
            hint="give their records an answer, or say text: teacher there, or leave it out",
        )


def _check_routes(recipe: Recipe, split: str, problems: Sequence[Problem]) -> None:
    """Raises DataError unless each problem matches one teacher, and each teacher a problem of train."""
    routes = [
        [teacher.name for teacher in recipe.teachers if teaches(routes_of(teacher), problem)]
        for problem in problems
    ]
    for what, wrong in (
        ("match no teacher", [p for p, names in zip(problems, routes, strict=True) if not names]),
        ("match several teachers", [p for p, names in zip(problems, routes, strict=True) if len(names) > 1]),
    ):
        if wrong:
            more = ", ..." if len(wrong) > MAX_SHOWN else ""
            raise DataError(
                f"{len(wrong)} of {len(problems)} {split} problems {what} by teachers[].only: "
                f"{', '.join(_described(recipe, problem) for problem in wrong[:MAX_SHOWN])}{more}",
                hint="every problem needs exactly one teacher: fix only, or take these records out",
            )
    for teacher in recipe.teachers:
        if split == "train" and [teacher.name] not in routes:
            raise DataError(
                f"teacher {teacher.name!r} teaches none of the {len(problems)} train problems: only is {teacher.only}",
                hint="fix its only, or remove it",
            )


def _described(recipe: Recipe, problem: Problem) -> str:
    """The problem's id and what its record has of the fields that teachers are chosen by."""
    names = sorted({name for teacher in recipe.teachers for name in teacher.only or ()})
    found = ", ".join(f"{name}: {str(problem.fields.get(name, 'missing'))[:40]}" for name in names)
    return f"{problem.prompt_id} ({found})"


def _check_prompt(teacher: Teacher, problem: Problem) -> None:
    known = prompt_values(problem)
    for name in teacher.prompt_fields:
        if name not in known:
            raise DataError(
                f"the prompt of teacher {teacher.name!r} names {{{name}}}, but {problem.prompt_id} has no text "
                f"or number of that name; it has: {', '.join(sorted(known))}",
                hint=f"fix the name, or write {{{{{name}}}}} for the word in braces",
            )
