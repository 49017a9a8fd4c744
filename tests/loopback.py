"""A Hugging Face Hub over real HTTP on this machine, for the real huggingface_hub client; with faults on demand.

    with LoopbackHub(mode="lfs") as hub:
        commit = hub.publish("someone/eraser", {"README.md": b"", "x.safetensors": data})
        hub.fail("GET .*/resolve/", reset_after=100)          # the next such request only; times=None for all of them
        subprocess.run([...], env={**os.environ, **hub.environment(tmp_path)})
        hub.adopt(monkeypatch, tmp_path)                       # or: this very process talks to it

`hub.requests` lists what was asked ("GET /api/models/..."), `hub.authorisations` what came with it as Authorization,
`hub.ranges` the parts of files that were asked for.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

Mode = Literal["regular", "lfs"]
NOWHERE = "http://127.0.0.1:9"
"""An endpoint at which nothing listens."""
LFS_SUFFIXES = (".safetensors", ".bin", ".png")


@dataclass(frozen=True)
class Stored:
    """One file of a commit; a large one has its sha256 as ETag and is served from another host, as on the real Hub."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


@dataclass
class Repository:
    """Commits by their hash, and what branches, tags and pull requests point at."""

    commits: dict[str, dict[str, Stored]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: dict[str, Stored], ref: str = "main", oid: str | None = None) -> str:
        listing = "".join(f"{path} {file.etag}\n" for path, file in sorted(files.items()))
        oid = oid or hashlib.sha1(f"{len(self.commits)} {listing}".encode()).hexdigest()
        self.commits[oid] = files
        self.refs[ref] = oid
        return oid

    def find(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)

    def tags(self) -> list[str]:
        """As the Hub makes them from the front matter of the card."""
        readme = self.commits[self.refs["main"]].get("README.md", Stored(b"", False)).content.decode()
        card = front_matter(readme)
        named = [str(card[key]) for key in ("library_name", "pipeline_tag") if key in card]
        based = card.get("base_model") or []
        for base in [based] if isinstance(based, str) else based:
            named += [f"base_model:{base}", f"base_model:{card.get('base_model_relation', 'finetune')}:{base}"]
        return [*named, *card.get("tags", []), f"license:{card.get('license', 'unknown')}", "region:us"]


@dataclass
class Fault:
    """What happens to requests that `pattern` matches, `times` times; see `LoopbackHub.fail`."""

    pattern: re.Pattern[str]
    times: int | None
    skip: int
    status: int | None
    code: str | None
    headers: Mapping[str, str]
    reset_after: int | None
    short_by: int
    corrupt: bool
    seconds_per_kb: float


def adopt_endpoint(endpoint: str, patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let this process use the Hub at `endpoint`: set what the client read at import, and its cache."""
    from huggingface_hub import constants, hf_api

    patch.setattr(constants, "ENDPOINT", endpoint)
    patch.setattr(hf_api.api, "endpoint", endpoint)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(folder / "hf" / "hub"))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setenv("XDG_DATA_HOME", str(folder / "data"))
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "SPMHUB_REGISTRY", "SPMHUB_OWNER"):
        patch.delenv(variable, raising=False)


class LoopbackHub:
    """The server; a context manager. `mode` says how large files are uploaded, `token` whose writes are let in."""

    def __init__(self, mode: Mode = "regular", token: str | None = None) -> None:
        self.mode, self.token = mode, token
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.authorisations: list[tuple[str, str | None]] = []
        self.ranges: list[str] = []
        self.page = 1000
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, folder: Path, **more: str) -> dict[str, str]:
        """Variables with which another process uses this Hub, and a home of its own under `folder`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "XDG_DATA_HOME": str(folder / "data"),
            "XDG_CACHE_HOME": str(folder / "cache"),
            **more,
        }

    def adopt(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        """Let this process use this Hub, and a cache of its own under `folder`."""
        adopt_endpoint(self.endpoint, patch, folder)

    def publish(
        self, repo: str, files: Mapping[str, bytes], *, ref: str = "main", commit: str | None = None, **about: bool
    ) -> str:
        """Put a commit with exactly `files` on `ref` of `repo`, under the hash `commit` if one is given; its hash.

        about: `private=True`, `gated=True`.
        """
        place = self.repositories.setdefault(repo, Repository())
        place.private, place.gated = about.get("private", place.private), about.get("gated", place.gated)
        return place.commit({path: self._stored(path, content) for path, content in files.items()}, ref, commit)

    def content(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        place = self.repositories[repo]
        return {path: file.content for path, file in place.commits[place.find(revision) or ""].items()}

    def fail(
        self,
        pattern: str,
        *,
        times: int | None = 1,
        skip: int = 0,
        status: int | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        reset_after: int | None = None,
        short_by: int = 0,
        corrupt: bool = False,
        seconds_per_kb: float = 0.0,
    ) -> None:
        """Break the next `times` requests (None: all) whose "METHOD /path" `pattern` matches, after `skip` good ones.

        status, code, headers: answer that, `code` as X-Error-Code (RepoNotFound, GatedRepo ...), without looking.
        reset_after: reset the connection after so many bytes of the body.
        short_by: announce the body shorter by so many bytes than it should be (negative: longer, and hang up).
        corrupt: flip one bit in the middle of the body.  seconds_per_kb: send slowly.
        """
        self._faults.append(
            Fault(
                re.compile(pattern),
                times,
                skip,
                status,
                code,
                headers or {},
                reset_after,
                short_by,
                corrupt,
                seconds_per_kb,
            )
        )

    def mend(self) -> None:
        """No more faults."""
        self._faults.clear()

    def fault_for(self, request: str) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.times == 0 or not fault.pattern.search(request):
                    continue
                if fault.skip:
                    fault.skip -= 1
                    continue
                if fault.times is not None:
                    fault.times -= 1
                return fault
        return None

    def _stored(self, path: str, content: bytes) -> Stored:
        large = self.mode == "lfs" and path.endswith(LFS_SUFFIXES)
        file = Stored(content, large)
        if large:
            self.large[file.sha256] = content
        return file


class _Handler(BaseHTTPRequestHandler):
    """One request: the fault that is due, or the route whose pattern matches."""

    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    # Head and body leave in two pieces: the second would wait 40 ms for the client to acknowledge the first.
    disable_nagle_algorithm = True
    fault: Fault | None = None

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._chunks()
        line = f"{self.command} {unquote(address.path)}"
        self.hub.requests.append(line)
        self.hub.authorisations.append((line, self.headers.get("Authorization")))
        self.hub.ranges += [asked for asked in [self.headers.get("Range")] if asked]
        self.fault = self.hub.fault_for(line)
        if self.fault is not None and self.fault.status is not None:
            self.answer(self.fault.status, {"error": "fault"}, code=self.fault.code, headers=self.fault.headers)
            return
        for pattern, route in ROUTES:
            # The path is matched as it was sent, so that a slash within a revision stays one of its own.
            if match := re.fullmatch(pattern, f"{self.command.replace('HEAD', 'GET')} {address.path}"):
                route(self, *map(unquote, match.groups()))
                return
        self.answer(404, {"error": f"no such route: {line}"})

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815 - the names that http.server looks for

    def answer(
        self, status: int, body: object, *, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {"X-Error-Code": code, **(headers or {})}
        fault = self.fault
        if fault is not None and fault.corrupt and content:
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        announced = len(content) - (fault.short_by if fault else 0)
        self.send_response(status)
        for key, value in {"Content-Length": str(announced), **given}.items():
            if value is not None:
                self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            self._send(content[:announced], fault)
        except OSError:
            self.close_connection = True
        if announced != len(content):
            self.close_connection = True

    def _send(self, content: bytes, fault: Fault | None) -> None:
        if fault is not None and fault.reset_after is not None:
            self.wfile.write(content[: fault.reset_after])
            self.wfile.flush()
            # Lingering for 0 seconds makes the close a reset.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        elif fault is not None and fault.seconds_per_kb:
            for start in range(0, len(content), 1024):
                self.wfile.write(content[start : start + 1024])
                self.wfile.flush()
                time.sleep(fault.seconds_per_kb)
        else:
            self.wfile.write(content)

    def _chunks(self) -> bytes:
        whole = b""
        while size := int(self.rfile.readline(), 16):
            whole += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return whole

    def repository(self, repo: str, *, write: bool = False) -> Repository | None:
        """The repository, if there is one and whoever asks may; otherwise the refusal is sent."""
        found = self.hub.repositories.get(repo)
        known = self.hub.token is not None and self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if found is None or (found.private and not known):
            self.answer(404 if known else 401, {"error": "Repository not found"}, code="RepoNotFound")
        elif found.gated and not known:
            self.answer(401, {"error": "Access to this model is restricted"}, code="GatedRepo")
        elif write and self.hub.token is not None and not known:
            self.answer(401, {"error": "Invalid username or password."})
        else:
            return found
        return None

    def revision(self, repo: str, revision: str) -> tuple[str, dict[str, Stored]] | None:
        place = self.repository(repo)
        if place is None:
            return None
        oid = place.find(revision)
        if oid is None:
            self.answer(404, {"error": f"Invalid rev id: {revision}"}, code="RevisionNotFound")
            return None
        return oid, place.commits[oid]

    # Routes, in the order of ROUTES.

    def whoami(self) -> None:
        self.answer(200, {"name": "someone", "type": "user", "orgs": []})

    def validate_yaml(self) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def create(self) -> None:
        asked = json.loads(self.body)
        repo = f"{asked.get('organization') or 'someone'}/{asked['name']}"
        if self.hub.token is not None and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self.answer(401, {"error": "Invalid username or password."})
            return
        url = {"url": f"{self.hub.endpoint}/{repo}", "name": repo, "id": repo}
        if repo in self.hub.repositories:
            self.answer(409, {**url, "error": "You already created this model repo"})
            return
        made = self.hub.repositories[repo] = Repository()
        made.private = asked.get("private") is True or asked.get("visibility") == "private"
        made.commit({".gitattributes": Stored(b"*.safetensors filter=lfs\n", False)})
        self.answer(200, url)

    def delete(self) -> None:
        asked = json.loads(self.body)
        self.hub.repositories.pop(f"{asked.get('organization') or 'someone'}/{asked['name']}", None)
        self.answer(200, {})

    def models(self) -> None:
        wanted, author = set(self.query.get("filter", [])), self.query.get("author", [""])[0]
        text, start = self.query.get("search", [""])[0].lower(), int(self.query.get("cursor", ["0"])[0])
        found = [
            {"id": repo, "modelId": repo, "sha": place.refs["main"], "tags": place.tags(), "private": False,
             "downloads": 0, "likes": 0, "lastModified": "2026-01-01T00:00:00.000Z", "cardData": card(place)}
            for repo, place in sorted(self.hub.repositories.items())
            if not place.private and wanted <= set(place.tags()) and text in repo.lower()
            and repo.startswith(f"{author}/" if author else "")
        ]  # fmt: skip
        size = min(self.hub.page, int(self.query.get("limit", [self.hub.page])[0]))
        link = {}
        if start + size < len(found):
            others = "&".join(f"{key}={value}" for key in self.query if key != "cursor" for value in self.query[key])
            link["Link"] = f'<{self.hub.endpoint}/api/models?{others}&cursor={start + size}>; rel="next"'
        self.answer(200, found[start : start + size], headers=link)

    def info(self, repo: str, revision: str = "main") -> None:
        if (at := self.revision(repo, revision)) is None:
            return
        oid, files = at
        place = self.hub.repositories[repo]
        siblings = []
        for path, file in files.items():
            row: dict[str, Any] = {"rfilename": path}
            if "blobs" in self.query:
                row |= {"size": len(file.content), "blobId": file.git_oid}
                if file.lfs:
                    row["lfs"] = {"sha256": file.sha256, "size": len(file.content), "pointerSize": 134}
            siblings.append(row)
        self.answer(
            200,
            {"id": repo, "modelId": repo, "sha": oid, "siblings": siblings, "private": place.private,
             "gated": "manual" if place.gated else False, "tags": place.tags(), "cardData": card(place),
             "lastModified": "2026-01-01T00:00:00.000Z"},
        )  # fmt: skip

    def tree(self, repo: str, revision: str, folder: str = "") -> None:
        if (at := self.revision(repo, revision)) is None:
            return
        rows = []
        for path, file in at[1].items():
            row: dict[str, Any] = {"type": "file", "path": path, "size": len(file.content), "oid": file.git_oid}
            if file.lfs:
                row["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 134}
            if path.startswith(folder):
                rows.append(row)
        self.answer(200, rows)

    def references(self, repo: str) -> None:
        if place := self.repository(repo):
            heads = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in place.refs.items()
            ]
            self.answer(200, {"branches": heads, "tags": [], "converts": []})

    def branch(self, repo: str, name: str) -> None:
        if place := self.repository(repo, write=True):
            asked = json.loads(self.body or b"{}")
            if name in place.refs:
                self.answer(409, {"error": "Reference already exists"})
                return
            place.refs[name] = place.find(asked.get("startingPoint", "main")) or ""
            self.answer(200, {})

    def resolve(self, repo: str, revision: str, path: str) -> None:
        if (at := self.revision(repo, revision)) is None:
            return
        oid, files = at
        if path not in files:
            self.answer(404, {"error": "Entry not found"}, code="EntryNotFound", headers={"X-Repo-Commit": oid})
            return
        file = files[path]
        headers = {"X-Repo-Commit": oid, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if file.lfs:
            # localhost and 127.0.0.1 are different hosts to the client, as the Hub and its storage are.
            headers |= {"X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
            headers["Location"] = f"http://localhost:{self.hub.port}/storage/{file.sha256}"
            self.answer(302, b"", headers=headers)
        else:
            self._ranged(file.content, headers)

    def storage(self, sha256: str) -> None:
        self._ranged(self.hub.large[sha256], {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"})

    def _ranged(self, content: bytes, headers: dict[str, str]) -> None:
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if match is None:
            self.answer(200, content, headers=headers)
        elif int(match[1]) >= len(content):
            self.answer(416, b"", headers={"Content-Range": f"bytes */{len(content)}"})
        else:
            start = int(match[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.answer(206, content[start:], headers=headers)

    def preupload(self, repo: str, _revision: str) -> None:
        if self.repository(repo, write=True):
            asked = json.loads(self.body)["files"]
            large = self.hub.mode == "lfs"
            self.answer(
                200,
                {"files": [
                    {"path": one["path"], "shouldIgnore": False,
                     "uploadMode": "lfs" if large and one["path"].endswith(LFS_SUFFIXES) else "regular"}
                    for one in asked
                ]},
            )  # fmt: skip

    def batch(self, repo: str) -> None:
        if self.repository(repo, write=True):
            objects = []
            for one in json.loads(self.body)["objects"]:
                missing = one["oid"] not in self.hub.large
                upload = {"upload": {"href": f"http://localhost:{self.hub.port}/storage/{one['oid']}", "header": {}}}
                objects.append({**one, **({"actions": upload} if missing else {})})
            self.answer(200, {"transfer": "basic", "objects": objects})

    def store(self, sha256: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != sha256:
            self.answer(400, {"error": "content does not match its oid"})
            return
        self.hub.large[sha256] = self.body
        self.answer(200, {})

    def commit(self, repo: str, revision: str) -> None:
        place = self.repository(repo, write=True)
        if place is None:
            return
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        head = place.find(revision)
        if head is None:
            self.answer(404, {"error": f"Invalid rev id: {revision}"}, code="RevisionNotFound")
            return
        parent = lines[0]["value"].get("parentCommit")
        if parent is not None and parent != head:
            self.answer(412, {"error": "A commit has happened since. Please refresh and try again."})
            return
        files = dict(place.commits[head])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Stored(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                files[value["path"]] = Stored(self.hub.large[value["oid"]], True)
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        ref = revision
        if "create_pr" in self.query:
            ref = f"refs/pr/{sum(name.startswith('refs/pr/') for name in place.refs) + 1}"
        oid = place.commit(files, ref)
        made = {"commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{oid}"}
        if ref != revision:
            made["pullRequestUrl"] = f"{self.hub.endpoint}/{repo}/discussions/{ref.rpartition('/')[2]}"
        self.answer(200, {"success": True, **made})

    def log_message(self, *_: object) -> None:
        pass


def front_matter(readme: str) -> dict[str, Any]:
    """The YAML between the first two lines of dashes of a card."""
    match = re.match(r"---\n(.*?)\n---\n", readme, re.DOTALL)
    return yaml.safe_load(match[1]) if match else {}


def card(place: Repository) -> dict[str, Any]:
    return front_matter(place.commits[place.refs["main"]].get("README.md", Stored(b"", False)).content.decode())


_REPO = r"([^/]+/[^/]+)"
ROUTES = (
    (r"GET /api/whoami-v2", _Handler.whoami),
    (r"POST /api/validate-yaml", _Handler.validate_yaml),
    (r"POST /api/repos/create", _Handler.create),
    (r"DELETE /api/repos/delete", _Handler.delete),
    (r"GET /api/models", _Handler.models),
    (rf"GET /api/models/{_REPO}", _Handler.info),
    (rf"GET /api/models/{_REPO}/revision/([^/]+)", _Handler.info),
    (rf"GET /api/models/{_REPO}/tree/([^/]+)", _Handler.tree),
    (rf"GET /api/models/{_REPO}/tree/([^/]+)/(.+)", _Handler.tree),
    (rf"GET /api/models/{_REPO}/refs", _Handler.references),
    (rf"POST /api/models/{_REPO}/branch/([^/]+)", _Handler.branch),
    (rf"POST /api/models/{_REPO}/preupload/([^/]+)", _Handler.preupload),
    (rf"POST /api/models/{_REPO}/commit/([^/]+)", _Handler.commit),
    (rf"GET /{_REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"GET /storage/([0-9a-f]{64})", _Handler.storage),
    (r"PUT /storage/([0-9a-f]{64})", _Handler.store),
)
