"""Which fields of a user's records are question and answer, and the problems that they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kdpipe.data.graders import unfit_reference
from kdpipe.data.graders.choice import LETTERS, letter_of, options_of
from kdpipe.data.graders.marking import MARK
from kdpipe.data.graders.number import extract_expected, grade_number
from kdpipe.data.rows import Problem
from kdpipe.data.tasks.record import RIGHT_LINE, RIGHT_TURNS, DataRecord
from kdpipe.errors import DataError
from kdpipe.recipe.task import OwnTask, PythonGrader, QuestionTask

QUESTIONS = ("question", "prompt", "messages", "problem", "query", "conversations", "instruction")
CONTEXTS = {"instruction": "input"}
"""Fields whose text belongs below a question's, as Alpaca has them."""
ANSWERS = ("answer", "solution", "completion", "response", "output", "reward_model.ground_truth")
NUMBERS_HINT = "write numbers as 1234.5 or 1,234.5; task.grader says how other answers are graded"
GRADER_HINT = "task.answer_field names the field of the answer, task.grader how it is graded"
NO_ANSWERS_HINT = "task.answer_field names the answer; prompts without answers need task.grader: none"


@dataclass(frozen=True, slots=True)
class Form:
    """The fields that are read of every record; without an `answer` it may be a conversation's last turn."""

    question: str
    answer: str | None
    context: str | None = None
    has_options: bool = False

    def words(self) -> str:
        """Which fields those are, for people."""
        answer = "no field is its answer" if self.answer is None else f"{self.answer!r} is its answer"
        context = "" if self.context is None else f" with {self.context!r} below it"
        options = " with its options below it, where it does not list them" if self.has_options else ""
        return f"{self.question!r} is asked{context}{options}, and {answer}"


def read_splits(
    task: OwnTask, splits: Mapping[str, Sequence[DataRecord]], say: Callable[[str], None]
) -> tuple[list[Problem], list[Problem]]:
    """Train and test problems of records; their ids are the records' own, or `<kind>/<split>/<row>`.

    `say` is told which fields are read, where the recipe does not name them.
    """
    # Each split has its own: what is asked of train must not hang on the test file, which no rollout's hash holds.
    forms = {split: _find_form(task, records) for split, records in splits.items()}
    if task.question_field is None or task.answer_field is None:
        train_form, test_form = (forms[split].words() for split in ("train", "test"))
        both = train_form if train_form == test_form else f"of train {train_form}; of test {test_form}"
        say(f"task: of each record {both}")
    seen: dict[str, str] = {}
    train, test = (
        [
            _problem(
                task, forms[split], record, _identity(task, record, seen) or f"{task.kind}/{split}/{row}"
            )
            for row, record in enumerate(splits[split])
        ]
        for split in ("train", "test")
    )
    return train, test


def _find_form(task: OwnTask, records: Sequence[DataRecord]) -> Form:
    """The form that the recipe names, or else that of the split's first record."""
    first = records[0]
    question = task.question_field or next((name for name in QUESTIONS if name in first.fields), None)
    if question is None:
        raise DataError(
            f"{first.place}: none of its fields is a question by its name; the record has: {_names(first)}",
            hint=f"task.question_field names it; one right line: {RIGHT_LINE}",
        )
    known = (
        [name for name in ANSWERS if name != question] if task.answer_field is None else [task.answer_field]
    )
    answer = next((name for name in known if _any_has(records, name)), None)
    if answer is None and task.answer_field is not None:
        raise DataError(
            f"{first.place}: no record has the field {task.answer_field!r}; this one has: {_names(first)}",
            hint="correct task.answer_field, or leave it out",
        )
    context = CONTEXTS.get(question)
    has_options = task.grader == "choice" and any(record.options() for record in records)
    return Form(question, answer, context if context and _any_has(records, context) else None, has_options)


def _any_has(records: Sequence[DataRecord], field: str) -> bool:
    return any(field in record.fields or record.value(field) is not None for record in records)


def _names(record: DataRecord) -> str:
    return ", ".join(map(repr, record.fields)) or "nothing"


def _identity(task: OwnTask, record: DataRecord, seen: dict[str, str]) -> str | None:
    """The record's own id, if the recipe names its field; raises DataError on one that was `seen`."""
    if task.id_field is None:
        return None
    prompt_id = record.identity(task.id_field)
    if prompt_id in seen:
        raise DataError(
            f"{record.place}: the id {prompt_id!r} stands already at {seen[prompt_id]}; "
            "expected ids that are unique over train and test",
            hint="without task.id_field the rows of each file are numbered",
        )
    seen[prompt_id] = record.place
    return prompt_id


def _problem(task: OwnTask, form: Form, record: DataRecord, prompt_id: str) -> Problem:
    turns = record.asked(form.question, form.context)
    said = turns[-1].content if turns and turns[-1].role == "assistant" else None
    asked = turns if said is None else turns[:-1]
    if not asked or asked[-1].role != "user":
        last = f"a turn of the {asked[-1].role}" if asked else "no turn of the user"
        raise DataError(
            f"{record.place}: field {form.question!r} asks with {last}, expected the user's question",
            hint=f"one right line: {RIGHT_TURNS}",
        )
    answer = _answer(task, form, record, said)
    question, expected = asked[-1].content, None
    if form.has_options:
        question = _listed(record, question)
    if task.grader != "none" and not (answer is None and isinstance(task.grader, PythonGrader)):
        if answer is None:
            raise DataError(
                f"{record.place}: has no answer to grade by; the record has: {_names(record)}",
                hint=NO_ANSWERS_HINT,
            )
        expected = read_expected(task, record, answer, question=question)
    return Problem(
        prompt_id,
        question,
        expected,
        said or answer,
        record.others(form.question, form.answer),
        asked[:-1],
    )


def _listed(record: DataRecord, question: str) -> str:
    """The question, and below it the options that its record has, where it does not list some itself."""
    if options_of(question) or not (options := record.options()):
        return question
    lines = [f"{letter}) {option}" for letter, option in zip(LETTERS, options.values(), strict=False)]
    return "\n".join([question, "", *lines])


def _answer(task: OwnTask, form: Form, record: DataRecord, said: str | None) -> str | None:
    """The text of the answer; what the assistant `said` where no field has it, None where nothing does."""
    if form.answer is None:
        return said
    is_blank = record.value(form.answer) in (None, "")
    if is_blank and (said is not None or task.grader == "none"):
        return said
    return record.answer(form.answer)


def read_expected(task: QuestionTask, record: DataRecord, answer: str, *, question: str = "") -> str:
    """The reference in an answer: all of it, or what stands after its last mark.

    Of a choice it is the letter, also where the answer is the text or the label of an option of the question.
    Raises DataError where the grader cannot compare with it, or where a reader of the task would read another number in
    a solution.
    """
    expected = extract_expected(answer) if MARK in answer else answer.strip()
    if task.grader == "choice" and expected is not None and unfit_reference(expected, "choice"):
        labels = dict(zip(record.options(), LETTERS, strict=False))
        expected = letter_of(expected, options_of(question)) or labels.get(expected, expected)
    if (wanted := unfit_reference(expected, task.grader)) is not None or expected is None:
        raise DataError(
            f"{record.place}: the answer is or ends in {(expected or answer)[-60:]!r}, expected {wanted}, alone or "
            f"after {MARK}, by task.grader: {task.grader}",
            hint=NUMBERS_HINT if task.grader == "number" else GRADER_HINT,
        )
    if task.grader != "number":
        return expected
    for name, reader in (("headline", task.headline), ("reward", task.reward)):
        graded = grade_number(answer, expected, reader=reader)
        if MARK in answer and not graded.correct:
            raise DataError(
                f"{record.place}: the answer ends in {expected!r}, but task.{name}: {reader} reads "
                f"{graded.answer!r} in it",
                hint=f"leave one {MARK} in it, followed by a space, or choose another reader",
            )
    return expected
