"""The cold start: its batches, its loss over micro-batches, and the prompts that it learns after."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kdpipe.recipe.models import Optimizer
from kdpipe.stages import sft
from kdpipe.training.local import LocalTrainer
from tests.stages.test_experience import rollout
from tests.training.steps import NUM_IDS, NUM_TOKENS, SEQUENCES, tiny_llama

IDS = tuple("abcdefg")


def test_steps_take_every_example_once_an_epoch_and_epochs_differ() -> None:
    taken = [index for step in range(7) for index in sft._batch_indices(IDS, step=step, size=4, seed=1)]
    epochs = [taken[start : start + 7] for start in range(0, 28, 7)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(7))] * 4
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert taken[:4] != sft._batch_indices(IDS, step=0, size=4, seed=2)


@pytest.mark.parametrize("train_tokens", [5, 99])
def test_the_loss_is_the_mean_over_all_completion_tokens_however_they_are_cut(train_tokens: int) -> None:
    model = tiny_llama().double()
    trainer = LocalTrainer(model, Optimizer(), num_ids=NUM_IDS, horizon=1, compute=torch.float64)
    runtime = SimpleNamespace(train_tokens=train_tokens, head_chunk_tokens=64)
    job: Any = SimpleNamespace(runtime=runtime)
    trainer.begin()
    loss, tokens = sft._gradient(job, trainer, SEQUENCES)
    assert tokens == NUM_TOKENS
    expected = 0.0
    with torch.no_grad():
        for prompt, completion in SEQUENCES:
            logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
            expected -= float(logits.log_softmax(-1)[range(len(completion)), completion].sum())
    assert loss == pytest.approx(expected / NUM_TOKENS, rel=1e-6)


def test_a_teachers_text_is_learned_after_the_students_own_prompt() -> None:
    text: Any = SimpleNamespace(prompt=lambda problem: [2, 3])
    problem: Any = SimpleNamespace(prompt_id="a")
    written = [rollout("a", sample, [5, sample + 6]) for sample in range(2)]
    assert sft._examples(text, [problem], written) == {"a/0": ([2, 3], [5, 6]), "a/1": ([2, 3], [5, 7])}
