from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPTJConfig, GPTJForCausalLM

from kdpipe.models import logprobs as forward
from kdpipe.models.batching import make_batch
from kdpipe.models.logprobs import Head, head_of, hidden_states, score_tokens, token_logprobs
from tests.tiny_models import CONFIGS, ROWS, in_float64, plain_logprobs, tiny_model

PAIRS = [([2], [3, 4, 5, 6]), ([7] * 20, [1]), ([3, 3], []), ([2, 9, 4, 1], [5] * 11), ([8, 8], [2, 3])]
VOCABULARY = 37


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(forward, "_MIN_CHUNK_LOGITS", 1)


def batch_of(pairs):
    return make_batch([prompt for prompt, _ in pairs], [completion for _, completion in pairs])


def random_head(*, rows=VOCABULARY, bias=True):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    ids = torch.randint(VOCABULARY, (23,), generator=generator)
    return draw(23, 4), Head(draw(rows, 4), draw(rows) if bias else None), ids


class LargestLogits(TorchDispatchMode):
    """Notes the most rows that any tensor as wide as the vocabulary has had, made on the way."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.ndim == 2 and result.shape[1] == VOCABULARY:
            self.rows = max(self.rows, result.shape[0])
        return result


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_token_logprobs_of_a_padded_batch_are_those_of_each_sequence_alone(name, chunk):
    model = tiny_model(name)
    batch = batch_of(PAIRS)
    logprobs_N, extra = token_logprobs(
        hidden_states(model, batch),
        head_of(model, num_ids=13),
        batch.target_ids_N,
        temperature=0.7,
        chunk=chunk,
    )
    assert extra is None
    wide = in_float64(model)
    for (prompt, completion), found in zip(PAIRS, logprobs_N.split(batch.counts), strict=True):
        plain = plain_logprobs(wide, prompt, completion, temperature=0.7, num_ids=13)
        expected = plain[range(len(completion)), completion]
        torch.testing.assert_close(found.detach().double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 5, 22, 23])
def test_chunked_values_and_gradients_are_the_unchunked_ones(chunk, bias):
    weights_N = torch.linspace(-1, 2, 23, dtype=torch.float64)
    targets_NV = torch.randn(
        23, VOCABULARY, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    ).log_softmax(-1)

    def divergence(logprobs, targets):
        return (logprobs.exp() * (logprobs - targets)).sum(-1)

    def gradients(values, hidden, head):
        token_N, extra_N = values
        leaves = [hidden, head.weight_VH, *([head.bias_V] if bias else [])]
        return torch.autograd.grad((token_N * weights_N + extra_N * weights_N**2).sum(), leaves)

    hidden, head, ids = random_head(bias=bias)
    chunked = token_logprobs(
        hidden,
        head,
        ids,
        temperature=0.6,
        chunk=chunk,
        extra=lambda logprobs, part: divergence(logprobs, targets_NV[part]),
    )
    logits = hidden @ head.weight_VH.t() + (head.bias_V if bias else 0)
    logprobs = (logits / 0.6).log_softmax(-1)
    plain = (logprobs[range(23), ids], divergence(logprobs, targets_NV))
    for one, other in zip(
        (*chunked, *gradients(chunked, hidden, head)), (*plain, *gradients(plain, hidden, head)), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", ["llama", "llama-tied-biased", "qwen3"])
def test_gradients_reach_every_parameter_as_through_plain_logits(name):
    model = tiny_model(name).double()
    batch = batch_of(PAIRS)
    weights_N = torch.linspace(-1, 2, len(batch.target_ids_N), dtype=torch.float64)
    head = head_of(model, num_ids=13)
    logprobs_N, _ = token_logprobs(
        hidden_states(model, batch), head, batch.target_ids_N, temperature=0.7, chunk=3
    )
    chunked = torch.autograd.grad((logprobs_N * weights_N).sum(), list(model.parameters()))
    logits_BTV = model(input_ids=batch.input_ids_BT).logits[..., :13]
    plain_N = (logits_BTV / 0.7).log_softmax(-1)[batch.rows_N, batch.positions_N, batch.target_ids_N]
    plain = torch.autograd.grad((plain_N * weights_N).sum(), list(model.parameters()))
    for one, other in zip(chunked, plain, strict=True):
        # transformers' norms compute in float32 whatever the model's dtype.
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_no_more_logits_than_a_chunk_exist_forward_and_backward():
    hidden, head, ids = random_head()
    with LargestLogits() as forward_pass:
        logprobs, _ = token_logprobs(hidden, head, ids, temperature=1.0, chunk=5)
        score_tokens(hidden, head, ids, temperature=1.0, top_k=3, chunk=5)
    with LargestLogits() as backward_pass:
        logprobs.sum().backward()
    assert forward_pass.rows == backward_pass.rows == 5


def test_no_chunk_keeps_its_logits_for_the_backward_pass():
    def note(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    shapes: list[tuple[int, ...]] = []
    hidden, head, ids = random_head()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        token_logprobs(hidden, head, ids, temperature=1.0, chunk=5)
        assert not [shape for shape in shapes if shape[-1:] == (VOCABULARY,) and shape[0] in (3, 5)]
        token_logprobs(hidden, head, ids, temperature=1.0, chunk=23)
    assert (23, VOCABULARY) in shapes


def test_chunks_grow_where_the_vocabulary_is_small(monkeypatch):
    monkeypatch.setattr(forward, "_MIN_CHUNK_LOGITS", VOCABULARY * 12)
    hidden, head, ids = random_head()
    with LargestLogits() as largest:
        token_logprobs(hidden, head, ids, temperature=1.0, chunk=5)
    assert largest.rows == 12


def test_padding_rows_of_the_head_have_no_probability_and_no_gradient():
    model = tiny_model("llama")
    batch = batch_of(PAIRS[:1])
    head = head_of(model, num_ids=7)
    assert head.weight_VH.shape[0] == 7 < ROWS
    sums = []
    logprobs_N, _ = token_logprobs(
        hidden_states(model, batch),
        head,
        batch.target_ids_N,
        temperature=1.0,
        chunk=2,
        extra=lambda logprobs, part: sums.append(logprobs.exp().sum(-1).detach()) or logprobs.sum(-1),
    )
    torch.testing.assert_close(torch.cat(sums), torch.ones(4))
    logprobs_N.sum().backward()
    assert (model.lm_head.weight.grad[7:] == 0).all()
    assert (model.lm_head.weight.grad[:7] != 0).any()


def test_a_head_with_a_bias_keeps_the_biases_of_the_rows_that_it_keeps():
    config = GPTJConfig(vocab_size=ROWS, n_embd=16, n_layer=1, n_head=2, n_positions=16, rotary_dim=4)
    model = GPTJForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.bias)
    head = head_of(model, num_ids=7)
    torch.testing.assert_close(head.weight_VH, model.lm_head.weight[:7])
    torch.testing.assert_close(head.bias_V, model.lm_head.bias[:7])


def test_ties_in_the_top_k_go_to_the_lower_id_inside_and_at_the_edge():
    logits_NV = torch.tensor([[1.0, 4.0, 2.0, 4.0, 2.0, 2.0], [3.0] * 6])
    head = Head(torch.eye(6), None)
    scores = score_tokens(logits_NV, head, torch.tensor([0, 5]), temperature=1.0, top_k=4, chunk=9)
    assert scores.topk_ids_NS.tolist() == [[1, 3, 2, 4], [0, 1, 2, 3]]
    expected = torch.tensor([[1.0, 2.0]]).logsumexp(-1) - logits_NV[0].logsumexp(-1)
    torch.testing.assert_close(scores.tail_logprobs_N, torch.cat((expected, torch.tensor([2 / 6]).log())))


def test_no_tokens_are_no_scores():
    hidden, head, ids = random_head()
    logprobs, _ = token_logprobs(hidden[:0], head, ids[:0], temperature=1.0, chunk=5)
    assert logprobs.shape == (0,)
    scores = score_tokens(hidden[:0], head, ids[:0], temperature=1.0, top_k=3, chunk=5)
    assert scores.topk_ids_NS.shape == (0, 3)
