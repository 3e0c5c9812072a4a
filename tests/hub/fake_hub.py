"""A hub on loopback, for the real huggingface_hub client: repositories with commits and branches, and faults to order.

It speaks what that client asks for: a repository's files at a revision, their contents with ranges, and a search.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Repo:
    """`commits` maps a commit to its files; `branches` a name to a commit. `claimed` are sizes that are listed instead
    of the files' own."""

    name: str
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    token: str = ""
    claimed: dict[str, int] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)

    def push(self, files: dict[str, bytes], branch: str = "main") -> str:
        """A commit with exactly these files, that the branch means from now on."""
        text = repr((self.name, len(self.commits), sorted(files.items())))
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.branches[branch] = commit
        return commit

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit that a revision means, and its files."""
        commit = self.branches.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose path contains `part`."""

    part: str
    times: int
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int = -1
    corrupt: bool = False
    hold: threading.Event | None = None
    redirect: str = ""


@dataclass
class Asked:
    """A request that came."""

    method: str
    path: str
    range: str
    token: str


class FakeHub:
    """`url` is for HF_ENDPOINT."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.repos: dict[str, Repo] = {}
        self.asked: list[Asked] = []
        self.faults: list[Fault] = []
        self._lock = threading.Lock()

    def repo(self, name: str, folder: Path | None = None, **options: Any) -> Repo:
        """A repository, with the files of a folder as its first commit."""
        made = self.repos[name] = Repo(name, **options)
        if folder is not None:
            made.push({path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()})
        return made

    def fault(self, part: str, times: int = 1, **what: Any) -> Fault:
        """Order a fault."""
        made = Fault(part, times, **what)
        self.faults.append(made)
        return made

    def due(self, path: str) -> Fault | None:
        """The fault that a request meets, counted."""
        with self._lock:
            for fault in self.faults:
                if fault.part in path and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    def fetched(self, name: str) -> list[Asked]:
        """The requests for a file's content."""
        return [asked for asked in self.asked if asked.method == "GET" and asked.path.endswith(f"/{name}")]


def listed(repo: Repo, name: str, content: bytes) -> dict[str, Any]:
    """A file as the hub lists it; safetensors are in LFS."""
    size = repo.claimed.get(name, len(content))
    entry: dict[str, Any] = {"rfilename": name, "size": size}
    if name.endswith(".safetensors"):
        entry["blobId"] = hashlib.sha1(content + b"pointer").hexdigest()
        entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 130}
    else:
        entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return entry


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 - the base's name
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if url.path != "/api/agent-harnesses":  # asked once by the library, of itself
            self.hub.asked.append(Asked(self.command, url.path, self.headers.get("Range", ""), token))
        fault = self.hub.due(url.path)
        if fault is not None and fault.hold is not None:
            fault.hold.wait(30)
        if fault is not None and fault.redirect:
            self._send(302, b"", {"Location": fault.redirect + self.path})
            return
        if fault is not None and fault.status:
            self._send(fault.status, b"{}", fault.headers)
            return
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if parts == ["api", "models"]:
            self._search(parse_qs(url.query))
        elif parts[:2] == ["api", "models"]:
            self._info("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main", token)
        elif len(parts) >= 5 and parts[2] == "resolve":
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), token, fault)
        else:
            self._send(404, b"{}")

    def _allowed(self, name: str, token: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.token and repo.token != token and not repo.gated):
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return None
        if repo.gated and token != repo.token:
            self._send(403 if token else 401, b"{}", {"X-Error-Code": "GatedRepo"})
            return None
        return repo

    def _found(self, name: str, revision: str, token: str) -> tuple[Repo, str, dict[str, bytes]] | None:
        repo = self._allowed(name, token)
        if repo is None:
            return None
        found = repo.files(revision)
        if found is None:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return None
        return repo, *found

    def _info(self, name: str, revision: str, token: str) -> None:
        if (found := self._found(name, revision, token)) is not None:
            self._send(200, json.dumps(described(*found)).encode())

    def _search(self, query: dict[str, list[str]]) -> None:
        words = query.get("search", [""])[0].lower().split()
        limit = int(query.get("limit", ["20"])[0])
        shown = []
        for repo in self.hub.repos.values():
            if all(word in repo.name.lower() for word in words) and not repo.token and repo.branches:
                commit = repo.branches["main"]
                shown.append(described(repo, commit, repo.commits[commit]))
        self._send(200, json.dumps(shown[:limit]).encode())

    def _file(self, name: str, revision: str, file: str, token: str, fault: Fault | None) -> None:
        if (found := self._found(name, revision, token)) is None:
            return
        repo, commit, files = found
        if file not in files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        content = files[file]
        entry = listed(repo, file, content)
        if fault is not None and fault.corrupt:
            content = bytes([content[0] ^ 1]) + content[1:]
        etag = entry["lfs"]["sha256"] if "lfs" in entry else entry["blobId"]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        status, start = 200, 0
        if (asked := self.headers.get("Range")) is not None:
            status, start = 206, int(asked.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(status, content[start:], headers, cut_after=fault.cut_after if fault is not None else -1)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut_after: int = -1) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if cut_after < 0 else body[:cut_after])
        if cut_after >= 0:
            self.wfile.flush()
            self.close_connection = True


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # who was killed or gave up hangs up
            super().handle_error(request, client_address)


def described(repo: Repo, commit: str, files: dict[str, bytes]) -> dict[str, Any]:
    """A repository at a commit, as `/api/models/…` answers."""
    config = json.loads(files.get("config.json", b"{}"))
    return {
        "id": repo.name,
        "modelId": repo.name,
        "sha": commit,
        "gated": "auto" if repo.gated else False,
        "private": bool(repo.token) and not repo.gated,
        "downloads": 7,
        "likes": 1,
        "tags": repo.tags,
        "lastModified": "2026-11-01T10:00:00.000Z",
        "config": {"model_type": config.get("model_type", ""), "architectures": config.get("architectures", [])},
        "siblings": [listed(repo, name, content) for name, content in files.items()],
    }


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub that listens until the end of the block."""
    handler: Callable[..., Any] = type("Handler", (_Handler,), {})
    server = _Server(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub = FakeHub(f"http://127.0.0.1:{server.server_address[1]}")
    handler.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        for fault in hub.faults:
            if fault.hold is not None:
                fault.hold.set()
        server.shutdown()
        server.server_close()
        thread.join()
