"""A completions server on a loopback port that answers as vLLM's: an engine's real scores, and mistakes to make."""

from __future__ import annotations

import itertools
import json
import socket
import socketserver
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any, Literal

from kdpipe.engines.protocol import Engine, SampleRequest, Sampling, ScoreRequest, Scoring
from kdpipe.engines.server.engine import SEQUENCE

MODEL = "served"


@dataclass
class Reply:
    """What is about to be sent, and how: `cut` stops in the middle, `late` waits until the server ends."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    how: Literal["whole", "cut", "late", "reset"] = "whole"


Twist = Callable[[int, Reply], Reply]
"""Makes of the reply to the nth completions request another."""


def honest(_number: int, reply: Reply) -> Reply:
    return reply


@dataclass
class Served:
    """A server with the engine behind it. What a request leaves out has defaults that spoil what is sampled."""

    engine: Engine
    rows: int
    context: int
    twist: Twist = honest
    key: str | None = None
    url: str = ""
    names: tuple[str, ...] = (MODEL,)
    roots: tuple[str | None, ...] = ("path/of/it",)
    says: str | None = None  # the name in its replies, in place of the one that was asked
    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def models(self) -> Reply:
        roots = itertools.cycle(self.roots)
        data = [{"id": name, "max_model_len": self.context, "root": next(roots)} for name in self.names]
        return Reply({"object": "list", "data": data})

    def complete(self, body: dict[str, Any]) -> Reply:
        if body["prompt"] == list(SEQUENCE)[: self.context - 1]:  # asked whenever it is loaded: not counted
            with self.lock:
                return self._complete(body)
        with self.lock:
            number = len(self.bodies)
            self.bodies.append(body)
            reply = self._complete(body)
        return self.twist(number, reply)

    def _complete(self, body: dict[str, Any]) -> Reply:
        prompt = body["prompt"]
        if body["model"] not in self.names:
            return _refused(404, f"The model `{body['model']}` does not exist.")
        if len(prompt) + body["max_tokens"] > self.context:
            return _refused(400, f"{len(prompt)} tokens and {body['max_tokens']} do not fit {self.context}")
        choice: dict[str, Any] = {"index": 0, "text": ""}
        if body.get("prompt_logprobs") is not None:
            choice["prompt_logprobs"] = self._prompt_logprobs(prompt, body["prompt_logprobs"])
        choice |= self._sampled(prompt, body)
        if body.get("return_token_ids"):
            choice["prompt_token_ids"] = prompt
        return Reply({"object": "text_completion", "model": self.says or body["model"], "choices": [choice]})

    def _prompt_logprobs(self, ids: Sequence[int], k: int) -> list[dict[str, Any] | None]:
        [scores] = self.engine.score(
            [ScoreRequest(ids[:1], ids[1:])],
            Scoring(temperature=1.0, num_ids=self.rows, top_k=self.rows),
            progress=lambda _: None,
        )
        assert scores.topk_ids is not None
        assert scores.topk_logprobs is not None
        positions: list[dict[str, Any] | None] = [None]
        for token, order, values in zip(ids[1:], scores.topk_ids, scores.topk_logprobs, strict=True):
            place = order.tolist().index(token)
            rank = int((values >= values[place]).sum())
            row = {token: _entry(values[place], rank)}
            row |= {int(order[i]): _entry(values[i], i + 1) for i in range(k)}
            positions.append({str(key): value for key, value in row.items()})
        return positions

    def _sampled(self, prompt: list[int], body: dict[str, Any]) -> dict[str, Any]:
        settings = Sampling(
            temperature=body.get("temperature", 0.3),
            max_new_tokens=body["max_tokens"],
            end_ids=tuple(body.get("stop_token_ids", ())) + (() if body.get("ignore_eos") else (0,)),
            num_ids=self.rows,
            top_p=body.get("top_p", 0.5),
            top_k=body.get("top_k", 1),
            stop=tuple(body.get("stop", ())),
        )
        request = SampleRequest(prompt, (body.get("seed", 7),))
        [[drawn]] = self.engine.sample([request], settings, progress=lambda _: None)
        found: dict[str, Any] = {"finish_reason": drawn.finish_reason}
        if body.get("return_token_ids"):
            found["token_ids"] = drawn.token_ids
        if body.get("logprobs") is not None and body.get("return_tokens_as_token_ids"):
            tokens = [f"token_id:{token}" for token in drawn.token_ids]
            found["logprobs"] = {"tokens": tokens, "token_logprobs": drawn.logprobs}
        return found


def _entry(logprob: Any, rank: int) -> dict[str, Any]:
    return {"logprob": float(logprob), "rank": rank, "decoded_token": "?"}


def _refused(status: int, message: str) -> Reply:
    return Reply({"error": {"message": message, "type": "BadRequestError", "code": status}}, status)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is part of the tests."""


def _handler(served: Served) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            served.paths.append(self.path)
            self._answer(served.models() if self.path == "/v1/models" else _refused(404, "Not Found"))

        def do_POST(self) -> None:
            served.paths.append(self.path)
            served.headers.append(dict(self.headers))
            data = self.rfile.read(int(self.headers["Content-Length"]))
            self._answer(
                served.complete(json.loads(data))
                if self.path == "/v1/completions"
                else _refused(404, "Not Found")
            )

        def _answer(self, reply: Reply) -> None:
            if served.key is not None and self.headers["Authorization"] != f"Bearer {served.key}":
                reply = _refused(401, f"wrong key in {self.headers['Authorization']!r}")
            data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            if reply.how == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                return
            if reply.how == "late":
                served.ended.wait(30)
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if reply.how == "cut" else data)
            self.close_connection = reply.how == "cut"

        def log_message(self, *_args: Any) -> None: ...

    return Handler


@contextmanager
def serve(
    engine: Engine, *, rows: int, context: int = 64, tls: Any = None, **settings: Any
) -> Iterator[Served]:
    """A running server; `tls` is an SSL context."""
    served = Served(engine, rows, context, **settings)

    server = _Server(("127.0.0.1", 0), _handler(served))
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    served.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield served
    finally:
        served.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
