"""Where and how a recipe runs and who is told: the two sections that change no result beyond rounding."""

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from kdpipe.recipe.section import Count, Positive, Section


class Tracking(Section):
    """Where MLflow lives; `uri` null is SQLite in the workspace, `experiment` null the recipe's name.

    With `log_model` the last student of a finished run becomes a logged model, which `mlflow.transformers.load_model`
    loads: its weights are copied there, and the end of the run waits for that.

    A password is none of a recipe's business, which is kept and mirrored: MLflow reads MLFLOW_TRACKING_USERNAME and
    MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN for a server, and libpq PGPASSWORD for PostgreSQL.
    """

    enabled: bool = True
    uri: str | None = None
    experiment: str | None = None
    log_model: bool = False

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
