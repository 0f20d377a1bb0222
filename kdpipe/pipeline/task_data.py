"""A recipe's problems, read and checked before a model is opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from kdpipe.data.rows import Problem
from kdpipe.data.tasks import read_problems
from kdpipe.models.prompting import prompt_style
from kdpipe.pipeline.records import check_records
from kdpipe.recipe.schema import Recipe
from kdpipe.recipe.task import QuestionTask


@dataclass(frozen=True, slots=True)
class TaskData:
    """What is known of a task's problems.

    `form` says which fields were found to be read, None where the recipe says it; `references` how many of them were
    found to be formulas, where they must be. `overlap` counts test problems whose
    text is also a train problem's. `first_prompt` is the user's text in the first one.
    """

    train: int
    test: int
    overlap: int
    form: str | None
    references: str | None
    first_prompt: str

    def warnings(self) -> list[str]:
        """What weakens a result, as sentences."""
        if not self.overlap:
            return []
        return [
            f"{self.overlap} of {self.test} test problems also stand in train: what is measured on them is not held out"
        ]


def open_data(recipe: Recipe, folder: Path, hub_folder: Path | None = None) -> TaskData:
    """What is known of a recipe's problems, after they were checked; raises DataError or RecipeError."""
    said: list[str] = []
    train, test = read_problems(recipe.task, folder, hub_folder=hub_folder, say=said.append)
    check_records(recipe, train, test)
    prompt_style(recipe.task, train, recipe.student.template)
    known = {problem.normalized for problem in train}
    return TaskData(
        train=len(train),
        test=len(test),
        overlap=sum(problem.normalized in known for problem in test),
        form=said[0] if said else None,
        references=_references([*train, *test]) if recipe.task.grader == "math" else None,
        first_prompt=_first_prompt(recipe, train),
    )


def _references(problems: Sequence[Problem]) -> str:
    if find_spec("math_verify") is None:
        return "references were not read, as math-verify is not installed"
    from kdpipe.data.graders.judge import read_formulas

    return read_formulas(problems)


def _first_prompt(recipe: Recipe, train: Sequence[Problem]) -> str:
    """The user's text in the first prompt; examples come before it."""
    task = recipe.task
    if isinstance(task, QuestionTask) and task.instruction and not (task.few_shot or train[0].turns):
        return f"{task.instruction}\n\n{train[0].question}"
    return train[0].question
