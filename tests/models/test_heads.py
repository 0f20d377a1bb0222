"""Output heads that scale or cap their logits, against transformers' own logits of the same models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from kdpipe.engines.protocol import SampleRequest, Sampling, ScoreRequest, Scoring
from kdpipe.errors import ModelError
from kdpipe.method.micro_batch import TeacherHidden, reverse_kl
from kdpipe.models.batching import make_batch
from kdpipe.models.folder import head_digest, open_model, read_head, write_model
from kdpipe.models.logprobs import Head, head_of, hidden_states, score_tokens, token_logprobs
from kdpipe.stages.scoring import swapped_head
from tests.engines.test_hf_engine import engine_of
from tests.models.test_forward import PAIRS, batch_of
from tests.tiny_models import (
    COMMON,
    FLOAT32_NATS,
    ROWS,
    in_float64,
    plain_logprobs,
    tiny_model,
    tiny_tokenizer,
)

CPU = torch.device("cpu")
NUM_IDS = 13
_PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": ROWS}
FORMS = {
    "granite": {"logits_scaling": 0.5},
    "cohere": {"logit_scale": 0.25},
    "gemma2": {"final_logit_softcapping": 1.5, "head_dim": 8, "tie_word_embeddings": False},
}
MORE = {
    "cohere2": {"logit_scale": 3.0, "head_dim": 8},
    "falcon_h1": {
        "lm_head_multiplier": 0.3,
        "head_dim": 8,
        "mamba_d_ssm": 24,
        "mamba_n_heads": 3,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
    },
    "gemma3_text": {"final_logit_softcapping": 1.5, "head_dim": 8},
    "gemma3n_text": {
        **_PER_LAYER,
        "final_logit_softcapping": 1.5,
        "head_dim": 8,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma4_text": {**_PER_LAYER, "final_logit_softcapping": 1.5, "head_dim": 8},
    "hyperclovax": {"logits_scaling": 4.0},
    "nanochat": {"final_logit_softcapping": 1.5},
    "recurrent_gemma": {"logits_soft_cap": 1.5, "lru_width": 24, "attention_window_size": 16, "head_dim": 8},
}
EVERY = [*FORMS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]


def model_of(name: str) -> PreTrainedModel:
    config = CONFIG_MAPPING[name](**COMMON | (FORMS | MORE)[name])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", EVERY)
def test_logprobs_and_gradients_are_those_of_the_models_own_logits(name: str) -> None:
    model = model_of(name).double()
    batch, head = batch_of(PAIRS), head_of(model, num_ids=NUM_IDS)
    assert (head.scale, head.cap) != (1, None)
    weights_N = torch.linspace(-1, 2, len(batch.target_ids_N), dtype=torch.float64)
    found_N, _ = token_logprobs(
        hidden_states(model, batch), head, batch.target_ids_N, temperature=0.7, chunk=3
    )
    logits_BTV = model(input_ids=batch.input_ids_BT, use_cache=False).logits[..., :NUM_IDS]
    plain_N = (logits_BTV / 0.7).log_softmax(-1)[batch.rows_N, batch.positions_N, batch.target_ids_N]
    torch.testing.assert_close(found_N, plain_N, atol=1e-9, rtol=0)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    found, plain = (
        torch.autograd.grad((each_N * weights_N).sum(), trained, allow_unused=True)
        for each_N in (found_N, plain_N)
    )
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)  # some norms are float32 in any model
    assert sum(gradient is not None and bool(gradient.any()) for gradient in found) > 8


@pytest.mark.parametrize("name", FORMS)
def test_the_engine_samples_and_scores_with_the_heads_scale_and_cap(name: str) -> None:
    model = model_of(name)
    wide, engine = in_float64(model), engine_of(model)
    sampling = Sampling(temperature=0.7, max_new_tokens=6, end_ids=(1,), num_ids=NUM_IDS)
    [[drawn]] = engine.sample([SampleRequest([3, 4, 5], (11,))], sampling, progress=lambda _: None)
    expected_NV = plain_logprobs(wide, [3, 4, 5], drawn.token_ids, temperature=0.7, num_ids=NUM_IDS)
    own = [row[token].item() for row, token in zip(expected_NV, drawn.token_ids, strict=True)]
    assert drawn.logprobs == pytest.approx(own, abs=FLOAT32_NATS)
    scoring = Scoring(temperature=0.7, num_ids=NUM_IDS, top_k=NUM_IDS)
    [scores] = engine.score([ScoreRequest([3, 4, 5], drawn.token_ids)], scoring, progress=lambda _: None)
    assert scores.logprobs == pytest.approx(own, abs=FLOAT32_NATS)
    assert scores.topk_ids is not None
    assert scores.topk_logprobs is not None
    everywhere = expected_NV.gather(1, torch.from_numpy(scores.topk_ids).long()).numpy()
    assert scores.topk_logprobs == pytest.approx(everywhere, abs=FLOAT32_NATS)


def test_a_divergence_over_the_vocabulary_is_between_the_two_models_own_logits() -> None:
    student, teacher = model_of("granite").double(), model_of("gemma2").double()
    batch = batch_of(PAIRS)
    with torch.no_grad():
        states = TeacherHidden(hidden_states(teacher, batch), head_of(teacher, num_ids=NUM_IDS), 1.5)
        found_N = reverse_kl(
            hidden_states(student, batch),
            head_of(student, num_ids=NUM_IDS),
            states,
            temperature=0.7,
            chunk=4,
        )
        p, q = (
            (model(input_ids=batch.input_ids_BT, use_cache=False).logits[..., :NUM_IDS] / heat).log_softmax(
                -1
            )
            for model, heat in ((student, 0.7), (teacher, 1.5))
        )
    expected_N = (p.exp() * (p - q)).sum(-1)[batch.rows_N, batch.positions_N]
    torch.testing.assert_close(found_N, expected_N, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", EVERY)
def test_a_head_read_from_its_folder_has_the_scale_and_cap_of_the_opened_model(
    name: str, tmp_path: Path
) -> None:
    write_model(model_of(name), tiny_tokenizer(), tmp_path)
    wanted = head_of(open_model(tmp_path, dtype=torch.bfloat16, device=CPU), num_ids=NUM_IDS)
    found = read_head(tmp_path, num_ids=NUM_IDS, dtype=torch.bfloat16, device=CPU)
    assert (found.scale, found.cap) == (wanted.scale, wanted.cap) != (1, None)
    assert head_digest(found) == head_digest(wanted) != head_digest(Head(wanted.weight_VH, wanted.bias_V))


def test_two_ids_that_trade_places_keep_the_heads_scale_and_cap() -> None:
    draw = torch.Generator().manual_seed(1)
    hidden_NH, weight_VH = (torch.randn(5, 4, generator=draw, dtype=torch.float64) for _ in "ab")
    bias_V = torch.randn(5, generator=draw, dtype=torch.float64)
    head = Head(weight_VH, bias_V, scale=0.3, cap=0.9)
    ids = {"own": torch.tensor([0, 1, 2, 3, 4]), "swapped": torch.tensor([0, 3, 2, 1, 4])}
    one, other = (
        score_tokens(hidden_NH, which, ids[name], temperature=0.7, top_k=0, chunk=9).logprobs_N
        for name, which in (("own", head), ("swapped", swapped_head(head, (1, 3))))
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("field", ["logits_scaling", "logit_scale", "final_logit_softcapping"])
def test_a_head_that_is_not_what_the_config_says_is_refused(field: str, tmp_path: Path) -> None:
    write_model(tiny_model("llama"), tiny_tokenizer(), tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {field: 30.0}))
    with pytest.raises(ModelError, match="logits of LlamaForCausalLM are not those of its output head"):
        open_model(tmp_path, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["qwen2", "llama-tied-biased"])
def test_a_tied_head_is_written_once_in_any_dtype(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(name)
    write_model(model, tiny_tokenizer(), tmp_path, dtype=dtype)
    written = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in written
    numbers = sum(weight.numel() for weight in model.parameters())  # a tied matrix counts once
    assert sum(weight.nbytes for weight in written.values()) == 2 * numbers
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    head, embeddings = plain.get_output_embeddings(), plain.get_input_embeddings()
    assert head.weight is embeddings.weight
    assert torch.equal(head.weight, model.get_output_embeddings().weight.to(dtype))
    with torch.no_grad():
        ids = make_batch([[2, 3]], [[4]]).input_ids_BT
        assert plain(input_ids=ids).logits.isfinite().all()
