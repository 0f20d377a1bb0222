"""Requests to HTTP servers with equal weights, in turn, repeated after a passing failure.

What passes and is tried again: a refused or broken connection, a timeout, a reply cut short, 408, 429 and 5xx. All else
is the user's to fix and ends at once: other 4xx, redirects (a key must not travel elsewhere), certificates, what is no
JSON, and replies that are too large. The key goes into one header and nowhere else; no text that leaves here holds it.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from email.utils import parsedate_to_datetime
from http.client import (
    BadStatusLine,
    HTTPConnection,
    HTTPException,
    HTTPMessage,
    IncompleteRead,
    RemoteDisconnected,
)
from pathlib import Path
from typing import TypeAlias, TypeVar
from urllib.parse import urlsplit

from pydantic import JsonValue

from kdpipe import __version__
from kdpipe.errors import EngineError
from kdpipe.recipe.runtime import ServerRuntime

CONNECT_SECONDS = 10.0
FIRST_DELAY_SECONDS = 0.5
MAX_DELAY_SECONDS = 30.0
MAX_RETRY_AFTER_SECONDS = 120.0
MAX_ERROR_CHARACTERS = 300
_FIRST_WORDS = 80
Found = TypeVar("Found")
Read: TypeAlias = Callable[[dict[str, JsonValue], str], Found]
"""Reads the answer of a URL; raises EngineError on one that cannot be right."""
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "HTTP_REQUEST")
_KEPT = "finished parts are kept: fix it and repeat the command, which continues after them"


class _PassingError(Exception):
    """A failure that may be gone at the next attempt; `after_seconds` is what the server asked to wait."""

    def __init__(self, what: str, *, after_seconds: float = 0.0) -> None:
        super().__init__(what)
        self.what = what
        self.after_seconds = after_seconds


class Halted(EngineError):
    """A request was not made, since another one had failed for good."""


class HttpClient:
    """Asks base URLs in turn, from any number of threads; one that fails is left alone for a while.

    `sleep` is that of the machine unless a test brings its own.
    """

    def __init__(
        self,
        urls: Sequence[str],
        settings: ServerRuntime,
        *,
        key_name: str | None = None,
        ca_bundle: Path | None = None,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        self.urls = tuple(dict.fromkeys(url.rstrip("/") for url in urls))
        self._settings = settings
        self._key = None if key_name is None else _read_key(key_name)
        self._key_name = key_name
        self._tls = _certificates(ca_bundle) if any(url.startswith("https:") for url in self.urls) else None
        self._sleep = sleep
        self._halt = threading.Event()  # of the requests that were begun last
        self._lock = threading.Lock()
        self._turn = 0
        # Of each URL: failures in a row, and until when it rests.
        self._resting: dict[str, tuple[int, float]] = {}
        self._failures = 0  # in a row, of all requests

    def begin(self) -> threading.Event:
        """An event that, once set, makes each request begun after this raise Halted.

        Those that were begun before keep theirs: a thread that a failure left behind cannot halt what came after it.
        """
        self._halt = threading.Event()
        return self._halt

    def post(
        self,
        path: str,
        body: dict[str, JsonValue],
        read: Read[Found],
        *,
        max_bytes: int,
        halt: threading.Event,
    ) -> Found:
        """What `read` makes of the JSON object that a server answers with, and of that server's URL.

        Raises EngineError when no attempt succeeds, and at once where another attempt would be no use or `read` raises.
        """
        answer, url = self._ask(path, json.dumps(body).encode(), max_bytes=max_bytes, halt=halt)
        return self._taken(answer, url, read)

    def each(
        self, path: str, body: dict[str, JsonValue] | None, read: Read[Found], *, max_bytes: int
    ) -> dict[str, Found]:
        """What `read` makes of the JSON object of each URL that answers; asks again as long as none does.

        Without a body it is got, with one posted.
        """
        data = None if body is None else json.dumps(body).encode()
        found = {}
        for url in self.urls:
            try:
                found[url] = self._attempt(url, path, data, max_bytes=max_bytes)
            except _PassingError:
                self._rest(url)
        if not found:
            answer, url = self._ask(path, data, max_bytes=max_bytes, halt=self.begin())
            found[url] = answer
        return {url: self._taken(answer, url, read) for url, answer in found.items()}

    def close(self) -> None:
        """Halts what was begun last."""
        self._halt.set()

    def _taken(self, answer: dict[str, JsonValue], url: str, read: Read[Found]) -> Found:
        """What `read` makes of a reply; what it says of a wrong one goes on without the key and in short."""
        try:
            return read(answer, url)
        except EngineError as error:
            what, hint = self._clean(error.what), self._clean(error.hint)
            raise EngineError(what, hint=hint, request=error.request) from None

    def _ask(
        self, path: str, body: bytes | None, *, max_bytes: int, halt: threading.Event
    ) -> tuple[dict[str, JsonValue], str]:
        sleep = self._sleep or halt.wait
        attempt = 0
        while True:
            if halt.is_set():
                raise Halted("given up: another request failed")
            url = self._next_url()
            try:
                answer = self._attempt(url, path, body, max_bytes=max_bytes)
            except _PassingError as failure:
                self._note_failure(url, path, failure, attempt)
                if not self._another_is_up(url):
                    # Not all at once.
                    sleep(max(_pause(attempt) * random.uniform(0.5, 1.5), failure.after_seconds))
                attempt += 1
            else:
                with self._lock:
                    self._failures = 0
                    self._resting.pop(url, None)
                return answer, url

    def _note_failure(self, url: str, path: str, failure: _PassingError, attempt: int) -> None:
        """Counts a failure; raises EngineError where it was the last that is allowed."""
        self._rest(url, failure.after_seconds)
        with self._lock:
            self._failures += 1
            failures = self._failures
        if failures >= self._settings.max_failures:
            raise EngineError(
                f"{url}{path}: {failures} requests in a row failed, this one: {failure.what}",
                hint=f"{_KEPT}; runtime.server.max_failures is how many are allowed",
            )
        if attempt >= self._settings.retries:
            raise EngineError(
                f"{url}{path}: failed {attempt + 1} times, at last: {failure.what}",
                hint=f"{_KEPT}; runtime.server.retries and timeout_seconds say how patient it is",
            )

    def _attempt(self, url: str, path: str, body: bytes | None, *, max_bytes: int) -> dict[str, JsonValue]:
        """One request. Raises _PassingError where another may succeed, EngineError where none will."""
        try:
            status, headers, data = self._exchange(url + path, body, max_bytes=max_bytes)
        except (HTTPException, OSError, UnicodeError) as error:
            raise self._failure(url + path, error) from None
        if status != 200:
            raise self._refusal(url + path, status, headers, data)
        if len(data) > max_bytes:
            what = "more than what was asked for can take"
            raise EngineError(f"{url}{path}: its reply is over {max_bytes} bytes, {what}")
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError):
            raise self._no_json(url + path, headers, data) from None
        if not isinstance(answer, dict):
            raise EngineError(f"{url}{path}: its reply is a JSON {type(answer).__name__}, expected an object")
        return answer

    def _exchange(self, url: str, body: bytes | None, *, max_bytes: int) -> tuple[int, HTTPMessage, bytes]:
        """Status, headers and body, of which the first `max_bytes` + 1; each request has its own connection."""
        parts, begun, seconds = urlsplit(url), time.monotonic(), self._settings.timeout_seconds
        tls = self._tls if parts.scheme == "https" else None
        connection = HTTPConnection(str(parts.hostname), parts.port or (80 if tls is None else 443))
        connection.default_port = 80 if tls is None else 443
        line = _connected(connection.host, connection.port, seconds=min(CONNECT_SECONDS, seconds))
        with contextlib.closing(connection), line, line.dup() as same, _ended(same, begun, seconds=seconds):
            line.settimeout(None)
            connection.sock = line if tls is None else tls.wrap_socket(line, server_hostname=connection.host)
            connection.request("GET" if body is None else "POST", parts.path, body, self._headers())
            with connection.getresponse() as reply:
                data = reply.read(max_bytes + 1)
                if reply.length and len(data) <= max_bytes:
                    raise IncompleteRead(data, reply.length)
        return reply.status, reply.headers, data

    def _failure(self, where: str, error: Exception) -> EngineError | _PassingError:
        """What an exchange that did not come to its end means."""
        what = f"{type(error).__name__}: {self._clean(str(error))}"
        if isinstance(error, ssl.SSLCertVerificationError):
            hint = "they are always checked: runtime.server.ca_bundle names a file with others to trust"
            return EngineError(f"{where}: {what}", hint=hint)
        no_http = isinstance(error, BadStatusLine) and not isinstance(error, RemoteDisconnected)
        if no_http or isinstance(error, UnicodeError) or getattr(error, "reason", "") in _NO_TLS:
            hint = "see the URL: its host and port, and whether it begins with http or https"
            return EngineError(f"{where}: no HTTP server answers there: {what}", hint=hint)
        return _PassingError(what)

    def _no_json(self, where: str, headers: HTTPMessage, data: bytes) -> EngineError | _PassingError:
        """What a whole reply means that is no JSON: one that begins like it was cut before it got here."""
        kind, encoding = headers.get("Content-Type", "no content type"), headers.get("Content-Encoding", "")
        said = f"HTTP 200 with {len(data)} bytes of {kind} {encoding}"
        what = f"{self._clean(said)}, no JSON: {self._clean(_decoded(data))[:_FIRST_WORDS]}"
        if data.lstrip().startswith(b"{") and not encoding:
            return _PassingError(what)
        hint = "a login page, a proxy or another program answers there: see the URL, and what is before the server"
        return EngineError(f"{where}: {what}", hint=hint)

    def _refusal(
        self, where: str, status: int, headers: HTTPMessage, data: bytes
    ) -> EngineError | _PassingError:
        """What a status other than 200 means."""
        said = self._clean(_message(data))
        what = f"HTTP {status}" + (f": {said}" if said else "")
        if status in (408, 429) or status >= 500:
            return _PassingError(what, after_seconds=retry_after(headers.get("Retry-After")))
        if 300 <= status < 400:
            hint = "redirects are not followed, since the key would travel along: write the last URL"
            return EngineError(f"{where}: redirects elsewhere (HTTP {status})", hint=hint)
        hint = "see what it says, and its own log; vLLM gives a top k of 20 unless it is started with --max-logprobs 64"
        if status in (401, 403):
            hint = (
                f"the key is read from {self._key_name}: see that it is the server's"
                if self._key_name
                else "name the environment variable that holds its key in teachers[].server.api_key_env"
            )
        elif status == 404:
            hint = (
                "see the URL (it ends in /v1 for most servers) and the name under which the model is served"
            )
        return EngineError(f"{where}: {what}", hint=hint)

    def _headers(self) -> dict[str, str]:
        headers = {
            "Content-Type": "application/json",
            "Accept": "application/json",
            "Connection": "close",
            "User-Agent": f"kdpipe/{__version__}",
        }
        return headers if self._key is None else {**headers, "Authorization": f"Bearer {self._key}"}

    def _clean(self, text: str) -> str:
        """Text of a server or a library on one line, without control codes and the key, and not too long."""
        line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        if self._key is not None:
            line = line.replace(self._key, "***")
        return line if len(line) <= MAX_ERROR_CHARACTERS else line[: MAX_ERROR_CHARACTERS - 3] + "..."

    def _next_url(self) -> str:
        """The next in turn of those that do not rest; if all do, the one that is up first."""
        with self._lock:
            self._turn += 1
            order = [self.urls[(self._turn + i) % len(self.urls)] for i in range(len(self.urls))]
            now = time.monotonic()
            return min(order, key=lambda url: max(self._resting.get(url, (0, 0.0))[1] - now, 0.0))

    def _rest(self, url: str, after_seconds: float = 0.0) -> None:
        with self._lock:
            failures = self._resting.get(url, (0, 0.0))[0] + 1
            self._resting[url] = (failures, time.monotonic() + max(_pause(failures), after_seconds))

    def _another_is_up(self, failed: str) -> bool:
        """Whether a server other than the one that just failed may be asked at once."""
        with self._lock:
            now = time.monotonic()
            return any(url != failed and self._resting.get(url, (0, 0.0))[1] <= now for url in self.urls)


def _connected(host: str, port: int, *, seconds: float) -> socket.socket:
    """A connection to the first address of a host that takes it.

    Raises TimeoutError when the time is over. Nothing ends the lookup of a name but itself, so one that
    hangs is left behind in a thread.
    """
    found: queue.SimpleQueue[socket.socket | Exception] = queue.SimpleQueue()

    def connect() -> None:
        try:
            found.put(socket.create_connection((host, port), seconds))
        except (OSError, UnicodeError) as error:
            found.put(error)

    threading.Thread(target=connect, daemon=True).start()
    try:
        answer = found.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"{host} was not found and reached within {seconds:g} seconds") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


@contextlib.contextmanager
def _ended(line: socket.socket, begun: float, *, seconds: float) -> Iterator[None]:
    """Shuts a socket down from outside once the time is over, and raises TimeoutError.

    Whatever reads or writes it then ends, in whatever part of a reply that comes byte by byte.
    """
    is_over = threading.Event()

    def end() -> None:
        is_over.set()
        with contextlib.suppress(OSError):
            line.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(max(begun + seconds - time.monotonic(), 0), end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (HTTPException, OSError):
        if not is_over.is_set():
            raise
    finally:
        timer.cancel()
        timer.join()  # before the socket is closed and its number another's
    if is_over.is_set():
        raise TimeoutError(f"its reply was not whole after {seconds:g} seconds")


def _certificates(bundle: Path | None) -> ssl.SSLContext:
    """What vouches for servers: the certificates in a file, or the system's."""
    try:
        return ssl.create_default_context(cafile=bundle)
    except OSError as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else "holds no certificates"
        raise EngineError(f"{bundle}: {why}", hint="fix runtime.server.ca_bundle") from None


def _read_key(name: str) -> str:
    """The key in the environment variable `name`."""
    key = os.environ.get(name, "").strip()
    if not key:
        raise EngineError(
            f"{name}: this environment variable is to hold the key of the server, and is not set",
            hint=f"export {name}=... in the shell that runs kdpipe",
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise EngineError(f"{name}: what this environment variable holds cannot be a key: expected ASCII")
    return key


def _pause(failures: int) -> float:
    """Seconds to wait after so many failures: twice as long each time, within reason."""
    return min(FIRST_DELAY_SECONDS * 2.0 ** min(failures, 20), MAX_DELAY_SECONDS)


def retry_after(value: str | None) -> float:
    """What a Retry-After header asks for, in seconds and within reason; 0 without one."""
    try:
        if value is None or value.strip().isdecimal():
            return float(min(int(value or 0), MAX_RETRY_AFTER_SECONDS))
        seconds = parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, OverflowError, OSError):
        return 0.0
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_SECONDS)


def _message(data: bytes) -> str:
    """What an error reply says: the message of OpenAI's form, else its text."""
    text = _decoded(data)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    inner = found.get("error", found) if isinstance(found, dict) else found
    said = inner.get("message", inner) if isinstance(inner, dict) else inner
    return said if isinstance(said, str) else json.dumps(said)


def _decoded(data: bytes) -> str:
    """The beginning of a body as text, whatever it is."""
    return data[: 1 << 16].decode("utf-8", errors="replace")
