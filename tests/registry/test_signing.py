"""Signatures: made by the real model-signing with a real key, and any change afterwards is named."""

import sys
from pathlib import Path
from typing import Any

import pytest
from test_registry import named

import spm_hub
from spm_hub.adapters.manifest import Manifest
from spm_hub.errors import NotFoundError, SignatureError, UsageError
from spm_hub.registry import signing
from spm_hub.registry.archive import export, import_
from spm_hub.registry.entry import MANIFEST_NAME, WEIGHTS_NAME, EraserEntry
from spm_hub.registry.registry import Registry
from spm_hub.registry.verification import verify

pytest.importorskip("model_signing.signing", reason="the extra sign is not installed")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A private and a public key, as openssl makes them."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = tmp_path_factory.mktemp("keys")
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / "key.pem", folder / "key.pub"
    no_password = serialization.NoEncryption()
    pem = serialization.Encoding.PEM
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.TraditionalOpenSSL, no_password))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def registry(tmp_path: Path, keys: tuple[Path, Path]) -> Registry:
    kept = Registry(tmp_path / "registry")
    kept.add(named("snoopy"))
    kept.sign("snoopy", keys[0])
    return kept


def check_of(entry: EraserEntry, subject: str, key: Path | None = None) -> tuple[str, str]:
    found = next(check for check in verify(entry, key) if check.subject == subject)
    return found.state, found.detail


def test_a_signed_eraser_is_used_and_one_that_is_not_signed_is_not(registry: Registry, keys: tuple[Path, Path]) -> None:
    assert registry.get("snoopy").load(signed_by=keys[1]).name == "snoopy"
    registry.add(named("mickey"))
    assert registry.get("mickey").load().name == "mickey"
    with pytest.raises(SignatureError, match="is not signed"):
        registry.get("mickey").load(signed_by=keys[1])
    assert check_of(registry.get("snoopy"), "signature", keys[1])[0] == "ok"
    assert check_of(registry.get("snoopy"), "signature")[0] == "not checked"
    assert check_of(registry.get("mickey"), "signature", keys[1])[0] == "failed"


def test_the_environment_requires_it_of_everything(
    registry: Registry, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.add(named("mickey"))
    monkeypatch.setenv(signing.KEY_VARIABLE, str(keys[1]))
    assert spm_hub.load("snoopy", registry=registry.root).name == "snoopy"
    for lazy in (False, True):
        with pytest.raises(SignatureError, match="is not signed"):
            spm_hub.load("mickey", registry=registry.root, lazy=lazy)


def test_an_altered_file_is_named(registry: Registry, keys: tuple[Path, Path]) -> None:
    entry = registry.get("snoopy")
    assert entry.manifest_path is not None
    whole, manifest = entry.adapter_path.read_bytes(), entry.manifest_path.read_text()
    # An enemy who can write both files makes the hashes right again; what he cannot make is the signature.
    other = Registry(registry.root.parent / "other")
    other.add(named("snoopy", seed=1))
    for folder in ("adapters", "manifests"):
        for path in (other.root / folder).iterdir():
            (registry.root / folder / path.name).write_bytes(path.read_bytes())
    assert registry.get("snoopy").load().name == "snoopy"
    with pytest.raises(SignatureError) as caught:
        registry.get("snoopy").load(signed_by=keys[1])
    assert str(entry.adapter_path) in str(caught.value)
    entry.adapter_path.write_bytes(whole)
    entry.manifest_path.write_text(manifest.replace('"strength": 1.0', '"strength": 0.0'))
    with pytest.raises(SignatureError) as caught:
        registry.get("snoopy").load(signed_by=keys[1])
    assert str(entry.manifest_path) in str(caught.value)
    assert str(entry.adapter_path) not in str(caught.value)
    assert check_of(entry, "manifest inside the file") == (
        "failed",
        "gate: [{'kind': 'calibrated', 'protected': [], 'rows': 'both', 'strength': 1.0}] inside the file, "
        "[{'kind': 'calibrated', 'protected': [], 'rows': 'both', 'strength': 0.0}] outside it",
    )
    entry.manifest_path.write_text(manifest)
    assert registry.get("snoopy").load(signed_by=keys[1]).name == "snoopy"


def test_a_manifest_replaced_while_it_is_checked(
    registry: Registry, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = registry.get("snoopy").manifest_path
    assert path is not None
    honest, check = path.read_text(), signing.check

    def replaced(*given: Any) -> Manifest:
        path.write_text(honest)
        signed = check(*given)
        path.write_text(honest.replace('"author": ""', '"author": "somebody"'))
        return signed

    monkeypatch.setattr(signing, "check", replaced)
    for lazy in (False, True):
        with pytest.raises(SignatureError, match="was replaced while it was checked"):
            registry.get("snoopy").load(signed_by=keys[1], lazy=lazy)


def test_the_first_signature_is_made_where_one_is_required(
    registry: Registry, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.add(named("mickey"))
    monkeypatch.setenv(signing.KEY_VARIABLE, str(keys[1]))
    registry.sign("mickey", keys[0])
    assert registry.get("mickey").load().name == "mickey"


def test_another_key_and_damaged_signatures(registry: Registry, keys: tuple[Path, Path], tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    stranger = tmp_path / "stranger.pub"
    public = ec.generate_private_key(ec.SECP256R1()).public_key()
    stranger.write_bytes(
        public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    with pytest.raises(SignatureError, match="was not made with the private key of"):
        registry.get("snoopy").load(signed_by=stranger)
    signature = registry.get("snoopy").signature_path
    assert signature is not None
    whole = signature.read_bytes()
    for data in (b"", b"{}", b"[" * 100_000, whole[: len(whole) // 2], whole.replace(b"payload", b"qayload"), b"\xff"):
        signature.write_bytes(data)
        with pytest.raises(SignatureError):
            registry.get("snoopy").load(signed_by=keys[1])
    signature.write_bytes(bytes(2**21))
    with pytest.raises(SignatureError, match="limit of 1048576 bytes"):
        registry.get("snoopy").load(signed_by=keys[1])


def test_keys_that_are_none(registry: Registry, keys: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such public key") as caught:
        registry.get("snoopy").load(signed_by=tmp_path / "none.pub")
    assert "openssl" in str(caught.value)
    with pytest.raises(UsageError, match="not a public elliptic-curve key"):
        registry.get("snoopy").load(signed_by=keys[0])
    with pytest.raises(UsageError, match="not a private elliptic-curve key"):
        registry.sign("snoopy", keys[1])


def test_a_signature_goes_where_its_eraser_goes(registry: Registry, keys: tuple[Path, Path], tmp_path: Path) -> None:
    export(registry.entries(), tmp_path / "carried.tar")
    elsewhere = Registry(tmp_path / "elsewhere")
    import_(tmp_path / "carried.tar", elsewhere)
    assert elsewhere.get("snoopy").load(signed_by=keys[1]).name == "snoopy"
    # As a repository of the Hub, the same signature holds for the same eraser.
    hub = tmp_path / "hub"
    hub.mkdir()
    source = registry.get("snoopy")
    assert source.manifest_path is not None
    assert source.signature_path is not None
    info = source.read_manifest().increment.model_copy(update={"file": WEIGHTS_NAME})
    (hub / MANIFEST_NAME).write_text(source.read_manifest().model_copy(update={"increment": info}).to_json())
    (hub / WEIGHTS_NAME).write_bytes(source.adapter_path.read_bytes())
    (hub / signing.SIGNATURE_NAME).write_bytes(source.signature_path.read_bytes())
    entry = EraserEntry("someone/snoopy", hub / WEIGHTS_NAME, hub / MANIFEST_NAME)
    assert entry.load(signed_by=keys[1]).name == "snoopy"
    third = Registry(tmp_path / "third")
    third.install(entry)
    assert third.get("snoopy").load(signed_by=keys[1]).name == "snoopy"
    third.add(named("snoopy", seed=2), replace=True)
    assert third.get("snoopy").signature_path is None, "a signature does not outlive what it was for"


def test_without_the_extra_the_command_that_installs_it_is_named(
    registry: Registry, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("model_signing.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(UsageError) as refused:
        registry.get("snoopy").load(signed_by=keys[1])
    assert 'pip install "spm-hub[sign]"' in refused.value.mend
