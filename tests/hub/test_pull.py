"""Adapters from the Hub: downloads, pulls, bare names, and the state after a failure."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loopback import NOWHERE, LoopbackHub
from safetensors.torch import save_file

import spm_hub
from spm_hub.adapters.adapter import Adapter, increment_info
from spm_hub.adapters.increments import Increment, LowRank
from spm_hub.adapters.manifest import MAX_BYTES, Base, Concept, Manifest
from spm_hub.errors import (
    AdapterFileError,
    HubError,
    ManifestError,
    NetworkError,
    SpmHubError,
    UsageError,
)
from spm_hub.hub import pull as hub_pull
from spm_hub.hub.resolve import resolve
from spm_hub.io import hub_client as network
from spm_hub.registry import lockfile
from spm_hub.registry.entry import MANIFEST_NAME, WEIGHTS_NAME
from spm_hub.registry.registry import Registry

ROOT = Path(__file__).resolve().parents[2]
REPO = "someone/whole"
COMMIT = "c" * 40


def eraser(seed: int = 0, name: str = "snoopy") -> Adapter:
    """Large enough to be broken off in the middle."""
    random = torch.Generator().manual_seed(seed)
    increments: dict[str, Increment] = {
        "mid_block.attentions.0.proj_in": LowRank(
            torch.randn(2, 4096, generator=random), torch.randn(4096, 2, generator=random)
        )
    }
    manifest = Manifest(
        name=name,
        concept=Concept(target=name),
        increment=increment_info(increments),
        base=Base(family="sd1", id="sketchbook", fingerprint="0" * 64),
        recipe={"method": "spm"},
    )
    return Adapter(manifest, increments)


def repository(folder: Path, adapter: Adapter | None = None) -> dict[str, bytes]:
    """The files of an adapter's repository."""
    (adapter or eraser()).save(folder / WEIGHTS_NAME, folder / MANIFEST_NAME)
    return {name: (folder / name).read_bytes() for name in (WEIGHTS_NAME, MANIFEST_NAME)} | {"README.md": b"# hello\n"}


@pytest.fixture(params=["regular", "lfs"])
def hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub(request.param) as served:
        served.adopt(monkeypatch, tmp_path)
        monkeypatch.setattr(network, "_FIRST_PAUSE", 0.01)
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        served.publish(REPO, repository(tmp_path / "made"), commit=COMMIT)
        yield served


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def cached(tmp_path: Path) -> list[str]:
    """The bytes that the Hub's cache holds, by file name; an incomplete download has its own ending."""
    return sorted(path.name for path in (tmp_path / "hf").rglob("blobs/*"))


def offline(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()


def test_downloaded_once_and_then_from_the_cache(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = resolve(REPO)
    assert (entry.name, entry.fetched, entry.load().name) == (REPO, True, "snoopy")
    assert entry.manifest_path is not None
    hub.requests.clear()
    assert not resolve(f"{REPO}@{COMMIT}").fetched
    assert hub.requests == []
    again = resolve(REPO)
    assert (again.adapter_path, again.fetched) == (entry.adapter_path, False)
    assert hub.requests == [f"GET /api/models/{REPO}"]
    offline(hub, monkeypatch)
    assert resolve(REPO).adapter_path == entry.adapter_path
    assert hub.requests == []


def test_a_hub_that_is_away(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(REPO)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", NOWHERE)
    assert resolve(REPO).load().name == "snoopy"
    with pytest.raises(NetworkError, match="someone/other is not in the cache and the Hub cannot be reached"):
        resolve("someone/other")


def test_which_repositories_are_refused(hub: LoopbackHub, tmp_path: Path) -> None:
    files = repository(tmp_path / "made")
    hub.publish("someone/other-name", {"snoopy.safetensors": files[WEIGHTS_NAME]})
    hub.publish("someone/several", {"a.safetensors": b"", "b.safetensors": b""})
    hub.publish("someone/pickle", {"pytorch_lora_weights.bin": b""})
    assert resolve("someone/other-name").load().name == "snoopy"
    for repo, message in {
        "someone/several": "has no pytorch_lora_weights.safetensors but several other",
        "someone/pickle": "has no safetensors file",
        "someone/nothing": "there is no someone/nothing on the Hub",
        f"{REPO}@v9": "no revision 'v9'",
    }.items():
        with pytest.raises(SpmHubError, match=message):
            resolve(repo)


def test_a_pulled_eraser_is_pinned_and_used_without_the_hub(
    hub: LoopbackHub, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pulled = hub_pull.pull(REPO, registry=registry)
    assert (pulled.state, pulled.entry.name) == ("new", "snoopy")
    assert pulled.entry.adapter_path.read_bytes() == hub.content(REPO)[WEIGHTS_NAME]
    origin = pulled.entry.read_manifest().origin
    assert origin is not None
    assert (origin.repo, origin.commit, origin.revision) == (REPO, COMMIT, None)
    pin = lockfile.read(registry.root)["snoopy"]
    assert (pin.repo, pin.commit) == (REPO, COMMIT)
    assert hub_pull.pull(REPO, registry=registry).state == "unchanged"

    offline(hub, monkeypatch)
    assert hub_pull.pull(REPO, registry=registry).state == "unchanged"
    # What was pulled is found by its repository's name, too.
    assert resolve(REPO, registry.root).adapter_path == pulled.entry.adapter_path
    assert resolve(f"{REPO}@{COMMIT}", registry.root).adapter_path == pulled.entry.adapter_path
    # The lock file alone brings it back; removing it on purpose does not.
    pulled.entry.adapter_path.unlink()
    assert [one.entry.name for one in hub_pull.restore(registry)] == ["snoopy"]
    assert registry.get("snoopy").load().name == "snoopy"
    assert lockfile.read(registry.root)["snoopy"] == pin
    with pytest.raises(HubError, match=r"does not match spmhub-lock\.json"):
        hub_pull.pull(REPO, registry=registry, name="x", pin=pin.model_copy(update={"sha256": "0" * 64}))
    registry.remove("snoopy")
    assert list(hub_pull.restore(registry)) == []
    assert hub.requests == []


def test_a_newer_commit(hub: LoopbackHub, registry: Registry, tmp_path: Path) -> None:
    hub_pull.pull(REPO, registry=registry)
    hub_pull.pull(REPO, COMMIT, registry=registry, name="kept")
    assert [(age.name, age.state) for age in hub_pull.ages(registry)] == [("kept", "pinned"), ("snoopy", "current")]
    newer = hub.publish(REPO, repository(tmp_path / "new", eraser(seed=7)))
    assert [(age.name, age.state) for age in hub_pull.ages(registry)] == [("kept", "pinned"), ("snoopy", "outdated")]
    assert resolve(REPO, registry.root).read_manifest().origin.commit == COMMIT  # type: ignore[union-attr]
    pulled = hub_pull.pull(REPO, registry=registry)
    assert (pulled.state, pulled.origin.commit) == ("updated", newer)
    assert pulled.entry.adapter_path.read_bytes() == hub.content(REPO)[WEIGHTS_NAME]
    assert registry.get("kept").read_manifest().origin.commit == COMMIT  # type: ignore[union-attr]
    del hub.repositories[REPO]
    ages = {age.name: age for age in hub_pull.ages(registry)}
    assert ages["snoopy"].state == "unknown"
    assert "there is no someone/whole" in str(ages["snoopy"].remark)


@pytest.mark.parametrize("cached", [True, False])
def test_the_lock_file_brings_back_its_own_commit_and_not_the_newest(
    cached: bool, hub: LoopbackHub, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_pull.pull(REPO, registry=registry)
    first, pin = hub.content(REPO)[WEIGHTS_NAME], lockfile.read(registry.root)["snoopy"]
    newer = hub.publish(REPO, repository(tmp_path / "new", eraser(seed=7)))
    assert (newer, hub.content(REPO)[WEIGHTS_NAME]) != (COMMIT, first)
    registry.get("snoopy").adapter_path.unlink()
    if not cached:
        hub.adopt(monkeypatch, tmp_path / "another machine")
    assert [one.origin.commit for one in hub_pull.restore(registry)] == [COMMIT]
    kept = registry.get("snoopy")
    assert hashlib.sha256(kept.adapter_path.read_bytes()).hexdigest() == pin.sha256 == hashlib.sha256(first).hexdigest()
    assert kept.pin == pin
    assert lockfile.read(registry.root) == {"snoopy": pin}


def test_a_file_that_names_no_concept_keeps_the_one_it_was_given(
    hub: LoopbackHub, registry: Registry, tmp_path: Path
) -> None:
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    for version in (1, 2):
        factors = {"lora_down.weight": torch.full((1, 768), float(version)), "lora_up.weight": torch.ones(320, 1)}
        save_file({f"{module}.{part}": one for part, one in factors.items()}, tmp_path / f"{version}.safetensors")
    first, second = ((tmp_path / f"{version}.safetensors").read_bytes() for version in (1, 2))
    hub.publish("someone/step-10", {"lora.safetensors": first})

    def concept() -> str | None:
        return registry.get("lora").load().manifest.concept.target

    pulled = hub_pull.pull("someone/step-10", registry=registry)
    assert (pulled.entry.name, pulled.state, concept()) == ("lora", "new", None)
    named = spm_hub.pull("someone/step-10", registry=registry.root, concept="a dog")
    assert named.manifest.concept.target == concept() == "a dog"
    assert hub_pull.pull("someone/step-10", registry=registry).state == "unchanged"
    hub.publish("someone/step-10", {"lora.safetensors": second}, commit="d" * 40)
    assert hub_pull.pull("someone/step-10", registry=registry).state == "updated"
    assert concept() == "a dog"


def test_what_is_published_with_a_concept_is_pulled_with_that_one(hub: LoopbackHub, registry: Registry) -> None:
    with pytest.raises(UsageError, match="says that it erases snoopy, and --concept says a dog") as caught:
        hub_pull.pull(REPO, registry=registry, concept="a dog")
    assert "spmhub convert snoopy --concept 'a dog'" in str(caught.value)
    assert registry.entries() == ()
    assert hub_pull.pull(REPO, registry=registry, concept="snoopy").state == "new"


def test_an_eraser_of_that_name_from_elsewhere_is_not_replaced(hub: LoopbackHub, registry: Registry) -> None:
    registry.add(eraser(seed=3))
    before = registry.get("snoopy").adapter_path.read_bytes()
    with pytest.raises(SpmHubError, match="already has an eraser named 'snoopy'"):
        hub_pull.pull(REPO, registry=registry)
    assert registry.get("snoopy").adapter_path.read_bytes() == before
    assert hub_pull.pull(REPO, registry=registry, name="other").entry.load().name == "other"
    assert hub_pull.pull(REPO, registry=registry, replace=True).state == "updated"
    # One that is trained here after all is no longer pinned.
    registry.add(eraser(seed=3), replace=True)
    assert set(lockfile.read(registry.root)) == {"other"}


FAULTS: dict[str, tuple[dict[str, Any], str | None]] = {
    "401": ({"status": 401}, "asks for a login to"),
    "gated": ({"status": 403, "code": "GatedRepo"}, "accept their terms"),
    "403": ({"status": 403}, "does not let you"),
    "repository gone": ({"status": 404, "code": "RepoNotFound"}, "there is no someone/whole"),
    "revision gone": ({"status": 404, "code": "RevisionNotFound"}, "no revision"),
    "file gone": ({"status": 404, "code": "EntryNotFound"}, "has no file|there is no|404"),
    "429 once": ({"status": 429, "headers": {"Retry-After": "0"}, "times": 1}, None),
    "429 for an hour": ({"status": 429, "headers": {"Retry-After": "3600"}}, "run it again in 3600 seconds"),
    "500 once": ({"status": 500, "times": 1}, None),
    "503 twice": ({"status": 503, "times": 2}, None),
    "503 for good": ({"status": 503}, "503"),
    "slow": ({"seconds_per_kb": 0.002}, None),
}
BODY_FAULTS: dict[str, tuple[dict[str, Any], str | None]] = {
    "reset once": ({"reset_after": 500, "times": 1}, None),
    "reset at every 20 kB": ({"reset_after": 20_000}, None),
    "reset at once, always": ({"reset_after": 0}, "cannot be reached"),
    "short once": ({"short_by": 7, "times": 1}, None),
    "short for good": ({"short_by": 7}, "bytes were announced, then|bad Content-Length"),
    "longer than announced": ({"short_by": -7, "times": 1}, None),
    "corrupt once": ({"corrupt": True, "times": 1}, None),
    "corrupt for good": ({"corrupt": True}, "altered on the way"),
}
HEAD_FAULTS: dict[str, tuple[dict[str, Any], str | None]] = {
    "announced too short, once": ({"short_by": 7, "times": 1}, None),
    "announced too long, once": ({"short_by": -7, "times": 1}, None),
}
PLACES = {"asking": "GET /api/models/", "a file's head": "HEAD .*/resolve/"}
CASES = [(where, pattern, fault) for where, pattern in PLACES.items() for fault in FAULTS] + [
    (name, rf"GET /(someone/whole/resolve/\w+/{re.escape(name)}|storage/)", fault)
    for name in (WEIGHTS_NAME, MANIFEST_NAME)
    for fault in (*FAULTS, *BODY_FAULTS)
]
CASES += [("a file's head", rf"HEAD .*/resolve/\w+/{re.escape(WEIGHTS_NAME)}", fault) for fault in HEAD_FAULTS]


@pytest.mark.slow
@pytest.mark.parametrize(("where", "pattern", "fault"), CASES, ids=[f"{case[0]}: {case[2]}" for case in CASES])
def test_every_fault_ends_well_or_in_one_clear_error(
    where: str, pattern: str, fault: str, hub: LoopbackHub, registry: Registry, tmp_path: Path
) -> None:
    given, message = {**FAULTS, **BODY_FAULTS, **HEAD_FAULTS}[fault]
    hub.fail(pattern, **{"times": None, **given})
    if message is None:
        assert hub_pull.pull(REPO, registry=registry).entry.load().name == "snoopy"
    else:
        with pytest.raises(SpmHubError, match=message) as caught:
            hub_pull.pull(REPO, registry=registry)
        assert caught.value.exit_code == 1
        assert registry.entries() == ()
        assert lockfile.read(registry.root) == {}
    # Nothing but whole files, and at most what the next attempt goes on from; which then succeeds.
    hub.mend()
    assert hub_pull.pull(REPO, registry=registry).entry.load().name == "snoopy"
    assert not [name for name in cached(tmp_path) if name.endswith("incomplete")]
    assert [entry.name for entry in registry.entries()] == ["snoopy"]


@pytest.mark.parametrize("hub", ["regular"], indirect=True)
@pytest.mark.parametrize("short_by", [7, -7])
def test_a_size_that_stays_wrong(short_by: int, hub: LoopbackHub, registry: Registry, tmp_path: Path) -> None:
    hub.fail(f"HEAD .*/{WEIGHTS_NAME}", short_by=short_by, times=None)
    with pytest.raises(HubError, match=r"bytes were announced, then \d+|more than the limit of \d+"):
        hub_pull.pull(REPO, registry=registry)
    assert registry.entries() == ()
    assert not [name for name in cached(tmp_path) if name.endswith("incomplete")]


PASSING = ("429 once", "500 once", "reset once", "short once", "longer than announced", "corrupt once")


@pytest.mark.slow
@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_at_any_request_of_a_pull(fault: str, hub: LoopbackHub, tmp_path: Path) -> None:
    """The first request, the second, ...: none of them is one that a pull does not survive."""
    given, _ = {**FAULTS, **BODY_FAULTS}[fault]
    at = 0
    while True:
        for folder in ("hf", "registry"):
            shutil.rmtree(tmp_path / folder, ignore_errors=True)
        hub.requests.clear()
        hub.fail(".", **{**given, "times": 1, "skip": at})
        registry = Registry(tmp_path / "registry")
        assert hub_pull.pull(REPO, registry=registry).entry.load().name == "snoopy", f"at request {at}"
        assert not [name for name in cached(tmp_path) if name.endswith("incomplete")]
        hub.mend()
        if at >= len(hub.requests):
            break
        at += 1
    assert at >= 5


def test_a_file_that_is_not_the_manifests(hub: LoopbackHub, registry: Registry, tmp_path: Path) -> None:
    files = repository(tmp_path / "made")
    other = repository(tmp_path / "other", eraser(seed=9))
    assert len(other[WEIGHTS_NAME]) == len(files[WEIGHTS_NAME])
    hub.publish("someone/swapped", {**files, WEIGHTS_NAME: other[WEIGHTS_NAME]})
    with pytest.raises(HubError, match=r"increment\.sha256"):
        hub_pull.pull("someone/swapped", registry=registry)
    hub.publish("someone/longer", {**files, WEIGHTS_NAME: files[WEIGHTS_NAME] + b" "})
    hub.requests.clear()
    with pytest.raises(HubError, match=r"increment\.bytes"):
        hub_pull.pull("someone/longer", registry=registry)
    assert not any(WEIGHTS_NAME in line for line in hub.requests)
    hub.publish("someone/broken", {**files, MANIFEST_NAME: b"{"})
    with pytest.raises(ManifestError):
        hub_pull.pull("someone/broken", registry=registry)
    hub.publish("someone/alone", {WEIGHTS_NAME: files[WEIGHTS_NAME][:-1] + b"?"})
    with pytest.raises(AdapterFileError):
        hub_pull.pull("someone/alone", registry=registry)
    hub.publish("someone/huge", {**files, MANIFEST_NAME: b" " * (MAX_BYTES + 1)})
    with pytest.raises(HubError, match="more than the"):
        hub_pull.pull("someone/huge", registry=registry)
    assert registry.entries() == ()


def test_a_killed_pull_goes_on_where_it_was(hub: LoopbackHub, registry: Registry, tmp_path: Path) -> None:
    body = r"GET /storage/" if hub.mode == "lfs" else rf"GET /{REPO}/resolve/\w+/{WEIGHTS_NAME}"
    hub.fail(body, seconds_per_kb=0.05)
    command = [sys.executable, "-m", "spm_hub.cli", "pull", REPO, "--registry", str(registry.root)]
    registry.root.mkdir()
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **hub.environment(tmp_path)})
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size >= 2048 for path in tmp_path.rglob("*.incomplete")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert registry.entries() == ()
    (left,) = tmp_path.rglob("*.incomplete")
    had = left.stat().st_size
    hub.requests.clear()
    hub_pull.pull(REPO, registry=registry)
    assert hub.ranges == [f"bytes={had}-"] * len(hub.ranges)
    assert hub.ranges
    assert registry.get("snoopy").load().name == "snoopy"


def test_the_lock_file_is_json_for_people(hub: LoopbackHub, registry: Registry) -> None:
    hub_pull.pull(REPO, registry=registry)
    text = (registry.root / lockfile.LOCK_NAME).read_text()
    sha256 = registry.get("snoopy").read_manifest().increment.sha256
    pin = {"repo": REPO, "commit": COMMIT, "revision": None, "sha256": sha256}
    assert json.loads(text) == {"schema_version": 1, "adapters": {"snoopy": pin}}
    (registry.root / lockfile.LOCK_NAME).write_text(text.replace(COMMIT, "main"))
    with pytest.raises(SpmHubError, match=r"adapters\.snoopy\.commit"):
        lockfile.read(registry.root)


@pytest.mark.parametrize("fault", [{"short_by": 40}, {"status": 200}], ids=["cut short", "somebody else's"])
@pytest.mark.parametrize("times", [1, None])
def test_an_answer_that_is_no_answer(
    fault: dict[str, Any], times: int | None, hub: LoopbackHub, registry: Registry
) -> None:
    """JSON without its end, or of something between us and the Hub: asked again, and then a sentence."""
    hub.fail("GET /api/models/", times=times, **fault)
    if times is None:
        with pytest.raises(NetworkError, match="its answer is not what the Hub writes"):
            hub_pull.pull(REPO, registry=registry)
        assert registry.entries() == ()
        hub.mend()
    assert hub_pull.pull(REPO, registry=registry).entry.load().name == "snoopy"
