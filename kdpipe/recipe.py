"""The recipe: the only schema and the only defaults. Never imports torch.

`recipe_file.py` reads one from YAML. `runtime` and `tracking` cannot change results beyond floating-point rounding;
every other field is part of some step's fingerprint (`plan.py`), which a test enforces leaf by leaf.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
DEFAULT_INSTRUCTION = (
    "Solve this problem step by step. End with one line that holds only the final number, in the form: #### N"
)

PROMPT_PIECE = re.compile(r"\{\{|\}\}|\{([A-Za-z_]\w*)\}")
"""What a teacher's prompt holds beside plain text: a literal brace, or the name of a field of the record."""

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
EngineName = Literal["hf", "vllm"]
TextSource = Literal["reference", "teacher"]
ENGINE_ABILITIES: dict[str, frozenset[str]] = {"hf": frozenset({"support", "hidden"}), "vllm": frozenset()}
"""What each engine scores beyond sampled tokens and the teacher's top k (see engine.py)."""


class Section(BaseModel):
    """What all sections share: unknown keys are errors, values are frozen and finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)


# ------------------------------------------------------------------------------------------------ task


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


# ---------------------------------------------------------------------------------------------- models


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


# -------------------------------------------------------------------------------------------- sections


class RolloutSection(Section):
    """How each round samples from the student.

    `on_policy_fraction` is the share of a round's prompts that it samples for; each of the others gives one row, the
    reference solution or a sample of the teacher (`off_policy_text`), which train takes by `off_policy_term`.
    """

    engine: EngineName = "hf"
    prompts: Count = 64
    samples: Count = 1
    on_policy_fraction: Fraction = 1.0
    off_policy_text: TextSource = "reference"
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    max_new_tokens: Count = 256
    stop: list[Annotated[str, Field(min_length=1)]] = []
    seed: Seed | None = None

    @property
    def on_policy_prompts(self) -> int:
        """How many of a round's prompts the student samples for."""
        return round(self.on_policy_fraction * self.prompts)

    @property
    def rows(self) -> int:
        """Completions of a round: the student's samples, and a text for each other prompt."""
        return self.on_policy_prompts * self.samples + self.prompts - self.on_policy_prompts


class KeepTopK(Section):
    """Keep the teacher's `top_k` most probable ids and a tail bucket."""

    top_k: Count


class TeacherScoreSection(Section):
    """What is kept of the teacher: `auto` (what the objective needs), `token`, `{top_k: k}`, or `hidden`.

    `hidden` keeps the states before the teacher's output head, from which train computes its whole
    distribution. `logprobs` is the dtype in which a support's log-probs are stored.
    """

    engine: EngineName = "hf"
    keep: Literal["auto", "token", "hidden"] | KeepTopK = "auto"
    logprobs: Literal["float32", "float16"] = "float32"


class Support(Section):
    """The ids on which a distribution is compared, and a tail bucket for all others; exactly one is given.

    The k most probable ids of the teacher, of the student that sampled, or of either (`union_top_k`). Chosen
    when the teacher scores, and kept.
    """

    teacher_top_k: Count | None = None
    student_top_k: Count | None = None
    union_top_k: Count | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> "Support":
        if sum(k is not None for k in (self.teacher_top_k, self.student_top_k, self.union_top_k)) != 1:
            raise ValueError("give exactly one of: teacher_top_k, student_top_k, union_top_k")
        return self


AnySupport = Literal["vocabulary"] | Support
DEFAULT_SUPPORT = Support.model_construct(teacher_top_k=64)


class RatioControl(Section):
    """Weight of off-policy tokens (method: ratio weights). `cap` for truncate, `low`/`high` for mask and clip."""

    control: Literal["none", "truncate", "mask", "clip"] = "none"
    cap: Annotated[float, Field(ge=1)] | None = None
    low: Annotated[float, Field(ge=0)] | None = None
    high: Positive | None = None

    @model_validator(mode="after")
    def _parameters_fit(self) -> "RatioControl":
        given = {name for name in ("cap", "low", "high") if getattr(self, name) is not None}
        wanted = {"none": set(), "truncate": {"cap"}, "mask": {"low", "high"}, "clip": {"low", "high"}}[
            self.control
        ]
        if given != wanted:
            names = ", ".join(sorted(wanted)) or "no parameters"
            raise ValueError(f"control {self.control} takes {names}")
        if self.control == "mask" and not (self.low < 1 < self.high):  # type: ignore[operator]
            raise ValueError("mask keeps ratios between low and high, and needs low < 1 < high")
        return self


class DecoupledControl(Section):
    """Two weights whose product is w: `update` acts on exp(s - p), `behaviour` on exp(p - b)."""

    update: RatioControl = RatioControl.model_construct()
    behaviour: RatioControl = RatioControl.model_construct()

    @model_validator(mode="after")
    def _controls_fit(self) -> "DecoupledControl":
        if self.update.control not in ("none", "clip"):
            raise ValueError("update.control is none or clip")
        if self.behaviour.control not in ("none", "truncate", "mask"):
            raise ValueError("behaviour.control is none, truncate or mask")
        return self


class SampledTerm(Section):
    """What the terms by the sampled token share.

    `ratio` weighs by exp(s - b); `decoupled` instead by two ratios through p. `baseline` is subtracted from the
    signal: its mean over the other completions of the step, or of the group.
    """

    ratio: RatioControl = RatioControl.model_construct()
    decoupled: DecoupledControl | None = None
    baseline: Literal["none", "step", "group", "exact"] = "none"

    @model_validator(mode="after")
    def _one_weight(self) -> "SampledTerm":
        if self.decoupled is not None and self.ratio.control != "none":
            raise ValueError("give ratio or decoupled, not both")
        return self


class SampledReverseKl(SampledTerm):
    """A sampled-token term whose signal is q - s.

    `baseline` may be `exact`: the signal's expectation given the prefix, for which a distribution on `support`
    (default: the teacher's top 64) is kept.
    """

    support: AnySupport | None = None

    @model_validator(mode="after")
    def _support_is_used(self) -> "SampledReverseKl":
        if self.support is not None and self.baseline != "exact":
            raise ValueError("support goes with baseline: exact")
        return self


class RklTerm(SampledReverseKl):
    """Reverse KL by the sampled token (policy-gradient surrogate); `gamma` discounts the future sum."""

    term: Literal["rkl"]
    gamma: Fraction = 0.0


class K2Term(SampledReverseKl):
    """Reverse KL by the sampled token, as half the squared log-ratio."""

    term: Literal["k2"]


class K3Term(SampledTerm):
    """GRPO's KL estimator as a loss: its gradient is that of the *forward* KL."""

    term: Literal["k3"]
    baseline: Literal["none", "step", "group"] = "none"


class K1LossTerm(Section):
    """AReaL's joint branch: s - q as a loss, whose expected gradient is zero. For reproducing it only."""

    term: Literal["k1_loss"]


class JsdTerm(Section):
    """Generalised Jensen-Shannon divergence; beta 0 is forward KL(P|S), beta 1 reverse KL(S|P)."""

    term: Literal["jsd"]
    beta: Fraction = 0.5
    support: AnySupport = DEFAULT_SUPPORT


class SkewKlTerm(Section):
    """KL of the teacher against its mixture with the student, `alpha` being the teacher's share."""

    term: Literal["skew_kl"]
    alpha: Annotated[float, Field(ge=0, lt=1)] = 0.1
    support: AnySupport = DEFAULT_SUPPORT


class SkewRklTerm(Section):
    """KL of the student against its mixture with the teacher, `alpha` being the student's share."""

    term: Literal["skew_rkl"]
    alpha: Annotated[float, Field(ge=0, lt=1)] = 0.1
    support: AnySupport = DEFAULT_SUPPORT


DistributionTerm = JsdTerm | SkewKlTerm | SkewRklTerm
KdTerm = Annotated[
    RklTerm | K2Term | K3Term | K1LossTerm | JsdTerm | SkewKlTerm | SkewRklTerm, Field(discriminator="term")
]


class BehaviourControl(Section):
    """What the RL term does with `v = exp(proximal - behaviour)`: nothing, `truncate` at cap, or `mask` above it."""

    control: Literal["none", "truncate", "mask"] = "none"
    cap: Annotated[float, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _parameters_fit(self) -> "BehaviourControl":
        if (self.cap is not None) != (self.control != "none"):
            raise ValueError("cap goes with control truncate or mask, and both need it")
        return self


class DistillSchedule(Section):
    """How `distill_weight` moves to `end` over the optimizer steps of `rounds` (default: all), both ends included."""

    kind: Literal["constant", "linear", "cosine"] = "constant"
    end: Annotated[float, Field(ge=0)] | None = None
    rounds: Count | None = None

    @model_validator(mode="after")
    def _parameters_fit(self) -> "DistillSchedule":
        if (self.end is not None) != (self.kind != "constant"):
            raise ValueError("end goes with kind linear or cosine, and both need it")
        if self.rounds is not None and self.kind == "constant":
            raise ValueError("rounds goes with kind linear or cosine")
        return self


class Objective(Section):
    """What train descends: `kd`, `grpo`, their weighted sum `kdrl`, `srpo`, or `then` (kd first, grpo after).

    `mask` closes the KD term of kdrl where the student is right anyway. `normalization`: what an optimizer step's
    sum over tokens is divided by. `truncated`: completions cut at max_new_tokens count, are dropped, or
    get reward 0. `end_token: mask` leaves the end token out; `alias` swaps the teacher's end id with the student's.
    `off_policy_term`: what text that the student did not sample gets in the place of all this, by `distill_weight`.
    """

    kind: Literal["kd", "grpo", "kdrl", "srpo", "then"] = "kd"
    kd: KdTerm = RklTerm.model_construct(term="rkl")
    kd_rounds: Count | None = None
    rl_weight: Annotated[float, Field(ge=0)] = 1.0
    distill_weight: Annotated[float, Field(ge=0)] = 1.0
    distill_schedule: DistillSchedule = DistillSchedule.model_construct()
    mask: Literal["none", "wrong", "all_wrong_groups"] = "none"
    reward_scaling: Positive = 1.0
    reward_bias: float = 0.0
    reward_clip: Positive = 20.0
    group_normalization: Literal["mean_std", "mean"] = "mean_std"
    batch_normalization: bool = False
    clip_low: Annotated[float, Field(gt=0, le=1)] = 0.2
    clip_high: Positive = 0.2
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    behaviour: BehaviourControl = BehaviourControl.model_construct()
    normalization: Literal["token", "sequence", "fixed"] = "token"
    fixed_length: Count | None = None
    truncated: Literal["keep", "drop", "no_reward"] = "keep"
    end_token: Literal["keep", "mask", "alias"] = "keep"  # noqa: S105 (no password)
    off_policy_term: Literal["kd", "cross_entropy"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _name_is_a_term(cls, value: Any) -> Any:
        """Lets `kd: k2` stand for `kd: {term: k2}`."""
        if isinstance(value, dict) and isinstance(value.get("kd"), str):
            return {**value, "kd": {"term": value["kd"]}}
        return value

    @property
    def has_kd(self) -> bool:
        """Whether some phase computes the KD term: a weight that is exactly 0 throughout means none does."""
        return self.kind != "grpo" and (self.distill_weight > 0 or bool(self.distill_schedule.end))

    @property
    def has_rl(self) -> bool:
        """Whether some phase computes the RL term."""
        return self.kind != "kd" and self.rl_weight > 0

    @property
    def off_policy_loss(self) -> Literal["kd", "cross_entropy"]:
        """The term of off-policy text: `off_policy_term`, and without one `kd` where that needs no ratio."""
        return self.off_policy_term or ("kd" if isinstance(self.kd, DistributionTerm) else "cross_entropy")

    @property
    def distribution_support(self) -> AnySupport | None:
        """Where the KD term needs the teacher's distribution; None when the sampled tokens are enough."""
        if not self.has_kd:
            return None
        if isinstance(self.kd, SampledReverseKl):
            return (self.kd.support or DEFAULT_SUPPORT) if self.kd.baseline == "exact" else None
        return self.kd.support if isinstance(self.kd, DistributionTerm) else None

    def in_round(self, number: int) -> "Objective":
        """The objective of that round: `then` is `kd` up to `kd_rounds` and `grpo` after."""
        if self.kind != "then" or self.kd_rounds is None:
            return self
        phase = "kd" if number <= self.kd_rounds else "grpo"
        return self.model_copy(update={"kind": phase, "kd_rounds": None})

    @model_validator(mode="after")
    def _settings_fit(self) -> "Objective":
        if (self.kd_rounds is not None) != (self.kind == "then"):
            raise ValueError("kd_rounds goes with kind: then, which needs it")
        if self.kind == "then" and not (self.has_kd and self.has_rl):
            raise ValueError("then needs both weights above 0")
        if not (self.has_kd or self.has_rl):
            raise ValueError("every weight of this objective is 0: nothing would be trained")
        if self.mask != "none" and self.kind != "kdrl":
            raise ValueError("mask goes with kind: kdrl")
        if self.kind == "srpo":
            plain = RklTerm.model_construct(term="rkl")
            if self.kd != plain:
                raise ValueError(
                    "srpo takes kd: rkl without further settings: its signal goes through the RL loss"
                )
        if self.off_policy_term == "kd" and not isinstance(self.kd, DistributionTerm):
            raise ValueError(
                f"off_policy_term: kd needs a term over whole distributions (jsd, skew_kl, skew_rkl): {self.kd.term} "
                "goes by tokens that the student sampled, and it did not sample this text; use cross_entropy"
            )
        if self.fixed_length is not None and self.normalization != "fixed":
            raise ValueError("fixed_length goes with normalization: fixed")
        schedule = self.distill_schedule
        if schedule.kind != "constant" and self.kind == "grpo":
            raise ValueError("distill_schedule needs an objective with a KD term")
        if (not self.has_rl or self.kind == "then") and 0 in (self.distill_weight, schedule.end):
            raise ValueError("a distill weight of 0 would leave steps without anything to train")
        return self


class TrainSection(Section):
    """How a round's rows become optimizer steps: `epochs` passes of `minibatches` steps each.

    `control` makes the recipe a control arm of itself. `shuffled_teacher`: position t of a completion takes the scores
    of position t, wrapped, of a completion of another prompt. `self_teacher`: the teacher is the student that sampled.
    """

    objective: Objective = Objective.model_construct()
    optimizer: Optimizer = Optimizer.model_construct()
    minibatches: Count = 1
    epochs: Count = 1
    control: Literal["none", "shuffled_teacher", "self_teacher"] = "none"
    seed: Seed | None = None


class EvaluateSection(Section):
    """Held-out accuracy and reverse KL. Nulls mean: rollout's engine and length, the whole test split."""

    engine: EngineName | None = None
    problems: Count | None = None
    samples: Count = 1
    temperature: Annotated[float, Field(ge=0)] = 0.0
    max_new_tokens: Count | None = None
    every: Count = 1
    teacher: bool = True
    reverse_kl_problems: Annotated[int, Field(ge=0)] = 64
    seed: Seed | None = None


class Tracking(Section):
    """Where MLflow lives; `uri` null is SQLite in the workspace, `experiment` null the recipe's name.

    A password is none of a recipe's business, which is kept and mirrored: MLflow reads MLFLOW_TRACKING_USERNAME and
    MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN for a server, and libpq PGPASSWORD for PostgreSQL.
    """

    enabled: bool = True
    uri: str | None = None
    experiment: str | None = None

    @model_validator(mode="after")
    def _uri_holds_no_secret(self) -> "Tracking":
        if self.uri is not None and _holds_secret(self.uri):  # the URI itself is not repeated
            raise ValueError(
                "uri holds a password: export it as MLFLOW_TRACKING_PASSWORD, with MLFLOW_TRACKING_USERNAME, or as "
                "PGPASSWORD for PostgreSQL, and leave it out here"
            )
        return self


def _holds_secret(uri: str) -> bool:
    """Whether an address names a password, or for a web server anything before an `@`, which may be a token."""
    scheme, _, rest = uri.partition("://")
    user, at, _ = re.split(r"[/?#]", rest, maxsplit=1)[0].rpartition("@")
    in_query = re.search(r"[?&;](password|passwd|pwd|token|sslpassword)=", uri, re.IGNORECASE)
    return bool(in_query) or bool(at and (":" in user or scheme.lower() in ("http", "https")))


class Keep(Section):
    """Retention, in rounds: how many of the latest keep their weights and their optimizer state."""

    weights: Annotated[int, Field(ge=1)] = 2
    optimizer: Annotated[int, Field(ge=1)] = 2


class ServerRuntime(Section):
    """How teachers behind servers are asked: requests at once, the time each may take, and when to give up.

    A failed request is repeated up to `retries` times; `max_failures` in a row, of all requests, end the step.
    `ca_bundle` is a file with the certificates that are trusted instead of the system's.
    """

    concurrency: Annotated[int, Field(ge=1, le=1024)] = 8
    timeout_seconds: Positive = 120.0
    retries: Annotated[int, Field(ge=0)] = 8
    max_failures: Count = 100
    ca_bundle: str | None = None


class Placement(Section):
    """Where the engines of the roles run; null is `runtime.device`, on which the student is trained.

    `sampler` is the student's engine in rollout and evaluate; `teacher` may name a device for each teacher. An hf
    engine on the trainer's device shares its process and its weights, unless its role is in `own_process`; every
    other engine has a process of its own.
    """

    sampler: str | None = None
    teacher: str | dict[str, str] | None = None
    own_process: list[Literal["sampler", "teacher"]] = []

    def of_teacher(self, name: str) -> str | None:
        """The device of that teacher's engine, or null."""
        return self.teacher.get(name) if isinstance(self.teacher, dict) else self.teacher


class Vllm(Section):
    """How vLLM runs. `kv_cache_gib` null is 2 GiB on a CPU, and what `gpu_memory_utilization` leaves on a GPU.

    `enforce_eager` null compiles on GPUs only. `max_model_len` null is the model's own context; a shorter one needs
    less memory. `batch_tokens` are those of one forward pass, whose logits exist at once where they are scored.
    `sleep` frees the GPU while other engines work. `check_weights` compares each loaded model with transformers.
    """

    tensor_parallel_size: Count = 1
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    kv_cache_gib: Positive | None = None
    enforce_eager: bool | None = None
    max_model_len: Count | None = None
    max_num_seqs: Count = 256
    batch_tokens: Count = 2048
    prefix_caching: bool = True
    sleep: bool = False
    check_weights: bool = True

    @model_validator(mode="after")
    def _batch_holds_sequences(self) -> "Vllm":
        if self.batch_tokens < self.max_num_seqs:
            raise ValueError(
                "batch_tokens must be at least max_num_seqs: each sequence has a token in a batch"
            )
        return self


class Runtime(Section):
    """Hardware, batch sizes and retention; nothing here changes results beyond floating-point rounding.

    `preflight` examines student and teachers, quickly, before the first round that is not done (docs/doctor.md).
    """

    device: str = "auto"
    threads: Count | None = None
    sample_tokens: Count = 65536
    score_tokens: Count = 8192
    train_tokens: Count = 8192
    head_chunk_tokens: Count = 512
    part_rows: Annotated[int, Field(ge=1, le=512)] = 64
    checkpoint_steps: Count = 100
    gradient_checkpointing: bool = False
    keep: Keep = Keep.model_construct()
    server: ServerRuntime = ServerRuntime.model_construct()
    placement: Placement = Placement.model_construct()
    vllm: Vllm = Vllm.model_construct()
    allow_weak_teacher: bool = False
    preflight: bool = True


@dataclass(frozen=True, slots=True)
class Keeping:
    """What teacher-score keeps for each token: hidden states, or a support of k ids from either model, or neither."""

    teacher_top_k: int = 0
    student_top_k: int = 0
    hidden: bool = False


class Recipe(Section):
    """One experiment: a task, a student, its teachers, and how the student learns from them.

    `reproduce` lets an objective run that check-loss fails, to reproduce what others did.
    """

    name: Annotated[str, Field(pattern=NAME)]
    seed: Seed = 1
    reproduce: bool = False
    rounds: Count
    task: Task
    student: Student
    teachers: Annotated[list[Teacher], Field(min_length=1)]
    rollout: RolloutSection = RolloutSection.model_construct()
    teacher_score: TeacherScoreSection = TeacherScoreSection.model_construct()
    train: TrainSection = TrainSection.model_construct()
    evaluate: EvaluateSection = EvaluateSection.model_construct()
    tracking: Tracking = Tracking.model_construct()
    runtime: Runtime = Runtime.model_construct()

    @property
    def teacher(self) -> "Teacher":
        """The teacher, or the first of several."""
        return self.teachers[0]

    @property
    def is_routed(self) -> bool:
        """Whether each problem has one of several teachers."""
        return len(self.teachers) > 1 and self.teachers[0].only is not None

    @property
    def is_mixed(self) -> bool:
        """Whether several teachers score every completion."""
        return len(self.teachers) > 1 and self.teachers[0].only is None

    @property
    def is_served(self) -> bool:
        """Whether every teacher is behind a server, so that `teacher_score.engine` scores none."""
        return all(teacher.server is not None for teacher in self.teachers)

    @property
    def engines(self) -> set[EngineName]:
        """The engines that some step runs."""
        found = {self.rollout.engine, self.evaluate.engine or self.rollout.engine}
        asked = self.train.objective.has_kd or self.evaluate.reverse_kl_problems
        return found | ({self.teacher_score.engine} if asked and not self.is_served else set())

    @property
    def weights(self) -> dict[str, float]:
        """The share of each teacher in their mixture, by name; they sum to 1."""
        given = {teacher.name: 1.0 if teacher.weight is None else teacher.weight for teacher in self.teachers}
        return {name: weight / sum(given.values()) for name, weight in given.items()}

    @property
    def keep(self) -> "Keeping":
        """What teacher-score keeps of the teacher beside each token's log-prob."""
        section, support = self.teacher_score, self.train.objective.distribution_support
        if section.keep == "hidden":
            return Keeping(hidden=True)
        if isinstance(section.keep, KeepTopK):
            return Keeping(teacher_top_k=section.keep.top_k)
        if section.keep == "token" or support is None:
            return Keeping()
        if support == "vocabulary" or self.is_mixed:  # the top k of a mixture are those of none of its parts
            return Keeping(hidden=True)
        k = support.union_top_k
        return Keeping(
            teacher_top_k=support.teacher_top_k or k or 0, student_top_k=support.student_top_k or k or 0
        )

    @property
    def ema_decay(self) -> float | None:
        """The decay of the average that each round's train step keeps; None where no teacher is it."""
        return next((teacher.decay for teacher in self.teachers if teacher.decay is not None), None)

    @property
    def distill_horizon(self) -> int:
        """Optimizer steps over which the distill weight moves."""
        objective = self.train.objective
        rounds = objective.distill_schedule.rounds or objective.kd_rounds or self.rounds
        return rounds * self.train.minibatches * self.train.epochs

    @model_validator(mode="after")
    def _sections_agree(self) -> "Recipe":
        objective, section = self.train.objective, self.teacher_score
        support = objective.distribution_support
        if section.keep != "auto" and support is not None:
            enough = section.keep == "hidden" and (
                support == "vocabulary" or support.teacher_top_k is not None
            )
            if isinstance(section.keep, KeepTopK) and support != "vocabulary" and not self.is_mixed:
                enough = section.keep.top_k == support.teacher_top_k
            if not enough:
                raise ValueError(
                    f"teacher_score.keep {_spelled(section.keep)} is not what train.objective.kd needs: auto keeps that"
                )
        aliased = objective.has_kd and objective.end_token == "alias"  # noqa: S105 (no password)
        needs = (
            ("support",) if self.keep.student_top_k or aliased else ("hidden",) if self.keep.hidden else ()
        )
        for ability in needs:
            if ability not in ENGINE_ABILITIES[section.engine] and not self.is_served:
                what = "scores of given ids" if ability == "support" else "hidden states"
                other = "" if self.is_mixed or aliased else ", or support: {teacher_top_k: k}"
                raise ValueError(f"teacher_score.engine {section.engine} gives no {what}: use hf{other}")
        if section.logprobs == "float16" and not (self.keep.teacher_top_k or self.keep.student_top_k):
            raise ValueError("teacher_score.logprobs goes with a top-k support: nothing else is stored by it")
        arithmetic = isinstance(self.task, ArithmeticTask)
        models: list[tuple[str, Student | Teacher]] = [("student", self.student)]
        models += [(f"teacher {teacher.name!r}", teacher) for teacher in self.teachers]
        for where, model in models:
            if model.scratch is not None and not arithmetic:
                raise ValueError(f"{where}: scratch needs a task with its own tokenizer (arithmetic)")
        if objective.has_rl and self.rollout.samples == 1:
            raise ValueError("an RL term needs rollout.samples of 2 or more: a group of one has no advantage")
        if self.train.minibatches > self.rollout.rows:
            raise ValueError("train.minibatches is larger than the number of completions of a round")
        return self

    @model_validator(mode="after")
    def _vllm_fits(self) -> "Recipe":
        evaluator = self.evaluate.engine or self.rollout.engine
        if self.student.lora is not None and "vllm" in (self.rollout.engine, evaluator):
            raise ValueError(
                "engine vllm takes no adapter: with student.lora, rollout and evaluate use engine hf"
            )
        for teacher in self.teachers:
            if teacher.quantization is None:
                continue
            if teacher.self_ is not None:
                raise ValueError(
                    f"teacher {teacher.name!r}: quantization goes with a teacher of its own, not with the student"
                )
            engines = {self.teacher_score.engine, *([evaluator] if self.evaluate.teacher else [])}
            if "hf" in engines:
                raise ValueError(
                    f"teacher {teacher.name!r}: quantization goes with engine vllm, and engine hf would run it too: "
                    "set teacher_score.engine and evaluate.engine to vllm, or evaluate.teacher to false"
                )
        return self

    @model_validator(mode="after")
    def _off_policy_text_fits(self) -> "Recipe":
        objective, rollout = self.train.objective, self.rollout
        if rollout.on_policy_fraction == 1:
            idle = "train.objective.off_policy_term" if objective.off_policy_term is not None else ""
            idle = "rollout.off_policy_text" if rollout.off_policy_text != "reference" else idle
            if idle:
                raise ValueError(
                    f"{idle} has no effect where every prompt is sampled for: "
                    "set rollout.on_policy_fraction below 1, or remove it"
                )
            return self
        if not objective.has_kd or objective.kind == "then":
            why = "has rounds without a KD term" if objective.kind == "then" else "has no KD term"
            raise ValueError(
                f"rollout.on_policy_fraction below 1 needs an objective with a KD term, whose weight the other text "
                f"gets: kind {objective.kind} {why}; set on_policy_fraction to 1, or take kind kd, kdrl or srpo"
            )
        if objective.has_rl and not rollout.on_policy_prompts:
            raise ValueError(
                f"an RL term needs completions of the student: rollout.on_policy_fraction "
                f"{rollout.on_policy_fraction:g} of {rollout.prompts} prompts is none"
            )
        return self

    @model_validator(mode="after")
    def _servers_can(self) -> "Recipe":
        for teacher in self.teachers:
            if teacher.server is not None and (trouble := self._beyond_a_server(teacher)):
                raise ValueError(f"teacher {teacher.name!r} is behind a server, {trouble}")
        return self

    def _beyond_a_server(self, teacher: Teacher) -> str | None:
        """What the recipe asks of a server that it cannot give, and what to write instead; None if nothing."""
        rollout, section, objective = self.rollout, self.evaluate, self.train.objective
        if (teacher.temperature or rollout.temperature) != 1:
            asked = "teachers[].temperature" if teacher.temperature else "rollout.temperature"
            return (
                f"whose log-probs are at temperature 1, and {asked} is not 1: write temperature: 1 for this teacher "
                "(equal weights then do not mean a KL of 0), or set rollout.temperature to 1"
            )
        if self.keep.hidden:
            instead = "kd: rkl or k2" if self.is_mixed else "support: {teacher_top_k: k}, or kd: rkl or k2"
            return f"which gives no hidden states and no whole distributions: use {instead}"
        if self.keep.student_top_k:
            return "which gives its own top k and no scores of the student's: use support: {teacher_top_k: k}"
        if objective.has_kd and objective.end_token == "alias":  # noqa: S105 (no password)
            return "which gives no scores of other ids than those it reads: use end_token: mask"
        sft, is_cut = self.student.sft, rollout.top_p < 1 or rollout.top_k > 0
        sampled = {"evaluate.temperature": section.temperature} if section.teacher else {}
        if sft is not None and sft.text == "teacher":
            sampled["student.sft.temperature"] = sft.temperature
        if rollout.off_policy_text == "teacher":
            sampled["teachers[].temperature"] = 1.0
        for name, temperature in sampled.items():
            if temperature not in (0, 1) or (temperature and is_cut):
                return (
                    "whose log-probs of what it samples are at temperature 1 and of the whole distribution: set "
                    f"{name} to 0, or to 1 without rollout.top_p and top_k"
                    + (", or evaluate.teacher to false" if name.startswith("evaluate") else "")
                )
        return None

    @property
    def has_teacher_text(self) -> bool:
        """Whether the student is trained on what a teacher wrote: in its cold start, or in the rounds."""
        sft, rollout = self.student.sft, self.rollout
        return (sft is not None and sft.text == "teacher") or rollout.off_policy_text == "teacher"

    @model_validator(mode="after")
    def _teachers_can_write(self) -> "Recipe":
        for teacher in self.teachers:
            if teacher.sft is not None and teacher.sft.text == "teacher":
                raise ValueError(
                    f"teacher {teacher.name!r}: sft.text: teacher is for the student; a teacher's own cold start reads "
                    "the reference solutions"
                )
        if not self.has_teacher_text:
            return self
        if self.is_mixed:
            raise ValueError(
                "a mixture of teachers scores text and writes none: give each teacher the problems that it writes for "
                "by only, or take text: reference"
            )
        selves = [teacher for teacher in self.teachers if teacher.self_ is not None]
        if selves and self.student.sft is not None and self.student.sft.text == "teacher":
            raise ValueError(
                f"student.sft.text: teacher {selves[0].name!r} is the student that this cold start makes: "
                "take text: reference, or another teacher"
            )
        return self

    def _is_the_sampler(self, teacher: Teacher) -> bool:
        """Whether its distributions are those that the student samples from: equal weights, prompt and temperature."""
        own = (
            teacher.prompt is not None,
            bool(teacher.template) and teacher.template != self.student.template,
            teacher.temperature not in (None, self.rollout.temperature),
        )
        return (teacher.self_ == "current" or teacher.decay == 0) and not any(own)

    @model_validator(mode="after")
    def _control_fits(self) -> "Recipe":
        control = self.train.control
        if control == "none":
            return self
        if len(self.teachers) > 1:
            raise ValueError(f"train.control {control} goes with a single teacher")
        if not self.train.objective.has_kd:
            raise ValueError(f"train.control {control} needs an objective with a KD term")
        if control == "shuffled_teacher" and self.rollout.prompts < 2:
            raise ValueError("train.control shuffled_teacher needs rollout.prompts of 2 or more")
        if control == "self_teacher" and not self._is_the_sampler(self.teacher):
            raise ValueError(
                "train.control self_teacher needs teachers: [{self: current}], without a prompt, template or "
                "temperature of its own"
            )
        return self

    @model_validator(mode="after")
    def _teachers_agree(self) -> "Recipe":
        names = [teacher.name for teacher in self.teachers]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two teachers are called {twice!r}: give each a name of its own")
        routed = [teacher.only is not None for teacher in self.teachers]
        if len(names) == 1 and routed[0]:
            raise ValueError("only goes with several teachers: a single one teaches every problem")
        placed = self.runtime.placement.teacher
        if isinstance(placed, dict) and (foreign := sorted(placed.keys() - set(names))):
            raise ValueError(
                f"runtime.placement.teacher names {foreign[0]!r}, and no teacher is called so: {', '.join(names)}"
            )
        if any(routed) and not all(routed):
            lacking = names[routed.index(False)]
            raise ValueError(
                f"teacher {lacking!r} has no only, and others have: give it to all teachers or to none"
            )
        if not self.is_mixed and any(teacher.weight is not None for teacher in self.teachers):
            raise ValueError("weight goes with several teachers without only, which are mixed by it")
        if len({teacher.decay for teacher in self.teachers if teacher.decay is not None}) > 1:
            raise ValueError(
                "teachers with self: ema have different decays: one average is kept, give them the same"
            )
        if self.ema_decay is not None and self.student.lora is not None:
            raise ValueError(
                "self: ema averages whole weights, and with student.lora only an adapter is kept of each round: "
                "use self: initial or self: current, or train all weights"
            )
        silent = [teacher for teacher in self.teachers if self._is_the_sampler(teacher)]
        is_meant = self.train.control == "self_teacher"
        if silent and not is_meant and (not self.is_mixed or len(silent) == len(names)):
            raise ValueError(
                f"teacher {silent[0].name!r} would be the very student that samples, so its scores say nothing: "
                "give it a prompt, a template or a temperature of its own"
            )
        support = self.train.objective.distribution_support
        if self.is_mixed and isinstance(support, Support) and support.teacher_top_k is None:
            raise ValueError(
                "a mixture of teachers is not compared on the student's top k: "
                "use support: vocabulary or {teacher_top_k: k}, which are then the mixture's"
            )
        return self


def _spelled(keep: str | KeepTopK) -> str:
    return keep if isinstance(keep, str) else f"{{top_k: {keep.top_k}}}"


def resolved(recipe: Recipe) -> dict[str, JsonValue]:
    """Every field of the recipe with defaults filled in, as JSON."""
    value: dict[str, JsonValue] = recipe.model_dump(mode="json", by_alias=True)
    return value
