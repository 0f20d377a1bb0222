from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from kdpipe.errors import ArtifactError, EngineError, ModelError, RecipeError
from kdpipe.models.cache import ModelCache
from kdpipe.models.devices import resolve_device, resolve_dtype
from kdpipe.models.folder import head_digest, open_model, read_head, scratch_model, write_model
from kdpipe.models.logprobs import head_of
from kdpipe.models.source import ModelSource
from kdpipe.recipe.models import Scratch
from kdpipe.training.optimizer import read_trainer, write_trainer
from tests.tiny_models import CONFIGS, tiny_model, tiny_tokenizer

CPU = torch.device("cpu")


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def equal_weights(one, other) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_written_model_opens_bit_for_bit_and_writes_the_same_bytes_again(name, tmp_path):
    model = tiny_model(name)
    write_model(model, tiny_tokenizer(), tmp_path / "one")
    opened = open_model(tmp_path / "one", dtype=torch.float32, device=CPU)
    assert equal_weights(model, opened)
    assert not opened.training
    write_model(opened, PreTrainedTokenizerFast.from_pretrained(tmp_path / "one"), tmp_path / "two")
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= set(
        digests(tmp_path / "one")
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_an_output_head_is_read_alone_and_known_by_its_digest(name, tmp_path):
    model = tiny_model(name)
    write_model(model, tiny_tokenizer(), tmp_path)
    wanted = head_of(model, num_ids=13)
    head = read_head(tmp_path, num_ids=13, dtype=torch.float32, device=CPU)
    assert torch.equal(head.weight_VH, wanted.weight_VH)
    assert (head.bias_V is None) == (wanted.bias_V is None)
    assert head_digest(head) == head_digest(wanted)
    assert head_digest(head) != head_digest(read_head(tmp_path, num_ids=12, dtype=torch.float32, device=CPU))
    with torch.no_grad():
        wanted.weight_VH[3, 2] += 1e-3
    assert head_digest(head) != head_digest(wanted)


def test_a_folder_without_its_output_head_is_named(tmp_path):
    write_model(tiny_model("llama"), tiny_tokenizer(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"not in its files, the first is lm_head\.weight"):
        read_head(tmp_path, num_ids=13, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("name", ["llama", "llama-tied-biased"])
def test_float32_masters_are_written_in_the_models_dtype(name, tmp_path):
    model = tiny_model(name)
    write_model(model, tiny_tokenizer(), tmp_path / "half", dtype=torch.bfloat16)
    write_model(model, tiny_tokenizer(), tmp_path / "full")
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"
    assert model.dtype == torch.float32
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert plain.dtype == torch.bfloat16
    assert equal_weights(plain, tiny_model(name).to(torch.bfloat16))
    sizes = [(tmp_path / folder / "model.safetensors").stat().st_size for folder in ("half", "full")]
    assert sizes[0] < 0.7 * sizes[1]


def test_scratch_models_are_the_seeds_own_and_leave_the_generator_alone():
    def make(seed, **changes):
        settings = Scratch(hidden_size=24, intermediate_size=40, num_heads=3, num_kv_heads=3, **changes)
        return scratch_model(settings, num_ids=14, eos_id=1, pad_id=0, seed=seed)

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = make(1)
    assert torch.equal(torch.rand(3), expected)
    assert equal_weights(one, make(1))
    assert not equal_weights(one, make(2))
    assert one.dtype == torch.float32
    assert one.get_output_embeddings().weight.shape == (14, 24)
    assert one.get_output_embeddings().weight is one.get_input_embeddings().weight
    untied = make(1, tie_embeddings=False)
    assert untied.get_output_embeddings().weight is not untied.get_input_embeddings().weight
    assert (one.config.eos_token_id, one.config.pad_token_id, one.config.max_position_embeddings) == (
        1,
        0,
        256,
    )


def test_folders_that_are_no_models_are_refused_by_name(tmp_path):
    with pytest.raises(EngineError, match=r"nothing: no config\.json"):
        open_model(tmp_path / "nothing", dtype=torch.float32, device=CPU)
    write_model(tiny_model("llama"), tiny_tokenizer(), tmp_path / "m")
    weights = tmp_path / "m/model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(EngineError, match=f"{tmp_path}/m: cannot be opened"):
        open_model(tmp_path / "m", dtype=torch.float32, device=CPU)
    weights.rename(tmp_path / "m/pytorch_model.bin")
    with pytest.raises(EngineError, match=r"pytorch_model\.bin, which are pickles"):
        open_model(tmp_path / "m", dtype=torch.float32, device=CPU)
    (tmp_path / "m/pytorch_model.bin").rename(tmp_path / "notes.txt")
    with pytest.raises(EngineError, match="found no weights"):
        open_model(tmp_path / "m", dtype=torch.float32, device=CPU)
    weights.write_bytes(kept)
    (tmp_path / "m/config.json").write_text('{"model_type": "no-such-architecture"}')
    with pytest.raises(EngineError, match="no-such-architecture"):
        open_model(tmp_path / "m", dtype=torch.float32, device=CPU)


def test_weights_that_are_missing_are_refused_and_not_invented(tmp_path):
    write_model(tiny_model("llama"), tiny_tokenizer(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_hidden_layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngineError, match=r"weights of the model are not in its files.*layers\.2"):
        open_model(tmp_path, dtype=torch.float32, device=CPU)


def test_bfloat16_models_pass_the_probe_of_the_head(tmp_path):
    write_model(tiny_model("qwen2"), tiny_tokenizer(), tmp_path)
    assert open_model(tmp_path, dtype=torch.bfloat16, device=CPU).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("flags", "expected", "reason"),
    [
        ("avx2 fma", torch.float32, "no avx512_bf16 or amx_bf16"),
        ("avx2 avx512_bf16 amx_tile", torch.bfloat16, "avx512_bf16"),
        ("amx_bf16 avx512_bf16", torch.bfloat16, "avx512_bf16 and amx_bf16"),
    ],
)
def test_auto_is_bfloat16_only_where_the_cpu_computes_it(flags, expected, reason, tmp_path):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags\t\t: fpu {flags} sse2\n")
    dtype, why = resolve_dtype("auto", CPU, cpuinfo=tmp_path / "cpuinfo")
    assert dtype == expected
    assert reason in why
    assert resolve_dtype("float16", CPU)[0] == torch.float16
    assert resolve_dtype("auto", CPU, cpuinfo=tmp_path / "none")[0] == torch.float32


def test_devices_are_named_or_refused():
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type in ("cpu", "cuda")
    with pytest.raises(RecipeError, match="gpu7"):
        resolve_device("gpu7")
    with pytest.raises(RecipeError, match="CUDA devices"):
        resolve_device("cuda:99")


def test_trainer_state_comes_back_as_written_in_the_same_bytes(tmp_path):
    shared = torch.randn(4, 3)
    tensors = {
        "b.exp_avg": shared.t(),
        "a.exp_avg": shared,
        "rng": torch.get_rng_state(),
        "step": torch.tensor(3.0),
    }
    state = {"step": 3, "cursor": [1, 2], "rate": 1e-3, "a": {"z": None, "b": True}}
    write_trainer(tmp_path / "one", tensors=tensors, state=state)
    read_tensors, read_state = read_trainer(tmp_path / "one")
    assert read_state == state
    assert read_tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(read_tensors[name], tensor)
        assert read_tensors[name].dtype == tensor.dtype
    write_trainer(
        tmp_path / "two", tensors=dict(reversed(tensors.items())), state=dict(reversed(state.items()))
    )
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_damaged_trainer_state_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="nothing"):
        read_trainer(tmp_path / "nothing")
    write_trainer(tmp_path, tensors={"a": torch.ones(2)}, state={"step": 1})
    (tmp_path / "trainer.json").write_text('{"step": ')
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_trainer(tmp_path)
    (tmp_path / "trainer.json").write_text("[]")
    with pytest.raises(ArtifactError, match="JSON object"):
        read_trainer(tmp_path)
    (tmp_path / "trainer.json").write_text("{}")
    (tmp_path / "trainer.safetensors").write_bytes(b"\x10")
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_trainer(tmp_path)


def test_the_cache_opens_once_and_drops_the_least_recently_used(tmp_path):
    write_model(tiny_model("llama"), tiny_tokenizer(), tmp_path)
    cache = ModelCache(CPU, limit=2)

    def get(digest):
        return cache.get(ModelSource(tmp_path, digest, dtype="float32"))

    a, b = get("a"), get("b")
    assert get("a") is a
    assert get("b") is b
    get("a")
    get("c")
    assert get("a") is a
    assert get("b") is not b
    assert cache.get(ModelSource(tmp_path, "b", dtype="bfloat16")).dtype == torch.bfloat16
    kept = get("b")
    cache.drop("b")
    assert get("b") is not kept


def test_a_network_holds_one_version_until_that_is_withdrawn(tmp_path):
    model = tiny_model("llama").train()
    cache = ModelCache(CPU)
    cache.publish("before", model)
    cache.publish("after", model)
    assert cache.get(ModelSource(tmp_path, "after", dtype="float32")) is model
    assert not model.training
    with pytest.raises(EngineError):
        cache.get(ModelSource(tmp_path, "before", dtype="float32"))
    cache.withdraw("after")
    with pytest.raises(EngineError):
        cache.get(ModelSource(tmp_path, "after", dtype="float32"))
