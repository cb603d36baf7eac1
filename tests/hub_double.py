"""A stand-in for a model hub: directories served on loopback as huggingface_hub expects them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BRANCHES = ("main", "v2", COMMIT)


class Hub:
    """A hub with a repository per directory, at one commit. ``read``: the names of files that were sent.

    ``claimed``: sizes that the hub claims, by file name. ``gated``: names of repositories that nobody may read.
    ``cut``: a file whose connection ends halfway. ``stalled``: one whose second half never comes.
    """

    def __init__(
        self,
        repositories: Mapping[str, Path],
        claimed: Mapping[str, int] | None = None,
        gated: tuple[str, ...] = (),
        cut: str = "",
        stalled: str = "",
    ):
        self.cut, self.stalled, self.ended = cut, stalled, threading.Event()
        self.repositories, self.claimed, self.gated = dict(repositories), dict(claimed or {}), gated
        self.read: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub._answer(self, body=True)

            def do_HEAD(self) -> None:
                hub._answer(self, body=False)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, cache: Path, **more: str) -> dict[str, str]:
        """Return the environment of a process that uses this hub and nothing else."""
        mine = {"HF_ENDPOINT": self.url, "HF_HUB_CACHE": str(cache), "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}
        return {**os.environ, **mine, "HF_HUB_DISABLE_TELEMETRY": "1", **more}

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = unquote(urlsplit(request.path).path)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = api or file
        name = found[1] if found else ""
        if name in self.gated:
            self._send(request, 403, b"{}", {"X-Error-Code": "GatedRepo"}, body)
        elif name not in self.repositories:
            self._send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        elif (file[2] if file else api[3] if api and api[3] else "main") not in BRANCHES:
            self._send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
        elif file:
            self._file(request, name, file[3], body)
        elif api and api[2] == "tree":
            self._send(request, 200, json.dumps(self._tree(name)).encode(), {}, body)
        else:
            facts = {"_id": "1", "id": name, "sha": COMMIT, "siblings": [], "private": False, "tags": []}
            self._send(request, 200, json.dumps(facts).encode(), {}, body)

    def _tree(self, name: str) -> list[dict[str, Any]]:
        root = self.repositories[name]
        return [
            {
                "type": "file",
                "path": file.relative_to(root).as_posix(),
                "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
                "size": self.claimed.get(file.name, file.stat().st_size),
            }
            for file in sorted(root.rglob("*"))
            if file.is_file()
        ]

    def _file(self, request: BaseHTTPRequestHandler, name: str, file: str, body: bool) -> None:
        content = (self.repositories[name] / file).read_bytes()
        if body:
            self.read.append(file)
        size = self.claimed.get(file, len(content))
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if body and file in (self.cut, self.stalled):
            self._send(request, 200, content[: len(content) // 2], headers, body, size)
            request.wfile.flush()
            if file == self.stalled:
                self.ended.wait(120)
            request.close_connection = True
            return
        self._send(request, 200, content, headers, body, size)

    @staticmethod
    def _send(
        request: BaseHTTPRequestHandler,
        status: int,
        content: bytes,
        headers: Mapping[str, str],
        body: bool,
        size: int | None = None,
    ) -> None:
        request.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(content) if size is None else size))
        request.end_headers()
        if body:
            request.wfile.write(content)
