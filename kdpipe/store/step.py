"""A step's identity: its stage, round and subject, what was hashed, and the fingerprint of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from pydantic import JsonValue

from kdpipe.recipe.roles import Role
from kdpipe.store.stage import Stage

Fields: TypeAlias = dict[str, JsonValue]


class Input(NamedTuple):
    """An input of a step: which step makes it, and which folders of its payload are opened."""

    step_id: str
    opens: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One stage in one round. `document` is all that was hashed into `fingerprint`, readable."""

    id: str
    stage: Stage
    round: int
    subject: str
    seed: int
    inputs: Mapping[Role, Input]
    document: Fields
    fingerprint: str

    @property
    def link_name(self) -> str:
        """The name of this step's link in its round's folder of the run."""
        return link_name_of(self.stage, self.subject)


def step_id_of(stage: str, subject: str | None, number: int) -> str:
    """What a step is called: `rollout@3`, `evaluate:student@3`."""
    return f"{stage}:{subject}@{number}" if subject else f"{stage}@{number}"


def link_name_of(stage: str, subject: str | None) -> str:
    """What a run calls its link to a step's entry: `rollout`, `evaluate-student`."""
    return f"{stage}-{subject}" if subject else stage


def canonical(value: JsonValue) -> bytes:
    """`value` as JSON bytes, equal for equal values; raises on a type or number that JSON cannot hold."""
    _require_text_keys(value)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _require_text_keys(value: JsonValue) -> None:
    """Raises TypeError on keys that JSON would turn into text, making two documents one."""
    waiting = [value]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            for key in node:
                if not isinstance(key, str):
                    raise TypeError(f"key {key!r} is not text")
            waiting += [item for item in node.values() if isinstance(item, (dict, list, tuple))]
        elif isinstance(node, (list, tuple)):
            waiting += [item for item in node if isinstance(item, (dict, list, tuple))]
