"""The task of a recipe: its problems, and how they are asked."""

from typing import Annotated, Literal

from pydantic import Field

from kdpipe.recipe.section import Count, Section, Seed

DEFAULT_INSTRUCTION = (
    "Solve this problem step by step. End with one line that holds only the final number, in the form: #### N"
)


class Gsm8kTask(Section):
    """Grade-school word problems; `data` is a hub id or a local folder with train and test files."""

    kind: Literal["gsm8k"]
    data: str = "openai/gsm8k"
    revision: str | None = None
    prompt: Literal["chat", "plain"] = "chat"
    instruction: str = DEFAULT_INSTRUCTION
    few_shot: Annotated[int, Field(ge=0, le=64)] = 0
    headline: Literal["strict", "flexible"] = "flexible"


class ArithmeticTask(Section):
    """Generated word problems of one or two steps, with a tokenizer of their own; nothing to download."""

    kind: Literal["arithmetic"]
    steps: Annotated[list[Literal[1, 2]], Field(min_length=1)] = [1, 2]
    max_operand: Annotated[int, Field(ge=5, le=99)] = 20
    train_problems: Count = 4096
    test_problems: Count = 200
    seed: Seed = 0
    headline: Literal["strict", "flexible"] = "strict"


class JsonlTask(Section):
    """A user's own questions and answers: JSONL or parquet files with a question and an answer field."""

    kind: Literal["jsonl"]
    train: str
    test: str
    question_field: str = "question"
    answer_field: str = "answer"
    id_field: str | None = None
    prompt: Literal["chat", "plain"] = "chat"
    instruction: str = DEFAULT_INSTRUCTION
    few_shot: Annotated[int, Field(ge=0, le=64)] = 0
    headline: Literal["strict", "flexible"] = "flexible"


Task = Annotated[Gsm8kTask | ArithmeticTask | JsonlTask, Field(discriminator="kind")]
