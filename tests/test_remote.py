"""Adapters from the Hub, over a loopback server that answers what huggingface_hub asks for one repository."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from test_adapter import snoopy

from spm_hub.hub.registry import MANIFEST_NAME, WEIGHTS_NAME

COMMIT = "c" * 40
SCRIPT = """
import sys
from spm_hub.errors import SpmHubError
from spm_hub.hub.registry import resolve
try:
    entry = resolve(sys.argv[1])
    print(entry.name, entry.manifest_path is not None, entry.load().name)
except SpmHubError as error:
    print(type(error).__name__, error)
"""


class Hub:
    """A Hub with the repositories in `repos`: name -> file name -> content; `requests` lists what was asked."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_GET  # noqa: N815 - the name that http.server looks for

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        parts = request.path.partition("?")[0].strip("/").split("/")
        is_info = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if is_info else parts[:2])
        revision = parts[parts.index("revision") + 1] if is_info and "revision" in parts else "main"
        # Only what is asked of a repository: the client may also ask the Hub about itself.
        self.requests += [request.path] * (repo in self.repos)
        if repo not in self.repos:
            self.send(request, 404, b"", {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", COMMIT):
            self.send(request, 404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif is_info and "tree" in parts:
            files = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.repos[repo].items()
            ]
            self.send(request, 200, json.dumps(files).encode(), {})
        elif is_info:
            files = [{"rfilename": name} for name in self.repos[repo]]
            self.send(request, 200, json.dumps({"id": repo, "sha": COMMIT, "siblings": files}).encode(), {})
        else:
            content = self.repos[repo]["/".join(parts[4:])]
            tag = hashlib.sha256(content).hexdigest()
            self.send(request, 200, content, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})

    def send(self, request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
        request.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    snoopy().save(tmp_path / "a.safetensors", tmp_path / "a.json")
    weights, manifest = (tmp_path / "a.safetensors").read_bytes(), (tmp_path / "a.json").read_bytes()
    served = Hub()
    served.repos = {
        "someone/whole": {WEIGHTS_NAME: weights, MANIFEST_NAME: manifest, "README.md": b""},
        "someone/other-name": {"snoopy.safetensors": weights},
        "someone/several": {"a.safetensors": weights, "b.safetensors": weights},
        "someone/pickle": {"pytorch_lora_weights.bin": b""},
    }
    yield served
    served.server.shutdown()
    served.server.server_close()


def resolved(reference: str, hub: Hub, folder: Path, **env: str) -> str:
    host, port = hub.server.server_address[:2]
    # A process of its own, as the client reads its endpoint and its cache when it is imported.
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, reference],
        cwd=Path(__file__).resolve().parents[1],
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "0",
            "HF_ENDPOINT": f"http://{host!s}:{port}",
            "HF_HOME": str(folder / "hf"),
            **env,
        },
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_a_repository_with_its_manifest_and_then_from_the_cache(hub: Hub, tmp_path: Path) -> None:
    assert resolved("someone/whole", hub, tmp_path) == "someone/whole True snoopy"
    asked = list(hub.requests)
    assert resolved(f"someone/whole@{COMMIT}", hub, tmp_path) == "someone/whole True snoopy"
    assert hub.requests == asked
    assert resolved("someone/whole", hub, tmp_path, HF_HUB_OFFLINE="1") == "someone/whole True snoopy"
    assert resolved("someone/whole", hub, tmp_path, HF_ENDPOINT="http://127.0.0.1:9") == "someone/whole True snoopy"


def test_an_altered_file_is_found(hub: Hub, tmp_path: Path) -> None:
    weights = bytearray(hub.repos["someone/whole"][WEIGHTS_NAME])
    weights[-1] ^= 1
    hub.repos["someone/whole"][WEIGHTS_NAME] = bytes(weights)
    assert resolved("someone/whole", hub, tmp_path).startswith("AdapterFileError")


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("someone/other-name", "someone/other-name False snoopy"),
        ("someone/several", "UsageError someone/several holds no pytorch_lora_weights.safetensors but several others"),
        ("someone/pickle", "NotFoundError someone/pickle holds no safetensors file"),
        ("someone/nothing", "NotFoundError there is no someone/nothing on the Hub"),
        ("someone/whole@v9", "NotFoundError someone/whole has no revision 'v9'"),
    ],
)
def test_what_a_reference_can_meet(reference: str, answer: str, hub: Hub, tmp_path: Path) -> None:
    assert resolved(reference, hub, tmp_path).startswith(answer)


@pytest.mark.parametrize("env", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_no_network_and_nothing_cached(env: dict[str, str], hub: Hub, tmp_path: Path) -> None:
    answer = resolved("someone/whole", hub, tmp_path, **env)
    assert answer.startswith("NetworkError someone/whole is not in the cache and the Hub cannot be reached")
    assert "hf download someone/whole" in answer
