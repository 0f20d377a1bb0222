"""Whether a model folder may be opened: what is read lies in it, is small, and fits its weights.

A folder from elsewhere is data. Names in it that lead out of it, links, devices, JSON that is huge or nested
without end, and sizes that its weights cannot have are refused here, before transformers or a tokenizer sees them; what
these raise of the rest becomes a sentence. Cheap, and imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import json
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from kdpipe.errors import ModelError

MAX_SETTINGS_BYTES = 64 << 20  # the index of a model of 10^12 parameters takes less
MAX_TOKENIZER_BYTES = 512 << 20
MAX_DEPTH = 64
TEMPLATES = "additional_chat_templates"
SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
)
_HINT = "take the folder only from whom you trust, and let it hold plain files"
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_LAYERS = re.compile(r"(num|n)_(\w+_)?layers?|(en|de)coder_layers")
_SIZES = re.compile(
    r"hidden_size|n_embd|d_model|vocab_size|(\w+_)?intermediate_size|n_inner|d_ff|\w*ffn_dim|head_dim"
    r"|(num|n)_(\w+_)?(heads?|experts)"
)
_POSITIONS = re.compile(r"n_positions|n_ctx|max_position_embeddings")
_OF_A_TOWER = re.compile(r"(^|\.)(vision|visual|audio|image)")
"""Weights of what sees or hears: its positions are no tokens."""
_NEEDED = re.compile(r"num_hidden_layers|n_layer|hidden_size|n_embd|vocab_size|num_attention_heads|n_head")
"""Sizes without which there is no model; others may be 0."""
_UNBOUNDED = 10_000, 1 << 24, 1 << 31  # layers, sizes, and positions, where no weights tell
_SHARED = 16  # layers that use the same weights
_PACKED = 32  # numbers of a few bits that quantization puts into one
RAISED = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    ImportError,
)
"""What libraries raise of what they are given, beside errors of their own."""
# Of safetensors, the hub, and Rust.
_RAISED_BY_NAME = {"SafetensorError", "StrictDataclassError", "PanicException"}


@contextlib.contextmanager
def unfit(what: str, *, hint: str = "") -> Iterator[None]:
    """Turns what a library raises of files that it cannot use into a ModelError: `what` and why."""
    try:
        yield
    except BaseException as error:  # a library written in Rust panics with one
        known = {kind.__name__ for kind in type(error).__mro__} & _RAISED_BY_NAME
        if not (known or isinstance(error, RAISED) or type(error) is Exception):
            raise
        raise ModelError(f"{what}: {error}", hint=hint) from error


def require_own_files(folder: Path) -> None:
    """Raises ModelError unless a model folder's files are plain, its own, and small enough to read.

    A snapshot of the hub's cache links to the blobs of its own repository; other links may not leave the folder.
    """
    root = folder.resolve()
    home = root.parents[1] if root.parent.name == "snapshots" else root
    templates = folder / TEMPLATES
    inside = sorted(templates.iterdir()) if templates.is_dir() and not templates.is_symlink() else []
    for path in [*sorted(folder.iterdir()), *inside]:
        place = path.resolve()
        if not place.is_relative_to(home):
            raise ModelError(f"{path}: is a link that leads out of the folder, to {place}", hint=_HINT)
        try:
            status = place.stat()
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror}", hint=_HINT) from None
        if stat.S_ISDIR(status.st_mode):
            continue
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"{path}: is no plain file", hint=_HINT)
        if path.suffix == ".json":
            value = _readable(path, status.st_size)
            if path.name == "config.json":
                _require_sizes(path, value, tensors_of(folder))


@dataclass(frozen=True, slots=True)
class Tensor:
    """What a header says of a tensor; `dtype` is safetensors' name, such as BF16."""

    dtype: str
    shape: tuple[int, ...]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """The tensors in a folder's safetensors files, by their headers; a broken one has none."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with contextlib.suppress(*RAISED), path.open("rb") as file:
            header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), _MAX_HEADER_BYTES)))
            header.pop("__metadata__", None)
            found |= {
                name: Tensor(str(row["dtype"]), tuple(map(int, row["shape"]))) for name, row in header.items()
            }
    return found


def _require_sizes(path: Path, value: JsonValue, tensors: Mapping[str, Tensor]) -> None:
    """Raises ModelError on sizes in a config that its weights cannot have, before any is built."""
    bounds = dict(zip((_LAYERS, _SIZES, _POSITIONS), _UNBOUNDED, strict=True))
    if tensors:
        numbers = [int(number) for name in tensors for number in re.findall(r"\b\d{1,9}\b", name)]
        bounds[_LAYERS] = _SHARED * (1 + max(numbers, default=len(tensors)))
        longest = {name: max(tensor.shape, default=1) for name, tensor in tensors.items()}
        bounds[_SIZES] = max(bounds[_LAYERS], _PACKED * max(longest.values()))
        learned = [
            size
            for name, size in longest.items()
            if re.search(r"\bwpe\b|embed_positions|position_emb", name) and not _OF_A_TOWER.search(name)
        ]
        bounds[_POSITIONS] = max(learned, default=bounds[_POSITIONS])
    for name, found in _fields(value):
        most = next((most for names, most in bounds.items() if names.fullmatch(name)), None)
        if most is not None:
            for size in found if isinstance(found, list) else [found]:
                _require_size(
                    f"{path}: {name}", size, least=int(_NEEDED.fullmatch(name) is not None), most=most
                )


def _fields(value: JsonValue) -> Iterator[tuple[str, JsonValue]]:
    """The fields of an object and of those in it, by their names."""
    for name, found in value.items() if isinstance(value, dict) else ():
        yield name, found
        yield from _fields(found)


def _require_size(what: str, size: JsonValue, *, least: int, most: int) -> None:
    if size is not None and (type(size) is not int or not least <= size <= most):
        raise ModelError(
            f"{what} is {repr(size)[:40]}, expected a whole number from {least} to {most}",
            hint="its weights allow no other: take a folder whose config.json and weights belong together",
        )


def _readable(path: Path, size: int) -> JsonValue:
    """A settings file's JSON; raises ModelError if it is too large, too deep, or names files elsewhere."""
    is_read = path.name in SETTINGS or path.name.endswith(".index.json")
    limit = MAX_SETTINGS_BYTES if is_read else MAX_TOKENIZER_BYTES
    if size > limit:
        raise ModelError(f"{path}: {size} bytes, expected at most {limit} of such a file", hint=_HINT)
    if not is_read:  # tokenizer.json and the like are parsed elsewhere, within limits of its own
        return None
    try:
        value: JsonValue = json.loads(path.read_bytes())
    except RecursionError:
        raise ModelError(f"{path}: is nested too deeply to be read", hint=_HINT) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from None
    if _depth(value) > MAX_DEPTH:
        raise ModelError(f"{path}: is nested more than {MAX_DEPTH} levels deep", hint=_HINT)
    for name in _named_files(path.name, value):
        if not isinstance(name, str) or name in ("", "..") or "/" in name or "\\" in name or "\0" in name:
            raise ModelError(f"{path}: names the file {name!r}, expected one in its folder", hint=_HINT)
    return value


def _depth(value: JsonValue) -> int:
    """How deeply objects and lists are nested; 0 of a plain value."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


def _named_files(file: str, value: JsonValue) -> Iterator[JsonValue]:
    """What a file of the folder calls files that are opened with it."""
    if not isinstance(value, dict):
        return
    if file.endswith(".index.json"):
        shards = value.get("weight_map")
        yield from shards.values() if isinstance(shards, dict) else ()
    elif file == "config.json" and value.get("transformers_weights") is not None:
        yield value["transformers_weights"]
    elif file == "tokenizer_config.json":
        named = value.get("fast_tokenizer_files")
        yield from named if isinstance(named, list) else ()
