"""
A Hub for tests: a real HTTP server on loopback that speaks the Hub's API as far as `huggingface_hub` uses it.

```python
with HubServer() as hub:
    commit = hub.add_repo("someone/model", folder, private=True)  # or {"config.json": b"{}", "big.safetensors": path}
    later = hub.commit("someone/model", {"config.json": b"{}"}, delete=["old.json"])  # old revisions stay loadable
    hub.fail(r"GET .*model\\.safetensors", times=2, kind="503")
    run_python(code, **hub.environment(tmp_path))  # in a fresh process: this Hub, this cache, this token
    hub.files("someone/model", "main")  # path -> content, as far as the files are small
    hub.log, hub.bytes_sent(r"GET .*model\\.safetensors")
```

Models and datasets share the names: what is added is served as either.

Tokens: `hub.token` may write under "someone/", `hub.read_token` may only read; writes need the first, reads of private
and gated repos either. Repos of other names are made by `add_repo` alone.

Patterns are searched in "METHOD /path?query" of each request. LFS files (safetensors, and whatever exceeds 10 MB) are
redirected to a second port, `/repos/REPO/SHA256?filename=NAME&...`, which refuses an Authorization header; uploads go
there by PUT. They are served by ranges; those that exceed 10 MB from where they lie. Kinds of `fail`, for the next
`times` requests that match:

- "503": the answer is 503.
- "drop": the connection is closed in place of an answer.
- "lost": the work is done, and then the connection is closed in place of an answer.
- "cut": the content of a file ends after `at` bytes and the connection is closed.
- "long": the content of a file has `at` bytes more than were asked for, and says so; "endless": and does not say so.
- "empty": the answer has no content. "shifted": it brings the bytes that begin `at` bytes later, and says so.
- "flip": the byte `at` of a file's content is wrong; in a PUT, that of what arrives.
"""

import base64
import hashlib
import json
import re
import secrets
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

OWNER = "someone"
DATE = "2025-01-01T00:00:00.000Z"
CHUNK = 2**20
LFS_SIZE = 10_000_000
GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


def is_lfs(path, size):
    return path.endswith(".safetensors") or size > LFS_SIZE


class File:
    """One version of one file, in memory or where it lies on disk."""

    def __init__(self, path: str, content: bytes | Path, sha256: str | None = None):
        self.content = content
        self.size = content.stat().st_size if isinstance(content, Path) else len(content)
        self.sha256, blob = sha256 or (self._sha256() if is_lfs(path, self.size) else None), content
        if self.sha256:
            blob = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()
        self.oid = hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    def _sha256(self):
        if isinstance(self.content, bytes):
            return hashlib.sha256(self.content).hexdigest()
        with open(self.content, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def etag(self):
        return self.sha256 or self.oid

    def chunks(self, start, stop):
        if isinstance(self.content, bytes):
            yield self.content[start:stop]
            return
        with open(self.content, "rb") as file:
            file.seek(start)
            while start < stop and (chunk := file.read(min(CHUNK, stop - start))):
                yield chunk
                start += len(chunk)


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, File]] = field(default_factory=dict)

    def resolve(self, revision):
        """Branch, tag or commit -> commit, or None."""
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        return sha if sha in self.commits else None

    def add(self, files, branch="main"):
        tree = sorted((path, file.oid) for path, file in files.items())
        sha = hashlib.sha1(repr((tree, len(self.commits))).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha


@dataclass
class Request:
    """What the log keeps of a request; `sent` counts the content's bytes, without headers."""

    line: str
    sent: int = 0


@dataclass
class Fault:
    pattern: str
    times: int
    kind: str
    at: int


class HubServer:
    """See the module's docstring."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, File] = {}  # what LFS stores, by sha256
        self.log: list[Request] = []
        self.token, self.read_token = "hf_write_" + secrets.token_hex(8), "hf_read_" + secrets.token_hex(8)
        self.signature = secrets.token_hex(8)
        self.lock = threading.RLock()
        self.faults: list[Fault] = []
        self.folder = tempfile.TemporaryDirectory()
        self.servers = [_Server(("127.0.0.1", 0), partial(handler, self)) for handler in (_Api, _Storage)]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)

    def __enter__(self):
        for server in self.servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        for server in self.servers:
            server.shutdown()
            server.server_close()
        self.folder.cleanup()

    def environment(self, home, token=None):
        """The environment of a fresh process: `home` is its cache, `token` may be `""` for none."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": self.token if token is None else token,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "DISABLE_SAFETENSORS_CONVERSION": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def add_repo(self, repo_id, files, private=False, gated=False):
        """
        A new repo of a folder's files, or of those of a dict path -> bytes, `Path` or `File`; returns the commit.

        `File(path, content, sha256)` believes the checksum, which spares the reading of a very large file.
        """
        self.repos[repo_id] = Repo(private, gated)
        return self.commit(repo_id, files)

    def commit(self, repo_id, files, delete=(), branch="main"):
        """Adds, replaces and deletes files, in one commit, which it returns."""
        if not isinstance(files, dict):
            paths = [path for path in Path(files).rglob("*") if path.is_file()]
            files = {path.relative_to(files).as_posix(): path for path in paths}
        new = {}
        for path, content in files.items():
            if isinstance(content, Path) and content.stat().st_size <= LFS_SIZE:
                content = content.read_bytes()  # now, so that the folder may change afterwards
            new[path] = content if isinstance(content, File) else File(path, content)
        with self.lock:
            repo = self.repos[repo_id]
            old = repo.commits[repo.branches[branch]] if branch in repo.branches else {}
            self.objects |= {file.sha256: file for file in new.values() if file.sha256}
            return repo.add({path: file for path, file in (old | new).items() if path not in delete}, branch)

    def head(self, repo_id, branch="main"):
        return self.repos[repo_id].branches[branch]

    def files(self, repo_id, revision="main"):
        repo = self.repos[repo_id]
        files = repo.commits[repo.resolve(revision)]
        return {path: b"".join(file.chunks(0, file.size)) for path, file in files.items()}

    def fail(self, pattern, times=1, kind="503", at=0):
        self.faults.append(Fault(pattern, times, kind, at))

    def bytes_sent(self, pattern=""):
        return sum(request.sent for request in self.log if re.search(pattern, request.line))

    def take_fault(self, line, *kinds):
        """The fault of one of these kinds that is due for this request, used up by that; or None."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.kind in kinds and re.search(fault.pattern, line):
                    fault.times -= 1
                    return fault
        return None


class _Server(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, *args):
        # Clients may be killed.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*args)


class _Refusal(Exception):
    """An answer other than success, raised wherever it is noticed."""

    def __init__(self, status, message, code=None):
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, hub, *args):
        self.hub = hub
        super().__init__(*args)

    def log_message(self, *_):
        pass

    def handle_any(self):
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.entry = Request(f"{self.command} {self.path}")
        self.hub.log.append(self.entry)
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        fault = self.hub.take_fault(self.entry.line, "503", "drop", "lost")
        self.is_answered = fault is None or fault.kind == "503"
        self.body, self.is_cut = self.read_body(), False
        try:
            if fault and fault.kind != "lost":
                raise _Refusal(503, "Service Unavailable")
            self.route(url.path, token)
        except _Refusal as refusal:
            self.reply(refusal.status, {"error": str(refusal)}, refusal.headers)
        # What was not read would be taken for the next request, and closing on it would reset the connection.
        while not self.is_cut and next(self.body, None) is not None:
            pass
        self.close_connection |= self.is_cut or not self.is_answered

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def read_body(self):
        """Yields the request's content as it comes, by length or in chunks."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left > 0 and (chunk := self.rfile.read(min(CHUNK, left))):
            left -= len(chunk)
            yield chunk

    def json(self):
        return json.loads(b"".join(self.body) or b"{}")

    def reply(self, status, content=b"", headers=(), fault=None):
        """Answers with bytes, with what becomes JSON, or with a file's chunks (then `headers` have the length)."""
        if not self.is_answered:
            return
        headers = dict(headers)
        if isinstance(content, (dict, list)):
            content, headers["Content-Type"] = json.dumps(content).encode(), "application/json"
        if isinstance(content, bytes):
            headers["Content-Length"], content = len(content), [content]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        position = 0
        for chunk in content:
            if fault and fault.kind == "cut":
                chunk = chunk[: max(fault.at - position, 0)]
            elif fault and fault.kind == "flip":
                chunk = _flip(chunk, fault.at - position)
            self.entry.sent += len(chunk)
            self.wfile.write(chunk)
            position += len(chunk)
            if fault and fault.kind == "cut" and position >= fault.at:
                self.is_cut = True
                return

    def reply_file(self, file, headers):
        """Answers with a file or the range of it that was asked for."""
        start, stop, status = 0, file.size, 200
        headers = {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"} | headers
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or ""):
            first, last = (int(text) if text else None for text in match.groups())
            start = max(file.size - last, 0) if first is None else first
            stop = file.size if first is None or last is None else min(last + 1, file.size)
            if start >= stop:
                raise _Refusal(416, "Range Not Satisfiable")
            status, headers["Content-Range"] = 206, f"bytes {start}-{stop - 1}/{file.size}"
        fault = None if self.command == "HEAD" else self.hub.take_fault(self.entry.line, *CONTENT_FAULTS)
        content = file.chunks(start, stop)
        if fault and fault.kind in ("long", "endless"):
            content, stop = (*content, b"\0" * fault.at), stop + fault.at
        elif fault and fault.kind == "empty":
            content, stop = (), start
        elif fault and fault.kind == "shifted":
            content = file.chunks(start + fault.at, stop + fault.at)
            headers["Content-Range"] = f"bytes {start + fault.at}-{stop + fault.at - 1}/{file.size}"
        if fault and fault.kind == "endless":
            headers["Connection"], self.close_connection = "close", True
        else:
            headers["Content-Length"] = stop - start
        self.reply(status, content, headers, fault)


CONTENT_FAULTS = ("cut", "flip", "long", "endless", "empty", "shifted")


def _flip(chunk, at):
    return chunk[:at] + bytes([chunk[at] ^ 1]) + chunk[at + 1 :] if 0 <= at < len(chunk) else chunk


class _Storage(_Handler):
    """The origin of the LFS files: knows signed URLs, and no tokens."""

    def route(self, path, token):
        if token is not None:
            raise _Refusal(400, "Only one auth mechanism allowed")
        if self.query.get("Signature") != self.hub.signature:
            raise _Refusal(403, "Access denied: the URL is not signed")
        sha256 = path.rpartition("/")[2]
        if self.command == "PUT":
            self.store(sha256)
        elif sha256 in self.hub.objects:
            self.reply_file(self.hub.objects[sha256], {"Content-Type": "binary/octet-stream"})
        else:
            raise _Refusal(404, "No such key")

    def store(self, sha256):
        fault = self.hub.take_fault(self.entry.line, "flip", "cut")
        target = Path(self.hub.folder.name) / secrets.token_hex(8)
        digest, position = hashlib.sha256(), 0
        with target.open("wb") as file:
            for chunk in self.body:
                if fault and fault.kind == "cut" and position + len(chunk) >= fault.at:
                    self.is_cut = True
                    return
                chunk = _flip(chunk, fault.at - position) if fault else chunk
                position += len(chunk)
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != sha256:
            raise _Refusal(400, "BadDigest: the content does not have the checksum it was announced with")
        self.hub.objects[sha256] = File(target.name, target, sha256)
        self.reply(200)


KIND, REPO, REVISION = "(?:models|datasets)", r"(?P<repo_id>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"


class _Api(_Handler):
    """The Hub itself."""

    ROUTES = {
        r"GET /api/whoami-v2": "whoami",
        r"POST /api/repos/create": "create_repo",
        r"POST /api/validate-yaml": "validate_yaml",
        rf"GET /api/{KIND}/{REPO}(?:/revision/{REVISION})?": "info",
        rf"GET /api/{KIND}/{REPO}/tree/{REVISION}(?:/(?P<path>.*))?": "tree",
        rf"POST /api/{KIND}/{REPO}/paths-info/{REVISION}": "paths_info",
        rf"POST /api/{KIND}/{REPO}/branch/{REVISION}": "create_branch",
        rf"POST /api/{KIND}/{REPO}/tag/{REVISION}": "create_tag",
        rf"POST /api/{KIND}/{REPO}/preupload/{REVISION}": "preupload",
        rf"POST /api/{KIND}/{REPO}/commit/{REVISION}": "create_commit",
        rf"POST /{REPO}\.git/info/lfs/objects/batch": "lfs_batch",
        rf"POST /{REPO}\.git/info/lfs/verify": "lfs_verify",
        rf"(?:GET|HEAD) /(?:datasets/)?{REPO}/resolve/{REVISION}/(?P<path>.+)": "resolve",
        rf"(?:GET|HEAD) /api/resolve-cache/{KIND}/{REPO}/{REVISION}/(?P<path>.+)": "resolve_cache",
    }

    def route(self, path, token):
        self.can_read, self.can_write = token in (self.hub.token, self.hub.read_token), token == self.hub.token
        if token is not None and not self.can_read:
            raise _Refusal(401, "Invalid credentials in Authorization header")
        for pattern, name in self.ROUTES.items():
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                groups = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                if (answer := getattr(self, name)(**groups)) is not None:
                    self.reply(200, answer)
                return
        raise _Refusal(404, f"This Hub has no {self.command} {path}")

    # Who may do what

    def readable(self, repo_id):
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self.can_read):
            # Without a token the Hub says 401, which the client takes for this code on https alone.
            raise _Refusal(404 if self.can_read else 401, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, repo_id):
        self.check_writes(repo_id.partition("/")[0])
        return self.readable(repo_id)

    def check_writes(self, owner):
        if not self.can_read:
            raise _Refusal(401, "Invalid username or password.")
        if not self.can_write or owner != OWNER:
            raise _Refusal(403, f"You don't have the rights to write under the namespace {owner!r}")

    def revision(self, repo, revision):
        sha = repo.resolve(revision)
        if sha is None:
            raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repo.commits[sha]

    # Reading

    def whoami(self):
        if not self.can_read:
            raise _Refusal(401, "Invalid username or password.")
        role = "write" if self.can_write else "read"
        return {"type": "user", "name": OWNER, "orgs": [], "auth": {"accessToken": {"role": role}}}

    def info(self, repo_id, revision="main"):
        repo = self.readable(repo_id)
        sha, files = self.revision(repo, revision)
        siblings = [{"rfilename": path} for path in files]
        if "blobs" in self.query:
            for entry, file in zip(siblings, files.values()):
                entry |= {"size": file.size, "blobId": file.oid}
                if file.sha256:
                    entry["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": 134}
        about = {"id": repo_id, "modelId": repo_id, "sha": sha, "lastModified": DATE, "tags": [], "siblings": siblings}
        return about | {"private": repo.private, "gated": repo.gated and "auto", "disabled": False}

    def tree(self, repo_id, revision, path=""):
        sha, files = self.revision(self.readable(repo_id), revision)
        prefix = f"{path}/" if path else ""
        inside = {name: file for name, file in files.items() if name.startswith(prefix)}
        if path and not inside:
            raise _Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound")
        folders = {
            parent.as_posix()
            for name in inside
            for parent in Path(name).parents
            if parent.as_posix() not in (".", path)
        }
        folders = {name for name in folders if name.startswith(prefix)}
        if self.query.get("recursive", "").lower() != "true":
            folders = {name for name in folders if "/" not in name.removeprefix(prefix)}
            inside = {name: file for name, file in inside.items() if "/" not in name.removeprefix(prefix)}
        return [_folder_entry(name) for name in sorted(folders)] + [_file_entry(*item) for item in inside.items()]

    def paths_info(self, repo_id, revision):
        sha, files = self.revision(self.readable(repo_id), revision)
        asked = parse_qs(b"".join(self.body).decode()).get("paths", [])
        is_folder = {path: any(name.startswith(f"{path}/") for name in files) for path in asked}
        return [
            _folder_entry(path) if is_folder[path] else _file_entry(path, files[path])
            for path in asked
            if is_folder[path] or path in files
        ]

    def resolve(self, repo_id, revision, path):
        sha, file = self.find(repo_id, revision, path)
        headers = {
            "X-Repo-Commit": sha,
            "X-Linked-ETag": f'"{file.etag}"',
            "X-Linked-Size": file.size,
            "ETag": f'"{file.etag}"',
            "Accept-Ranges": "bytes",
        }
        if file.sha256:
            signed = urlencode({"filename": path, "Signature": self.hub.signature})
            location = f"{self.hub.storage_url}/repos/{repo_id}/{file.sha256}?{signed}"
            self.reply(302, b"", headers | {"Location": location})
        else:
            location = f"/api/resolve-cache/models/{repo_id}/{sha}/{quote(path)}"
            self.reply(307, b"", headers | {"Location": location})

    def resolve_cache(self, repo_id, revision, path):
        sha, file = self.find(repo_id, revision, path)
        self.reply_file(file, {"X-Repo-Commit": sha, "Content-Type": "text/plain; charset=utf-8"})

    def find(self, repo_id, revision, path):
        repo = self.readable(repo_id)
        if repo.gated and not self.can_read:
            raise _Refusal(401, f"Access to model {repo_id} is restricted. Please log in.", "GatedRepo")
        sha, files = self.revision(repo, revision)
        if path not in files:
            refusal = _Refusal(404, "Entry not found", "EntryNotFound")
            refusal.headers["X-Repo-Commit"] = sha
            raise refusal
        return sha, files[path]

    # Writing

    def create_repo(self):
        asked = self.json()
        owner = asked.get("organization") or OWNER
        self.check_writes(owner)
        repo_id = f"{owner}/{asked['name']}"
        about = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        with self.hub.lock:
            if repo_id in self.hub.repos:
                self.reply(409, about | {"error": "You already created this model repo"})
                return None
            self.hub.add_repo(repo_id, {".gitattributes": GITATTRIBUTES}, asked.get("visibility") == "private")
        return about

    def validate_yaml(self):
        has_metadata = self.json()["content"].startswith("---")
        missing = {"message": "empty or missing yaml metadata in repo card"}
        return {"errors": [], "warnings": [] if has_metadata else [missing]}

    def create_branch(self, repo_id, revision):
        repo, asked = self.writable(repo_id), self.json()
        if revision in repo.branches:
            raise _Refusal(409, "Reference already exists")
        repo.branches[revision], _ = self.revision(repo, asked.get("startingPoint", "main"))
        return {"success": True}

    def create_tag(self, repo_id, revision):
        repo, asked = self.writable(repo_id), self.json()
        if asked["tag"] in repo.tags:
            raise _Refusal(409, "Tag reference exists already")
        repo.tags[asked["tag"]], _ = self.revision(repo, revision)
        return {"success": True}

    def preupload(self, repo_id, revision):
        asked = self.json()
        _, files = self.revision(self.writable(repo_id), revision)
        entries = [
            {
                "path": (path := file["path"]),
                "uploadMode": "lfs" if is_lfs(path, file["size"]) else "regular",
                "shouldIgnore": False,
                "oid": files[path].etag if path in files else None,
            }
            for file in asked["files"]
        ]
        return {"files": entries}

    def lfs_batch(self, repo_id):
        asked = self.json()
        self.writable(repo_id)
        objects = [{"oid": item["oid"], "size": item["size"]} for item in asked["objects"]]
        for item in objects:
            if item["oid"] not in self.hub.objects:
                signed = urlencode({"Signature": self.hub.signature})
                upload = {"href": f"{self.hub.storage_url}/repos/{repo_id}/{item['oid']}?{signed}"}
                item["actions"] = {
                    "upload": upload,
                    "verify": {"href": f"{self.hub.url}/{repo_id}.git/info/lfs/verify"},
                }
        return {"transfer": "basic", "objects": objects}

    def lfs_verify(self, repo_id):
        asked = self.json()
        self.writable(repo_id)
        stored = self.hub.objects.get(asked["oid"])
        if stored is None or stored.size != asked["size"]:
            raise _Refusal(404, "The object was not uploaded")
        return {"success": True}

    def create_commit(self, repo_id, revision):
        lines = [json.loads(line) for line in b"".join(self.body).splitlines() if line]
        repo = self.writable(repo_id)
        with self.hub.lock:
            if revision not in repo.branches:
                raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            sha, files = self.revision(repo, revision)
            files = dict(files)
            for key, value in ((line["key"], line["value"]) for line in lines):
                if key == "header":
                    if value.get("parentCommit", sha) != sha:
                        raise _Refusal(412, "A commit has happened since. Please refresh and try again.")
                elif key == "file":
                    files[value["path"]] = File(value["path"], base64.b64decode(value["content"]))
                elif key == "lfsFile":
                    if value["oid"] not in self.hub.objects:
                        raise _Refusal(400, f"LFS pointer of {value['path']} points to a file that does not exist")
                    files[value["path"]] = self.hub.objects[value["oid"]]
                elif files.pop(value["path"], None) is None:
                    raise _Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            sha = repo.add(files, revision)
        return {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}"}


def _folder_entry(path):
    return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}


def _file_entry(path, file):
    entry = {"type": "file", "path": path, "size": file.size, "oid": file.oid}
    return entry | ({"lfs": {"oid": file.sha256, "size": file.size, "pointerSize": 134}} if file.sha256 else {})
