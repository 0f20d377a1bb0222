"""What train descends: the terms, their weights, and what is done about text of another policy."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kdpipe.recipe.section import Count, Fraction, Positive, Section


class Support(Section):
    """The ids on which a distribution is compared, and a tail bucket for all others.

    Exactly one is given. The ids are chosen when the teacher scores, and kept.
    """

    teacher_top_k: Count | None = None
    """The teacher's most probable ids."""
    student_top_k: Count | None = None
    """The most probable ids of the student that sampled."""
    union_top_k: Count | None = None
    """The most probable ids of either."""

    def faults(self) -> Iterator[str]:
        if sum(k is not None for k in (self.teacher_top_k, self.student_top_k, self.union_top_k)) != 1:
            yield "give exactly one of: teacher_top_k, student_top_k, union_top_k"


AnySupport = Literal["vocabulary"] | Support
DEFAULT_SUPPORT = Support.model_construct(teacher_top_k=64)


class RatioControl(Section):
    """Weight of off-policy tokens by their importance ratio."""

    control: Literal["none", "truncate", "mask", "clip"] = "none"
    """Nothing, cut at cap, leave out, or clip as PPO does."""
    cap: Annotated[float, Field(ge=1)] | None = None
    """Largest ratio, for truncate."""
    low: Annotated[float, Field(ge=0)] | None = None
    """Smallest ratio, for mask and clip."""
    high: Positive | None = None
    """Largest ratio, for mask and clip."""

    def faults(self) -> Iterator[str]:
        given = {name for name in ("cap", "low", "high") if getattr(self, name) is not None}
        takes = {"none": set(), "truncate": {"cap"}, "mask": {"low", "high"}, "clip": {"low", "high"}}
        if given != (wanted := takes[self.control]):
            yield f"control {self.control} takes {', '.join(sorted(wanted)) or 'no parameters'}"
        if self.control == "mask" and not (self.low < 1 < self.high):  # type: ignore[operator]
            yield "mask keeps ratios between low and high, and needs low < 1 < high"


class DecoupledControl(Section):
    """Two weights whose product is w: one acts on exp(s - p), the other on exp(p - b)."""

    update: RatioControl = RatioControl.model_construct()
    """Control of exp(s - p), the step's own movement."""
    behaviour: RatioControl = RatioControl.model_construct()
    """Control of exp(p - b), sampler against trainer."""

    def faults(self) -> Iterator[str]:
        if self.update.control not in ("none", "clip"):
            yield "update.control is none or clip"
        if self.behaviour.control not in ("none", "truncate", "mask"):
            yield "behaviour.control is none, truncate or mask"


class SampledTerm(Section):
    """What the terms by the sampled token share."""

    ratio: RatioControl = RatioControl.model_construct()
    """What is done with the importance ratio of a token, exp(s - b)."""
    decoupled: DecoupledControl | None = None
    """Two ratios through the proximal policy in place of one."""
    baseline: Literal["none", "step", "group", "exact"] = "none"
    """Subtracted from the signal: its mean over the other completions of the step or of the group, or its expectation
    given the prefix (exact). The expected gradient stays as it is, and varies less."""

    @property
    def is_bounded(self) -> bool:
        """Whether something is done with importance ratios."""
        parts = [self.ratio] if self.decoupled is None else [self.decoupled.update, self.decoupled.behaviour]
        return any(part.control != "none" for part in parts)

    def faults(self) -> Iterator[str]:
        if self.decoupled is not None and self.ratio.control != "none":
            yield "give ratio or decoupled, not both"


class SampledReverseKl(SampledTerm):
    """A sampled-token term whose signal is q - s."""

    support: AnySupport | None = None
    """The ids that the exact baseline is computed on; null is the teacher's top 64."""

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.support is not None and self.baseline != "exact":
            yield "support goes with baseline: exact"


class RklTerm(SampledReverseKl):
    """Reverse KL by the sampled token (policy-gradient surrogate); `gamma` discounts the future sum."""

    term: Literal["rkl"]
    """This divergence."""
    gamma: Fraction = 0.0
    """Discount of the future tokens' signal; 0 is each token's own."""


class K2Term(SampledReverseKl):
    """Reverse KL by the sampled token, as half the squared log-ratio."""

    term: Literal["k2"]
    """This divergence."""


class K3Term(SampledTerm):
    """GRPO's KL estimator as a loss: its gradient is that of the *forward* KL."""

    term: Literal["k3"]
    """This divergence."""
    baseline: Literal["none", "step", "group"] = "none"
    """Subtracted from the signal: its mean over the other completions of the step, or of the group."""


class K1LossTerm(Section):
    """AReaL's joint branch: s - q as a loss, whose expected gradient is zero. For reproducing it only."""

    term: Literal["k1_loss"]
    """This divergence."""


class JsdTerm(Section):
    """Generalised Jensen-Shannon divergence; beta 0 is forward KL(P|S), beta 1 reverse KL(S|P)."""

    term: Literal["jsd"]
    """This divergence."""
    beta: Fraction = 0.5
    """0 is forward KL, 1 reverse KL."""
    support: AnySupport = DEFAULT_SUPPORT
    """The ids on which distributions are compared; all others are one bucket."""


class SkewKlTerm(Section):
    """KL of the teacher against its mixture with the student, `alpha` being the teacher's share."""

    term: Literal["skew_kl"]
    """This divergence."""
    alpha: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The teacher's share of the mixture."""
    support: AnySupport = DEFAULT_SUPPORT
    """The ids on which distributions are compared; all others are one bucket."""


class SkewRklTerm(Section):
    """KL of the student against its mixture with the teacher, `alpha` being the student's share."""

    term: Literal["skew_rkl"]
    """This divergence."""
    alpha: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The student's share of the mixture."""
    support: AnySupport = DEFAULT_SUPPORT
    """The ids on which distributions are compared; all others are one bucket."""


DistributionTerm = JsdTerm | SkewKlTerm | SkewRklTerm
KdTerm = Annotated[
    RklTerm | K2Term | K3Term | K1LossTerm | JsdTerm | SkewKlTerm | SkewRklTerm, Field(discriminator="term")
]


class BehaviourControl(Section):
    """What the RL term does with `v = exp(proximal - behaviour)`."""

    control: Literal["none", "truncate", "mask"] = "none"
    """Nothing, cut at cap, or leave out above it."""
    cap: Annotated[float, Field(ge=1)] | None = None
    """Largest ratio, for truncate and mask."""

    def faults(self) -> Iterator[str]:
        if (self.cap is not None) != (self.control != "none"):
            yield "cap goes with control truncate or mask, and both need it"


class DistillSchedule(Section):
    """How `distill_weight` moves to `end` over optimizer steps, both ends included."""

    kind: Literal["constant", "linear", "cosine"] = "constant"
    """The curve."""
    end: Annotated[float, Field(ge=0)] | None = None
    """The last weight, for linear and cosine."""
    rounds: Count | None = None
    """Rounds over which it moves; null is all."""

    def faults(self) -> Iterator[str]:
        if (self.end is not None) != (self.kind != "constant"):
            yield "end goes with kind linear or cosine, and both need it"
        if self.rounds is not None and self.kind == "constant":
            yield "rounds goes with kind linear or cosine"


class Objective(Section):
    """What train descends: a KD term, an RL term, or both."""

    kind: Literal["kd", "grpo", "kdrl", "srpo", "then"] = "kd"
    """kd, grpo, their sum kdrl, srpo, or then (kd first, grpo after)."""
    kd: KdTerm = RklTerm.model_construct(term="rkl")
    """The KD term: a name, or a mapping with `term`."""
    kd_rounds: Count | None = None
    """Rounds of kd before grpo, for kind then."""
    rl_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the RL term."""
    distill_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the KD term."""
    distill_schedule: DistillSchedule = DistillSchedule.model_construct()
    """How that weight moves."""
    mask: Literal["none", "wrong", "all_wrong_groups"] = "none"
    """Where kdrl leaves the KD term out: nowhere, or where the student is right anyway."""
    reward_scaling: Positive = 1.0
    """Multiplies the reward after reward_bias is added."""
    reward_bias: float = 0.0
    """Added to the reward, 0 or 1, before scaling."""
    reward_clip: Positive = 20.0
    """Scaled rewards are cut to plus and minus this."""
    group_normalization: Literal["mean_std", "mean"] = "mean_std"
    """Advantages less their group's mean, and divided by its deviation or not."""
    batch_normalization: bool = False
    """Advantages standardised over the batch as well."""
    clip_low: Annotated[float, Field(gt=0, le=1)] = 0.2
    """PPO's clip: ratios below 1 minus this."""
    clip_high: Positive = 0.2
    """PPO's clip: ratios above 1 plus this."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bounds the loss where the advantage is negative."""
    behaviour: BehaviourControl = BehaviourControl.model_construct()
    """What the RL term does with the ratio of the proximal policy to the sampler."""
    normalization: Literal["token", "sequence", "fixed"] = "token"
    """What an optimizer step's sum over tokens is divided by."""
    fixed_length: Count | None = None
    """The divisor's length, for normalization fixed; null is max_new_tokens."""
    truncated: Literal["keep", "drop", "no_reward"] = "keep"
    """Completions cut at max_new_tokens count, are dropped, or get no reward."""
    end_token: Literal["keep", "mask", "alias"] = "keep"  # noqa: S105 (no password)
    """The end token counts, is left out, or the teacher's end id is swapped with the student's (alias)."""
    off_policy_term: Literal["kd", "cross_entropy"] | None = None
    """The loss, by distill_weight, of text that the student did not sample, in place of all other terms."""

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
    def reward_fields(self) -> list[str]:
        """The fields, other than by default, that read a reward or whether an answer is right."""
        names = ("rl_weight", "mask", "reward_scaling", "reward_bias", "reward_clip")
        found = [name for name in names if getattr(self, name) != type(self).model_fields[name].default]
        return [
            *(["kind"] if self.kind != "kd" else []),
            *found,
            *(["truncated"] if self.truncated == "no_reward" else []),
        ]

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

    def faults(self) -> Iterator[str]:
        if (self.kd_rounds is not None) != (self.kind == "then"):
            yield "kd_rounds goes with kind: then, which needs it"
        if self.kind == "then" and not (self.has_kd and self.has_rl):
            yield "then needs both weights above 0"
        if not (self.has_kd or self.has_rl):
            yield "every weight of this objective is 0: nothing would be trained"
        if self.mask != "none" and self.kind != "kdrl":
            yield "mask goes with kind: kdrl"
        if self.kind == "srpo" and self.kd != RklTerm.model_construct(term="rkl"):
            yield "srpo takes kd: rkl without further settings: its signal goes through the RL loss"
        if self.off_policy_term == "kd" and not isinstance(self.kd, DistributionTerm):
            yield (
                f"off_policy_term: kd needs a term over whole distributions (jsd, skew_kl, skew_rkl): {self.kd.term} "
                "goes by tokens that the student sampled, and it did not sample this text; use cross_entropy"
            )
        if self.fixed_length is not None and self.normalization != "fixed":
            yield "fixed_length goes with normalization: fixed"
        schedule = self.distill_schedule
        if schedule.kind != "constant" and self.kind == "grpo":
            yield "distill_schedule needs an objective with a KD term"
        if (not self.has_rl or self.kind == "then") and 0 in (self.distill_weight, schedule.end):
            yield "a distill weight of 0 would leave steps without anything to train"
