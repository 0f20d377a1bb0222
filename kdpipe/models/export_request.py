"""What `kdpipe export` asks a worker that writes weights anew, both ends of it. Never imports torch."""

from __future__ import annotations

from pathlib import Path

from kdpipe.recipe.section import DtypeName
from kdpipe.workers.message import Nothing, Talk, message


@message
class WriteWeights:
    """Write the model in `folder`, with its adapter if there is one, to `target` in a dtype.

    `rollouts` holds completions at which the result is compared with what was trained, and that with the model in
    `start`, where training began.
    """

    folder: Path
    adapter: Path | None
    start: Path | None
    target: Path
    dtype: DtypeName
    device: str
    trust_remote_code: bool
    rollouts: Path | None


@message
class Rounded:
    """Mean KL divergences in nats a token: of what was trained and what was `written`.

    `back` is the other way; `start` is from what was trained to the model where training began.
    """

    tokens: int
    written: float
    back: float
    start: float | None


@message
class WrittenWeights:
    """The dtype that was written, and how far that is from what was trained, where it was measured."""

    dtype: str
    distance: Rounded | None


WEIGHTS = Talk[WriteWeights, Nothing, WrittenWeights]((WriteWeights,), (Nothing,), (WrittenWeights,))
