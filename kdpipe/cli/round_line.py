"""What `run` and `status` say of a round."""

from __future__ import annotations

from kdpipe.pipeline.headline import headline_of, own_reverse_kl
from kdpipe.pipeline.progress import duration
from kdpipe.store.stage import Stage


def round_line(number: int, rounds: int, metrics: dict[str, float]) -> str:
    """One round in one line of at most 80 columns: reverse KL, reward, and the headline when it was due."""
    pieces = [f"round {number:>{len(str(rounds))}}/{rounds}"]
    if (found := own_reverse_kl(metrics)) is not None:
        pieces.append(f"reverse KL {found:6.3f}")
    if (reward := metrics.get("rollout/reward_mean")) is not None:
        pieces.append(f"reward {reward:5.3f}")
    stage = f"{Stage.EVALUATE}/"
    summary = {name.removeprefix(stage): value for name, value in metrics.items() if name.startswith(stage)}
    measure = headline_of(summary)
    if (estimate := measure.estimate(summary)) is not None:
        pieces.append(f"{measure.brief} {measure.show(estimate):>6}")
    seconds = sum(value for name, value in metrics.items() if name.startswith("time/"))
    pieces.append(duration(seconds))
    return "  ".join(pieces)
