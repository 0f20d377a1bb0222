"""Where and how a recipe runs, and MLflow: the two sections that change no result beyond rounding."""

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from kdpipe.recipe.section import Count, Positive, Section


class Tracking(Section):
    """Where MLflow lives, and what it is given.

    A password does not belong into a recipe, which is kept and mirrored: MLflow reads MLFLOW_TRACKING_USERNAME and
    MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN for a server, and libpq PGPASSWORD for PostgreSQL.
    """

    enabled: bool = True
    """Whether anything is mirrored into MLflow."""
    uri: str | None = None
    """Address of the tracking server; null is SQLite in the workspace."""
    experiment: str | None = None
    """Name of the experiment; null is the recipe's name."""
    log_model: bool = False
    """Whether the last student of a finished run becomes a logged model, which `mlflow.transformers.load_model`
    loads: its weights are copied into MLflow, and the end of the run waits for that."""

    def faults(self) -> Iterator[str]:
        if self.uri is not None and _may_hold_secret(self.uri):  # the URI itself is not repeated
            yield (
                "uri holds a password, or what could be one (before @, after ?, # or ;): export it as "
                "MLFLOW_TRACKING_PASSWORD, with MLFLOW_TRACKING_USERNAME, or as PGPASSWORD for PostgreSQL, and leave "
                "it out here"
            )


_HARMLESS = {"sslmode", "sslrootcert", "ssl_ca", "charset", "driver", "connect_timeout", "application_name"}
"""Settings in a database's address that are no secrets."""


def _may_hold_secret(uri: str) -> bool:
    """Whether an address can hold a secret: more than a database's user and some of its settings."""
    scheme, _, rest = uri.strip().partition(":")
    kind = scheme.lower().partition("+")[0]
    place, _, query = rest.partition("?")
    if kind in ("postgresql", "mysql", "mssql", "sqlite"):
        names = {setting.partition("=")[0].lower() for setting in re.split("[&;]", query) if setting}
        has_more = ":" in place.rpartition("@")[0] or bool(re.search("[#;]", rest))
        return not names <= _HARMLESS or (has_more and kind != "sqlite")
    is_web = "//" in uri or kind in ("http", "https")
    return is_web and bool(re.search("[@?#;]", rest))


class Keep(Section):
    """Retention of weights and optimizer states, in rounds."""

    weights: Annotated[int, Field(ge=1)] = 2
    """Latest rounds that keep their weights; the best and the last evaluated keep theirs too."""
    optimizer: Annotated[int, Field(ge=1)] = 2
    """Latest rounds that keep the optimizer's state."""


class ServerRuntime(Section):
    """How teachers behind servers are asked, and when to give up."""

    concurrency: Annotated[int, Field(ge=1, le=1024)] = 8
    """Requests at once."""
    timeout_seconds: Positive = 120.0
    """Longest time for one request."""
    retries: Annotated[int, Field(ge=0)] = 8
    """Times that a failed request is sent again."""
    max_failures: Count = 100
    """Failures in a row, of all requests, that end the step."""
    ca_bundle: str | None = None
    """File of the certificates that are trusted in place of the system's."""


class Placement(Section):
    """Where the engines of the roles run; null is `runtime.device`, on which the student is trained.

    An hf engine on the trainer's device shares its process and its weights, unless its role is in `own_process`;
    every other engine has a process of its own.
    """

    sampler: str | None = None
    """Device of the student's engine in rollout and evaluate."""
    teacher: str | dict[str, str] | None = None
    """Device of the teachers' engines, or of each by name."""
    own_process: list[Literal["sampler", "teacher"]] = []
    """Roles whose hf engine has a process of its own."""

    def of_teacher(self, name: str) -> str | None:
        """The device of that teacher's engine, or null."""
        return self.teacher.get(name) if isinstance(self.teacher, dict) else self.teacher


WHOLE_SHARE = 0.9
"""Of a GPU's memory, for a vLLM that has it for itself."""


class Vllm(Section):
    """How vLLM runs."""

    tensor_parallel_size: Count = 1
    """GPUs that share one model."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the GPU's memory; null is 0.9, less what the trainer keeps on the same GPU."""
    kv_cache_gib: Positive | None = None
    """null is 2 on a CPU, and what gpu_memory_utilization leaves on a GPU."""
    enforce_eager: bool | None = None
    """null compiles on GPUs only."""
    max_model_len: Count | None = None
    """null is the model's context; a shorter one needs less memory."""
    max_num_seqs: Count = 256
    """Sequences at once."""
    batch_tokens: Count = 2048
    """Tokens of a forward pass, whose logits exist at once where they are scored."""
    prefix_caching: bool = True
    """Whether prompts that begin alike share their cache."""
    sleep: bool | None = None
    """Frees the GPU while others work; null is on where roles share a GPU."""
    check_weights: bool = True
    """Compares each loaded model with transformers."""

    def faults(self) -> Iterator[str]:
        if self.batch_tokens < self.max_num_seqs:
            yield "batch_tokens must be at least max_num_seqs: each sequence has a token in a batch"


class Runtime(Section):
    """Hardware, batch sizes and retention; nothing here changes results beyond floating-point rounding."""

    device: str = "auto"
    """auto is the first GPU, else the CPU."""
    threads: Count | None = None
    """CPU threads; null is as many as PyTorch takes."""
    sample_tokens: Count = 65536
    """Tokens in a batch that is sampled."""
    score_tokens: Count = 8192
    """Tokens in a batch that is scored."""
    train_tokens: Count = 8192
    """Tokens in a micro-batch."""
    head_chunk_tokens: Count = 512
    """Tokens whose logits exist at once."""
    part_rows: Annotated[int, Field(ge=1, le=512)] = 64
    """Rows of a part of a long step: what a kill can cost."""
    checkpoint_steps: Count = 100
    """Optimizer steps between checkpoints inside a step."""
    gradient_checkpointing: bool = False
    """Less memory for a second forward pass."""
    keep: Keep = Keep.model_construct()
    """What is kept of the weights of past rounds."""
    server: ServerRuntime = ServerRuntime.model_construct()
    """How servers are asked."""
    placement: Placement = Placement.model_construct()
    """Devices and processes of the roles."""
    vllm: Vllm = Vllm.model_construct()
    """How vLLM runs."""
    allow_weak_teacher: bool = False
    """Goes on although the teacher is not better than the student."""
    preflight: bool = True
    """Whether run makes the quick probes before the first round that is not done (`kdpipe docs doctor`)."""
