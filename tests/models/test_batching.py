from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.models.batching import batches_by_tokens, make_batch


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200))
def test_batches_hold_every_sequence_once_within_the_budget(lengths, max_tokens):
    batches = batches_by_tokens(lengths, max_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= max_tokens
    flat = [lengths[index] for batch in batches for index in batch]
    assert flat == sorted(flat, reverse=True)


def test_batches_fill_the_budget_and_equal_lengths_keep_their_order():
    assert batches_by_tokens([3, 9, 3, 3, 40], 10) == [[4], [1], [0, 2, 3]]
    assert batches_by_tokens([3, 9, 3, 3, 40], 8) == [[4], [1], [0, 2], [3]]


def test_completion_token_t_is_predicted_at_prompt_minus_1_plus_t():
    batch = make_batch([[1], [1] * 4, [1] * 2], [[2, 3], [], [4, 5, 6]])
    assert batch.rows_N.tolist() == [0, 0, 2, 2, 2]
    assert batch.positions_N.tolist() == [0, 1, 1, 2, 3]


def test_a_batch_points_from_each_input_to_the_token_after_it():
    prompts, completions = [[11], [21, 22, 23], [31, 32]], [[12, 13, 14], [24], []]
    batch = make_batch(prompts, completions)
    assert batch.input_ids_BT.tolist() == [[11, 12, 13], [21, 22, 23], [31, 32, 0]]
    assert batch.counts == [3, 1, 0]
    inputs = batch.input_ids_BT[batch.rows_N, batch.positions_N]
    assert torch.equal(batch.target_ids_N, torch.tensor([12, 13, 14, 24]))
    assert torch.equal(batch.target_ids_N, inputs + 1)
