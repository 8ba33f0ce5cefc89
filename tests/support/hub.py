"""A hub of model folders on this machine, with as much of Hugging Face's interface as an upload asks for."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """commits: (repository, message, files that came with it: path -> content), in their order.

    cards: what was asked to be validated.
    """

    url: str = ""
    commits: list[tuple[str, str, dict[str, bytes]]] = field(default_factory=list)
    cards: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)

    def files(self, repository: str) -> dict[str, bytes]:
        """What the repository holds after all commits."""
        return {
            path: content
            for name, _, files in self.commits
            if name == repository
            for path, content in files.items()
        }

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = "/".join(part for part in (wanted.get("organization"), wanted["name"]) if part)
            return {"url": f"{self.url}/{name}", "name": name, "id": name}
        if path == "/api/validate-yaml":
            self.cards.append(json.loads(body)["content"])
            return {"errors": [], "warnings": []}
        repository, _, action = path.removeprefix("/api/models/").partition("/main")[0].rpartition("/")
        if action == "preupload":  # whole files in the commit, none by a store of large ones
            files = json.loads(body)["files"]
            return {
                "files": [
                    {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in files
                ]
            }
        if action == "commit":
            lines = [json.loads(line) for line in body.splitlines()]
            header = next(line["value"] for line in lines if line["key"] == "header")
            found = [line["value"] for line in lines if line["key"] == "file"]
            contents = {one["path"]: base64.b64decode(one["content"]) for one in found}
            self.commits.append((repository, header["summary"], contents))
            return {"commitUrl": f"{self.url}/{repository}/commit/{'0' * 40}", "commitOid": "0" * 40}
        raise KeyError(path)


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """A hub that listens until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b"".join(iter(self._chunk, b""))
            hub.tokens.add(self.headers.get("Authorization"))
            try:
                status, found = 200, hub.answer(self.path.partition("?")[0], body)
            except KeyError:
                status, found = 404, {"error": f"no {self.path} here"}
            self._reply(status, found)

        def do_GET(self) -> None:
            self._reply(404, {"error": f"no {self.path} here"})

        do_HEAD = do_GET

        def _reply(self, status: int, found: dict[str, Any]) -> None:
            content = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _chunk(self) -> bytes:
            size = int(self.rfile.readline(), 16)
            content = self.rfile.read(size)
            self.rfile.readline()
            return content

        def log_message(self, *_: Any) -> None:
            """Quietly."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
