"""Messages between processes: what is written is what is read, bit for bit, and nothing else is taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kdpipe.engines.protocol import Completion, SampleRequest, Sampling, ScoreRequest, Scoring, TokenScores
from kdpipe.engines.remote import TALK, Hosting, Load, SampleCall, Sampled, ScoreCall, Scored
from kdpipe.errors import ArtifactError, EngineError, ModelError, StepError
from kdpipe.models.source import AdapterSource, ModelSource
from kdpipe.recipe.runtime import Runtime
from kdpipe.workers.failure import failure_of
from kdpipe.workers.message import (
    ArrayField,
    Frame,
    FrameReader,
    Nothing,
    Talk,
    encode,
    failure,
    message,
)


@message
class Numbers:
    """Three arrays and a word."""

    word: str
    first: Annotated[npt.NDArray[Any], ArrayField()]
    second: Annotated[npt.NDArray[Any], ArrayField()] | None = None
    more: list[Annotated[npt.NDArray[Any], ArrayField()]] | None = None


NUMBERS = Talk[Numbers, Nothing, Numbers]((Numbers,), (Nothing,), (Numbers,))
HOSTING = Hosting("hf", "cpu", Runtime())


def frames(data: bytes, size: int) -> list[Frame]:
    """The frames of these bytes, which arrive in pieces of `size`."""
    reader = FrameReader()
    return [frame for at in range(0, len(data), size) for frame in reader.feed(data[at : at + size])]


def crossed(value: Any, talk: Talk[Any, Any, Any], *, kind: Any = "call", size: int = 1 << 20) -> Any:
    [frame] = frames(b"".join(encode(kind, value)), size)
    return talk.request(frame) if kind == "call" else talk.result(frame)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32])
@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_arrays_cross_bit_for_bit(dtype: Any, size: int) -> None:
    random = np.random.default_rng(1).bytes(24 * np.dtype(dtype).itemsize)
    array = np.frombuffer(random, dtype).reshape(2, 3, 4)  # any bits: nan with payloads, denormals, -0.0
    empty, back = np.zeros((0, 5), np.int32), np.array([-0.0, np.inf, 1e-45], np.float32)[::-1]
    found = crossed(Numbers("é", array, None, [empty, back, array.T]), NUMBERS, size=size)
    assert (found.word, found.second) == ("é", None)
    for one, other in zip((found.first, *found.more), (array, empty, back, array.T), strict=True):
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    found.first[...] = 0  # whoever gets it may write to it
    assert found.more[2].tobytes() == array.T.tobytes()


def test_an_array_of_another_type_does_not_cross() -> None:
    with pytest.raises(Exception, match="int64"):
        encode("call", Numbers("", np.zeros(1, np.int64)))
    [frame] = frames(b"".join(encode("call", Numbers("", np.zeros(1, np.float32)))), 99)
    tampered = Frame(frame.kind, frame.type, frame.body.replace(b"<f4", b"|O8"), frame.arrays)
    with pytest.raises(ValidationError, match=r"\|O8"):
        NUMBERS.request(tampered)


@given(st.lists(st.integers(0, 3), max_size=12), st.integers(1, 64))
def test_messages_arrive_in_order_however_they_are_cut(lengths: list[int], size: int) -> None:
    sent = [Numbers(str(number), np.arange(length, dtype=np.int32)) for number, length in enumerate(lengths)]
    data = b"".join(piece for value in sent for piece in encode("result", value))
    found = [NUMBERS.result(frame) for frame in frames(data, size)]
    assert [value.word for value in found] == [value.word for value in sent]
    assert [value.first.tolist() for value in found] == [value.first.tolist() for value in sent]


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=64)))
def test_the_log_probs_of_a_completion_cross_as_the_float64_that_they_are(logprobs: list[float]) -> None:
    completion = Completion(list(range(len(logprobs))), logprobs, "stop")
    found = crossed(Sampled([[completion]]), TALK, kind="result")
    assert found == Sampled([[completion]])
    assert np.array(found.completions[0][0].logprobs).tobytes() == np.array(logprobs).tobytes()


def test_everything_that_an_engine_is_asked_and_answers_crosses_whole() -> None:
    source = ModelSource(
        Path("/m"), "d", "float32", adapter=AdapterSource(Path("/a"), "e"), quantization="fp8"
    )
    sampling = Sampling(0.7, 8, (1, 2), 30, top_p=0.9, top_k=3, stop=("x",))
    for value in (Load(HOSTING, source), SampleCall(HOSTING, [SampleRequest([1, 2], (3, 2**62))], sampling)):
        assert crossed(value, TALK) == value
    support = np.array([[4, 5]], np.int32)
    asked = crossed(
        ScoreCall(HOSTING, [ScoreRequest([1], [2], support, [3])], Scoring(0.5, 30, 2, hidden=True)), TALK
    )
    assert asked.requests[0].support_ids.tolist() == [[4, 5]]
    assert (asked.requests[0].target_ids, asked.scoring) == ([3], Scoring(0.5, 30, 2, hidden=True))
    scores = TokenScores(np.array([-1.5], np.float32), support, hidden=np.ones((1, 3), np.float32))
    [found] = crossed(Scored([scores]), TALK, kind="result").scores
    assert (found.topk_logprobs, found.logprobs.tolist(), found.hidden.shape) == (None, [-1.5], (1, 3))


@pytest.mark.parametrize("change", ["top", "nested", "missing", "type", "kind"])
def test_an_unknown_field_or_type_is_refused_at_the_pipe(change: str) -> None:
    [frame] = frames(
        b"".join(encode("call", SampleCall(HOSTING, [SampleRequest([1], (1,))], Sampling(1, 1, (0,), 2)))), 99
    )
    body = json.loads(frame.body)
    match change:
        case "top":
            body["hurry"] = True
        case "nested":
            body["sampling"]["beam"] = 4
        case "missing":
            del body["requests"]
        case "type":
            body["sampling"]["num_ids"] = "2"
        case "kind":
            frame = Frame(frame.kind, "Sampel", frame.body, frame.arrays)
    with pytest.raises(ValueError, match=r"hurry|beam|requests|num_ids|Sampel"):
        TALK.request(Frame(frame.kind, frame.type, json.dumps(body).encode(), frame.arrays))


class OutOfInkError(ArtifactError):
    """From elsewhere."""


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (StepError("a", hint="b"), StepError),
        (EngineError("c", hint="d", request=3), EngineError),
        (ModelError("e", request=0), ModelError),
        (OutOfInkError("f", hint="g"), ArtifactError),
    ],
)
def test_an_error_crosses_with_its_class_message_hint_and_request(error: Any, kind: type) -> None:
    [frame] = frames(b"".join(encode("error", failure_of(error))), 9)
    found = failure(frame).error("worker.log")
    assert type(found) is kind
    assert (str(found), found.hint) == (str(error), error.hint)
    assert getattr(found, "request", None) == getattr(error, "request", None)


def test_what_is_no_error_of_ours_is_a_bug_that_names_the_log() -> None:
    found = failure_of(ZeroDivisionError("by zero")).error("worker.log")
    assert type(found) is StepError
    assert "ZeroDivisionError: by zero" in found.message
    assert "worker.log" in found.message
