"""The completion tokens of one micro-batch as losses read them, and the teacher's distribution.

Shapes as in `losses.py`: N flattened completion tokens, V ids in use, K ids of a support, S support points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kdpipe.errors import StepError
from kdpipe.method.losses import student_support
from kdpipe.recipe.objective import Objective


class NonFiniteError(StepError):
    """A number that should be finite is not; `index` is its place in the input, for the caller to name."""

    def __init__(self, index: int, found: str) -> None:
        super().__init__(f"position {index}: {found}")
        self.index = index
        self.found = found


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """The completion tokens of one micro-batch as [N] tensors, completions one after another.

    `behaviour` b, `proximal` p and `teacher` q are log-probs of the sampled tokens; `advantage` A and
    `baseline` (of the sampled-token terms) are those of each token's completion. `kept` is False where no term
    may look, `scorable` where the KD term may not (the teacher lacks the id), `kd_open` where a KD mask closes
    the completion: values there are never read. `share` is the weight of each token in the optimizer
    step's loss (see `shares`). `lengths` are the tokens of each completion, N in all. `off_policy` is True in text
    that the student did not sample, which has neither b, p, A, baseline nor KD mask: none of them is read there.
    `signal` is what a control puts in the place of q - s.
    """

    behaviour: Tensor
    proximal: Tensor
    advantage: Tensor
    kept: Tensor
    scorable: Tensor
    kd_open: Tensor
    share: Tensor
    lengths: Sequence[int]
    teacher: Tensor | None = None
    baseline: Tensor | None = None
    off_policy: Tensor | None = None
    signal: Tensor | None = None

    def __post_init__(self) -> None:
        shape = (sum(self.lengths),)
        for field in fields(self):
            tensor = getattr(self, field.name)
            if field.name != "lengths" and tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{field.name} has shape {tuple(tensor.shape)}, but the lengths add up to {shape[0]} tokens"
                )

    @property
    def sampled(self) -> Tensor:
        """Bool [N]: the tokens that count and that the student sampled."""
        return self.kept if self.off_policy is None else self.kept & ~self.off_policy

    @property
    def taught(self) -> Tensor:
        """Bool [N]: the student's own tokens that the KD term looks at."""
        return self.sampled & self.scorable & self.kd_open

    def given(self, objective: Objective) -> Tensor:
        """Bool [N]: the off-policy tokens that `off_policy_term` looks at."""
        if self.off_policy is None:
            return torch.zeros_like(self.kept)
        given = self.kept & self.off_policy
        return given & self.scorable if objective.off_policy_loss == "kd" else given

    def compared(self, objective: Objective) -> Tensor:
        """Bool [N]: the tokens at which a term looks at two whole distributions."""
        if objective.off_policy_loss == "kd":
            return self.taught | self.given(objective)
        return self.taught


@dataclass(frozen=True, slots=True)
class TeacherSupport:
    """The teacher's distribution at N positions: on K ids and a tail of all others, or on all V ids.

    `ids_NK` (-1 is padding) with `logprobs_NS` [N, K] and `tail_N`, the log-mass of all other ids; or
    `logprobs_NS` [N, V] alone.
    """

    logprobs_NS: Tensor
    ids_NK: Tensor | None = None
    tail_N: Tensor | None = None

    def at(self, index: Tensor) -> TeacherSupport:
        """The positions in `index`."""
        if self.ids_NK is None or self.tail_N is None:
            return TeacherSupport(self.logprobs_NS[index])
        return TeacherSupport(self.logprobs_NS[index], self.ids_NK[index].long(), self.tail_N[index])

    def pair(self, logprobs_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Student and teacher on the same support points, [N, S] each; `logprobs_NV` are the student's."""
        if self.ids_NK is None or self.tail_N is None:
            return logprobs_NV, self.logprobs_NS.to(logprobs_NV.dtype)
        student_NS = student_support(logprobs_NV, self.ids_NK)
        teacher_NS = torch.cat([self.logprobs_NS, self.tail_N[:, None]], dim=-1).to(student_NS.dtype)
        return student_NS, teacher_NS


def require_finite(at: Tensor, values: Mapping[str, Tensor]) -> None:
    """Raises NonFiniteError for the first of the named values [n] that is not; `at` [n] is where."""
    for name, tensor in values.items():
        is_finite = torch.isfinite(tensor)
        if not bool(is_finite.all()):
            row = int((~is_finite).nonzero()[0])
            found = float(tensor[row].detach())
            raise NonFiniteError(int(at[row]), f"{name} is {found}, expected a finite number")
