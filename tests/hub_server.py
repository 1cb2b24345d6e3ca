"""A small Hub on loopback: what the real huggingface_hub client needs of the protocol to create, fill and read model repositories.

Everything is in memory. Writes need the token; binary and large files have to come by LFS, whose objects are checked against their
SHA-256; the metadata of a README.md has to be what the Hub takes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_loopback"

#: What the metadata of a model card has to be: field → check. Others are free.
METADATA: dict[str, Callable[[Any], bool]] = {
    "license": lambda value: isinstance(value, str) and re.fullmatch(r"[a-z0-9.\-]+", value) is not None,
    "library_name": lambda value: isinstance(value, str),
    "pipeline_tag": lambda value: isinstance(value, str),
    "tags": lambda value: isinstance(value, list) and all(isinstance(tag, str) for tag in value),
    "base_model": lambda value: isinstance(value, str) and re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", value) is not None,
    "model-index": lambda value: all(valid_result(result) for entry in value for result in entry["results"] if entry["name"]),
}


def valid_result(result: Any) -> bool:
    """Whether an entry of a model index has a task, a dataset with id and name, and metrics with numbers."""
    named = result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]
    return bool(named) and all(metric["type"] and isinstance(metric["value"], (int, float)) for metric in result["metrics"])


def metadata_errors(card: str) -> list[str]:
    """What is wrong with the metadata of a model card."""
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    data = yaml.safe_load(match[1]) if match else {}
    errors = []
    for name, accepts in METADATA.items():
        try:
            fine = name not in data or accepts(data[name])
        except (KeyError, TypeError):
            fine = False
        errors += [] if fine else [f'"{name}" is not valid']
    return errors


class Hub:
    """The repositories: by id, by branch, path → content; every write is a commit with a number of its own."""

    def __init__(self) -> None:
        self.branches: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.heads: dict[tuple[str, str], str] = {}
        self.objects: dict[str, bytes] = {}
        self.by_lfs: set[str] = set()
        self.log: list[str] = []

    def create(self, repo: str, private: bool) -> bool:
        """Make a repository; False if it is there."""
        if repo in self.branches:
            return False
        self.branches[repo], self.private[repo] = {"main": {}}, private
        self.move(repo, "main")
        return True

    def move(self, repo: str, branch: str) -> str:
        """Give a branch a new commit."""
        files = sorted((path, hashlib.sha1(content).hexdigest()) for path, content in self.branches[repo][branch].items())
        sha = hashlib.sha1(json.dumps([repo, branch, files]).encode()).hexdigest()
        self.heads[repo, branch] = sha
        return sha

    def branch_of(self, repo: str, revision: str) -> str | None:
        """The branch that a name or the id of its last commit means."""
        found = (name for (owner, name), sha in self.heads.items() if owner == repo and revision in (name, sha))
        return next(found, None)


class Handler(BaseHTTPRequestHandler):
    """The protocol: method and path → answer."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Keep the tests' output clean."""

    def handle_any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append(f"{self.command} {path}")
        if self.command in ("POST", "PUT") and self.headers.get("Authorization") != f"Bearer {TOKEN}" and "/lfs/" not in path:
            return self.answer(401, {"error": "Invalid username or password."})
        for method, pattern, name in ROUTES:
            if method == self.command.replace("HEAD", "GET") and (match := re.fullmatch(pattern, path)):
                return getattr(self, name)(body, **match.groupdict())
        return self.answer(404, {"error": f"no such route: {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def root(self) -> str:
        return f"http://{self.headers['Host']}"

    # -------------------------------------------------------------------------------------------------------------- writing

    def who(self, body: bytes) -> None:
        self.answer(200, {"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def validate(self, body: bytes) -> None:
        errors = metadata_errors(json.loads(body)["content"])
        self.answer(400 if errors else 200, {"errors": [{"message": error} for error in errors], "warnings": []})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        made = self.hub.create(repo, asked.get("visibility") == "private")
        self.answer(200 if made else 409, {"url": f"{self.root}/{repo}", "name": repo, "id": repo})

    def branch(self, body: bytes, repo: str, name: str) -> None:
        made = name not in self.hub.branches[repo]
        if made:
            self.hub.branches[repo][name] = dict(self.hub.branches[repo]["main"])
            self.hub.move(repo, name)
        self.answer(200 if made else 409, {})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        files = []
        for file in json.loads(body)["files"]:
            binary = b"\0" in base64.b64decode(file["sample"]) or file["size"] > 10_000_000
            files.append({"path": file["path"], "uploadMode": "lfs" if binary else "regular", "shouldIgnore": False})
        self.answer(200, {"files": files})

    def lfs_batch(self, body: bytes, repo: str) -> None:
        objects = []
        for item in json.loads(body)["objects"]:
            known = item["oid"] in self.hub.objects
            actions = {} if known else {"actions": {"upload": {"href": f"{self.root}/lfs/{item['oid']}"}}}
            objects.append({"oid": item["oid"], "size": item["size"], **actions})
        self.answer(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})

    def lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(400, {"error": "not the object that was announced"})
        self.hub.objects[oid] = body
        return self.answer(200, {})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        branch = self.hub.branch_of(repo, revision)
        if branch is None:
            return self.answer(404, {"error": "Invalid rev"}, {"X-Error-Code": "RevisionNotFound"})
        files = dict(self.hub.branches[repo][branch])
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                if b"\0" in files[value["path"]]:
                    return self.answer(400, {"error": f"{value['path']} is binary and has to come by LFS"})
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self.answer(400, {"error": f"{value['path']} was not uploaded"})
                files[value["path"]] = self.hub.objects[value["oid"]]
                self.hub.by_lfs.add(value["path"])
        self.hub.branches[repo][branch] = files
        sha = self.hub.move(repo, branch)
        return self.answer(200, {"commitUrl": f"{self.root}/{repo}/commit/{sha}", "commitOid": sha, "hookOutput": ""})

    # -------------------------------------------------------------------------------------------------------------- reading

    def info(self, body: bytes, repo: str, revision: str = "main") -> None:
        branch = self.hub.branch_of(repo, revision)
        if branch is None:
            return self.missing(repo)
        siblings = [{"rfilename": path} for path in sorted(self.hub.branches[repo][branch])]
        sha, private = self.hub.heads[repo, branch], self.hub.private[repo]
        described = {"_id": sha[:24], "id": repo, "modelId": repo, "sha": sha, "private": private, "tags": [], "siblings": siblings}
        return self.answer(200, described)

    def tree(self, body: bytes, repo: str, revision: str, below: str | None = None) -> None:
        branch = self.hub.branch_of(repo, revision)
        if branch is None:
            return self.missing(repo)
        start = f"{below}/" if below else ""
        files = {path: content for path, content in self.hub.branches[repo][branch].items() if path.startswith(start)}
        if not files:
            return self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in sorted(files.items())
        ]
        return self.answer(200, entries)

    def refs(self, body: bytes, repo: str) -> None:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
            for (owner, name), sha in self.hub.heads.items()
            if owner == repo
        ]
        self.answer(200, {"branches": branches, "converts": [], "tags": []})

    def resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        branch = self.hub.branch_of(repo, revision)
        if branch is None:
            return self.missing(repo)
        content = self.hub.branches[repo][branch].get(path)
        commit = {"X-Repo-Commit": self.hub.heads[repo, branch]}
        if content is None:
            return self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", **commit})
        found = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Content-Type": "application/octet-stream"}
        return self.answer(200, content, found | commit)

    def missing(self, repo: str) -> None:
        code = "RevisionNotFound" if repo in self.hub.branches else "RepoNotFound"
        self.answer(404, {"error": "not found"}, {"X-Error-Code": code})


_REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES = (
    ("GET", r"/api/whoami-v2", "who"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", rf"/api/models/{_REPO}/branch/(?P<name>.+)", "branch"),
    ("POST", rf"/api/models/{_REPO}/preupload/(?P<revision>.+)", "preupload"),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>\w+)", "lfs_put"),
    ("POST", rf"/api/models/{_REPO}/commit/(?P<revision>.+)", "commit"),
    ("GET", rf"/api/models/{_REPO}", "info"),
    ("GET", rf"/api/models/{_REPO}/revision/(?P<revision>.+)", "info"),
    ("GET", rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)(/(?P<below>.+))?", "tree"),
    ("GET", rf"/api/models/{_REPO}/refs", "refs"),
    ("GET", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
)


@contextmanager
def serving() -> Iterator[tuple[Hub, str]]:
    """A Hub and its address, for as long as the context lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def run_with_hub(code: str, *arguments: object, endpoint: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own that takes the loopback server for the Hub."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=home.parent, env=inherited | settings | environment)
