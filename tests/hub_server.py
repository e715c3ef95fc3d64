# SPDX-License-Identifier: Apache-2.0
"""A small server that speaks the calls of the Hub's API by which `huggingface_hub` creates, commits and downloads."""

import base64
import contextlib
import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlparse


class HubHandler(BaseHTTPRequestHandler):
    """Repositories are dictionaries of path to content; there is one branch, whose commit is their hash."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        path, body = unquote(urlparse(self.path).path), self._body()
        if path == "/api/repos/create":
            request = json.loads(body)
            repo = "/".join(filter(None, (request.get("organization"), request["name"])))
            self.server.repos.setdefault(repo, {})
            self._reply({"url": f"{self.server.url}/{repo}", "name": repo})
        elif path == "/api/validate-yaml":
            self._reply({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            self._reply({"files": [{**file, "shouldIgnore": False} for file in files]})
        elif "/commit/" in path:
            repo = path.split("/commit/")[0].removeprefix("/api/models/")
            files = self.server.repos[repo]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit_url = f"{self.server.url}/{repo}/commit/{commit(files)}"
            self._reply({"commitUrl": commit_url, "commitOid": commit(files)})
        else:
            self._reply({"error": path}, status=404)

    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        if path == "/api/whoami-v2":
            self._reply({"name": "somebody", "type": "user", "orgs": []})
        elif path.startswith("/api/models/"):
            repo = path.removeprefix("/api/models/").split("/revision/")[0].split("/tree/")[0]
            files = self.server.repos.get(repo)
            if files is None:
                self._reply({"error": "no such repository"}, status=404, headers={"X-Error-Code": "RepoNotFound"})
            elif "/tree/" in path:
                self._reply([{"type": "file", "path": name, "size": len(files[name]), "oid": "0"} for name in files])
            else:
                siblings = [{"rfilename": name} for name in files]
                self._reply(
                    {"id": repo, "modelId": repo, "sha": commit(files), "siblings": siblings, "private": False}
                )
        elif "/resolve/" in path:
            repo, name = path[1:].split("/resolve/")
            files, name = self.server.repos.get(repo, {}), name.split("/", 1)[1]
            if name not in files:
                self._reply({"error": name}, status=404, headers={"X-Error-Code": "EntryNotFound"})
            else:
                etag = hashlib.sha1(files[name]).hexdigest()
                headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit(files)}
                self._reply(files[name], headers=headers)
        else:
            self._reply({"error": path}, status=404)

    def do_HEAD(self):
        self.do_GET()

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _reply(self, content, status: int = 200, headers: dict | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle(self):
        with contextlib.suppress(ConnectionResetError):  # a client may leave when it has what it came for
            super().handle()

    def log_message(self, *args):
        self.server.calls.append(f"{self.command} {self.path}")


def commit(files: dict[str, bytes]) -> str:
    return hashlib.sha1(b"".join(name.encode() + files[name] for name in sorted(files))).hexdigest()


@contextlib.contextmanager
def serve() -> Iterator[ThreadingHTTPServer]:
    """The server on a free port of this machine: its `url`, `repos` and `calls`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.url, server.repos, server.calls = f"http://127.0.0.1:{server.server_port}", {}, []
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
