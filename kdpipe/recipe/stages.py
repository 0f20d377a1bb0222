"""The sections of the stages: rollout, teacher-score, train, evaluate."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from kdpipe.recipe.models import Optimizer
from kdpipe.recipe.objective import Objective
from kdpipe.recipe.section import Count, EngineName, Fraction, Positive, Section, Seed, TextSource


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


@dataclass(frozen=True, slots=True)
class Keeping:
    """What teacher-score keeps for each token: hidden states, or a support of k ids from either model, or neither."""

    teacher_top_k: int = 0
    student_top_k: int = 0
    hidden: bool = False


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
