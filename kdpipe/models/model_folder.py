"""Whether a model folder may be opened: all that is read lies in it and is small enough to read.

A folder from elsewhere is data. Names in it that lead out of it, links, devices, and JSON that is huge or nested
without end are refused here, before transformers or a tokenizer sees them. Cheap, and imports nothing heavy.
"""

from __future__ import annotations

import json
import stat
from typing import TYPE_CHECKING

from kdpipe.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pydantic import JsonValue

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
            _require_readable(path, status.st_size)


def _require_readable(path: Path, size: int) -> None:
    """Raises ModelError on JSON that is too large, nested too deeply, or that names files elsewhere."""
    is_read = path.name in SETTINGS or path.name.endswith(".index.json")
    limit = MAX_SETTINGS_BYTES if is_read else MAX_TOKENIZER_BYTES
    if size > limit:
        raise ModelError(f"{path}: {size} bytes, expected at most {limit} of such a file", hint=_HINT)
    if not is_read:  # tokenizer.json and the like are parsed elsewhere, within limits of its own
        return
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
