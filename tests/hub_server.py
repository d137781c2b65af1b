"""A small Hub in one process: the endpoints that huggingface_hub calls to make, fill and read a model repository.

    python tests/hub_server.py FOLDER

It prints its address, and keeps in FOLDER what it was sent: `objects/` large files by SHA-256, `log.jsonl` a line for
each request. Covered: making a repository, the check of a card's header, upload modes, Git LFS batches with basic
transfer and verification, commits (files in line, large files, deletions), repository info, the tree, and downloads.
Not covered: Xet storage, which the real Hub prefers (the client falls back to LFS with HF_HUB_DISABLE_XET=1), tokens,
branches and pull requests. While a file FOLDER/refuse-commits exists, commits are refused with status 403.
"""

import base64
import hashlib
import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from urllib.parse import unquote, urlsplit

import yaml

LARGE = (".safetensors", ".bin", ".pt")  # what .gitattributes of a new repository sends to LFS


class Hub(ThreadingHTTPServer):
    """The state of the Hub.

    Attributes:
        folder: Where it keeps what it was sent.
        repositories: Files of each: path to content, or to the SHA-256 of a large file.
    """

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.lock = folder, Lock()
        self.repositories: dict[str, dict[str, bytes | str]] = {}
        (folder / "objects").mkdir(parents=True, exist_ok=True)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit_of(self, repository: str) -> str:
        """A commit's name: 40 hexadecimal digits of what is in it."""
        return hashlib.sha1(repr(sorted(self.repositories[repository].items())).encode()).hexdigest()

    def content(self, repository: str, path: str) -> bytes:
        value = self.repositories[repository][path]
        return value if isinstance(value, bytes) else (self.folder / "objects" / value).read_bytes()


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Hub
    protocol_version = "HTTP/1.1"
    ROUTES = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/[^/]+", "preupload"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/[^/]+", "commit"),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/[^/]+", "tree"),
        ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", "info"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/objects/([0-9a-f]{64})", "receive"),
        ("POST", r"/verify", "verify"),
        ("GET", r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", "resolve"),
    )

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self.read_chunks()
        with self.server.lock, (self.server.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps({"method": self.command, "path": path, "bytes": len(body)}) + "\n")
        method = "GET" if self.command == "HEAD" else self.command
        for verb, pattern, name in self.ROUTES:
            found = re.fullmatch(pattern, path)
            if verb == method and found:
                repository = found[1] if found.groups() else None
                if name not in ("create", "receive") and repository and repository not in self.server.repositories:
                    return self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
                return getattr(self, name)(body, *found.groups())
        return self.answer(404, {"error": f"no {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def read_chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def create(self, body: bytes) -> None:
        values = json.loads(body)
        name = f"{values.get('organization') or 'someone'}/{values['name']}"
        exists = name in self.server.repositories
        self.server.repositories.setdefault(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.answer(409 if exists else 200, {"url": f"{self.server.address}/{name}", "name": name})

    def validate(self, body: bytes) -> None:
        header = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        valid = header is not None and isinstance(yaml.safe_load(header[1]), dict)
        self.answer(200 if valid else 400, {"errors": [] if valid else [{"message": "no header"}], "warnings": []})

    def preupload(self, body: bytes, _repository: str) -> None:
        files = [
            {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(LARGE) else "regular"}
            for one in json.loads(body)["files"]
        ]
        self.answer(200, {"files": [{**one, "shouldIgnore": False, "oid": None} for one in files]})

    def batch(self, body: bytes, _repository: str) -> None:
        objects = []
        for one in json.loads(body)["objects"]:
            actions = {
                "upload": {"href": f"{self.server.address}/objects/{one['oid']}", "header": {}},
                "verify": {"href": f"{self.server.address}/verify", "header": {}},
            }
            there = (self.server.folder / "objects" / one["oid"]).is_file()
            objects.append({"oid": one["oid"], "size": one["size"], **({} if there else {"actions": actions})})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def receive(self, body: bytes, digest: str) -> None:
        if hashlib.sha256(body).hexdigest() != digest:
            return self.answer(400, {"error": "another digest"})
        (self.server.folder / "objects" / digest).write_bytes(body)
        return self.answer(200, {})

    def verify(self, body: bytes) -> None:
        one = json.loads(body)
        path = self.server.folder / "objects" / one["oid"]
        fits = path.is_file() and path.stat().st_size == one["size"]
        self.answer(200 if fits else 404, {})

    def commit(self, body: bytes, repository: str) -> None:
        if (self.server.folder / "refuse-commits").exists():
            return self.answer(403, {"error": "commits are refused"})
        files = self.server.repositories[repository]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if not (self.server.folder / "objects" / value["oid"]).is_file():
                    return self.answer(400, {"error": f"{value['path']} was not uploaded"})
                files[value["path"]] = value["oid"]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        commit = self.server.commit_of(repository)
        address = f"{self.server.address}/{repository}/commit/{commit}"
        return self.answer(200, {"commitUrl": address, "commitOid": commit, "pullRequestUrl": None})

    def info(self, _body: bytes, repository: str) -> None:
        siblings = [{"rfilename": path} for path in sorted(self.server.repositories[repository])]
        values = {"id": repository, "modelId": repository, "siblings": siblings, "tags": [], "private": False}
        self.answer(200, {**values, "sha": self.server.commit_of(repository), "downloads": 0, "likes": 0})

    def tree(self, _body: bytes, repository: str) -> None:
        rows = []
        for path in sorted(self.server.repositories[repository]):
            content = self.server.content(repository, path)
            rows.append({"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()})
        self.answer(200, rows)

    def resolve(self, _body: bytes, repository: str, path: str) -> None:
        commit = {"X-Repo-Commit": self.server.commit_of(repository)}
        if path not in self.server.repositories[repository]:
            return self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", **commit})
        content = self.server.content(repository, path)
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', **commit}
        return self.answer(200, content, headers)

    def answer(self, status: int, content: bytes | list | dict, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        if not isinstance(content, bytes):
            self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_arguments) -> None:
        """Nothing: the log is a file."""


if __name__ == "__main__":
    hub = Hub(Path(sys.argv[1]))
    print(hub.address, flush=True)
    hub.serve_forever()
