"""A message as the other process gets it."""

from __future__ import annotations

from typing import Any

from kdpipe.workers.message import Frame, FrameReader, MessageKind, Talk, encode


def frame_of(kind: MessageKind, value: object) -> Frame:
    """The frame that these bytes are to who reads them."""
    [frame] = FrameReader().feed(b"".join(encode(kind, value)))
    return frame


def asked(talk: Talk[Any, Any, Any], value: object) -> Any:
    """A request after the pipe."""
    return talk.request(frame_of("call", value))


def reported(talk: Talk[Any, Any, Any], value: object) -> Any:
    """An event after the pipe."""
    return talk.event(frame_of("event", value))


def answered(talk: Talk[Any, Any, Any], value: object) -> Any:
    """A result after the pipe."""
    return talk.result(frame_of("result", value))
