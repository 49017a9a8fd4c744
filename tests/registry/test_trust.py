"""Claims in foreign files decide nothing: neither origin, nor pins, nor gates, nor paths."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from loopback import LoopbackHub
from test_adapter import saved, snoopy  # noqa: F401 - a fixture
from test_pull import COMMIT, REPO, eraser, hub, registry, repository  # noqa: F401 - fixtures
from test_registry import named
from test_storage import files_of

from spm_hub.adapters.adapter import Adapter, load_file
from spm_hub.adapters.formats import spm
from spm_hub.adapters.manifest import Concept, GateDefaults, Manifest, Origin
from spm_hub.errors import AdapterFileError, HubError, ManifestError, RegistryError, SpmHubError
from spm_hub.hub import download as fetching
from spm_hub.hub import pull as hub_pull
from spm_hub.hub.resolve import resolve
from spm_hub.io.safetensors_file import MANIFEST_KEY, encode
from spm_hub.registry import lockfile, signing, storage
from spm_hub.registry.archive import export, import_
from spm_hub.registry.entry import MANIFEST_NAME, WEIGHTS_NAME, EraserEntry, entry_of
from spm_hub.registry.registry import Registry

ORIGIN = Origin(repo=REPO, commit=COMMIT)


def claiming(adapter: Adapter) -> Adapter:
    """The adapter, with a manifest that says where it was pulled from."""
    return Adapter(adapter.manifest.model_copy(update={"origin": ORIGIN}), adapter.increments)


# Where a file is from.


def test_a_file_does_not_know_where_it_was_pulled_from(tmp_path: Path) -> None:
    evil = claiming(snoopy())
    with open(tmp_path / "evil.safetensors", "wb") as file:
        encode(spm.to_tensors(evil.increments), {MANIFEST_KEY: evil.manifest.to_json()}).write_to(file)
    for lazy in (False, True):
        assert load_file(tmp_path / "evil.safetensors", lazy=lazy).manifest.origin is None
    assert entry_of(tmp_path / "evil.safetensors").read_manifest().origin is None


def test_what_is_made_here_replaces_nothing_that_was_pulled(hub: LoopbackHub, registry: Registry) -> None:  # noqa: F811
    hub_pull.pull(REPO, registry=registry)
    before, pins = files_of(registry.root), lockfile.read(registry.root)
    with pytest.raises(RegistryError, match="already has an eraser named 'snoopy'"):
        registry.add(claiming(eraser(seed=5)))
    assert (files_of(registry.root), lockfile.read(registry.root)) == (before, pins)
    registry.add(claiming(eraser(seed=5)), replace=True)
    assert lockfile.read(registry.root) == {}
    assert registry.get("snoopy").read_manifest().origin is None


@pytest.mark.parametrize("to", ["carried", "carried.tar"])
def test_what_is_carried_about_only_claims_where_it_was_pulled_from(to: str, tmp_path: Path) -> None:
    source = EraserEntry("x", tmp_path / WEIGHTS_NAME, tmp_path / MANIFEST_NAME)
    manifest = claiming(named("snoopy")).save(source.adapter_path, source.manifest_path)
    pulled = Registry(tmp_path / "pulled").install(source, manifest)
    assert pulled.pin == lockfile.pin_of(manifest)
    assert pulled.describe_source() == f"{REPO}@{COMMIT[:12]}, kept in {pulled.adapter_path}"
    export([pulled], tmp_path / to)
    there = Registry(tmp_path / "there")
    import_(tmp_path / to, there)
    (carried,) = there.entries()
    assert carried.read_manifest().origin == ORIGIN
    assert (carried.pin, lockfile.read(there.root)) == (None, {})
    assert "as its manifest claims" in carried.describe_source()
    with pytest.raises(SpmHubError, match="the Hub cannot be reached"):
        resolve(REPO, there.root)


# Pins.


@pytest.mark.parametrize("replace", [False, True])
def test_a_damaged_copy_is_pulled_again(replace: bool, hub: LoopbackHub, registry: Registry) -> None:  # noqa: F811
    file = hub_pull.pull(REPO, registry=registry).entry.adapter_path
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"?")
    assert hub_pull.pull(REPO, registry=registry, replace=replace).state == "updated"
    assert file.read_bytes() == whole


def test_a_lock_file_that_version_control_brought(
    hub: LoopbackHub,  # noqa: F811
    registry: Registry,  # noqa: F811
    tmp_path: Path,
) -> None:
    hub_pull.pull(REPO, registry=registry)
    newer = hub.publish(REPO, repository(tmp_path / "new", eraser(seed=7)))
    elsewhere = Registry(tmp_path / "elsewhere")
    hub_pull.pull(REPO, registry=elsewhere)
    shutil.copyfile(elsewhere.root / lockfile.LOCK_NAME, registry.root / lockfile.LOCK_NAME)
    (age,) = hub_pull.ages(registry)
    assert (age.state, "spmhub pull" in str(age.remark)) == ("unknown", True)
    assert not resolve(REPO, registry.root).adapter_path.is_relative_to(registry.root)
    assert [(one.state, one.origin.commit) for one in hub_pull.restore(registry)] == [("updated", newer)]
    assert files_of(registry.root) == files_of(elsewhere.root)
    assert list(hub_pull.restore(registry)) == []


def test_a_newly_signed_copy_replaces_an_unsigned_one_only_by_force(tmp_path: Path) -> None:
    kept, there = Registry(tmp_path / "kept"), Registry(tmp_path / "there")
    kept.add(named("snoopy"))
    export(kept.entries(), tmp_path / "bare.tar")
    import_(tmp_path / "bare.tar", there)
    signature = storage.part_path(kept.root, storage.SIGNATURES, "snoopy")
    signature.parent.mkdir()
    signature.write_bytes(b"sigstore")
    export(kept.entries(), tmp_path / "signed.tar")
    with pytest.raises(RegistryError, match="already has an eraser"):
        import_(tmp_path / "signed.tar", there)
    assert [one.state for one in import_(tmp_path / "signed.tar", there, replace=True)] == ["replaced"]
    assert files_of(there.root) == files_of(kept.root)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda text: text.replace('"snoopy"', '"../../snoopy"'), r"adapters\.\.\./\.\./snoopy"),
        (lambda text: text.replace('"repo"', f'"commit": "{"d" * 40}", "repo"'), "key 'commit' appears twice"),
    ],
)
def test_a_lock_file_of_no_name_or_of_one_twice(change: Callable[[str], str], complaint: str, tmp_path: Path) -> None:
    lockfile.record(tmp_path, "snoopy", lockfile.Pin(repo=REPO, commit=COMMIT, sha256="0" * 64))
    path = tmp_path / lockfile.LOCK_NAME
    path.write_text(change(path.read_text()))
    with pytest.raises(RegistryError, match=complaint):
        lockfile.read(tmp_path)


# Which one a name means.


def test_a_repository_of_another_name_than_its_eraser_is_pulled_once(
    hub: LoopbackHub,  # noqa: F811
    registry: Registry,  # noqa: F811
    tmp_path: Path,
) -> None:
    def of_nudity(seed: int) -> Adapter:
        made = eraser(seed=seed, name="nude")
        return Adapter(made.manifest.model_copy(update={"concept": Concept(target="nudity")}), made.increments)

    registry.root.mkdir()
    hub.publish("spm-hub/nudity", repository(tmp_path / "one", of_nudity(0)))
    first = resolve("nudity", registry.root, pull=True)
    assert first.name == "nude"
    hub.publish("spm-hub/nudity", repository(tmp_path / "two", of_nudity(1)))
    hub.requests.clear()
    before = files_of(registry.root)
    assert resolve("nudity", registry.root).adapter_path == first.adapter_path
    assert (hub.requests, files_of(registry.root)) == ([], before)


def test_a_name_goes_before_what_another_registry_calls_its_concept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    first, mine = Registry(tmp_path / "first"), Registry(tmp_path)
    first.add(named("useless", concept="Nudity", aliases=("nudity",)))
    mine.add(named("nudity"))
    monkeypatch.setattr("spm_hub.registry.registry._CLONE", tmp_path)
    assert resolve("nudity", first.root).name == "nudity"
    assert resolve("Nudity", first.root).name == "nudity"


# How it is gated.


def test_a_manifest_file_may_not_contradict_the_manifest_inside_the_adapter(saved: tuple[Path, Path]) -> None:  # noqa: F811
    manifest = Manifest.read(saved[1])
    for change in (
        {"gate": GateDefaults(strength=0.0)},
        {"concept": manifest.concept.model_copy(update={"target": "nothing"})},
        {"base": manifest.base.model_copy(update={"family": "sdxl"})},
    ):
        saved[1].write_text(manifest.model_copy(update=change).to_json())
        for lazy in (False, True):
            with pytest.raises(ManifestError, match=f"contradict each other in {next(iter(change))}"):
                load_file(*saved, lazy=lazy)
    # What people write by hand, and the name of a copy.
    saved[1].write_text(manifest.model_copy(update={"author": "me", "licence": "mit", "name": "beagle"}).to_json())
    assert load_file(*saved).manifest.author == "me"


def test_a_manifest_without_a_hash_is_refused_before_the_file_is_needed(saved: tuple[Path, Path]) -> None:  # noqa: F811
    saved[1].write_text(snoopy().manifest.to_json())
    with pytest.raises(AdapterFileError, match=r"increment\.sha256 is None"):
        load_file(*saved, lazy=True)


# What comes from the Hub.


def test_no_file_is_larger_than_any_adapter(
    hub: LoopbackHub,  # noqa: F811
    registry: Registry,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(storage, "MAX_BYTES", 1000)
    hub.publish("someone/alone", {WEIGHTS_NAME: hub.content(REPO)[WEIGHTS_NAME]})
    for repo in (REPO, "someone/alone"):
        with pytest.raises(HubError, match="more than the limit of 1000"):
            hub_pull.pull(repo, registry=registry)
    assert not [line for line in hub.requests if line.startswith("GET") and WEIGHTS_NAME in line]
    with pytest.raises(HubError, match="is not a valid file name"):
        fetching.fetch(REPO, "../../x.safetensors", COMMIT)


def test_no_signature_is_lost_when_a_pull_breaks_off(hub: LoopbackHub, registry: Registry) -> None:  # noqa: F811
    commit = hub.publish("someone/signed", {**hub.content(REPO), signing.SIGNATURE_NAME: b"sigstore"})
    hub.fail(signing.SIGNATURE_NAME, status=403, times=None)
    with pytest.raises(HubError):
        hub_pull.pull("someone/signed", commit, registry=registry)
    hub.mend()
    pulled = hub_pull.pull("someone/signed", commit, registry=registry)
    assert pulled.entry.signature_path is not None


# Where files go.


@pytest.fixture
def strange(tmp_path: Path) -> Registry:
    """A stranger's registry whose adapters lie in a folder of the user's, and whose journal wants one gone."""
    owned = Registry(tmp_path / "owned")
    owned.add(named("snoopy"))
    made = Registry(tmp_path / "strange")
    (made.root / storage.STATE).mkdir(parents=True)
    (made.root / storage.ADAPTERS).symlink_to(owned.root / storage.ADAPTERS)
    (made.root / storage.MANIFESTS).symlink_to(owned.root / storage.MANIFESTS)
    (made.root / storage.STATE / "journal.json").write_text(json.dumps({"snoopy": {}}))
    return made


def test_a_link_in_a_strangers_registry_leads_to_no_deletion(strange: Registry, tmp_path: Path) -> None:
    orphan = tmp_path / "owned" / storage.MANIFESTS / "gone.json"
    orphan.write_text(named("gone").manifest.to_json())
    before = files_of(tmp_path / "owned")
    for lazy in (False, True):
        assert strange.get("snoopy").load(lazy=lazy).name == "snoopy"
    assert strange.gc() == ()
    assert files_of(tmp_path / "owned") == before


def test_a_lock_and_a_journal_elsewhere_are_not_written(tmp_path: Path) -> None:
    elsewhere, made = tmp_path / "elsewhere", Registry(tmp_path / "strange")
    made.add(named("snoopy"))
    shutil.rmtree(made.root / storage.STATE)
    elsewhere.mkdir()
    for name in ("journal.json", "lock"):
        (elsewhere / name).write_text("precious")
    (made.root / storage.STATE).symlink_to(elsewhere)
    for lazy in (False, True):
        assert made.get("snoopy").load(lazy=lazy).name == "snoopy"
    with pytest.raises(RegistryError, match="is a symbolic link"):
        made.add(named("mickey"))
    assert {path.read_text() for path in elsewhere.iterdir()} == {"precious"}
    assert len(list(elsewhere.iterdir())) == 2
