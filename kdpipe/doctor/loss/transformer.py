"""A transformer in float64 for check-loss, where padding can go wrong, on the step of `enumerated.py`.

Shapes as in `enumerated.py`; B sequences, T positions.
"""

from collections.abc import Sequence
from functools import cache, cached_property

import torch
from torch import Tensor

from kdpipe.doctor.loss.enumerated import END, STEP, EnumeratedRow, LossCase, V, gradients, loss_of, row_of
from kdpipe.models.batching import make_batch
from kdpipe.models.folder import scratch_model
from kdpipe.models.logprobs import Head, head_of, hidden_states
from kdpipe.recipe.models import Scratch

_SIZES = Scratch(
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    max_positions=32,
    tie_embeddings=False,
    init_std=0.3,
)


class Transformer:
    """The model, and the loss of rows on it."""

    def __init__(self) -> None:
        self.model = scratch_model(_SIZES, num_ids=V, eos_id=END, pad_id=END, seed=1).double()
        for module in list(self.model.modules()):
            for name, norm in list(module.named_children()):
                if name.endswith("norm"):  # transformers' own computes in float32 whatever it is given
                    size, eps = norm.weight.shape[0], norm.variance_epsilon
                    setattr(module, name, torch.nn.RMSNorm(size, eps=eps, dtype=torch.float64))

    @cached_property
    def rows(self) -> tuple[EnumeratedRow, ...]:
        """The completions of the step after prompts of several lengths; log-probs are of unbatched forwards.

        All are off-policy: a ratio that is 1 but for rounding would fall on either side of a clip that starts there.
        """
        generator = torch.Generator().manual_seed(6)
        rows = []
        for number, completion in enumerate(STEP):
            prompt = tuple((3 * number + place) % V for place in range(1 + (5 * number) % 4))
            with torch.no_grad():
                ids_1T = torch.tensor([[*prompt, *completion]])
                logits_TV = self.model(input_ids=ids_1T, use_cache=False).logits[0]
            student_nV = logits_TV[len(prompt) - 1 : -1].log_softmax(-1)
            noise = torch.randn(3, *student_nV.shape, generator=generator, dtype=torch.float64)
            teacher_nV, behaviour_nV, proximal_nV = noise
            rows.append(
                row_of(
                    completion,
                    prompt,
                    teacher_nV=teacher_nV.log_softmax(-1),
                    sampler_nV=(student_nV + 0.5 * behaviour_nV).log_softmax(-1),
                    proximal_nV=(student_nV + 0.3 * proximal_nV).log_softmax(-1),
                )
            )
        return tuple(rows)

    def outcome(
        self, case: LossCase, rows: Sequence[EnumeratedRow], *, left_padding: int | None = None
    ) -> Tensor:
        """Loss and gradient of a micro-batch, padded as train pads or with that many tokens on the left."""
        if left_padding is None:
            batch = make_batch([row.context for row in rows], [row.tokens for row in rows])
            hidden_NH = hidden_states(self.model, batch)
        else:
            hidden_NH = self._left_padded(rows, left_padding)
        # The model's logits are those at the temperature, as everywhere in the small world.
        head = Head(case.temperature * head_of(self.model, num_ids=V).weight_VH)
        loss = loss_of(case, rows, hidden_NH, head)
        found = gradients(loss, list(self.model.parameters()))
        return torch.cat([loss.detach()[None], *(gradient.flatten() for gradient in found)])

    def _left_padded(self, rows: Sequence[EnumeratedRow], amount: int) -> Tensor:
        """The hidden states [N, H] that predict the rows' tokens, by a way of its own: mask and positions."""
        sequences = [(*row.context, *row.tokens) for row in rows]
        width = amount + max(map(len, sequences))
        ids_BT = torch.tensor([[END] * (width - len(ids)) + list(ids) for ids in sequences])
        mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in sequences])
        hidden_BTH: Tensor = self.model.get_decoder()(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            position_ids=(mask_BT.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        return torch.cat(
            [hidden[-len(row.tokens) - 1 : -1] for row, hidden in zip(rows, hidden_BTH, strict=True)]
        )


transformer = cache(Transformer)
"""The same one for every objective: nothing trains it."""
