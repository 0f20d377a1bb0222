"""Tiny random models of many families of transformers, each tried in all that kdpipe does with a model.

The peer is always an unpadded, uncached forward of the model that transformers opens, in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from kdpipe.engines.hf.engine import HfEngine
from kdpipe.engines.protocol import Completion, SampleRequest, Sampling, ScoreRequest, Scoring
from kdpipe.errors import EngineError, ModelError
from kdpipe.models.batching import make_batch
from kdpipe.models.cache import ModelCache
from kdpipe.models.folder import open_model, read_architecture, read_head
from kdpipe.models.logprobs import token_logprobs
from kdpipe.models.source import ModelSource
from kdpipe.recipe.models import Optimizer
from kdpipe.recipe.runtime import Runtime
from kdpipe.training.local import LocalTrainer

CPU = torch.device("cpu")
ROWS, NUM_IDS = 40, 37
PROMPT_LENGTHS = (1, 4, 7, 11, 11, 17)
TOLERANCE = 2e-4
"""Nats that two float32 computations may lie apart. A lost state or a wrong mask is a thousand times more."""

# Sizes by the names that configs have for them; a family takes those that it knows.
SIZES: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "head_dim": 8,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_expand": 2,
    "mamba_dt_rank": 4,
    "ffn_dim": 48,
    "num_layers": 2,
}
_SHORT = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 64,
}
_MLA = {"num_key_value_heads": 4}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_WINDOWED = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "apertus": {},
    "arcee": {},
    "axk1": _MLA,
    "bailing_hybrid": _HYBRID | _MLA,
    "bamba": {"num_hidden_layers": 2, "attn_layer_indices": [1], "mamba_chunk_size": 4},
    "bart": {
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 48,
        "encoder_ffn_dim": 48,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
    },
    "bert": {"is_decoder": True},
    "bert as it is": {},
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "codegen": {"rotary_dim": 4},
    "cohere": {},
    "cohere2": _WINDOWED,
    "cohere2_moe": {},
    "ctrl": {"dff": 48},
    "cwm": {},
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    "deepseek_v32": _MLA,
    "deepseek_v4": {},
    "diffllama": {},
    "doge": {},
    "dots1": {"n_shared_experts": 1},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone4": _WINDOWED,
    "falcon": {},
    "falcon alibi": {"alibi": True, "new_decoder_architecture": False},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_chunk_size": 4},
    "falcon_mamba": {},
    "exaone_moe": {},
    "flex_olmo": {},
    "flint": {},
    "gemma": {},
    "gemma2": {"sliding_window": 5},
    "gemma2 without caps": {
        "sliding_window": 5,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    },
    "gemma3_text": _WINDOWED,
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 5,
        "activation_sparsity_pattern": [0.0] * 4,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": ROWS,
        "laurel_rank": 8,
        "altup_num_inputs": 2,
    },
    "gemma4_unified_text": {},
    "gemma4_text": _WINDOWED | {"hidden_size_per_layer_input": 0},
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "glm4_moe_lite": _MLA,
    "glm_moe_dsa": _MLA,
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 5},
    "gpt_neox": {},
    "gpt_oss": _WINDOWED,
    "gptj": {"rotary_dim": 4},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "granite without scaling": {},
    "granitemoe": {},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_chunk_size": 4},
    "granitemoeshared": {},
    "granite_swa": _WINDOWED,
    "helium": {},
    "hy_v3": {},
    "hrm_text": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {},
    "jais2": {},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
    },
    "jetmoe": {},
    "laguna": {},
    "kimi_linear": _HYBRID | _MLA | {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama": {},
    "llama llama3 rope": {
        "rope_parameters": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_SHORT}
    },
    "llama yarn": {"rope_parameters": {"rope_type": "yarn", **_SHORT}},
    "llama dynamic rope": {"rope_parameters": {"rope_type": "dynamic", **_SHORT}},
    "longcat_flash": _MLA,
    "llama4_text": {"attention_chunk_size": 5, "num_hidden_layers": 4, "intermediate_size_mlp": 48},
    "mamba": {},
    "mamba2": {"num_heads": 4, "head_dim": 16, "chunk_size": 4, "n_groups": 2},
    "mimo_v2_flash": {},
    "minicpm3": _MLA,
    "minimax": _HYBRID | {"block_size": 4},
    "minimax_m2": {},
    "ministral": {},
    "ministral3": {},
    "mistral": {"sliding_window": None},
    "mistral windowed": {"sliding_window": 5},
    "mixtral": {},
    "modernbert-decoder": {},
    "mpt": {},
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "moe_intermediate_size": 48,
        "moe_shared_expert_intermediate_size": 48,
        "n_groups": 2,
        "chunk_size": 4,
    },
    "olmo": {},
    "olmo2": {},
    "olmo3": _WINDOWED,
    "olmo_hybrid": _HYBRID,
    "olmoe": {},
    "openai-gpt": {},
    "opt": {"word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": {"initializer_range": 0.1},
    "phi3": {},
    "phi3 windowed": {"sliding_window": 5},
    "phi3 longrope": {
        "rope_parameters": _LONG,
        "original_max_position_embeddings": 32,
        "max_position_embeddings": 64,
    },
    "phimoe": {},
    "qwen2": {},
    "qwen2 windowed": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_5_moe_text": _HYBRID,
    "qwen3_5_text": _HYBRID,
    "qwen3_moe": {},
    "qwen3_next": _HYBRID,
    "recurrent_gemma": {"attention_window_size": 5, "num_hidden_layers": 3},
    "rembert": {"is_decoder": True, "output_embedding_size": 32, "input_embedding_size": 32},
    "roberta": {"is_decoder": True},
    "rwkv": {},
    "seed_oss": {},
    "smollm3": {},
    "solar_open": {},
    "stablelm": {},
    "starcoder2": {},
    "starcoder2 windowed": {"sliding_window": 5},
    "vaultgemma": _WINDOWED,
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
    "xlnet": {"d_model": 32, "n_head": 4, "d_head": 8, "n_layer": 2, "d_inner": 48},
    "xlstm": {},
    "youtu": _MLA,
    "zamba2": {
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "hybrid"],
        "hybrid_layer_ids": [1],
    },
    "zamba": {"num_hidden_layers": 2, "layer_types": ["linear_attention", "hybrid"]},
}
"""Config fields of each family beyond SIZES; the family's config is the name up to a blank."""


def tiny_config(name: str) -> Any:
    """The config of a family with two narrow layers."""
    family = CONFIG_MAPPING[name.partition(" ")[0]]
    renamed = getattr(family, "attribute_map", {})
    known = {
        field: size
        for field, size in SIZES.items()
        if field in renamed or (hasattr(family, field) and not isinstance(getattr(family, field), property))
    }
    return family(**known | FAMILIES.get(name, {}))


def write_family(name: str, folder: Path) -> None:
    """Writes a tiny random model of the family, whose norms and biases are not what they are initialised to."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(name), dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(str(folder))
    words = Tokenizer(models.WordLevel({f"w{token}": token for token in range(NUM_IDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w0").save_pretrained(folder)


def outcome(name: str, folder: Path) -> str:
    """`right`, `right, slowly`, or `refused: ` and the sentence; raises AssertionError where it is wrong."""
    write_family(name, folder)
    source = ModelSource(folder, "a", dtype="float32")
    engine = HfEngine(ModelCache(CPU), Runtime(sample_tokens=200, score_tokens=120, head_chunk_tokens=5))
    try:
        warning = engine.load(source)
        pairs = _sampled(engine, Peer(folder))
    except (ModelError, EngineError) as error:
        return f"refused: {error.what.replace(f'{folder}: ', '')}"
    read_architecture(folder)  # its files hold no weights but the model's
    _require_scores(engine, Peer(folder), pairs)
    _require_training(folder, pairs[3:5], folder / "trained")
    return "right" if warning is None else "right, slowly"


class Peer:
    """The model as transformers opens it, run on one sequence at a time without a cache."""

    def __init__(self, folder: Path) -> None:
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
        self.model.eval()

    def logprobs(self, prompt: list[int], completion: list[int]) -> torch.Tensor:
        """Log-probs [n] of the completion's tokens."""
        logits = self.model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0]
        rows = logits[len(prompt) - 1 : -1, :NUM_IDS].log_softmax(-1)
        return rows.gather(1, torch.tensor(completion)[:, None])[:, 0]


Pairs = list[tuple[list[int], Completion]]


def _sampled(engine: HfEngine, peer: Peer) -> Pairs:
    """Prompts and what was sampled after them; each log-prob is the peer's."""
    prompts = [
        [(5 * place + 3 * row) % (NUM_IDS - 3) + 3 for place in range(length)]
        for row, length in enumerate(PROMPT_LENGTHS)
    ]
    requests = [
        SampleRequest(prompt, (3 * row, 3 * row + 1, 3 * row + 2)) for row, prompt in enumerate(prompts)
    ]
    settings = Sampling(temperature=1.0, max_new_tokens=14, end_ids=(1, 7), num_ids=NUM_IDS)
    drawn = engine.sample(requests, settings, progress=lambda _: None)
    pairs = [(prompt, one) for prompt, row in zip(prompts, drawn, strict=True) for one in row]
    assert len({len(one.token_ids) for _, one in pairs}) > 3, (
        "completions of few lengths: rows are never dropped"
    )
    for prompt, one in pairs:
        _require_equal("sampled", torch.tensor(one.logprobs), peer.logprobs(prompt, one.token_ids))
    return pairs


def _require_scores(engine: HfEngine, peer: Peer, pairs: Pairs) -> None:
    requests = [ScoreRequest(prompt, one.token_ids) for prompt, one in pairs]
    scores = engine.score(requests, Scoring(temperature=1.0, num_ids=NUM_IDS), progress=lambda _: None)
    for (prompt, one), scored in zip(pairs, scores, strict=True):
        _require_equal("scored", torch.from_numpy(scored.logprobs), peer.logprobs(prompt, one.token_ids))


def _require_training(folder: Path, pairs: Pairs, written: Path) -> None:
    """The gradient of two completions is the peer's, and what a step makes of the weights is what is written."""
    peer, model = Peer(folder), open_model(folder, dtype=torch.float32, device=CPU)
    trainer = LocalTrainer(model, Optimizer(learning_rate=1e-2), num_ids=NUM_IDS, horizon=1)
    batch = make_batch([prompt for prompt, _ in pairs], [one.token_ids for _, one in pairs])

    def loss(hidden_NH: torch.Tensor, head: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logprobs_N, _ = token_logprobs(hidden_NH, head, batch.target_ids_N, temperature=1.0, chunk=5)
        return -logprobs_N.mean(), {}

    trainer.begin()
    trainer.accumulate(batch, loss)
    (-torch.cat([peer.logprobs(prompt, one.token_ids) for prompt, one in pairs]).mean()).backward()
    wanted = {name: weight.grad for name, weight in peer.model.named_parameters() if weight.grad is not None}
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert wanted.keys() == found.keys(), "other weights have gradients"
    size = max(float(grad.norm()) for grad in wanted.values())
    for name, grad in wanted.items():
        assert float((found[name] - grad).norm()) <= 1e-4 * size, f"gradient of {name}"
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    trainer.apply()
    trainer.end()
    assert any(not torch.equal(before[name], weight) for name, weight in model.named_parameters())
    trainer.write_weights(written, PreTrainedTokenizerFast.from_pretrained(str(folder)))
    again = open_model(written, dtype=torch.float32, device=CPU)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), f"written {name}"
    for prompt, one in pairs:
        _require_equal(
            "trained", Peer(written).logprobs(prompt, one.token_ids), _trainer_logprobs(trainer, prompt, one)
        )
    head = read_head(written, num_ids=NUM_IDS, dtype=torch.float32, device=CPU)
    assert torch.equal(head.weight_VH, model.get_output_embeddings().weight[:NUM_IDS]), (
        "the head that is read"
    )


def _trainer_logprobs(trainer: LocalTrainer, prompt: list[int], one: Completion) -> torch.Tensor:
    return trainer.logprobs(make_batch([prompt], [one.token_ids]), temperature=1.0, chunk=5)


def _require_equal(what: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    difference = float((found - wanted).detach().abs().max())
    assert difference <= TOLERANCE, f"{what}: {difference:.2g} nats off"
