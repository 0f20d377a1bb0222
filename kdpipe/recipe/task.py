"""The task of a recipe: its problems, and how they are asked."""

from collections.abc import Iterator
from datetime import date
from typing import Annotated, Literal

from pydantic import Field

from kdpipe.recipe.section import Count, Section, Seed

GSM8K_INSTRUCTION = (
    "Solve this problem step by step. End with one line that holds only the final number, in the form: #### N"
)


GraderName = Literal["number", "exact", "choice", "math", "none"]
NumberReader = Literal["strict", "flexible", "robust"]


class PythonGrader(Section):
    """Your own function that grades, which runs with all your rights: `kdpipe` asks once before it does."""

    python: Annotated[str, Field(pattern=r"^[^:\n]+\.py:[A-Za-z_][A-Za-z0-9_]*$")]
    """`file.py:function`, relative to the recipe: `def function(text: str, problem) -> bool | float`."""

    @property
    def file(self) -> str:
        return self.python.rpartition(":")[0]

    @property
    def function(self) -> str:
        return self.python.rpartition(":")[2]


AnyGrader = GraderName | PythonGrader


class QuestionTask(Section):
    """How questions from files are asked."""

    prompt: Literal["chat", "plain"] = "chat"
    """chat renders the student's own chat template, plain puts bare text."""
    system: str | None = None
    """A system turn before every prompt; records that have one of their own keep theirs."""
    today: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")] = "2024-07-26"
    """The date that chat templates get where they ask for today's, so that prompts are the same next week."""
    allow_special_tokens: bool = False
    """Whether special tokens in the problems' texts are read as such; else they are text like any other."""
    drop_overlong: bool = False
    """Whether problems that do not fit a model's context are left out, and counted; else the run is refused."""
    instruction: str = ""
    """Text before the question that asks for the form of the answer; empty is none."""
    few_shot: Annotated[int, Field(ge=0, le=64)] = 0
    """Solved problems of the train split put before the question."""
    grader: AnyGrader = "number"
    """How answers are graded: as a number, an exact text, a choice from A to E, a formula, by your code, or not."""
    headline: NumberReader = "flexible"
    """Which reading of a number is the accuracy: strict and flexible are lm-evaluation-harness's."""
    reward: NumberReader = "robust"
    """Which reading of a number is the reward: robust misjudges the fewest answers, strict and flexible compare."""

    def faults(self) -> Iterator[str]:
        try:
            date.fromisoformat(self.today)
        except ValueError:
            yield f"today is {self.today}, which is no day"
        known = type(self).model_fields
        for name in ("headline", "reward"):  # by value, as a recipe on its way to a worker has all fields set
            if self.grader != "number" and getattr(self, name) != known[name].default:
                grader = getattr(self.grader, "python", self.grader)
                yield f"{name} says how a number is read, and grader is {grader}: remove {name}"


class Gsm8kTask(QuestionTask):
    """Grade-school word problems; `data` is a hub id or a local folder with train and test files."""

    kind: Literal["gsm8k"]
    """This task."""
    instruction: str = GSM8K_INSTRUCTION
    """Text before the question that asks for the form of the answer; empty is none."""
    data: str = "openai/gsm8k"
    """Hub id, or a local folder with train and test files."""
    revision: str | None = None
    """Branch, tag or commit on the hub; null is pinned by the first run."""


class ArithmeticTask(Section):
    """Generated word problems of one or two steps, with a tokenizer of their own; nothing to download."""

    kind: Literal["arithmetic"]
    """This task."""
    steps: Annotated[list[Literal[1, 2]], Field(min_length=1)] = [1, 2]
    """Numbers of steps that a problem may take."""
    max_operand: Annotated[int, Field(ge=5, le=99)] = 20
    """Largest number in a problem."""
    train_problems: Count = 4096
    """Problems to train on."""
    test_problems: Count = 200
    """Held-out problems."""
    seed: Seed = 0
    """Seed of the problems; the recipe's seed does not change them."""
    grader: Literal["number"] = "number"
    """How answers are graded: the number in the answer is compared with the reference."""
    headline: NumberReader = "strict"
    """Which reading of a number is the accuracy: strict and flexible are lm-evaluation-harness's."""
    reward: NumberReader = "strict"
    """Which reading of a number is the reward: robust misjudges the fewest answers, strict and flexible compare."""


class OwnTask(QuestionTask):
    """A user's own prompts, with answers or without."""

    kind: str
    question_field: str | None = None
    """Field of the question, a text or a list of turns (a.b is b in a); null is found out from the first record."""
    answer_field: str | None = None
    """Field of the answer, a number or a solution that ends in `#### N`; null is found out from the records."""
    id_field: str | None = None
    """Field of a problem's id; null counts rows."""


class JsonlTask(OwnTask):
    """A user's own prompts, with answers or without: JSONL, CSV or parquet files."""

    kind: Literal["jsonl"]
    """This task."""
    train: str
    """JSONL, CSV, TSV or parquet file, relative to the recipe."""
    test: str
    """JSONL, CSV, TSV or parquet file of the held-out problems, relative to the recipe."""


class Splits(Section):
    """Which rows of a data set are train and which are test, as the library `datasets` writes it."""

    train: str = "train"
    """A split or a slice of one, such as train[:90%]."""
    test: str = "test"
    """A split or a slice of one for the held-out problems, such as train[90%:]."""


class DatasetTask(OwnTask):
    """A data set of the hub, or a folder in one of its layouts; needs `pip install "kdpipe[data]"`."""

    kind: Literal["dataset"]
    """This task."""
    path: str
    """Hub id, or a local folder of data files."""
    config: str | None = None
    """Which of the data set's configurations (subsets); null is its only one or its default."""
    split: Splits = Splits()
    """Which rows are train and which are test."""
    revision: str | None = None
    """Branch, tag or commit on the hub; null is pinned by the first run."""


Task = Annotated[Gsm8kTask | ArithmeticTask | JsonlTask | DatasetTask, Field(discriminator="kind")]
