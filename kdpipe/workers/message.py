"""Typed messages between a parent and its worker, encoded in one place; arrays cross as bytes.

A message is a header line of JSON, a body of JSON, and then the bytes of its arrays:

    {"kind": "call", "type": "Perform", "sizes": [812, 4096]}
    {...}<4096 bytes>

Types are frozen dataclasses made by `message`. A field that the receiving type does not have is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, TypeVar, dataclass_transform

from kdpipe.workers.failure import Failure

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt
    from pydantic import TypeAdapter
    from pydantic_core import CoreSchema

MessageKind = Literal["call", "stop", "event", "result", "stopped", "error"]
ARRAY_TYPES = ("<f4", "<f8", "<i4")
STRICT: Final = {"extra": "forbid"}
"""What a dataclass that crosses has as `__pydantic_config__`: unknown fields are refused."""

Request = TypeVar("Request")
Event = TypeVar("Event")
Result = TypeVar("Result")
Class = TypeVar("Class")


@dataclass_transform(frozen_default=True)
def message(cls: type[Class]) -> type[Class]:
    """The class as a frozen dataclass that crosses between processes; unknown fields are refused."""
    cls.__pydantic_config__ = STRICT  # type: ignore[attr-defined]
    return dataclass(frozen=True, slots=True)(cls)


@message
class Nothing:
    """A message that says nothing more than its kind."""


@dataclass(frozen=True, slots=True)
class Frame:
    """A message as it arrived: its kind, the name of its type, its body and the bytes of its arrays."""

    kind: MessageKind
    type: str
    body: bytes
    arrays: list[memoryview]


@dataclass(frozen=True)  # slots and Generic do not go together
class Talk(Generic[Request, Event, Result]):
    """The types of what a worker is asked, of what it reports meanwhile, and of what it answers."""

    requests: tuple[type[Request], ...]
    events: tuple[type[Event], ...]
    results: tuple[type[Result], ...]

    def request(self, frame: Frame) -> Request:
        """The request in a frame; raises ValueError unless it is one of this talk, field by field."""
        return _read(frame, self.requests)

    def event(self, frame: Frame) -> Event:
        """The event in a frame; raises as `request`."""
        return _read(frame, self.events)

    def result(self, frame: Frame) -> Result:
        """The result in a frame; raises as `request`."""
        return _read(frame, self.results)


def failure(frame: Frame) -> Failure:
    """The failure in a frame; raises as `Talk.request`."""
    return _read(frame, (Failure,))


def encode(kind: MessageKind, value: object) -> list[bytes | memoryview]:
    """The pieces of a message, to be written one after another."""
    kind_of: Any = type(value)
    arrays: list[memoryview] = []
    document = _adapter(kind_of).dump_python(value, mode="json", by_alias=True, context=arrays)
    body = json.dumps(document).encode()
    sizes = [len(body), *(array.nbytes for array in arrays)]
    header = json.dumps({"kind": kind, "type": kind_of.__name__, "sizes": sizes}).encode()
    return [header, b"\n", body, *arrays]


class FrameReader:
    """Bytes as they arrive to frames. Arrays are views of what arrived, not copies."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._header: dict[str, Any] | None = None

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that are whole with these bytes."""
        self._buffer += data
        while (frame := self._next()) is not None:
            yield frame

    def _next(self) -> Frame | None:
        if self._header is None:
            end = self._buffer.find(b"\n")
            if end < 0:
                return None
            self._header = json.loads(self._buffer[:end])
            del self._buffer[: end + 1]
        size, *sizes = self._header["sizes"]
        if len(self._buffer) < size + sum(sizes):
            return None
        header, self._header = self._header, None
        whole, self._buffer = self._buffer, self._buffer[size + sum(sizes) :]
        arrays = []
        for length in sizes:
            arrays.append(memoryview(whole)[size : size + length])
            size += length
        return Frame(header["kind"], header["type"], bytes(whole[: header["sizes"][0]]), arrays)


class ArrayField:
    """Makes an array cross as its bytes: `Annotated[npt.NDArray[np.float32], ArrayField()]`."""

    def __get_pydantic_core_schema__(self, _source: object, _handler: object) -> CoreSchema:
        """The schema by which pydantic leaves the bytes to `encode` and `Talk`."""
        from pydantic_core import core_schema

        written = core_schema.plain_serializer_function_ser_schema(_put, info_arg=True)
        return core_schema.with_info_plain_validator_function(_take, serialization=written)


def _put(array: npt.NDArray[Any], info: Any) -> dict[str, Any]:
    """What stands in the body for an array, whose little-endian bytes go to the context of the encoding."""
    import numpy as np

    plain = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    name = plain.dtype.newbyteorder("<").str
    if name not in ARRAY_TYPES:
        raise TypeError(f"an array of {array.dtype} does not cross, only {', '.join(ARRAY_TYPES)}")
    info.context.append(memoryview(plain.reshape(-1).view(np.uint8).data))
    return {"array": len(info.context) - 1, "type": name, "shape": list(array.shape)}


def _take(place: dict[str, Any], info: Any) -> npt.NDArray[Any]:
    """The array that a place in the body stands for, bit for bit."""
    import numpy as np

    if place["type"] not in ARRAY_TYPES:
        raise ValueError(f"an array of {place['type']!r} does not cross, only {', '.join(ARRAY_TYPES)}")
    return np.frombuffer(info.context[place["array"]], place["type"]).reshape(place["shape"])


def _read(frame: Frame, kinds: tuple[type[Class], ...]) -> Class:
    for kind in kinds:
        if kind.__name__ == frame.type:
            own: Any = kind
            found: Class = _adapter(own).validate_json(frame.body, strict=True, context=frame.arrays)
            return found
    raise ValueError(f"a {frame.kind} of type {frame.type} is no part of this talk")


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    """What writes and checks one type. Commands without a worker need no pydantic, so it is imported late."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind)
