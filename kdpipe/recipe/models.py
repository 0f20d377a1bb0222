"""The student of a recipe, and what models share: weights from scratch, the cold start, optimizers."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, JsonValue, model_validator

from kdpipe.recipe.section import Count, DtypeName, Positive, Section, Seed, TextSource


def _as_tuple(value: Any) -> Any:
    """A list as the tuple that strict validation asks for."""
    return tuple(value) if isinstance(value, list) else value


Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Beta, Beta], BeforeValidator(_as_tuple)]


class Optimizer(Section):
    """AdamW. `schedule_rounds` is the horizon of a schedule that is not constant (default: `rounds`)."""

    learning_rate: Positive = 1e-5
    betas: Betas = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    schedule_rounds: Count | None = None
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    max_grad_norm: Positive = 1.0


class SftOptimizer(Section):
    """AdamW for a cold start; a schedule that is not constant runs over `steps`."""

    learning_rate: Positive = 1e-3
    betas: Betas = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    max_grad_norm: Positive = 1.0


class Sft(Section):
    """Cold start of a model by cross-entropy on the train split: its reference solutions, or what a teacher writes.

    `text: teacher` is for the student (sequence-level KD): for each problem the teacher samples `samples` completions
    at `temperature`, 0 being greedy.
    """

    steps: Count
    batch: Count = 32
    problems: Count | None = None
    text: TextSource = "reference"
    samples: Count = 1
    temperature: Annotated[float, Field(ge=0)] = 1.0
    optimizer: SftOptimizer = SftOptimizer.model_construct()
    seed: Seed | None = None

    @model_validator(mode="after")
    def _sampling_is_used(self) -> "Sft":
        if self.text == "reference" and (self.samples != 1 or self.temperature != 1):
            raise ValueError("samples and temperature go with text: teacher, which is sampled")
        return self


class Scratch(Section):
    """A Llama model initialised from the seed, for tasks that bring their own tokenizer."""

    hidden_size: Count = 96
    intermediate_size: Count = 256
    num_layers: Count = 2
    num_heads: Count = 3
    num_kv_heads: Count = 3
    max_positions: Count = 256
    tie_embeddings: bool = True
    init_std: Positive = 0.02
    seed: Seed | None = None

    @model_validator(mode="after")
    def _heads_divide(self) -> "Scratch":
        if self.hidden_size % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must divide hidden_size ({self.hidden_size}), "
                f"and num_kv_heads ({self.num_kv_heads}) must divide num_heads"
            )
        return self


class Lora(Section):
    """Train low-rank adapters on frozen weights: B A x * alpha / rank, beside the layers in `targets`.

    `targets` are last names of layers, or all linear layers below the output head. No dropout: log-probs are
    taken with it off.
    """

    rank: Count = 16
    alpha: Count = 32
    targets: (
        Literal["all-linear"] | Annotated[list[Annotated[str, Field(pattern=r"^\w+$")]], Field(min_length=1)]
    ) = "all-linear"
    seed: Seed | None = None


class Student(Section):
    """The model that learns: `model` (hub id or local folder) or `scratch`, and its optional cold start.

    The cold start trains all weights, also with `lora`: the adapter begins in round 1, on what it left.
    """

    name: ClassVar = "student"
    quantization: ClassVar[None] = None

    model: str | None = None
    revision: str | None = None
    scratch: Scratch | None = None
    dtype: DtypeName = "auto"
    trust_remote_code: bool = False
    template: dict[str, JsonValue] = {}
    sft: Sft | None = None
    lora: Lora | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> "Student":
        if (self.model is None) == (self.scratch is None):
            raise ValueError("give exactly one of: model, scratch")
        if self.revision is not None and self.model is None:
            raise ValueError("revision goes with model")
        return self

    @property
    def has_cold_start(self) -> bool:
        """Whether an sft step makes its weights of round 0."""
        return self.sft is not None or self.scratch is not None
