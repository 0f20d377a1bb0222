"""One deadline for a whole exchange: a server that sends any part of a reply byte by byte does not hold a request."""

from __future__ import annotations

import contextlib
import itertools
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from kdpipe.engines.server.http import HttpClient
from kdpipe.errors import EngineError
from kdpipe.recipe.runtime import ServerRuntime
from tests.engines.test_server_engine import certificate

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["certificate"]
SECONDS = 0.2
MOST_PIECES = 1000
"""After so many a server gives up itself, long after the deadline."""
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


Pieces = list[bytes]
"""Sent one by one, the last of them again and again."""


def bytewise(before: bytes, after: bytes) -> Pieces:
    return [before, *(bytes([byte]) for byte in after)]


TRICKLES: dict[str, Pieces] = {
    "nothing": [b""],
    "status line": bytewise(b"", b"HTTP/1.1 200 OKK"),
    "header": bytewise(OK, b"X-More: x"),
    "header name": bytewise(OK, b"X"),
    "length": bytewise(OK, b"Content-Length: 1"),
    "body with a length": bytewise(OK + b"Content-Length: 9999\r\n\r\n", b'{"a": "x'),
    "body to the end": bytewise(OK + b"\r\n", b'{"a": "x'),
    "body in chunks": [CHUNKED, b"1\r\nx\r\n"],
    "chunk": bytewise(CHUNKED + b"999\r\n", b'{"a": "x'),
    "chunk size": bytewise(CHUNKED, b"00"),
    "chunk extension": bytewise(CHUNKED + b"2;", b"x"),
    "trailer": bytewise(CHUNKED + b"2\r\n{}\r\n0\r\n", b"X-More: x"),
    "trailers": [CHUNKED + b"2\r\n{}\r\n0\r\n", b"A: b\r\n"],
    "100 Continue": [b"HTTP/1.1 100 Continue\r\n\r\n"],
    "text of an error": bytewise(b"HTTP/1.1 500 Oh\r\nContent-Length: 9999\r\n\r\n", b"boo"),
    "refusal": bytewise(b"HTTP/1.1 400 No\r\n\r\n", b"boo"),
}


@contextmanager
def trickling(pieces: Pieces, *, pause: float = 0.01, tls: ssl.SSLContext | None = None) -> Iterator[int]:
    """The port of a server that sends these pieces to its only peer until that goes away."""
    listener = socket.create_server(("127.0.0.1", 0))

    gave_up = threading.Event()

    def send() -> None:
        with contextlib.suppress(OSError), listener.accept()[0] as line:
            spoken = line if tls is None else tls.wrap_socket(line, server_side=True)
            with spoken:
                spoken.recv(1 << 16)
                spoken.settimeout(pause)
                more = itertools.repeat(pieces[-1], MOST_PIECES if pause else 1 << 20)
                for piece in itertools.chain(pieces, more):
                    spoken.sendall(piece)
                    with contextlib.suppress(TimeoutError, ssl.SSLWantReadError, BlockingIOError):
                        if not spoken.recv(1 << 16):
                            return
                gave_up.set()

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()
        thread.join(20)
        assert not thread.is_alive(), "the connection is still open"
        assert not gave_up.is_set(), "the client waited for the server to give up"


def ask(port: int, *, scheme: str = "http", ca_bundle: Path | None = None) -> str:
    """What a client says of that server, asked once."""
    client = HttpClient(
        [f"{scheme}://127.0.0.1:{port}/v1"],
        ServerRuntime(timeout_seconds=SECONDS, retries=0, max_failures=9),
        ca_bundle=ca_bundle,
    )
    with pytest.raises(EngineError) as caught:
        client.post("/completions", {}, lambda answer, _url: answer, max_bytes=1 << 30, halt=client.begin())
    return caught.value.message


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(part, marks=() if number % 3 == 0 else pytest.mark.slow)
        for number, part in enumerate(TRICKLES)
    ],
)
def test_a_reply_of_which_one_part_comes_byte_by_byte_ends_at_the_deadline(part: str) -> None:
    with trickling(TRICKLES[part]) as port:
        assert ask(port).endswith(f"not whole after {SECONDS:g} seconds")


def test_a_lookup_of_the_hosts_name_that_hangs_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    is_over = threading.Event()

    def hanging(*_asked: object, **_also: object) -> list[object]:
        is_over.wait(20)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", hanging)
    begun = time.monotonic()
    said = ask(1)
    assert time.monotonic() - begun < 10
    assert f"127.0.0.1 was not found and reached within {SECONDS:g} seconds" in said
    is_over.set()


@pytest.mark.parametrize("part", ["100 Continue", "trailers", "body in chunks"])
def test_a_reply_without_an_end_as_fast_as_can_be_ends_at_the_deadline(part: str) -> None:
    with trickling(TRICKLES[part], pause=0) as port:
        assert ask(port).endswith(f"not whole after {SECONDS:g} seconds")


def test_a_handshake_of_tls_ends_at_the_deadline() -> None:
    hello = b"\x16\x03\x03\x40\x00\x02"  # 16 KiB of a record are to come
    with trickling(bytewise(b"", hello)) as port:
        assert ask(port, scheme="https").endswith(f"not whole after {SECONDS:g} seconds")


@pytest.mark.parametrize("part", ["status line", "body with a length", "trailer"])
def test_a_reply_within_tls_ends_at_the_deadline(part: str, certificate: tuple[Path, Path]) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    with trickling(TRICKLES[part], tls=context) as port:
        assert ask(port, scheme="https", ca_bundle=certificate[0]).endswith(f"after {SECONDS:g} seconds")


def test_a_server_that_reads_nothing_of_a_large_request_ends_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:  # accepted by the kernel, read by nobody
        port = listener.getsockname()[1]
        client = HttpClient(
            [f"http://127.0.0.1:{port}"], ServerRuntime(timeout_seconds=SECONDS, retries=0, max_failures=9)
        )
        with pytest.raises(EngineError, match="not whole after"):
            client.post("/", {"a": "x" * (12 << 20)}, lambda a, _: a, max_bytes=9, halt=client.begin())


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        ("http", b"SSH-2.0-OpenSSH_9.6\r\n"),
        ("http", b"\x15\x03\x01\x00\x02\x02\n"),
        ("https", b"HTTP/1.1 400 No\r\n"),
    ],
)
def test_what_speaks_another_protocol_is_told_at_once(scheme: str, said: bytes) -> None:
    with trickling([said, b""]) as port:
        assert "no HTTP server answers there" in ask(port, scheme=scheme)
