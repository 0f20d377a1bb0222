"""Memory of every role, disk and tokens of a round that a recipe needs, from sizes alone.

Bounds rather than forecasts: every completion is taken to be `max_new_tokens` long, nothing is compressed, and what
cannot be known from sizes (activations) is counted roughly and marked so. No weights are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kdpipe.models.reference import Shape
from kdpipe.recipe.schema import Recipe

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_ID = 4  # bytes of a token id, and of a log-prob
_TEXT = 4  # bytes of text for a token, about
_KEPT_PER_LAYER = 10  # activations of a layer that backward needs, in hidden sizes beside its MLP, about
_LOGIT_COPIES = 3  # logits, their log-softmax and its gradient
STAYS = ("weights", "optimizer")
"""What the trainer keeps on its device while others work; all else it needs while it trains."""
LEAST_SEQUENCES = 16
"""What a vLLM that samples is to hold at once, at full length; it takes more where there is room."""


@dataclass(frozen=True, slots=True)
class Sized:
    """A model with the dtype that it computes in; `adapter` is the number of weights of its LoRA adapter."""

    name: str
    shape: Shape
    dtype: str
    adapter: int = 0

    @property
    def element(self) -> int:
        """Bytes of one weight."""
        return DTYPE_BYTES[self.dtype]

    @property
    def weights(self) -> int:
        """Bytes of its weights."""
        return self.shape.parameters * self.element


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes by role and part, bytes on disk of a round by file, tokens of a round by stage.

    Of the whole run, `disk_bytes_written` is what all rounds write, `disk_bytes_kept` what stays of it.
    """

    parameters: Mapping[str, int]
    memory_bytes: Mapping[str, Mapping[str, int]]
    disk_bytes_per_round: Mapping[str, int]
    disk_bytes_written: int
    disk_bytes_kept: int
    tokens_per_round: Mapping[str, int]


def estimate(
    recipe: Recipe, student: Sized, teachers: Mapping[str, Sized | None], *, prompt_tokens: int
) -> Estimate:
    """What `recipe` needs with prompts of `prompt_tokens` tokens; None is a teacher on a server."""
    here = {name: teacher for name, teacher in teachers.items() if teacher is not None}
    distinct = {name: teacher for name, teacher in here.items() if teacher.name != student.name}
    memory = {
        "train student": training(recipe, student),
        "sample student": _sampling(recipe, student, prompt_tokens),
    }
    memory |= {f"score {name}": _scoring(recipe, one, prompt_tokens) for name, one in distinct.items()}
    disk = _disk(recipe, student, teachers, prompt_tokens)
    keep = recipe.runtime.keep
    small = sum(size for name, size in disk.items() if name not in ("model", "trainer", "ema"))
    kept = (
        (keep.weights + 2) * (disk["model"] + disk.get("ema", 0))  # and those evaluated best and last
        + keep.optimizer * disk["trainer"]
        + recipe.rounds * small
    )
    parameters = {student.name: student.shape.parameters}
    parameters |= {name: teacher.shape.parameters for name, teacher in distinct.items()}
    if student.adapter:
        parameters["adapter"] = student.adapter
    written = recipe.rounds * sum(disk.values())
    return Estimate(parameters, memory, disk, written, kept, _tokens(recipe, len(teachers), prompt_tokens))


def training(recipe: Recipe, student: Sized) -> dict[str, int]:
    """Weights with their masters, gradients, both moments, and what backward needs of a micro-batch."""
    shape, runtime = student.shape, recipe.runtime
    trained = student.adapter or shape.parameters
    frozen = student.weights if student.adapter else 0
    width = _KEPT_PER_LAYER * shape.hidden + 3 * shape.intermediate
    kept = shape.layers * width
    if runtime.gradient_checkpointing:
        kept = shape.layers * shape.hidden + width  # what goes into each layer, and one layer's own
    return {
        "weights": frozen + 4 * trained,
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        "activations, roughly": runtime.train_tokens * kept * student.element
        + _logits(student, runtime.head_chunk_tokens),
    }


def _logits(model: Sized, tokens: int) -> int:
    return _LOGIT_COPIES * tokens * model.shape.rows * 4


def _sampling(recipe: Recipe, student: Sized, prompt_tokens: int) -> dict[str, int]:
    """A copy of the weights, unless the trained ones serve, and keys and values of one batch."""
    shape, runtime = student.shape, recipe.runtime
    length = prompt_tokens + recipe.rollout.max_new_tokens
    rows = recipe.rollout.on_policy_prompts * recipe.rollout.samples
    tokens = min(max(runtime.sample_tokens, length), rows * length)
    if recipe.rollout.engine == "vllm":
        tokens = min(LEAST_SEQUENCES, runtime.vllm.max_num_seqs, rows) * length
    is_shared = shares_weights(recipe, student)
    return {
        "weights": 0 if is_shared else student.weights,
        "keys and values": 2 * tokens * shape.layers * shape.kv_width * student.element,
    }


def shares_weights(recipe: Recipe, student: Sized) -> bool:
    """Whether the sampler runs the very weights that are trained."""
    placement, runtime = recipe.runtime.placement, recipe.runtime
    is_here = placement.sampler in (None, runtime.device) and "sampler" not in placement.own_process
    return recipe.rollout.engine == "hf" and is_here and (bool(student.adapter) or student.dtype == "float32")


def _scoring(recipe: Recipe, teacher: Sized, prompt_tokens: int) -> dict[str, int]:
    """The teacher's weights, and one forward pass without gradients."""
    shape, runtime = teacher.shape, recipe.runtime
    tokens, at_once, cached = runtime.score_tokens, runtime.head_chunk_tokens, 0
    if recipe.teacher_score.engine == "vllm":
        tokens = at_once = runtime.vllm.batch_tokens
        length = prompt_tokens + recipe.rollout.max_new_tokens
        cached = 2 * max(tokens, length) * shape.layers * shape.kv_width * teacher.element
    passing = tokens * (4 * shape.hidden + 2 * shape.intermediate) * teacher.element
    found = {"weights": teacher.weights, "activations, roughly": passing + _logits(teacher, at_once)}
    return {**found, "keys and values": cached} if cached else found


def _disk(
    recipe: Recipe, student: Sized, teachers: Mapping[str, Sized | None], prompt_tokens: int
) -> dict[str, int]:
    """Bytes of what one round writes, uncompressed."""
    rows, new = recipe.rollout.rows, recipe.rollout.max_new_tokens
    prompt = rows * prompt_tokens
    completion = rows * new
    trained = student.adapter or student.shape.parameters
    masters = 0 if student.adapter or student.dtype == "float32" else 4
    written = 4 * trained if student.adapter else student.weights
    share = 1 / len(teachers) if recipe.is_routed else 1.0  # of the completions, for each teacher
    found = {
        "rollouts": prompt * (_ID + _TEXT) + completion * (2 * _ID + _TEXT),
        "scores": sum(
            (prompt * _ID + completion * (1 + _kept_bytes(recipe, teacher))) * share
            for teacher in teachers.values()
        ),
        "completions": completion * _ID,
        "model": written,
        "trainer": trained * (8 + masters),
    }
    if recipe.ema_decay is not None:
        found["ema"] = student.weights + (0 if student.dtype == "float32" else 4 * trained)
    return {name: int(size) for name, size in found.items()}


def _kept_bytes(recipe: Recipe, teacher: Sized | None) -> int:
    """Bytes that teacher-score keeps of a completion token; a served teacher gives no hidden states."""
    keep = recipe.keep
    if keep.hidden and teacher is not None:
        return _ID + teacher.shape.hidden * teacher.element
    k = keep.teacher_top_k + keep.student_top_k
    if not k:
        return _ID
    return 2 * _ID + k * (_ID + (2 if recipe.teacher_score.logprobs == "float16" else 4))


def _tokens(recipe: Recipe, num_teachers: int, prompt_tokens: int) -> dict[str, int]:
    """Tokens that a round samples, scores and trains on, at most."""
    rollout = recipe.rollout
    sampled = rollout.on_policy_prompts * rollout.samples * rollout.max_new_tokens
    passed = rollout.rows * (prompt_tokens + rollout.max_new_tokens)
    scored = passed * (1 if recipe.is_routed else num_teachers)
    return {"sampled": sampled, "scored": scored, "trained": passed * recipe.train.epochs}
