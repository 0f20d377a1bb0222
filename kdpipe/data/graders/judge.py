"""Grading in a process of its own: by math-verify, which may hang, and by a user's code.

`Judge` is the parent's side, `Bench` what the process runs. The process ends with its parent, has no secrets in its
environment, and is started again after a text that took too long.
"""

from __future__ import annotations

import ast
import math
import numbers
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias

from kdpipe.data.graders.marking import after_thinking, answer_part, last_box
from kdpipe.data.rows import Graded, Problem
from kdpipe.errors import DataError, KdpipeError, RecipeError, StepError
from kdpipe.workers.message import Nothing, Talk, message
from kdpipe.workers.worker import Report, Worker

BENCH = "kdpipe.data.graders.judge:Bench"
OPEN_SECONDS = 120.0
MATH_SECONDS = 5.0
CODE_SECONDS = 60.0
MATH_BYTES = 4 << 30
"""How long one text may take before the process is ended, with a moment more; and what formulas may fill."""
FORMULAS = 200
"""How many references are read beforehand, in a second or so."""


@message
class Code:
    """A user's function that grades, `function` of the file at `path`; without a path math-verify."""

    path: str = ""
    function: str = ""

    @property
    def named(self) -> str:
        """What to call it in a message."""
        return f"{self.path}:{self.function}" if self.path else "math-verify"


@message
class Open:
    """Import what grades."""

    code: Code


@message
class Ask:
    """Grade a text that was written for a problem."""

    text: str
    problem: Problem


@message
class Judged:
    """The answer that was read, where one is told, and the reward, from 0 to 1."""

    answer: str | None
    reward: float


BenchRequest: TypeAlias = Open | Ask
BenchResult: TypeAlias = Nothing | Judged
BENCHED: Talk[BenchRequest, Nothing, BenchResult] = Talk((Open, Ask), (), (Nothing, Judged))


class Judge:
    """Grades texts in a process of its own, which the first of them starts; one at a time.

    A text that math-verify does not finish is wrong, and counted in `unfinished`; of a user's code it is an error.
    """

    def __init__(self, code: Code, *, log: Path) -> None:
        self._code = code
        self._worker = Worker(BENCH, BENCHED, log=log, leads_group=True)
        self._seconds = CODE_SECONDS if code.path else MATH_SECONDS
        self.unfinished = 0

    def grade(self, text: str, problem: Problem) -> Graded:
        """The grade of a text; raises StepError with problem, file and function where code fails or hangs."""
        where = f"task.grader: {self._code.named}: problem {problem.prompt_id}"
        try:
            if self._worker.pid is None and self._call(Open(self._code), OPEN_SECONDS) is None:
                raise StepError(f"is not imported after {OPEN_SECONDS:.0f} s")
            verdict = self._call(Ask(text, problem), self._seconds)
            if verdict is None and self._code.path:
                raise StepError(f"took longer than {self._seconds:.0f} s")
        except DataError as error:
            raise DataError(f"{where}: {error.message}", hint=error.hint) from None
        except KdpipeError as error:
            self.close()
            if self._code.path:
                hint = "mend the function, then repeat the command; whoever edits the file makes what it graded stale"
                raise StepError(f"{where}: {error.message}", hint=hint) from None
            verdict = None
        if verdict is None:
            self.unfinished += 1
            return Graded(None, correct=False, reward=0.0)
        assert isinstance(verdict, Judged)
        return Graded(verdict.answer, verdict.reward >= 1, verdict.reward)

    def close(self) -> None:
        """Ends the process."""
        self._worker.kill()

    def _call(self, request: BenchRequest, seconds: float) -> BenchResult | None:
        """The answer of the process; None where it took too long, and was ended."""
        deadline = time.monotonic() + seconds
        found = self._worker.call(request, stop=lambda: time.monotonic() > deadline)
        if found is None:
            self.close()
        return found


def read_formulas(problems: Sequence[Problem]) -> str:
    """How many references were found to be formulas: up to `FORMULAS`, spread over the problems.

    Raises DataError on one that math-verify reads no formula in, or does not finish.
    """
    references = list({problem.expected: problem for problem in problems}.values())
    chosen = references[:: math.ceil(len(references) / FORMULAS)]
    with TemporaryDirectory() as folder, closing(Judge(Code(), log=Path(folder) / "grader.log")) as judge:
        for problem in chosen:
            judge.grade("", problem)
            if judge.unfinished:
                raise DataError(
                    f"task.grader: math-verify: problem {problem.prompt_id}: it does not finish the reference answer, "
                    f"{problem.expected!r:.200}, within {MATH_SECONDS:.0f} s",
                    hint="write it in a shorter form, or remove the record",
                )
    return f"{len(chosen)} of {len(references)} different references read by math-verify, each a formula"


def require_function(path: Path, name: str) -> None:
    """Raises RecipeError unless the file is Python that makes something of that name; nothing of it runs."""
    hint = "task.grader.python is file.py:function, from the recipe's folder"
    if not path.is_file():
        raise RecipeError(f"task.grader: {path}: no such file", hint=hint)
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError, OSError) as error:
        raise RecipeError(f"task.grader: {path}: not Python that can be read: {error}", hint=hint) from None
    found = [name for node in tree.body for name in _names(node)]
    if name not in found:
        functions = ", ".join(found) or "nothing"
        raise RecipeError(f"task.grader: {path}: no function {name!r}; it has {functions}", hint=hint)


def _names(node: ast.stmt) -> list[str]:
    """What a statement at the top of a module gives a name to."""
    match node:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Assign(targets=targets):
            return [target.id for target in targets if isinstance(target, ast.Name)]
        case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
            return [alias.asname or alias.name for alias in aliases]
    return []


class Bench:
    """Inside the process: grades by what it was opened for."""

    talk = BENCHED

    def __init__(self) -> None:
        self._grade: Callable[[str, Problem], Judged] | None = None

    def __call__(self, request: BenchRequest, _report: Report[Nothing]) -> BenchResult:
        """Opens or grades; raises StepError on what is no grade."""
        match request:
            case Open(code=code):
                self._grade = _own(code) if code.path else _math()
                return Nothing()
            case Ask(text=text, problem=problem):
                assert self._grade is not None
                return self._grade(text, problem)


def _own(code: Code) -> Callable[[str, Problem], Judged]:
    """The user's function; its file is imported under a name that nothing else has."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("kdpipe_grader", code.path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there for their annotations
    spec.loader.exec_module(module)
    function = getattr(module, code.function)

    def judged(text: str, problem: Problem) -> Judged:
        found = function(text, problem)
        if not isinstance(found, bool | numbers.Real) or not 0 <= float(found) <= 1:
            raise StepError(f"returned {found!r:.200}, expected True, False or a number from 0 to 1")
        return Judged(None, float(found))

    return judged


def _math() -> Callable[[str, Problem], Judged]:
    """math-verify without its own timeout, which is an alarm signal: the parent looks at the clock."""
    import logging
    import resource

    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    resource.setrlimit(resource.RLIMIT_AS, (MATH_BYTES, MATH_BYTES))  # a tower of powers has no end
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that nothing limits its time
    forms = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]

    def judged(text: str, problem: Problem) -> Judged:
        wanted = parse(f"${problem.expected}$", extraction_config=forms, parsing_timeout=None)
        found = parse(_shown(text), extraction_config=forms, parsing_timeout=None)
        if all(isinstance(one, str) for one in wanted):  # what it reads no formula in comes back as it is
            raise DataError(
                f"the reference answer is {problem.expected!r:.200}, expected a formula",
                hint="write it as LaTeX does, without the dollars",
            )
        is_right = verify(wanted, found, timeout_seconds=None)
        return Judged(str(found[-1]) if found else None, float(is_right))

    return judged


def _shown(text: str) -> str:
    """The part of a text that answers, as a formula where it was in a box."""
    boxed = last_box(after_thinking(text))
    return answer_part(text) if boxed is None else rf"\boxed{{{boxed}}}"
