"""The mismatch ledger: the sampler's log-probs b less the trainer's p of the same tokens, in nats.

Both are of the same weights at the same temperature, so that all of it is the engines' doing: kernels, dtypes,
batching, or a fault. Made from two files: `sampler_logprobs` of rollouts.parquet, and `proximal_logprobs` of
completions.parquet for the same prompt and sample.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kdpipe.recipe.objective import BehaviourControl, Objective, RatioControl, SampledTerm


def mismatch(sampler: npt.ArrayLike, trainer: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The difference b - p at each token [n] of a completion."""
    return np.asarray(sampler, np.float64) - np.asarray(trainer, np.float64)


def ledger(objective: Objective, differences: npt.NDArray[np.float64]) -> dict[str, float]:
    """Metrics of b - p of some tokens, none of no tokens; `objective` is that of the round."""
    if not differences.size:
        return {}
    absolute = np.abs(differences)
    return {
        "mismatch_nats_mean": float(differences.mean()),
        "mismatch_nats_p99": float(np.quantile(absolute, 0.99)),
        "mismatch_nats_max": float(absolute.max()),
        "mismatch_acted_fraction": float(acted(objective, differences).mean()),
    }


def acted(objective: Objective, differences: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """At which tokens a control of the objective would not leave exp(p - b) as it is, before any update.

    Where `clip` is the control these are the tokens outside its range; it acts on them where the signal points
    further out.
    """
    ratio = np.exp(-differences)
    found = np.zeros(ratio.shape, np.bool_)
    kd = objective.kd
    if objective.has_kd and isinstance(kd, SampledTerm):
        found |= _beyond(kd.ratio if kd.decoupled is None else kd.decoupled.behaviour, ratio)
    if objective.has_rl:
        found |= _beyond(objective.behaviour, ratio)
    return found


def _beyond(
    settings: RatioControl | BehaviourControl, ratio: npt.NDArray[np.float64]
) -> npt.NDArray[np.bool_]:
    match settings:
        case RatioControl(control="mask", low=float(low), high=float(high)):
            return (ratio < low) | (ratio > high)
        case RatioControl(control="clip", low=float(low), high=float(high)):
            return (ratio < 1 - low) | (ratio > 1 + high)
        case RatioControl(cap=float(cap)) | BehaviourControl(cap=float(cap)):  # truncated there, or masked
            return ratio > cap
        case _:
            return np.zeros(ratio.shape, np.bool_)
