"""Teacher servers whose replies trickle, never end, or are something else: a run with one ends, with a sentence."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

from tests.trials.trial import REFUSED, Trial
from tests.worlds import SMALLEST, write_recipe

TIMEOUT_SECONDS = 2
OK = b"HTTP/1.1 200 OK\r\n"
JSON = b"Content-Type: application/json\r\n"
MODELS = json.dumps({"object": "list", "data": [{"id": "m", "max_model_len": 64}]}).encode()


def whole(body: bytes, *, status: bytes = OK, kind: bytes = JSON, more: bytes = b"") -> bytes:
    return status + kind + more + b"Content-Length: %d\r\n\r\n" % len(body) + body


CHUNKED = OK + JSON + b"Transfer-Encoding: chunked\r\n\r\n"
TRICKLED: dict[str, tuple[bytes, bytes]] = {
    "status line": (b"", b"HTTP/1.1 200 " + b"O" * 10**6),
    "header": (OK, b"X-A: " + b"a" * 10**6),
    "headers": (OK, b"A: b\r\n" * 10**6),
    "body": (OK + JSON + b"Content-Length: 1000000\r\n\r\n", b"[" * 10**6),
    "body without a length": (OK + JSON + b"Connection: close\r\n\r\n", b"[" * 10**6),
    "chunk size": (CHUNKED, b"0" * 10**6),
    "chunk extension": (CHUNKED, b"5;" + b"a" * 10**6),
    "chunks": (CHUNKED, b"1\r\n[\r\n" * 10**6),
    "trailer": (CHUNKED + b"0\r\n", b"A: b\r\n" * 10**6),
    "continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 10**6),
    "error body": (b"HTTP/1.1 500 Oops\r\nContent-Length: 1000000\r\n\r\n", b"e" * 10**6),
    "nothing": (b"", b""),
    "nothing after the header": (OK + JSON + b"Content-Length: 5\r\n\r\n", b""),
}
"""Part -> what is sent at once, and what comes byte by byte."""
REPLIES: dict[str, bytes] = {
    "a login page": whole(b"<html><body>Please log in</body></html>", kind=b"Content-Type: text/html\r\n"),
    "a gzip": whole(b"\x1f\x8b\x08\0" + bytes(range(200)), more=b"Content-Encoding: gzip\r\n"),
    "a text": whole(b"hello"),
    "control codes": whole(b"\x1b[2J\x1b]0;owned\x07"),
    "nothing": whole(b""),
    "a list": whole(b"[]"),
    "a number": whole(b"5"),
    "NaN": whole(b'{"data": NaN, "choices": [{"logprobs": NaN}]}'),
    "100,000 levels": whole(b"[" * 100_000 + b"]" * 100_000),
    "a key twice": whole(b'{"data": [], "data": 5, "choices": [], "choices": 5}'),
    "UTF-16": whole('{"data": []}'.encode("utf-16")),
    "half a surrogate": whole(b'{"data": [{"id": "\\ud800"}], "choices": "\\ud800"}'),
    "401": whole(b'{"error": "no"}', status=b"HTTP/1.1 401 Unauthorized\r\n"),
    "404": whole(b"", status=b"HTTP/1.1 404 Not Found\r\n"),
    "429 for a year": whole(b"", status=b"HTTP/1.1 429 Slow\r\n", more=b"Retry-After: 31536000\r\n"),
    "503 for ever": whole(
        b"", status=b"HTTP/1.1 503 Busy\r\n", more=b"Retry-After: 99999999999999999999\r\n"
    ),
    "a redirect to a file": whole(
        b"", status=b"HTTP/1.1 302 Go\r\n", more=b"Location: file:///etc/passwd\r\n"
    ),
    "a redirect to itself": whole(b"", status=b"HTTP/1.1 307 Go\r\n", more=b"Location: /v1/models\r\n"),
    "101": b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n",
    "204": b"HTTP/1.1 204 No Content\r\n\r\n",
    "status 999": whole(b"{}", status=b"HTTP/1.1 999 Odd\r\n"),
    "HTTP/0.9": b"hello\r\n",
    "an SSH banner": b"SSH-2.0-OpenSSH_9.2\r\n",
    "a TLS alert": b"\x15\x03\x01\0\x02\x02\x46",
    "a length that is negative": OK + b"Content-Length: -5\r\n\r\nabc",
    "two lengths": OK + b"Content-Length: 3\r\nContent-Length: 5\r\n\r\nabcde",
    "a length that is too long": OK + b"Content-Length: 999\r\n\r\nabc",
    "a length of a terabyte": OK + b"Content-Length: 1099511627776\r\n\r\nabc",
    "a broken chunk": CHUNKED + b"zz\r\nabc\r\n",
    "a header of 10 MB": OK + b"X: " + b"a" * 10_000_000 + b"\r\n\r\n{}",
    "100,000 headers": OK + b"A: b\r\n" * 100_000 + b"\r\n{}",
    "a body of 300 MB": whole(b"[" * 300_000_000),
}
Send = Callable[[socket.socket], None]


def trickling(at_once: bytes, slowly: bytes, pause: float) -> Send:
    """Sends a byte each `pause` seconds until the peer hangs up, or as fast as it reads."""

    def send(peer: socket.socket) -> None:
        peer.sendall(at_once)
        if not pause and slowly:
            while True:
                peer.sendall(slowly)
        wait = threading.Event()
        for byte in slowly:
            peer.sendall(bytes([byte]))
            wait.wait(pause)
        peer.settimeout(300)
        while peer.recv(4096):
            pass

    return send


def serve(send: Send, *, lists_models: bool) -> int:
    """The port of a server in a thread of its own, which answers everything by `send`, or all but /models."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(peer: socket.socket) -> None:
        with peer:
            try:
                asked = peer.recv(65536)
                if lists_models and asked.startswith(b"GET"):
                    peer.sendall(whole(MODELS, more=b"Connection: close\r\n"))
                else:
                    send(peer)
            except OSError:
                return  # the peer hung up, as it should

    def accept() -> None:
        while True:
            peer, _ = listener.accept()
            threading.Thread(target=answer, args=(peer,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return int(listener.getsockname()[1])


def served(send: Send, *, lists_models: bool) -> Callable[[Path], object]:
    """A recipe whose teacher is that server."""

    def prepare(folder: Path) -> None:
        url = f"http://127.0.0.1:{serve(send, lists_models=lists_models)}/v1"
        teacher = {"server": {"urls": [url], "model": "m", "tokenizer": "./model"}}
        changes = {
            **SMALLEST,
            "teachers": [teacher],
            "rounds": 1,
            "runtime__preflight": True,
            "name": "served",
        }
        changes["runtime__server"] = {"timeout_seconds": TIMEOUT_SECONDS, "retries": 0}
        write_recipe(folder, **changes)

    return prepare


def trials() -> Iterator[Trial]:
    ways = {"slowly": 0.3, "fast": 0.0}
    sends = {
        f"{part} {how}": trickling(*sent, pause)
        for (part, sent), (how, pause) in product(TRICKLED.items(), ways.items())
        if sent[1] or pause
    }
    sends |= {name: lambda peer, reply=reply: peer.sendall(reply) for name, reply in REPLIES.items()}  # type: ignore[misc]
    for (name, send), lists_models in product(sends.items(), (False, True)):
        where = "completions" if lists_models else "models"
        yield Trial(
            "servers",
            f"{where}: {name}",
            "kdpipe run recipe.yaml",
            REFUSED,
            served(send, lists_models=lists_models),
            seconds=60.0,
        )
