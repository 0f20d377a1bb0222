"""How many tokens prompts, solutions and new tokens take, counted for each model before it reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from kdpipe.data.rows import Problem
from kdpipe.models.prompting import Text
from kdpipe.recipe.schema import Recipe, Student, Teacher
from kdpipe.stages.settings.model import routes_of, teaches

Split = Literal["train", "test"]
SHOWN = 3
OVERLONG = "set task.drop_overlong: true to leave them out, or lower rollout.max_new_tokens"


@dataclass(frozen=True, slots=True)
class Length:
    """The tokens of a problem's prompt and the most that follow it; `after` says what those are."""

    problem: Problem
    prompt: int
    following: int
    after: str

    @property
    def total(self) -> int:
        return self.prompt + self.following


@dataclass(frozen=True, slots=True)
class PromptReader:
    """A model of a recipe that reads problems; `limit` is its context, None where it has no end."""

    who: str
    settings: Student | Teacher
    limit: int | None
    text: Text
    prompt: Callable[[Problem], list[int]]

    def lengths(self, recipe: Recipe, split: Split, problems: Sequence[Problem]) -> list[Length]:
        """The lengths of what the model reads of a split's problems, which stand in the split's order."""
        is_teacher = not isinstance(self.settings, Student)
        if split == "test":
            new, used = self._test_tokens(recipe, is_teacher=is_teacher), problems[: recipe.evaluate.problems]
            return [self._length(each, new, taught=False) for each in used] if new else []
        routes = routes_of(self.settings) if not isinstance(self.settings, Student) else None
        own = [problem for problem in problems if teaches(routes, problem)]
        sft, rollout = self.settings.sft, recipe.rollout
        is_given = rollout.on_policy_fraction < 1 and rollout.off_policy_text == "reference"
        taught = len(own) if is_given else 0
        if sft is not None and sft.text == "reference":
            taught = max(taught, len(own[: sft.problems]))
        new = rollout.max_new_tokens
        return [self._length(each, new, taught=number < taught) for number, each in enumerate(own)]

    def _test_tokens(self, recipe: Recipe, *, is_teacher: bool) -> int:
        """The most new tokens that follow a test prompt; 0 where the model reads none."""
        section, new = recipe.evaluate, recipe.rollout.max_new_tokens
        scored = new if section.reverse_kl_problems else 0
        answers = not is_teacher or section.teacher
        return max(scored, (section.max_new_tokens or new) if answers else 0)

    def _length(self, problem: Problem, new: int, *, taught: bool) -> Length:
        prompt, after, following = len(self.prompt(problem)), "new tokens", new
        if taught and problem.solution is not None and (own := len(self.text.reference(problem))) > new:
            after, following = "tokens of its solution", own
        return Length(problem, prompt, following, after)

    def overlong(self, lengths: Sequence[Length]) -> list[Length]:
        """Those that the model's context does not hold, longest first."""
        if self.limit is None:
            return []
        found = [length for length in lengths if length.total > self.limit]
        return sorted(found, key=lambda length: -length.total)


def described(reader: PromptReader, split: Split, found: Sequence[Length], count: int) -> str:
    """How many problems do not fit a model, and the longest of them."""
    shown = "; ".join(
        f"{one.problem.prompt_id}: a prompt of {one.prompt} + {one.following} {one.after}"
        for one in found[:SHOWN]
    )
    more = "; ..." if len(found) > SHOWN else ""
    return (
        f"{len(found)} of {count} {split} problems do not fit the context of {reader.limit} tokens of {reader.who} "
        f"({shown}{more})"
    )
