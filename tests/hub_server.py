"""A hub of models on 127.0.0.1, for one test: the part of its HTTP API that a download uses.

Small files come from the hub itself; large ones (.safetensors) from a "CDN", which is the same server under another
host's name.
"""

import hashlib
import http.server
import json
import re
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

TOKEN = "hf_right"
API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?")
RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Repository:
    """A repository's commits and who may read it."""

    files: dict[str, bytes]
    private: bool = False
    gated: bool = False
    pipeline_tag: str | None = "text-generation"
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit(self.files)

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        digest = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[digest] = dict(files)
        self.branches[branch] = digest
        return digest

    def sha(self, revision: str) -> str | None:
        found = self.branches.get(revision, revision)
        return found if found in self.commits else None


@dataclass(frozen=True)
class Seen:
    """A request that came."""

    method: str
    path: str
    range: str | None
    token: str | None


class HubServer:
    """The hub.

    Attributes:
        repositories: by name; to be filled by the test.
        seen: the requests that came.
        cuts: bytes after which the next answer with this file breaks off, by name.
        gate: while it is cleared, no large file is sent.
        busy: so many requests will be answered 503.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.seen: list[Seen] = []
        self.cuts: dict[str, int] = {}
        self.busy = 0
        self.gate = threading.Event()
        self.gate.set()
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def add(self, name: str, files: Mapping[str, bytes], **options) -> Repository:
        self.repositories[name] = Repository(dict(files), **options)
        return self.repositories[name]

    def sent(self, name: str) -> list[Seen]:
        """The requests for a file's content."""
        return [seen for seen in self.seen if seen.method == "GET" and seen.path.endswith(f"/{name}")]

    def stop(self) -> None:
        self.gate.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: HubServer

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, *args) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.server_hub.seen.append(Seen(self.command, path, self.headers.get("Range"), token))
        if self.server_hub.busy:
            self.server_hub.busy -= 1
            return self._refuse(503, None, "Try again")
        if path.startswith("/cdn/"):
            return self._content(path)
        if token not in (None, TOKEN):
            return self._refuse(401, None, "Invalid credentials in Authorization header")
        if match := API.fullmatch(path):
            return self._model(match[1], match[2] or "main", token)
        if match := RESOLVE.fullmatch(path):
            return self._resolve(match[1], match[2], match[3], token)
        return self._refuse(404, None, "No such route")

    def _repository(self, name: str, token: str | None) -> Repository | None:
        found = self.server_hub.repositories.get(name)
        if found is None or (found.private and token is None):
            self._refuse(401 if token is None else 404, "RepoNotFound", "Repository not found")
            return None
        return found

    def _model(self, name: str, revision: str, token: str | None) -> None:
        if (repository := self._repository(name, token)) is None:
            return None
        if (sha := repository.sha(revision)) is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = [{"rfilename": n, "size": len(b), "blobId": _git_digest(b)} for n, b in repository.commits[sha].items()]
        body = {"_id": "0", "id": name, "modelId": name, "sha": sha, "private": repository.private, "siblings": files,
                "gated": "manual" if repository.gated else False, "tags": [], "downloads": 0, "likes": 0}  # fmt: skip
        if repository.pipeline_tag is not None:
            body["pipeline_tag"] = repository.pipeline_tag
        return self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _resolve(self, name: str, revision: str, file: str, token: str | None) -> None:
        if (repository := self._repository(name, token)) is None:
            return None
        if repository.gated and token is None:
            return self._refuse(401, "GatedRepo", f"Access to model {name} is restricted.")
        if repository.gated:
            return self._refuse(403, "GatedRepo", f"Access to model {name} is restricted.")
        if (sha := repository.sha(revision)) is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        content = repository.commits[sha].get(file)
        if content is None:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        if not file.endswith(".safetensors"):
            return self._send(200, content, {"ETag": f'"{_git_digest(content)}"', "X-Repo-Commit": sha})
        elsewhere = f"http://localhost:{self.server_hub.port}/cdn/{name}/{sha}/{file}"
        digest = hashlib.sha256(content).hexdigest()
        headers = {"Location": elsewhere, "X-Repo-Commit": sha, "X-Linked-Size": str(len(content))}
        return self._send(302, b"", {**headers, "X-Linked-Etag": f'"{digest}"'})

    def _content(self, path: str) -> None:
        _, _, owner, name, sha, file = path.split("/", 5)
        self.server_hub.gate.wait()
        content = self.server_hub.repositories[f"{owner}/{name}"].commits[sha][file]
        start, status = 0, 200
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        if (asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")) is not None:
            start, status = int(asked[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(status, content[start:], headers, self.server_hub.cuts.pop(file, None))

    def _refuse(self, status: int, code: str | None, message: str) -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self._send(status, json.dumps({"error": message}).encode(), {"Content-Type": "application/json", **headers})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True


def _git_digest(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
