"""Folders whose config, weights and tokenizer do not belong together: refused before anything is built."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, normalizers, pre_tokenizers

from kdpipe.errors import ModelError
from kdpipe.models.folder import open_model, read_architecture, write_model
from kdpipe.models.prompting import PromptStyle, Text
from kdpipe.models.tokenizer import open_tokenizer
from tests.tiny_models import tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]
NAMES = ("llama", "qwen2", "gpt2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name in NAMES:
        write_model(tiny_model(name), tiny_tokenizer(), root / name)
    return {name: root / name for name in NAMES}


@pytest.fixture
def copied(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Makes a copy of one of the folders, whose files may be changed."""
    numbers = itertools.count()

    def copy(name: str) -> Path:
        folder = tmp_path / f"{name}-{next(numbers)}"
        folder.mkdir()
        for path in folders[name].iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        return folder

    return copy


def configure(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def weigh(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cast(name: str, dtype: torch.dtype) -> Callable[[Path], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name].to(dtype)

    return lambda folder: weigh(folder, change)


def put(name: str, place: tuple[int, ...], value: float) -> Callable[[Path], None]:
    def change(tensors: Tensors) -> None:
        tensors[name][place] = value

    return lambda folder: weigh(folder, change)


def add(*names: str) -> Callable[[Path], None]:
    return lambda folder: weigh(folder, lambda found: found.update({name: torch.ones(2) for name in names}))


UP = "model.layers.1.mlp.up_proj.weight"
OTHERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a tensor more": (add("evil.weight"), "1 weights in its files are none of LlamaForCausalLM.*evil.weight"),
    "a value head": (add("v_head.summary.weight", "v_head.summary.bias"), "2 weights .* v_head.summary.bias"),
    "an expert": (add("model.layers.0.mlp.experts.0.up_proj.weight"), "none of Llama"),
    "scales of a quantization": (add(UP + "_scale"), "up_proj.weight_scale"),
    "fewer layers in the config": (lambda folder: configure(folder, num_hidden_layers=1), "model.layers.1."),
    "integers": (cast(UP, torch.int8), "up_proj.weight holds I8, and config.json has no quantization_config"),
    "8-bit floats": (cast(UP, torch.float8_e4m3fn), "holds F8_E4M3"),
    "an unknown method": (
        lambda folder: configure(folder, quantization_config={"quant_method": "evil"}),
        "quant_method is 'evil', which transformers does not know",
    ),
    "a method that is none": (
        lambda folder: configure(folder, quantization_config={"quant_method": ["fp8"]}),
        "quant_method is \\['fp8'\\]",
    ),
    "a quantization that is no section": (
        lambda folder: configure(folder, quantization_config="fp8"),
        "is not of a causal",
    ),
    "NaN": (put(UP, (3, 4), float("nan")), "up_proj.weight holds NaN or infinite"),
    "infinity": (put("model.norm.weight", (0,), float("-inf")), "norm.weight holds NaN or infinite"),
    "NaN in a row of padding": (put("lm_head.weight", (15, 0), float("nan")), "lm_head.weight holds NaN"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_weights_that_are_not_those_of_the_model_are_refused(
    case: str, copied: Callable[[str], Path]
) -> None:
    folder = copied("llama")
    open_model(folder, dtype=torch.float32, device=CPU)
    spoil, said = OTHERS[case]
    spoil(folder)
    with pytest.raises(ModelError, match=said):
        open_model(folder, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("case", [name for name, (_, said) in OTHERS.items() if "hold" not in said][:5])
def test_an_engine_that_reads_the_files_itself_is_given_no_other_weights(
    case: str, copied: Callable[[str], Path]
) -> None:
    folder = copied("llama")
    wanted = read_architecture(folder)
    spoil, said = OTHERS[case]
    spoil(folder)
    with pytest.raises(ModelError, match=said):
        read_architecture(folder)
    assert read_architecture(folder, is_quantized=True).rows == wanted.rows


@pytest.mark.parametrize("name", NAMES)
def test_constants_that_old_versions_wrote_are_no_weights(name: str, copied: Callable[[str], Path]) -> None:
    folder = copied(name)
    wanted = open_model(folder, dtype=torch.float32, device=CPU).state_dict()
    add(
        *("transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias", "h.0.attn.attention.masked_bias"),
        *("gpt_neox.layers.0.attention.bias", "transformer.h.1.attn.causal_mask"),
        *("model.layers.0.self_attn.rotary_emb.inv_freq", "transformer.rotary_pos_emb.inv_freq"),
        "model.embeddings.position_ids",
    )(folder)
    cast("transformer.h.0.attn.bias", torch.uint8)(folder)
    read_architecture(folder)
    found = open_model(folder, dtype=torch.float32, device=CPU).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


SIZES = {
    "llama": (
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_size",
        "intermediate_size",
    ),
    "qwen2": ("num_hidden_layers", "vocab_size", "max_position_embeddings", "max_window_layers", "head_dim"),
    "gpt2": ("n_layer", "n_head", "n_embd", "n_inner", "n_positions"),
}
NUMBERS: tuple[Any, ...] = (10**7, 10**30, 3, 0, -1, 1.5, "x", True, [], [10**7], {"a": 1})
OTHER_FIELDS: dict[str, Any] = {
    "eos_token_id": ["a"],
    "pad_token_id": -5,
    "num_experts": 10**9,
    "text_config": {"num_hidden_layers": 10**7},
    "layer_types": ["x", "y"],
    "rope_parameters": {"rope_type": "evil"},
    "dtype": "evil",
    "hidden_act": "evil",
    "rms_norm_eps": None,
    "architectures": 7,
    "model_type": ["llama"],
    "transformers_version": {},
}


def opened(folder: Path) -> int:
    """How many of the ways to open a folder are refused; what is no ModelError comes out."""
    told = []
    for way in (
        lambda: open_tokenizer(folder, trust_remote_code=False),
        lambda: read_architecture(folder),
        lambda: open_model(folder, dtype=torch.float32, device=CPU),
    ):
        try:
            way()
        except ModelError as error:
            told.append(error.message)
    assert all(str(folder) in message for message in told)
    return len(told)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        pytest.param(name, field, marks=() if name == "llama" else pytest.mark.slow)
        for name in NAMES
        for field in SIZES[name]
    ],
)
def test_a_size_that_cannot_be_is_refused_before_anything_is_built(
    name: str, field: str, copied: Callable[[str], Path]
) -> None:
    folder = copied(name)
    for number in NUMBERS:
        configure(folder, **{field: number})
        opened(folder)
    if field not in ("max_position_embeddings", "max_window_layers"):
        for number in (10**7, 10**30, -1, 1.5, "x", True):
            configure(folder, **{field: number})
            assert opened(folder) == 3, number


@pytest.mark.parametrize("field", OTHER_FIELDS)
def test_a_field_that_cannot_be_is_refused_or_means_nothing(
    field: str, copied: Callable[[str], Path]
) -> None:
    folder = copied("llama")
    configure(folder, **{field: OTHER_FIELDS[field]})
    opened(folder)


# ------------------------------------------------------------------------------------------ tokenizers


def set_part(folder: Path, part: str, value: Any) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {part: value}))


DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
GROWTH: dict[str, tuple[str, Any]] = {
    "doubled 24 times": ("normalizer", {"type": "Sequence", "normalizers": [DOUBLE] * 24}),
    "in sequences of sequences": (
        "normalizer",
        {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [DOUBLE] * 12}] * 2},
    ),
    "by a pattern": (
        "normalizer",
        {"type": "Sequence", "normalizers": [{**DOUBLE, "pattern": {"Regex": "."}, "content": "b" * 40}] * 2},
    ),
    "by one": ("normalizer", {**DOUBLE, "content": "a" * 10_000}),
    "of nothing": ("normalizer", {**DOUBLE, "pattern": {"String": ""}, "content": "a" * 10_000}),
    "where text is made": (
        "decoder",
        {"type": "Sequence", "decoders": [DOUBLE] * 24},
    ),
}


@pytest.mark.parametrize("case", GROWTH)
def test_a_tokenizer_that_makes_texts_ever_longer_is_refused(
    case: str, copied: Callable[[str], Path]
) -> None:
    folder = copied("llama")
    set_part(folder, *GROWTH[case])
    with pytest.raises(ModelError, match="times as long, expected 1000 at most"):
        open_tokenizer(folder, trust_remote_code=False)


def test_normalizers_of_real_tokenizers_are_taken(copied: Callable[[str], Path]) -> None:
    for normalizer in (
        normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]),
        normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), "\u2581")]),
        normalizers.BertNormalizer(),
        normalizers.Replace("\t", "        "),
    ):
        folder = copied("llama")
        set_part(folder, "normalizer", json.loads(normalizer.__getstate__()))
        open_tokenizer(folder, trust_remote_code=False)


def test_a_tokenizer_that_panics_on_a_text_is_a_model_error(
    copied: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = copied("llama")
    split = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    set_part(folder, "pre_tokenizer", json.loads(split.__getstate__()))
    tokenizer = open_tokenizer(folder, trust_remote_code=False)
    text = Text(tokenizer, PromptStyle("plain", "", 0, (), {}), (1,), 16)
    problem: Any = type("Question", (), {"solution": "a" * 40 + "b"})
    with pytest.raises(ModelError, match=r"its tokenizer fails on a text: Onig.*retry-limit"):
        text.reference(problem)
    with pytest.raises(ModelError, match="its tokenizer fails on token ids"):
        text.completion([-1], stop=[])
    capfd.readouterr()
