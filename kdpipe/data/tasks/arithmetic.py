"""Generated word problems in GSM8K's form, small enough that a model of 300k parameters learns them.

    Tom has 12 apples. Tom buys 7 more. Tom loses 4. How many apples are left?
    12 + 7 = 19 apples
    19 - 4 = 15 apples
    #### 15

A problem is a template and its operands, and no problem stands in both train and test. Names and things are
decoration: they do not make a problem new. Records say the `operation` (addition, subtraction or, of two
steps, mixed) and the number of `steps`. Templates take turns, so that one-step problems are not drowned
by the far more numerous two-step ones.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from kdpipe.data.rows import Problem
from kdpipe.errors import DataError
from kdpipe.recipe.task import ArithmeticTask

_NAMES = ("Ana", "Max", "Sue", "Tom")
_PAIRS = tuple(itertools.permutations(_NAMES, 2))
_THINGS = ("apples", "books", "coins", "pens")
_SYMBOLS = (*"0123456789", "+", "-", "=", "####", "\n")


@dataclass(frozen=True, slots=True)
class _Template:
    """A question with operands a, b (and c), and the steps to its answer; x is the step before's result."""

    question: str
    steps: tuple[tuple[str, ...], ...]

    @property
    def fields(self) -> dict[str, str | int | float]:
        """What a problem's record says beside question and solution."""
        signs = {sign for _, sign, _ in self.steps}
        operation = "mixed" if len(signs) == 2 else "addition" if signs == {"+"} else "subtraction"
        return {"operation": operation, "steps": len(self.steps)}


def _template(steps: str, event: str, ask: str) -> _Template:
    question = f"{{name}} has {{a}} {{things}}. {event} {ask}"
    return _Template(question, tuple(tuple(step) for step in steps.split()))


_WHO = "How many {things} does {name} have?"
_OTHER = "How many {things} does {other} have?"
_BOTH = "How many {things} do they have?"
_LEFT = "How many {things} are left?"

_TEMPLATES = (
    _template("a+b", "{name} buys {b} more.", _WHO),
    _template("a+b", "{name} finds {b} more.", _WHO),
    _template("a+b", "{other} has {b} {things}.", _BOTH),
    _template("a+b", "{other} has {b} more.", _OTHER),
    _template("a-b", "{name} loses {b}.", _LEFT),
    _template("a-b", "{name} sells {b}.", _LEFT),
    _template("a-b", "{name} gives {b} to {other}.", _WHO),
    _template("a-b", "{other} has {b} less.", _OTHER),
    _template("a+b x-c", "{name} buys {b} more. {name} loses {c}.", _LEFT),
    _template("a+b x+c", "{name} finds {b} more. {name} buys {c} more.", _WHO),
    _template("a-b x-c", "{name} loses {b}. {name} sells {c}.", _LEFT),
    _template("a-b x+c", "{name} sells {b}. {name} buys {c} more.", _WHO),
    _template("a+b a+x", "{other} has {b} more.", _BOTH),
    _template("a-b a+x", "{other} has {b} less.", _BOTH),
    _template("a+b x+c", "{other} has {b} {things}. {other} finds {c} more.", _BOTH),
    _template("a-c x+b", "{other} has {b} {things}. {name} loses {c}.", _BOTH),
)


def read_problems(task: ArithmeticTask, *_: object) -> tuple[list[Problem], list[Problem]]:
    """Train and test problems, the same for equal settings; test does not depend on the size of train.

    Raises DataError when more are asked for than there are.
    """
    templates = [template for template in _TEMPLATES if len(template.steps) in task.steps]
    turns = _take_turns(
        [_draw(template, task, random.Random(f"{task.seed}/{template.question}")) for template in templates]
    )
    test = list(itertools.islice(turns, task.test_problems))
    train = list(itertools.islice(turns, task.train_problems))
    if len(train) < task.train_problems:
        wanted = task.train_problems + task.test_problems
        raise DataError(
            f"task: {task.train_problems} train and {task.test_problems} test problems are {wanted}; "
            f"with steps {task.steps} and max_operand {task.max_operand} there are {len(train) + len(test)}",
            hint="lower task.train_problems, or raise task.max_operand",
        )
    return _numbered(train, "train", task.seed), _numbered(test, "test", task.seed)


def words() -> list[str]:
    """Every word of the task's texts, sorted; digits and the newline are words."""
    texts = " ".join(template.question for template in _TEMPLATES)
    plain = re.findall(r"[A-Za-z]+|[.?]", re.sub(r"\{\w+\}", " ", texts))
    return sorted({*plain, *_NAMES, *_THINGS, *_SYMBOLS})


def _numbered(problems: list[Problem], split: str, seed: int) -> list[Problem]:
    """The problems in random order, with ids."""
    random.Random(f"{seed}/{split}").shuffle(problems)
    return [replace(problem, prompt_id=f"arithmetic/{split}/{row}") for row, problem in enumerate(problems)]


def _take_turns(sources: list[Iterator[Problem]]) -> Iterator[Problem]:
    """One item of each source after the other, until all are used up."""
    while sources:
        for source in tuple(sources):
            item = next(source, None)
            if item is None:
                sources.remove(source)
            else:
                yield item


def _draw(template: _Template, task: ArithmeticTask, rng: random.Random) -> Iterator[Problem]:
    """Problems without ids for all operands whose results are 0 or more, in random order."""
    size, fields = task.max_operand, template.fields
    num_operands = 3 if "{c}" in template.question else 2
    for index in _permutation(size**num_operands, rng):
        operands = {"a": index % size + 1, "b": index // size % size + 1, "c": index // size**2 + 1}
        lines, result = _solve(template, operands)
        if result < 0:
            continue
        name, other = rng.choice(_PAIRS)
        things = rng.choice(_THINGS)
        question = template.question.format(name=name, other=other, things=things, **operands)
        solution = "".join(f"{line} {things}\n" for line in lines) + f"#### {result}"
        yield Problem("", question, str(result), solution, fields)


def _solve(template: _Template, operands: dict[str, int]) -> tuple[list[str], int]:
    """The worked steps and the last result; the first negative result ends them."""
    values = dict(operands)
    lines = []
    for left, sign, right in template.steps:
        result = values[left] + values[right] if sign == "+" else values[left] - values[right]
        lines.append(f"{values[left]} {sign} {values[right]} = {result}")
        values["x"] = result
        if result < 0:
            break
    return lines, values["x"]


def _permutation(size: int, rng: random.Random) -> Iterator[int]:
    """range(size) in random order, unbuilt: a Fisher-Yates shuffle that remembers only what it moved."""
    moved: dict[int, int] = {}
    for last in range(size - 1, -1, -1):
        pick = rng.randrange(last + 1)
        yield moved.get(pick, pick)
        moved[pick] = moved.pop(last, last)
