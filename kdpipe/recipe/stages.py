"""The sections of the stages: rollout, teacher-score, train, evaluate."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from kdpipe.recipe.models import Optimizer
from kdpipe.recipe.objective import Objective, RklTerm, SampledTerm
from kdpipe.recipe.section import Count, EngineName, Fraction, Positive, Section, Seed, TextSource


class RolloutSection(Section):
    """How each round samples from the student."""

    engine: EngineName = "hf"
    """What runs the model: hf (transformers, exact repeats) or vllm (GPUs)."""
    prompts: Count = 64
    """Prompts of a round."""
    samples: Count = 1
    """Completions for each prompt; an RL term needs 2 or more."""
    on_policy_fraction: Fraction = 1.0
    """Share of a round's prompts for which the student samples; each of the others gives one row."""
    off_policy_text: TextSource = "reference"
    """Who writes the completions that the student does not sample: the reference solution, or the teacher."""
    temperature: Positive = 1.0
    """Temperature at which the student samples, and every log-prob is taken."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Samples from the most probable ids that hold this share."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Samples from the k most probable ids; 0 is all."""
    max_new_tokens: Count = 256
    """Longest completion; longer ones are cut and counted."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """Strings that end a completion, for base models."""
    seed: Seed | None = None
    """Replaces the recipe's seed here; null is the recipe's."""

    @property
    def is_cut(self) -> bool:
        """Whether ids that the student would rarely choose are never sampled."""
        return self.top_p < 1 or self.top_k > 0

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
    """The teacher's most probable ids that are kept."""


class TeacherScoreSection(Section):
    """How the teacher scores, and what is kept of its distribution."""

    engine: EngineName = "hf"
    """What runs the model: hf (transformers, exact repeats) or vllm (GPUs)."""
    keep: Literal["auto", "token", "hidden"] | KeepTopK = "auto"
    """What is kept beside each token's log-prob: what the objective needs (auto), nothing (token), ids, or the
    states before the output head (hidden), from which train computes the whole distribution."""
    logprobs: Literal["float32", "float16"] = "float32"
    """Numbers in which a support's log-probs are stored."""


@dataclass(frozen=True, slots=True)
class Keeping:
    """What teacher-score keeps for each token: hidden states, k ids of either model, or neither."""

    teacher_top_k: int = 0
    student_top_k: int = 0
    hidden: bool = False


class TrainSection(Section):
    """How a round's rows become optimizer steps: `epochs` passes of `minibatches` steps each.

    The control `shuffled_teacher` gives position t of a completion the scores of position t, wrapped, of a completion
    of another prompt; with `self_teacher` the teacher is the student that sampled; `constant_advantage` has -1 in the
    place of q - s at every sampled token, whatever the teacher says.
    """

    objective: Objective = Objective.model_construct()
    """What is descended."""
    optimizer: Optimizer = Optimizer.model_construct()
    """AdamW."""
    minibatches: Count = 1
    """Optimizer steps of a pass over the round."""
    epochs: Count = 1
    """Passes over the round."""
    control: Literal["none", "shuffled_teacher", "self_teacher", "constant_advantage"] = "none"
    """Makes the recipe a control arm: shuffled scores, the student as its own teacher, or one fixed signal."""
    seed: Seed | None = None
    """Replaces the recipe's seed here; null is the recipe's."""

    def faults(self) -> Iterator[str]:
        """What has no signal q - s at each sampled token, in whose place a constant could stand."""
        kd = self.objective.kd
        if self.control != "constant_advantage":
            return
        if self.objective.kind == "srpo":
            yield "control constant_advantage goes with kind kd, kdrl or then: srpo's signal is one with the reward's"
        if not isinstance(kd, RklTerm) or kd.gamma or kd.baseline != "none":
            yield (
                "control constant_advantage takes the place of q - s at each sampled token: it needs kd: rkl without "
                "gamma and baseline"
            )

    def lone_baselines(self, rollout: RolloutSection) -> Iterator[str]:
        """Faults of a mean over the others of a group or step in which there are none."""
        kd, own = self.objective.kd, rollout.on_policy_prompts * rollout.samples
        if not (self.objective.has_kd and isinstance(kd, SampledTerm)):
            return
        if kd.baseline == "group" and rollout.samples == 1:
            yield (
                "train.objective.kd.baseline group needs rollout.samples of 2 or more: a completion without others in "
                "its group has no baseline; set samples, or take baseline step or exact"
            )
        if kd.baseline == "step" and 0 < own < 2 * self.minibatches:
            yield (
                f"train.objective.kd.baseline step needs two completions of the student in an optimizer step: {own} in "
                f"{self.minibatches} minibatches leave some alone; lower train.minibatches, or take baseline exact"
            )


class EvaluateSection(Section):
    """Held-out accuracy and reverse KL. With `task.grader: none` reverse KL is the headline."""

    engine: EngineName | None = None
    """What runs the model: hf or vllm; null is rollout's."""
    problems: Count | None = None
    """How many test problems, of an order that no seed changes; null is all."""
    samples: Count = 1
    """Answers to each problem; with several, pass@k and maj@k are reported."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Temperature of the answers; 0 is greedy."""
    max_new_tokens: Count | None = None
    """Longest answer; null is rollout's."""
    every: Count = 1
    """Rounds between evaluations; the last is always evaluated."""
    teacher: bool = True
    """Whether the teacher is graded too, for the headroom; where nothing is graded that is the reverse KL at first."""
    reverse_kl_problems: Annotated[int, Field(ge=0)] = 64
    """Test prompts on which reverse KL is measured; 0 is none."""
    seed: Seed | None = None
    """Replaces the recipe's seed here; null is the recipe's."""
