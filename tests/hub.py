"""A stand-in for the hub on a loopback port, as the hub's own clients ask it: repositories, and the ways it fails."""

from __future__ import annotations

import hashlib
import json
import re
import socketserver
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants, utils

Kind = Literal["models", "datasets"]
LARGE = 64
"""Bytes from which a file is stored apart (LFS): its content is served by another address, as by a CDN."""


class Refusal(NamedTuple):
    """An answer in place of the right one, to as many requests as `times` says."""

    status: int
    headers: Mapping[str, str] = {}
    body: bytes = b"{}"
    times: int = 1


class Asked(NamedTuple):
    """A request."""

    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class Repository:
    """Commits of files, branches and tags; who may read it."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    access: Literal["public", "gated", "private"] = "public"

    def commit(self, files: Mapping[str, bytes], ref: str = "main") -> str:
        """The new commit, which `ref` means from now on."""
        name = hashlib.sha1(repr((sorted(files.items()), self.refs)).encode()).hexdigest()
        self.commits[name] = dict(files)
        self.refs[ref] = name
        return name


@dataclass
class Hub:
    """What the hub has, what it was asked, and how it is to fail."""

    url: str = ""
    cdn: str = ""
    """Where contents are: a host of another name, which is shown no token."""
    repositories: dict[tuple[Kind, str], Repository] = field(default_factory=dict)
    renamed: dict[tuple[Kind, str], str] = field(default_factory=dict)
    tokens: dict[str, bool] = field(default_factory=dict)
    """Whether the account of a token has access to what is gated or private."""
    cuts: dict[str, list[int]] = field(default_factory=dict)
    """By file name, after how many bytes each of its next transfers breaks off."""
    stalls: dict[str, threading.Event] = field(default_factory=dict)
    """By file name, what its transfers wait for after the first half."""
    refusals: dict[str, Refusal] = field(default_factory=dict)
    """By a part of the path, how such requests are refused."""
    asked: list[Asked] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kind: Kind, name: str, files: Mapping[str, bytes], ref: str = "main") -> str:
        return self.repositories.setdefault((kind, name), Repository()).commit(files, ref)

    def fetched(self) -> list[str]:
        """The names of the files whose content was asked for."""
        return [
            one.path.rpartition("/")[2]
            for one in self.asked
            if one.method == "GET" and "/api/" not in one.path
        ]

    def environment(self, home: Any, **more: str) -> dict[str, str]:
        """What a process needs to meet this hub, with a cache of its own."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1,localhost", **more}

    def enter(self, home: Any, patch: pytest.MonkeyPatch) -> None:
        """Lets the client in this process meet this hub: what it has read from its environment is set anew."""
        patch.setattr(constants, "ENDPOINT", self.url)
        template = f"{self.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        patch.delenv("HF_TOKEN", raising=False)
        utils.close_session()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: the client acknowledges a first one late
    hub: Hub

    def log_message(self, *_args: object) -> None: ...

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = urlsplit(self.path).path
        if path == "/api/agent-harnesses":  # what the client wants to know once a day, also offline
            self.send(404)
            return
        with self.hub.lock:
            self.hub.asked.append(Asked(self.command, unquote(path), self.headers["Range"], self._token()))
            if (refusal := self._refused(path)) is not None:
                self.send(refusal.status, refusal.body, refusal.headers)
                return
        if found := re.fullmatch(r"/cdn/([0-9a-f]{40})/(.+)", path):
            self._content(found[1], unquote(found[2]))
            return
        api = re.fullmatch(r"/api/(models|datasets)/(.+?)(?:/(revision|tree)/([^/]+)(?:/.*)?)?", path)
        file = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if api is None and file is None:
            self.send(404, headers={"X-Error-Code": "RepoNotFound"})
            return
        kind: Kind = "datasets" if (api and api[1] == "datasets") or (file and file[1]) else "models"
        name = str(api[2] if api else file and file[2])
        if (new := self.hub.renamed.get((kind, name))) is not None:
            self.send(307, headers={"Location": self.path.replace(name, new)})
            return
        if (repository := self._readable(kind, name)) is None:
            return
        revision = unquote(str((api[4] or "main") if api else file and file[3]))
        commit = revision if revision in repository.commits else repository.refs.get(revision)
        if commit is None:
            self.send(404, headers={"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        elif api is not None:
            listed = (
                self._tree(repository.commits[commit])
                if api[3] == "tree"
                else self._info(name, repository, commit)
            )
            self.send(200, json.dumps(listed).encode(), {"Content-Type": "application/json"})
        elif file is not None:
            self._resolve(repository, commit, unquote(file[4]))

    def _refused(self, path: str) -> Refusal | None:
        for part, refusal in self.hub.refusals.items():
            if part in path and refusal.times > 0:
                self.hub.refusals[part] = refusal._replace(times=refusal.times - 1)
                return refusal
        return None

    def _token(self) -> str | None:
        return (self.headers["Authorization"] or "").removeprefix("Bearer ") or None

    def _readable(self, kind: Kind, name: str) -> Repository | None:
        """The repository; what is gated shows all but its files. Else it is answered here."""
        token = self._token()
        if token is not None and token not in self.hub.tokens:
            self.send(401, headers={"X-Error-Message": "Invalid credentials in Authorization header"})
            return None
        found = self.hub.repositories.get((kind, name))
        if found is None or (found.access == "private" and not self.hub.tokens.get(token or "")):
            status = 401 if token is None else 404
            headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            self.send(status, json.dumps({"error": "Invalid username or password."}).encode(), headers)
            return None
        return found

    @staticmethod
    def _info(name: str, repository: Repository, commit: str) -> dict[str, Any]:
        siblings = [{"rfilename": path} for path in sorted(repository.commits[commit])]
        gated = "manual" if repository.access == "gated" else False
        return {
            "id": name,
            "sha": commit,
            "siblings": siblings,
            "gated": gated,
            "tags": [],
            "downloads": 1,
            "likes": 1,
        }

    @staticmethod
    def _tree(files: Mapping[str, bytes]) -> list[dict[str, Any]]:
        folders = sorted({path.rpartition("/")[0] for path in files if "/" in path})
        listed: list[dict[str, Any]] = [
            {"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders
        ]
        for path, content in sorted(files.items()):
            entry = {
                "type": "file",
                "path": path,
                "oid": hashlib.sha1(content).hexdigest(),
                "size": len(content),
            }
            if len(content) >= LARGE:
                sha = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 130}
            listed.append(entry)
        return listed

    def _resolve(self, repository: Repository, commit: str, path: str) -> None:
        commit_header = {"X-Repo-Commit": commit}
        if repository.access == "gated" and not self.hub.tokens.get(self._token() or ""):
            said = "Access to this repository is restricted. You must have access to it and be authenticated."
            status = 401 if self._token() is None else 403
            self.send(status, headers={"X-Error-Code": "GatedRepo", "X-Error-Message": said, **commit_header})
        elif (content := repository.commits[commit].get(path)) is None:
            self.send(404, headers={"X-Error-Code": "EntryNotFound", **commit_header})
        elif len(content) < LARGE:
            self.send(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', **commit_header})
        else:
            sha = hashlib.sha256(content).hexdigest()
            linked = {"X-Linked-ETag": f'"{sha}"', "X-Linked-Size": str(len(content))}
            self.send(
                302, headers={"Location": f"{self.hub.cdn}/cdn/{commit}/{path}", **linked, **commit_header}
            )

    def _content(self, commit: str, path: str) -> None:
        contents = [one.commits[commit] for one in self.hub.repositories.values() if commit in one.commits]
        content, start = contents[0][path], 0
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or ""):
            start = int(found[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        name = path.rpartition("/")[2]
        with self.hub.lock:
            cut = cuts.pop(0) if self.command == "GET" and (cuts := self.hub.cuts.get(name)) else None
        self.send(206 if start else 200, content[start:], headers, cut=cut, stall=self.hub.stalls.get(name))

    def send(
        self,
        status: int,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        *,
        cut: int | None = None,
        stall: threading.Event | None = None,
    ) -> None:
        """Sends an answer; with `cut` only so many bytes of its body, and ends the connection."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        half = len(body) // 2 if stall else 0
        if self.command != "HEAD":
            self.wfile.write(body[:half])
            if stall is not None:
                self.wfile.flush()
                stall.wait(60)
            self.wfile.write(body[half:cut])
        if cut is not None:
            self.close_connection = True


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client may go away at any time."""


@contextmanager
def hub_stand_in() -> Iterator[Hub]:
    """A hub that has nothing yet, until the block ends."""
    hub = Hub()
    with _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub})) as server:
        hub.url, hub.cdn = (
            f"http://{host}:{server.server_address[1]}" for host in ("127.0.0.1", "localhost")
        )
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()
            utils.close_session()
