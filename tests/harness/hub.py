"""A hub on this machine: folders served as repositories of models, for the real client of huggingface_hub."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Answers what `snapshot_download` asks.

    Attributes:
        url: for HF_ENDPOINT.
        fetched: the files that were downloaded, as `user/name/folder/file`.
    """

    def __init__(self, repositories: dict[str, Path]):
        self.repositories, self.fetched = repositories, set[str]()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                self._answer(*hub.answer(self.path.partition("?")[0], head=True), head=True)

            def do_GET(self):
                self._answer(*hub.answer(self.path.partition("?")[0], head=False))

            def _answer(self, code: int, content: bytes, kind: str, head: bool = False) -> None:
                self.send_response(code)
                headers = {"Content-Type": kind, "Content-Length": str(len(content)), "X-Repo-Commit": COMMIT}
                if code == 404:
                    headers["X-Error-Code"] = "EntryNotFound" if "/resolve/" in self.path else "RepoNotFound"
                for name, value in (headers | {"ETag": f'"{_digest(content)}"'}).items():
                    self.send_header(name, value)
                self.end_headers()
                if not head:
                    self.wfile.write(content)

            def log_message(self, *_): ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, path: str, head: bool) -> tuple[int, bytes, str]:
        """Status, content and type for a path."""
        user, name, *rest = path.removeprefix("/api/models").strip("/").split("/")
        folder = self.repositories.get(f"{user}/{name}")
        if folder is None:
            return 404, b"", "text/plain"
        files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
        if not path.startswith("/api/"):
            file = files.get("/".join(rest[2:]))  # after resolve/<revision>
            if file is None:
                return 404, b"", "text/plain"
            if not head:
                self.fetched.add(f"{user}/{name}/{file.relative_to(folder)}")
            return 200, file.read_bytes(), "application/octet-stream"
        if rest[:1] == ["tree"]:
            content = [
                {"type": "file", "path": path, "size": file.stat().st_size, "oid": _digest(file.read_bytes())}
                for path, file in files.items()
            ]
        else:
            content = {"id": f"{user}/{name}", "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]}
        return 200, json.dumps(content).encode(), "application/json"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def serving(repositories: dict[str, Path]) -> Iterator[Hub]:
    """A hub as long as the context lasts."""
    hub = Hub(repositories)
    try:
        yield hub
    finally:
        hub.stop()
