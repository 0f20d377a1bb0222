"""Which teacher a problem has, and whether its record holds what that teacher's prompt names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdpipe.errors import DataError
from kdpipe.prompting import prompt_values

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kdpipe.recipe import Recipe, Teacher
    from kdpipe.rows import Problem


def check_records(recipe: Recipe, train: Sequence[Problem], test: Sequence[Problem]) -> None:
    """Raises DataError unless every record that a teacher will see has the fields that the teacher's prompt names."""
    section = recipe.evaluate
    seen = [*(train if recipe.train.objective.has_kd else ())]
    seen += test if section.teacher or section.reverse_kl_problems else ()
    for teacher in recipe.teachers:
        for problem in seen:
            _check_prompt(teacher, problem)


def _check_prompt(teacher: Teacher, problem: Problem) -> None:
    known = prompt_values(problem)
    for name in teacher.prompt_fields:
        if name not in known:
            raise DataError(
                f"the prompt of teacher {teacher.name!r} names {{{name}}}, but {problem.prompt_id} has no text "
                f"or number of that name; it has: {', '.join(sorted(known))}",
                hint=f"mend the name, or write {{{{{name}}}}} for the word in braces",
            )
