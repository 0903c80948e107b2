"""A hub on this machine: folders served as repositories, for the real clients of huggingface_hub and `datasets`."""

import hashlib
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Answers what `snapshot_download` and `load_dataset` ask.

    Attributes:
        url: for HF_ENDPOINT.
        repositories: their folders by name: `user/name`, of a dataset `datasets/user/name`.
        fetched: the files that were downloaded, as `user/name/folder/file`.
        hangs_up: connections are accepted and closed without an answer.
    """

    def __init__(self, repositories: dict[str, Path]):
        self.repositories, self.fetched, self._connections = repositories, set[str](), list[socket.socket]()
        self.hangs_up = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                super().setup()
                hub._connections.append(self.connection)

            def do_HEAD(self):
                self._answer(*hub.answer(self.path, head=True), head=True)

            def do_GET(self):
                self._answer(*hub.answer(self.path, head=False))

            def do_POST(self):
                form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
                self._answer(*hub.answer(self.path, head=False, asked=form.get("paths", [])))

            def _answer(self, code: int, content: bytes, kind: str, head: bool = False) -> None:
                if hub.hangs_up:
                    self.close_connection = True
                    return
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

    def answer(self, address: str, head: bool, asked: Sequence[str] = ()) -> tuple[int, bytes, str]:
        """Status, content and type for an address.

        Args:
            asked: the files that are asked about, with `paths-info`.
        """
        path, _, query = address.partition("?")
        is_api, is_dataset = path.startswith("/api/"), path.removeprefix("/api").startswith("/datasets/")
        path = unquote(path).removeprefix("/api").removeprefix("/models").removeprefix("/datasets").strip("/")
        user, name, *rest = [*path.split("/"), ""]
        rest = [part for part in rest if part]
        folder = self.repositories.get(("datasets/" if is_dataset else "") + f"{user}/{name}")
        if folder is None:
            return 404, b"", "text/plain"
        files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
        if not is_api:
            file = files.get("/".join(rest[2:]))  # after resolve/<revision>
            if file is None:
                return 404, b"", "text/plain"
            if not head:
                self.fetched.add(f"{user}/{name}/{file.relative_to(folder)}")
            return 200, file.read_bytes(), "application/octet-stream"
        entries = [
            {"type": "file", "path": path, "size": file.stat().st_size, "oid": _digest(file.read_bytes())}
            for path, file in files.items()
        ]
        content: Any = {"id": f"{user}/{name}", "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]}
        if rest[:1] == ["tree"]:
            inside = Path(*rest[2:])
            folders = {str(parent) for path in files for parent in Path(path).parents} - {"."}
            entries += [{"type": "directory", "path": path, "size": 0, "oid": _digest(b"")} for path in folders]
            content = [entry for entry in entries if inside in Path(entry["path"]).parents]
            if "recursive=true" not in query.lower():
                content = [entry for entry in content if Path(entry["path"]).parent == inside]
        elif rest[:1] == ["paths-info"]:
            content = [entry for entry in entries if entry["path"] in asked]
        return 200, json.dumps(content).encode(), "application/json"

    def stop(self) -> None:
        """Accept no more connections, and end those that clients keep open."""
        self._server.shutdown()
        self._server.server_close()
        for connection in self._connections:
            with suppress(OSError):  # it has ended
                connection.shutdown(socket.SHUT_RDWR)


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
