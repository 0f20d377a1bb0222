"""The names of the roles: which model of a recipe is meant."""

from __future__ import annotations

from kdpipe.recipe.schema import Recipe, Teacher

STUDENT = "student"
SERVER = "server"
BASE = "base"  # the role of the model below the student's adapter, where a step made it


def teacher_role(recipe: Recipe, teacher: Teacher) -> str:
    """What a teacher is called among a step's inputs and fields: `teacher`, or `teacher:NAME` of several."""
    return "teacher" if len(recipe.teachers) == 1 else f"teacher:{teacher.name}"
