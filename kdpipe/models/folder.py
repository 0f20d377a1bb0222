"""Models on disk: the only place that knows weight formats. Nothing is ever unpickled.

Whoever calls a `write_` function hands it a temporary folder and makes the result durable.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import JsonValue
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.logging import disable_progress_bar

from kdpipe.errors import ModelError, as_os_error
from kdpipe.models.adapters import CONFIG_FILE as ADAPTER_CONFIG
from kdpipe.models.adapters import Reach, is_adapted, reach, read_factors, targets_of, write_adapter
from kdpipe.models.config import TEXT_KEYS, context_of, left_out, open_config, scale_and_cap
from kdpipe.models.devices import dtype_name
from kdpipe.models.logprobs import Head, LowRank, body_of, head_logits, head_of, head_to
from kdpipe.models.model_folder import require_own_files, tensors_of, unfit
from kdpipe.recipe.models import Lora, Scratch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBES = (1.0, 1.0, 30.0, 1000.0)
"""What the hidden states of a probe's tokens are multiplied by: a wrong scale shows at small ones, a cap at large."""
_NO_WEIGHTS = re.compile(
    r"(^|\.)(attn|attention)\.(bias|masked_bias|causal_mask)$|rotary(_pos)?_emb\.inv_freq$|(^|\.)position_ids$"
)
"""Constants that old versions wrote beside the weights, but for those that transformers knows of an architecture."""
_FLOATS = ("F64", "F32", "F16", "BF16")
# How a model was opened or written, and what it is computed in: not what it is.
_CONFIG_HISTORY = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
# How a tokenizer was opened, which transformers writes beside what it is.
_TOKENIZER_HISTORY = ("is_local", "local_files_only", "name_or_path")

# Bars of loading and writing would tear the pipeline's own progress lines.
disable_progress_bar()


def open_model(
    folder: Path, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The causal language model in a Hugging Face folder, in eval mode.

    Raises ModelError when the folder is not one, its weights are not exactly those of the model, in numbers that it
    knows to read, or its logits are not those of its head (`logprobs.Head`).
    """
    _require_weights(folder)
    _require_known_numbers(folder)
    model, info = load_text_model(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{folder}: {len(missing)} weights of the model are not in its files, the first is {missing[0]}",
            hint="the folder holds another architecture, an adapter, or an incomplete copy",
        )
    _require_no_others(folder, model, info["unexpected_keys"])
    model = model.to(device).eval()
    _align(model)
    _require_finite(model, folder)
    _require_own_head(model, folder)
    return model


def load_text_model(
    folder: Path, *, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model in a folder as transformers loads it, and what it says of that; its text model alone."""
    hint = "give a folder that AutoModelForCausalLM.from_pretrained opens"
    config, is_part = open_config(folder, trust_remote_code=trust_remote_code), bool(left_out(folder)[0])
    with unfit(f"{folder}: cannot be opened as a causal language model", hint=hint):
        model, info = AutoModelForCausalLM.from_pretrained(
            str(folder),
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            key_mapping=TEXT_KEYS if is_part else None,
        )
    if is_part:
        model._weight_conversions = None  # it is written under the names of a text model, not as it was read
    return model, info


def read_head(
    folder: Path,
    *,
    num_ids: int,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
    adapter: Path | None = None,
) -> Head:
    """The output head of the model in a folder for `num_ids` ids in use, with what an `adapter` adds.

    Its rows are all that is read where they go by their own name or that of the input embeddings that they are
    tied to. Some are found by transformers alone (Pythia's `embed_out`), or stand there quantized: these are taken
    from the opened model.
    """
    _require_weights(folder)
    model = skeleton(folder, trust_remote_code=trust_remote_code)
    layer = model.get_output_embeddings()
    low_rank = None
    own = next(name for name, module in model.named_modules() if module is layer)
    if adapter is not None and (factors := read_factors(adapter, own)) is not None:
        low_rank = LowRank(factors[0].to(device), factors[1][:num_ids].to(device), factors[2])
    found = {}
    for key, wanted in (("weight", layer.weight), ("bias", layer.bias)):
        if wanted is not None:
            rows = _read_rows_of(folder, _names_in_files(model, layer, wanted, key), num_ids)
            if rows is None:
                cpu = torch.device("cpu")
                opened = open_model(folder, dtype=dtype, device=cpu, trust_remote_code=trust_remote_code)
                head = head_to(head_of(opened, num_ids=num_ids), dtype=dtype, device=device)
                return replace(head, low_rank=low_rank)
            found[key] = rows
    head = Head(found["weight"], found.get("bias"), *scale_and_cap(model.config))
    return replace(head_to(head, dtype=dtype, device=device), low_rank=low_rank)


def _names_in_files(
    model: PreTrainedModel, layer: torch.nn.Module, wanted: torch.Tensor, key: str
) -> list[str]:
    """What files may call a weight of the output head: its own names first, as transformers takes it."""
    own = next(name for name, module in model.named_modules() if module is layer)
    named = [name for name, tensor in model.named_parameters(remove_duplicate=False) if tensor is wanted]
    names = sorted(named, key=lambda name: name != f"{own}.{key}")
    forms = ("{0}", "language_model.{0}", "model.language_model.{1}", "{2}")
    bare = model.base_model_prefix + "."
    return [
        form.format(name, name.removeprefix("model."), name.removeprefix(bare))
        for name in names
        for form in forms
    ]


def _read_rows_of(folder: Path, names: list[str], count: int) -> torch.Tensor | None:
    """The first rows of the first tensor of `names` in a folder's safetensors files that is not quantized."""
    tensors = tensors_of(folder)
    name = next((name for name in names if name in tensors), None)
    if name is None or tensors[name].dtype not in _FLOATS:
        return None
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                if name in file.keys():  # noqa: SIM118 (no mapping)
                    rows: torch.Tensor = file.get_slice(name)[:count]
                    return rows
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: cannot be read: {error}") from error
    return None


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a model folder says of its model. `settings` are all that decides which weights fit into it.

    `head_names` are the names of the output head's weight: of a tied one, those of the input embeddings too.
    """

    context: int | None
    rows: int
    head_names: tuple[str, ...]
    is_quantized: bool
    settings: dict[str, JsonValue]


def read_architecture(
    folder: Path, *, trust_remote_code: bool = False, is_quantized: bool = False
) -> Architecture:
    """The architecture of the model in a folder; reads no weights, but their names.

    Raises ModelError if it is none, or its files hold weights that it does not have. That cannot be told of quantized
    ones, which go by names of their own: `is_quantized` says that an engine was told so, where config.json does not.
    """
    _require_weights(folder)
    model = skeleton(folder, trust_remote_code=trust_remote_code)
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{folder}: {type(model).__name__} has no output head of its own")
    named = model.named_parameters(remove_duplicate=False)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    is_quantized = is_quantized or "quantization_config" in settings
    if not is_quantized:
        _require_no_others(folder, model, _others_in_files(folder, model))
    return Architecture(
        context=context_of(model.config),
        rows=head.weight.shape[0],
        head_names=tuple(name for name, tensor in named if tensor is head.weight),
        is_quantized=is_quantized,
        settings={name: value for name, value in settings.items() if name not in _CONFIG_HISTORY},
    )


def head_digest(head: Head) -> str:
    """sha256 of the head's numbers, in its dtype: hidden states mean something only beside this very head."""
    form = str(head.weight_VH.dtype) + (f" {head.scale} {head.cap}" if head.scale != 1 or head.cap else "")
    digest = hashlib.sha256(form.encode())
    low_rank = () if head.low_rank is None else (head.low_rank.down_RH, head.low_rank.up_VR)
    for tensor in (head.weight_VH, head.bias_V, *low_rank):
        if tensor is not None:
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def scratch_model(
    settings: Scratch, *, num_ids: int, eos_id: int, pad_id: int, seed: int
) -> LlamaForCausalLM:
    """A float32 Llama model with weights drawn from the seed; leaves the global generator as it was."""
    config = LlamaConfig(
        vocab_size=num_ids,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_kv_heads,
        max_position_embeddings=settings.max_positions,
        tie_word_embeddings=settings.tie_embeddings,
        initializer_range=settings.init_std,
        bos_token_id=None,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return model.float().eval()


def write_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a Hugging Face folder: safetensors, config, generation config, tokenizer.

    `dtype` is that of the written weights where the model in memory holds wider masters. Equal weights,
    config and tokenizer give equal bytes. Of a model with an adapter that is all that is written, beside the tokenizer.
    """
    if is_adapted(model):
        with disk_errors(folder):
            write_adapter(model, folder)
        _write_tokenizer(tokenizer, folder)
        return
    dtype = dtype or model.dtype
    with disk_errors(folder):
        model.save_pretrained(str(folder), state_dict=_cast(model.state_dict(), dtype))
    _write_tokenizer(tokenizer, folder)
    _rewrite(folder / "config.json", {"dtype": dtype_name(dtype)})


def _cast(weights: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights in `dtype`; what is one in memory, such as a tied head, stays one, and is written once."""
    cast: dict[tuple[int, tuple[int, ...]], torch.Tensor] = {}
    found = {}
    for name, weight in weights.items():
        place = weight.data_ptr(), tuple(weight.shape)
        if weight.is_floating_point() and place not in cast:
            cast[place] = weight.to(dtype)
        found[name] = cast.get(place, weight)
    return found


def reach_of(folder: Path, lora: Lora, *, trust_remote_code: bool = False) -> Reach:
    """What adapters reach of the model in a folder, by no weights; raises ModelError if they do not fit."""
    _require_weights(folder)
    model = skeleton(folder, trust_remote_code=trust_remote_code)
    return reach(model, targets_of(model, lora))


def skeleton(folder: Path, *, trust_remote_code: bool) -> PreTrainedModel:
    """The model of a folder without its weights; raises ModelError when its config.json is not of one."""
    with unfit(f"{folder}: its config.json is not of a causal language model"), torch.device("meta"):
        config = open_config(folder, trust_remote_code=trust_remote_code)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    tokenizer.save_pretrained(str(folder))
    _rewrite(folder / "tokenizer_config.json", dict.fromkeys(_TOKENIZER_HISTORY))


def _rewrite(file: Path, changes: Mapping[str, str | None]) -> None:
    """Sets fields of a JSON file, or drops those that are None."""
    record = json.loads(file.read_text(encoding="utf-8")) | changes
    record = {name: value for name, value in record.items() if name not in changes or value is not None}
    file.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _align(model: PreTrainedModel) -> None:
    """Moves weights to memory of their own, aligned as torch aligns what it allocates.

    Read from a file they lie where the file's header puts them, and matrix products round differently there: a
    resumed run would not end with the digests of an unbroken one.
    """
    for weight in (*model.parameters(), *model.buffers()):
        weight.data = weight.data.clone()


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns what safetensors raises when the disk refuses into the OSError that it is."""
    try:
        yield
    except SafetensorError as error:
        raise as_os_error(error, folder.name) from error


def _require_weights(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder}: no config.json in it, so it is not a model folder",
            hint="give the folder that holds config.json, tokenizer files and *.safetensors",
        )
    require_own_files(folder)
    # Transformers would open the model that it names, wherever that is.
    if (folder / ADAPTER_CONFIG).exists():
        raise ModelError(
            f"{folder}: holds {ADAPTER_CONFIG}, so its weights are an adapter's, or another model's with one",
            hint="merge the adapter into the weights, or remove it",
        )
    if any(folder.glob("*.safetensors")):
        return
    others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    found = f"only {', '.join(others)}, which are pickles" if others else "no weights"
    raise ModelError(
        f"{folder}: expected *.safetensors, found {found}",
        hint="load it once with transformers and save_pretrained it: that writes safetensors",
    )


def _require_known_numbers(folder: Path) -> None:
    """Raises ModelError on weights in a quantization that is unknown, or not told, and so misread."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    told = settings.get("quantization_config") if isinstance(settings, dict) else None
    if told is None:
        coded = (
            (name, tensor.dtype)
            for name, tensor in tensors_of(folder).items()
            if name.endswith((".weight", ".bias"))
            and tensor.dtype not in _FLOATS
            and not _NO_WEIGHTS.search(name)
        )
        for name, dtype in coded:
            raise ModelError(
                f"{folder}: {name} holds {dtype}, and config.json has no quantization_config that says what they mean",
                hint="take the folder of the model before it was quantized, or one whose config.json is whole",
            )
        return
    method = told.get("quant_method") if isinstance(told, dict) else told
    if not isinstance(method, str) or method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        known = ", ".join(sorted(AUTO_QUANTIZATION_CONFIG_MAPPING))
        raise ModelError(
            f"{folder}: quant_method is {method!r}, which transformers does not know",
            hint=f"it knows {known}",
        )


def _others_in_files(folder: Path, model: PreTrainedModel) -> Iterator[str]:
    """Names in a folder's files that transformers would find no place for in the model."""
    held = model.state_dict()
    mapping = get_model_conversion_mapping(model, TEXT_KEYS if left_out(folder)[0] else None)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    prefix = model.base_model_prefix
    for name in tensors_of(folder):
        forms = (
            rename_source_key(name, *how, prefix, held)[0] for how in ((renamings, converters), ([], []))
        )
        if held.keys().isdisjoint(forms) and not any(pattern.search(name) for pattern in ignored):
            yield name


def _require_no_others(folder: Path, model: PreTrainedModel, unexpected: Iterable[str]) -> None:
    """Raises ModelError on weights in the files of a folder that are none of its model."""
    known = set(left_out(folder)[1])
    if others := sorted(name for name in unexpected if name not in known and not _NO_WEIGHTS.search(name)):
        raise ModelError(
            f"{folder}: {len(others)} weights in its files are none of {type(model).__name__} as its config.json "
            f"has it, the first is {others[0][:100]}: without them it would be another model",
            hint="see its architecture and its number of layers, or take those weights out of the files",
        )


def _require_finite(model: PreTrainedModel, folder: Path) -> None:
    """Raises ModelError on a weight that holds NaN or infinity, wherever in it that is."""
    for name, weight in model.named_parameters():
        if weight.numel() and not torch.stack(weight.detach().aminmax()).isfinite().all():
            raise ModelError(
                f"{folder}: {name} holds NaN or infinite numbers",
                hint="the weights are damaged, or were when they were saved: take another copy",
            )


def _require_own_head(model: PreTrainedModel, folder: Path) -> None:
    """Refuses models whose logits are not those of the head as read, of small and large hidden states."""
    sizes = torch.tensor(_PROBES, device=model.device, dtype=model.dtype)[:, None]

    def enlarge(_module: torch.nn.Module, _inputs: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state * sizes
        seen.append(output.last_hidden_state)
        return output

    seen: list[torch.Tensor] = []
    kind = type(model).__name__
    if (head := model.get_output_embeddings()) is None:
        raise ModelError(f"{folder}: {kind} has no output head of its own")
    handle = body_of(model).register_forward_hook(enlarge)
    try:
        with unfit(f"{folder}: a {kind} that cannot be run"), torch.no_grad():
            ids = torch.arange(len(sizes), device=model.device)[None] % head.weight.shape[0]
            logits = model(input_ids=ids, use_cache=False).logits[0].float()
            if not seen:
                raise ModelError(f"{folder}: {kind} makes its logits elsewhere than in its output head")
            own = head_logits(seen[0][0], head_of(model, num_ids=head.weight.shape[0]), temperature=1.0)
    finally:
        handle.remove()
    difference = (logits - own).abs().amax(1)
    # The two are one matrix product; bfloat16 rounds its result to 8 bits.
    if not (difference <= 0.02 * own.abs().amax(1)).all():
        raise ModelError(
            f"{folder}: logits of {kind} are not those of its output head, scaled and capped as its config.json says "
            f"(they differ by {difference.max().item():.3g}): it makes something else of them, which kdpipe does not",
            hint="use a model whose logits are hidden @ head, times a scale, under a cap",
        )
