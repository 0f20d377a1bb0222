"""How completions are drawn, and which prompts of a round the student samples for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kdpipe.recipe.stages import RolloutSection


@dataclass(frozen=True, slots=True)
class DrawSettings:
    """The distribution that tokens are drawn from, and where a completion ends.

    Temperature 0 is greedy decoding, which has no top-p or top-k.
    """

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    stop: Sequence[str]

    @classmethod
    def of(
        cls, rollout: RolloutSection, *, temperature: float | None = None, max_new_tokens: int | None = None
    ) -> DrawSettings:
        """The rollout's, with another temperature or length where one is given."""
        heat = rollout.temperature if temperature is None else temperature
        return cls(
            temperature=heat,
            top_p=rollout.top_p if heat else 1.0,
            top_k=rollout.top_k if heat else 0,
            max_new_tokens=max_new_tokens or rollout.max_new_tokens,
            stop=rollout.stop,
        )


@dataclass(frozen=True, slots=True)
class PromptSettings:
    """How many prompts a round has, and the share of them that the student samples for."""

    prompts: int
    on_policy_fraction: float

    @classmethod
    def of(cls, rollout: RolloutSection) -> PromptSettings:
        """Those of every round."""
        return cls(rollout.prompts, rollout.on_policy_fraction)

    @property
    def on_policy_prompts(self) -> int:
        """How many of a round's prompts the student samples for."""
        return round(self.on_policy_fraction * self.prompts)
