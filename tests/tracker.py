"""A real MLflow server on loopback that can be killed, and a proxy before it that is slow or refuses a param."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from kdpipe.tracking.memory import ENVIRONMENT, database_uri


@dataclass
class Server:
    """`mlflow server` over a database in `folder`, on one port however often it is started."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = field(default=None)

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Starts it and waits until it answers."""
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--backend-store-uri",
            database_uri(self.folder / "mlflow.db"),
        ]
        command += ["--artifacts-destination", str(self.folder / "artifacts"), "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--workers", "1"]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **ENVIRONMENT, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 120
        while not self._answers():
            assert self.process.poll() is None, (self.folder / "server.log").read_text()[-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL to it and to all that it started."""
        process, self.process = self.process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def query(self, sql: str) -> list[tuple]:
        with closing(sqlite3.connect(self.folder / "mlflow.db")) as connection:
            return connection.execute(sql).fetchall()

    def metrics(self) -> Counter[tuple[str, int, float]]:
        """How often each (name, step, value) is there."""
        return Counter(self.query("select key, step, value from metrics"))


@dataclass
class Proxy:
    """Hands requests on to a server, each after `seconds`; refuses batches that log a param called `refused`."""

    server: Server
    seconds: float = 0.0
    refused: str | None = None
    calls: int = 0
    port: int = 0

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextlib.contextmanager
    def running(self) -> Iterator[Proxy]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None: ...

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                proxy.calls += 1
                if proxy.seconds:
                    gone.wait(proxy.seconds)
                status, kind, answer = proxy.answer(self.command, self.path, dict(self.headers), body)
                with contextlib.suppress(OSError):  # whoever asked has gone
                    self.send_response(status)
                    self.send_header("Content-Type", kind)
                    self.send_header("Content-Length", str(len(answer)))
                    self.end_headers()
                    self.wfile.write(answer)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

        gone = threading.Event()
        listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        listener.daemon_threads = True
        self.port = listener.server_address[1]
        thread = threading.Thread(target=listener.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            gone.set()
            listener.shutdown()
            listener.server_close()
            thread.join()

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, str, bytes]:
        if self.refused and path.endswith("/runs/log-batch"):
            names = [param["key"] for param in json.loads(body).get("params", [])]
            if self.refused in names:
                said = {"error_code": "INVALID_PARAMETER_VALUE", "message": f"no {self.refused} here"}
                return 400, "application/json", json.dumps(said).encode()
        kept = {
            name: value
            for name, value in headers.items()
            if name.lower() in ("content-type", "accept", "user-agent")
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
        try:
            connection.request(method, path, body=body or None, headers=kept)
            reply = connection.getresponse()
            return reply.status, reply.getheader("Content-Type", "text/plain"), reply.read()
        except OSError as error:
            return 502, "text/plain", str(error).encode()
        finally:
            connection.close()


def free_port() -> int:
    """A port that nobody listens on; nothing keeps another process from taking it, and then the server says so."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
