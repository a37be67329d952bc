"""A Hub on loopback: as much of the Hub's HTTP interface as huggingface_hub needs to publish and to fetch models.

Standard library only, everything in memory. Repositories have branches, commits, pull requests and files, small ones
inside of commits and large ones (`*.safetensors`, `*.png`) in LFS, which stands under another host name, as the real
one does. A commit happens whole or not at all. `Hub.faults` breaks chosen requests.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Files = dict[str, "File"]


@dataclass(frozen=True)
class File:
    """One file of a commit."""

    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """Git's hash of a small file, SHA-256 of a large one."""
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repository:
    """A repository: its commits, and what points at them."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: Files, message: str) -> str:
        """Add a commit and let a ref point at it."""
        listing = json.dumps([len(self.commits), message, sorted((path, one.oid) for path, one in files.items())])
        oid = hashlib.sha1(listing.encode()).hexdigest()
        self.commits[oid], self.messages[oid], self.refs[ref] = files, message, oid
        return oid

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, a pull request or a hash names."""
        return revision if revision in self.commits else self.refs.get(revision)


@dataclass
class Fault:
    """Break the next `times` requests whose method and path match.

    Attributes:
        request: Regular expression over "METHOD path".
        how: A status to answer with; "cut", a connection closed after half of the body; or "short", half of the body
            as if it were all.
        times: How often.
    """

    request: str
    how: int | str
    times: int = 1


class Refused(Exception):
    """An answer that is an error: status, code for the client, message."""

    def __init__(self, status: int, code: str = "", message: str = "", commit: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.commit = status, code, message, commit


class Hub:
    """The server; a context manager that starts and stops it.

    Attributes:
        tokens: User by token. Users write under their own names, "me" also under "org".
        repositories: By id.
        faults: What to break.
        requests: "METHOD path" of everything that was asked for.
    """

    def __init__(self) -> None:
        self.tokens = {"hf_me": "me", "hf_you": "you"}
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self._server.daemon_threads = True
        port = self._server.server_port
        self.endpoint, self.lfs_endpoint = f"http://127.0.0.1:{port}", f"http://localhost:{port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Contents of a revision by path."""
        repository = self.repositories[repo_id]
        return {path: one.content for path, one in repository.commits[repository.resolve(revision)].items()}

    def add(self, repo_id: str, contents: dict[str, bytes], ref: str = "main", private: bool = False) -> str:
        """Put files into a repository without a client."""
        repository = self.repositories.setdefault(repo_id, Repository(private))
        files = {path: File(body, is_large(path)) for path, body in contents.items()}
        self.lfs |= {file.oid: file.content for file in files.values() if file.lfs}
        return repository.commit(ref, files, "added")


def is_large(path: str) -> bool:
    """Whether a file goes to LFS."""
    return path.endswith((".safetensors", ".png", ".bin"))


class Handler(BaseHTTPRequestHandler):
    """One request."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Answer."""
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._read_chunks()
        request = f"{self.command} {url.path}"
        with self.hub.lock:
            self.hub.requests.append(request)
            self.fault = self._next_fault(request)
            try:
                if isinstance(self.fault, int):
                    raise Refused(self.fault, message="broken on purpose")
                for pattern, method in ROUTES:
                    if match := re.fullmatch(pattern, request):
                        method(self, *(unquote(part) if part is not None else "main" for part in match.groups()))
                        return
                raise Refused(404, message=f"no such route: {request}")
            except Refused as refused:
                headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
                headers["X-Repo-Commit"] = refused.commit
                self._send(refused.status, {"error": refused.message}, {k: v for k, v in headers.items() if v})

    def _read_chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _next_fault(self, request: str) -> int | str | None:
        for fault in self.hub.faults:
            if fault.times and re.search(fault.request, request):
                fault.times -= 1
                return fault.how
        return None

    def _send(self, status: int, body: Any = b"", headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = content[: len(content) // 2] if self.fault in ("cut", "short") else content
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(content if self.fault == "cut" else sent)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(sent)
        self.close_connection = self.close_connection or self.fault == "cut"

    # Who may do what

    def _user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise Refused(401, message="Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def _writer(self, owner: str, proposes: bool = False) -> str:
        user = self._user()
        if user is None:
            raise Refused(401, message="Invalid username or password.")
        if not proposes and not self._owns(user, owner):
            raise Refused(403, message=f"You don't have the rights to write under {owner!r}")
        return user

    @staticmethod
    def _owns(user: str | None, owner: str) -> bool:
        return user is not None and (user == owner or (user, owner) == ("me", "org"))

    def _readable(self, repo_id: str) -> Repository:
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and not self._owns(self._user(), repo_id.split("/")[0])):
            raise Refused(404 if self._user() else 401, "RepoNotFound", "Repository not found")
        return repository

    def _commit_of(self, repository: Repository, revision: str) -> str:
        commit = repository.resolve(revision)
        if commit is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # Routes

    def create(self) -> None:
        """POST /api/repos/create."""
        asked = json.loads(self.body)
        user = self._user()
        repo_id = f"{asked.get('organization') or user}/{asked['name']}"
        self._writer(repo_id.split("/")[0])
        answer = {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repositories:
            self._send(409, answer | {"error": "You already created this model repo"})
            return
        self.hub.repositories[repo_id] = Repository(
            asked.get("visibility") == "private" or asked.get("private") is True
        )
        self.hub.repositories[repo_id].commit("main", {".gitattributes": File(b"", False)}, "initial commit")
        self._send(200, answer)

    def validate(self) -> None:
        """POST /api/validate-yaml; only that there is metadata."""
        has_metadata = json.loads(self.body)["content"].startswith("---\n")
        problem = [] if has_metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        self._send(200 if has_metadata else 400, {"errors": problem, "warnings": []})

    def branch(self, repo_id: str, name: str) -> None:
        """POST /api/models/{repo}/branch/{name}."""
        self._writer(repo_id.split("/")[0])
        repository = self._readable(repo_id)
        if name in repository.refs:
            raise Refused(409, message="Reference already exists")
        start = (json.loads(self.body) if self.body else {}).get("startingPoint", "main")
        repository.refs[name] = self._commit_of(repository, start)
        self._send(200, {})

    def info(self, repo_id: str, revision: str) -> None:
        """GET /api/models/{repo}[/revision/{revision}]."""
        repository = self._readable(repo_id)
        commit = self._commit_of(repository, revision)
        siblings = [{"rfilename": path} for path in repository.commits[commit]]
        answer = {"_id": "0", "id": repo_id, "sha": commit, "private": repository.private, "siblings": siblings}
        self._send(200, answer | {"tags": [], "downloads": 0, "likes": 0})

    def tree(self, repo_id: str, revision: str) -> None:
        """GET /api/models/{repo}/tree/{revision}."""
        repository = self._readable(repo_id)
        files = repository.commits[self._commit_of(repository, revision)]
        listing = []
        for path, file in files.items():
            entry = {"type": "file", "path": path, "oid": file.oid, "size": len(file.content)}
            lfs = {"oid": file.oid, "size": len(file.content), "pointerSize": 128}
            listing.append(entry | ({"lfs": lfs} if file.lfs else {}))
        self._send(200, listing)

    def list_refs(self, repo_id: str) -> None:
        """GET /api/models/{repo}/refs."""
        refs = self._readable(repo_id).refs.items()
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in refs if "/" not in n]
        self._send(200, {"branches": branches, "tags": [], "converts": []})

    def preupload(self, repo_id: str, revision: str) -> None:
        """POST /api/models/{repo}/preupload/{revision}."""
        self._writer(repo_id.split("/")[0], proposes="create_pr" in self.query)
        repository = self._readable(repo_id)
        files = repository.commits[self._commit_of(repository, revision)]
        answer = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            mode = {"path": path, "uploadMode": "lfs" if is_large(path) else "regular", "shouldIgnore": False}
            answer.append(mode | ({"oid": files[path].oid} if path in files else {}))
        self._send(200, {"files": answer})

    def lfs_batch(self, repo_id: str) -> None:
        """POST /{repo}.git/info/lfs/objects/batch."""
        self._writer(repo_id.split("/")[0], proposes=True)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.lfs:
                entry["actions"] = {
                    "upload": {"href": f"{self.hub.lfs_endpoint}/lfs/{asked['oid']}"},
                    "verify": {"href": f"{self.hub.endpoint}/{repo_id}.git/info/lfs/verify"},
                }
            objects.append(entry)
        self._send(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        """PUT /lfs/{oid}, on the other host, to which no token may go."""
        self._require_no_token()
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, message="content does not have this SHA-256")
        self.hub.lfs[oid] = self.body
        self._send(200)

    def lfs_get(self, oid: str) -> None:
        """GET /lfs/{oid}, on the other host."""
        self._require_no_token()
        content = self.hub.lfs[oid]
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if start is None:
            self._send(200, content)
        else:
            at = int(start[1])
            self._send(206, content[at:], {"Content-Range": f"bytes {at}-{len(content) - 1}/{len(content)}"})

    def _require_no_token(self) -> None:
        if self.headers.get("Authorization"):
            raise Refused(400, message="a token was sent to the host of large files")

    def lfs_verify(self, repo_id: str) -> None:
        """POST /{repo}.git/info/lfs/verify."""
        asked = json.loads(self.body)
        if len(self.hub.lfs.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, message="object not found, or of another size")
        self._send(200, {})

    def commit(self, repo_id: str, revision: str) -> None:
        """POST /api/models/{repo}/commit/{revision}: all of it, or nothing."""
        proposes = "create_pr" in self.query
        self._writer(repo_id.split("/")[0], proposes)
        repository = self._readable(repo_id)
        files = dict(repository.commits[self._commit_of(repository, revision)])
        header: dict[str, Any] = {}
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                header = value
            elif item["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif item["key"] == "lfsFile" and value["oid"] in self.hub.lfs:
                files[value["path"]] = File(self.hub.lfs[value["oid"]], True)
            elif item["key"] == "deletedFile":
                files.pop(value["path"], None)
            else:
                raise Refused(400, message=f"cannot commit {item['key']} {value.get('path')}")
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
        oid = repository.commit(f"refs/pr/{number}" if proposes else revision, files, header["summary"])
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{oid}"}
        url = f"{self.hub.endpoint}/{repo_id}/discussions/{number}"
        self._send(200, answer | ({"pullRequestUrl": url} if proposes else {}))

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        """HEAD or GET /{repo}/resolve/{revision}/{path}."""
        repository = self._readable(repo_id)
        commit = self._commit_of(repository, revision)
        file = repository.commits[commit].get(path)
        if file is None:
            raise Refused(404, "EntryNotFound", "Entry not found", commit)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.oid}"'}
        size = str(len(file.content))
        if file.lfs:
            location = f"{self.hub.lfs_endpoint}/lfs/{file.oid}"
            headers |= {"Location": location, "X-Linked-Size": size, "X-Linked-Etag": f'"{file.oid}"'}
            self._send(302, b"", headers)
        else:
            self._send(200, file.content, headers)


_REPO = r"/([^/]+/[^/]+)"
ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate),
    (rf"POST /api/models{_REPO}/branch/([^/]+)", Handler.branch),
    (rf"POST /api/models{_REPO}/preupload/([^/]+)", Handler.preupload),
    (rf"POST /api/models{_REPO}/commit/([^/]+)", Handler.commit),
    (rf"GET /api/models{_REPO}/tree/([^/]+)", Handler.tree),
    (rf"GET /api/models{_REPO}/refs", Handler.list_refs),
    (rf"GET /api/models{_REPO}(?:/revision/([^/]+))?", Handler.info),
    (r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (r"POST /([^/]+/[^/]+)\.git/info/lfs/verify", Handler.lfs_verify),
    (r"PUT /lfs/(\w+)", Handler.lfs_put),
    (r"GET /lfs/(\w+)", Handler.lfs_get),
    (rf"(?:HEAD|GET) {_REPO}/resolve/([^/]+)/(.+)", Handler.resolve),
]
