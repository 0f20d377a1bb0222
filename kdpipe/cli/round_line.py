"""What `run` and `status` say of a round."""

from __future__ import annotations

from kdpipe.pipeline.headline import headline_of
from kdpipe.pipeline.progress import duration
from kdpipe.store.stage import Stage


def round_line(number: int, rounds: int, metrics: dict[str, float]) -> str:
    """One round in one line of at most 80 columns: reverse KL, reward, and the headline when it was due."""
    pieces = [f"round {number:>{len(str(rounds))}}/{rounds}"]
    measured = (("score/reverse_kl_nats", "reverse KL", "6.3f"), ("rollout/reward_mean", "reward", "5.3f"))
    pieces += [f"{label} {metrics[name]:{spec}}" for name, label, spec in measured if name in metrics]
    stage = f"{Stage.EVALUATE}/"
    summary = {name.removeprefix(stage): value for name, value in metrics.items() if name.startswith(stage)}
    measure = headline_of(summary)
    if (estimate := measure.estimate(summary)) is not None:
        pieces.append(f"{measure.brief} {measure.show(estimate):>6}")
    seconds = sum(value for name, value in metrics.items() if name.startswith("time/"))
    pieces.append(duration(seconds))
    return "  ".join(pieces)
