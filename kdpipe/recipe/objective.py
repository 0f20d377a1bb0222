"""What train descends: the terms, their weights, and what is done about text of another policy."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kdpipe.recipe.section import Count, Fraction, Positive, Section


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
