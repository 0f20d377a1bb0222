"""What every section of a recipe shares, and the kinds of values that several of them hold."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
EngineName = Literal["hf", "vllm"]
ENGINE_ABILITIES: dict[EngineName, frozenset[str]] = {
    "hf": frozenset({"support", "hidden"}),
    "vllm": frozenset(),
}
"""What each engine scores beyond sampled tokens and the teacher's top k (see engines/protocol.py)."""
TextSource = Literal["reference", "teacher"]


class Section(BaseModel):
    """What all sections share: unknown keys are errors, values are frozen and finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)
