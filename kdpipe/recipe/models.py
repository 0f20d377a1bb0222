"""The student of a recipe, and what models share: weights from scratch, the cold start, optimizers."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, JsonValue

from kdpipe.recipe.section import Count, DtypeName, Positive, Section, Seed, TextSource

Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[
    tuple[Beta, Beta], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
]
"""Strict validation asks for a tuple, and YAML has lists."""


class AdamW(Section):
    """AdamW and how its rate moves."""

    learning_rate: Positive = 1e-5
    """Peak rate."""
    betas: Betas = (0.9, 0.999)
    """Adam's decays of the first and second moment."""
    eps: Positive = 1e-8
    """Added to the root of Adam's second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled decay, of all weights."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate falls after warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps over which the rate rises from 0."""
    max_grad_norm: Positive = 1.0
    """The gradient's norm is clipped to this."""


class Optimizer(AdamW):
    """AdamW, for the rounds."""

    schedule_rounds: Count | None = None
    """Rounds over which a schedule that is not constant runs; null is `rounds`."""


class SftOptimizer(AdamW):
    """AdamW, for a cold start."""

    learning_rate: Positive = 1e-3
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How the rate falls after warm-up, over `steps`."""


class Sft(Section):
    """Cold start by cross-entropy on reference solutions, or on what a teacher writes."""

    steps: Count
    """Optimizer steps."""
    batch: Count = 32
    """Solutions of an optimizer step."""
    problems: Count | None = None
    """How many train problems it sees; null is all."""
    text: TextSource = "reference"
    """Reference solutions, or what the teacher writes (sequence-level KD, for the student only)."""
    samples: Count = 1
    """Completions that the teacher writes for each problem."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Temperature at which the teacher writes; 0 is greedy."""
    optimizer: SftOptimizer = SftOptimizer.model_construct()
    """AdamW of the cold start."""
    seed: Seed | None = None
    """Replaces the recipe's seed here; null is the recipe's."""

    def faults(self) -> Iterator[str]:
        if self.text == "reference" and (self.samples != 1 or self.temperature != 1):
            yield "samples and temperature go with text: teacher, which is sampled"


class Scratch(Section):
    """A Llama model initialised from the seed, for tasks that bring their own tokenizer."""

    hidden_size: Count = 96
    """Width."""
    intermediate_size: Count = 256
    """Width of the feed-forward layers."""
    num_layers: Count = 2
    """Layers."""
    num_heads: Count = 3
    """Attention heads; they divide hidden_size."""
    num_kv_heads: Count = 3
    """Key-value heads; they divide num_heads."""
    max_positions: Count = 256
    """Longest sequence."""
    tie_embeddings: bool = True
    """Whether the output head is the embedding."""
    init_std: Positive = 0.02
    """Standard deviation of the first weights."""
    seed: Seed | None = None
    """Seed of the first weights; null is the recipe's."""

    def faults(self) -> Iterator[str]:
        if self.hidden_size % self.num_heads or self.num_heads % self.num_kv_heads:
            yield (
                f"num_heads ({self.num_heads}) must divide hidden_size ({self.hidden_size}), "
                f"and num_kv_heads ({self.num_kv_heads}) must divide num_heads"
            )


class Lora(Section):
    """Low-rank adapters on frozen weights: B A x * alpha / rank, beside the layers in `targets`.

    No dropout: log-probs are taken with it off.
    """

    rank: Count = 16
    """Rank of the adapters."""
    alpha: Count = 32
    """The adapters' product is scaled by alpha / rank."""
    targets: (
        Literal["all-linear"] | Annotated[list[Annotated[str, Field(pattern=r"^\w+$")]], Field(min_length=1)]
    ) = "all-linear"
    """Last names of the layers that get one, or all linear layers below the output head."""
    target_parameters: list[Annotated[str, Field(pattern=r"^\w+(\.\w+)*$")]] = []
    """Ends of the names of tensors that are no layers and get one too, as experts: mlp.experts.gate_up_proj."""
    warmup: bool = False
    """Whether the cold start trains the adapter too, in place of all weights."""
    seed: Seed | None = None
    """Seed of the adapters' first weights; null is the recipe's."""


class Student(Section):
    """The model that learns: `model` or `scratch`, and its optional cold start."""

    name: ClassVar = "student"
    quantization: ClassVar[None] = None

    model: str | None = None
    """Hub id or local folder."""
    revision: str | None = None
    """Branch, tag or commit on the hub; null is pinned by the first run."""
    scratch: Scratch | None = None
    """A Llama model made from the seed, for tasks that bring their tokenizer."""
    dtype: DtypeName = "auto"
    """Numbers that the model computes in; auto is float32 where bfloat16 would be emulated."""
    trust_remote_code: bool = False
    """Whether code that comes with the model may run; commands ask for --trust, once in a workspace."""
    template: dict[str, JsonValue] = {}
    """Arguments of the chat template, such as enable_thinking."""
    sft: Sft | None = None
    """Cold start before round 1; it trains all weights, also with `lora`, unless `lora.warmup`."""
    lora: Lora | None = None
    """Low-rank adapters in place of all weights, from round 1 on."""

    def faults(self) -> Iterator[str]:
        if (self.model is None) == (self.scratch is None):
            yield "give exactly one of: model, scratch"
        if self.revision is not None and self.model is None:
            yield "revision goes with model"
        if self.lora is not None and self.lora.warmup and (self.sft is None or self.model is None):
            yield "lora.warmup goes with model and sft: the cold start trains the adapter on that model"

    @property
    def warmup(self) -> Lora | None:
        """The adapter that the cold start trains, if it is one."""
        return self.lora if self.lora is not None and self.lora.warmup else None

    @property
    def has_cold_start(self) -> bool:
        """Whether an sft step makes its weights of round 0."""
        return self.sft is not None or self.scratch is not None
