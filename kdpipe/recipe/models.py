"""The models of a recipe, student and teachers: where each comes from, and its cold start."""

import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, JsonValue, model_validator

from kdpipe.recipe.section import NAME, Count, DtypeName, Positive, Section, Seed, TextSource

PROMPT_PIECE = re.compile(r"\{\{|\}\}|\{([A-Za-z_]\w*)\}")
"""What a teacher's prompt holds beside plain text: a literal brace, or the name of a field of the record."""


class Optimizer(Section):
    """AdamW. `schedule_rounds` is the horizon of a schedule that is not constant (default: `rounds`)."""

    learning_rate: Positive = 1e-5
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    schedule_rounds: Count | None = None
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    max_grad_norm: Positive = 1.0


class SftOptimizer(Section):
    """AdamW for a cold start; a schedule that is not constant runs over `steps`."""

    learning_rate: Positive = 1e-3
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
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


FieldValue = Annotated[str, Field(min_length=1)] | int | float


class Server(Section):
    """A model behind HTTP: base URLs of servers that hold the same weights, and the name under which they serve it.

    `tokenizer` is a hub id or local folder, `revision` that of the hub; `api_key_env` names the environment variable
    that holds the key. Where it is does not count; `model`, `revision` and what the tokenizer holds say what it is.
    """

    urls: Annotated[list[str], Field(min_length=1)]
    model: Annotated[str, Field(min_length=1)]
    tokenizer: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None

    @model_validator(mode="after")
    def _urls_are_bases(self) -> "Server":
        for number, url in enumerate(self.urls):
            if trouble := _trouble_of(url):  # the URL itself is not repeated: it may hold a password
                raise ValueError(f"urls.{number} {trouble}; write it as http://host:8000/v1")
        return self


def _trouble_of(url: str) -> str | None:
    """Why this is no base URL that a path can be put behind; None when it is one."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        known = False
    if not known or not url.isprintable() or " " in url:
        return "is no http or https URL with a host"
    if "@" in parts.netloc:
        return "holds a user or password: name the variable of the key in api_key_env"
    if parts.query or parts.fragment:
        return "holds a query or fragment"
    return None


class Teacher(Section):
    """A model that scores: `model`, `scratch` with `sft`, `self`, the student itself, or one behind a `server`.

    `self: initial` is the student before round 1, `current` the one that sampled the round, `ema` the average of the
    students so far, of which each round keeps `decay` and adds the rest of the new one.

    `prompt` is the teacher's own prompt text, with {question} and, privileged, {solution} or any other field of
    the record; null means the student's prompt. `temperature` null means the rollout temperature. Of several
    teachers, each teaches the problems whose record has the values in `only`; without `only` all score every
    completion and are mixed by `weight`. `quantization` is the method, by vLLM's name, by which that engine
    stores the teacher's weights in fewer bits.
    """

    name: Annotated[str, Field(pattern=NAME)] = "teacher"
    model: str | None = None
    revision: str | None = None
    scratch: Scratch | None = None
    self_: Annotated[Literal["initial", "current", "ema"] | None, Field(alias="self")] = None
    decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    server: Server | None = None
    dtype: DtypeName = "auto"
    trust_remote_code: bool = False
    template: dict[str, JsonValue] = {}
    prompt: str | None = None
    temperature: Positive | None = None
    quantization: Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")] | None = None
    only: (
        Annotated[
            dict[str, FieldValue | Annotated[list[FieldValue], Field(min_length=1)]], Field(min_length=1)
        ]
        | None
    ) = None
    weight: Positive | None = None
    sft: Sft | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> "Teacher":
        origins = (self.model, self.scratch, self.self_, self.server)
        if sum(origin is not None for origin in origins) != 1:
            raise ValueError("give exactly one of: model, scratch, self, server")
        if self.revision is not None and self.model is None:
            raise ValueError("revision goes with model")
        if self.server is not None and self.sft is not None:
            raise ValueError("a teacher behind a server is not trained here: it has no sft")
        if self.server is not None and self.quantization is not None:
            raise ValueError(
                "a teacher behind a server has the server's own quantization: leave quantization out"
            )
        if self.server is not None and self.dtype != "auto":
            raise ValueError("a teacher behind a server computes in the server's dtype: leave dtype out")
        if self.self_ is not None and self.sft is not None:
            raise ValueError("a teacher that is the student itself has no sft of its own")
        if (self.decay is not None) != (self.self_ == "ema"):
            raise ValueError("decay goes with self: ema, which needs it")
        if self.name == "student":
            raise ValueError("a teacher cannot be called 'student'")
        if self.prompt is not None and "question" not in self.prompt_fields:
            raise ValueError("prompt must contain {question}")
        return self

    @property
    def prompt_fields(self) -> tuple[str, ...]:
        """The names that the teacher's own prompt is filled in with, in the order of the text."""
        names = (match[1] for match in PROMPT_PIECE.finditer(self.prompt or ""))
        return tuple(dict.fromkeys(name for name in names if name))

    @property
    def is_privileged(self) -> bool:
        """Whether it is shown more of the record than the question."""
        return bool({*self.prompt_fields} - {"question"})
