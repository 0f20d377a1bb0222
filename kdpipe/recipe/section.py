"""What every section of a recipe shares, and the kinds of values that several of them hold."""

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
EngineName = Literal["hf", "vllm"]
Ability = Literal["support", "hidden"]
"""What not every engine can score: ids that the request gives beside the sampled ones, and the hidden states."""
ENGINE_ABILITIES: dict[EngineName, frozenset[Ability]] = {
    "hf": frozenset({"support", "hidden"}),
    "vllm": frozenset(),
}
PromptStyleName = Literal["student", "chat", "plain"]
TextSource = Literal["reference", "teacher"]


class Section(BaseModel):
    """What all sections share: unknown keys are errors, values are frozen and finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)

    def faults(self) -> Iterator[str]:
        """What does not fit between the fields, each of which is valid; the first is reported."""
        yield from ()

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        if fault := next(self.faults(), None):
            raise ValueError(fault)
        return self
